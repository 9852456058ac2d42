"""Split captions into words, as NLTK 3 does, in both readings."""

import re
from functools import lru_cache

from inputs.captions import ASCII_SPACE
from runtime.errors import InputError

SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")
READINGS = ("text", "released")
# Increase with any change to what `tokenize` returns, so that cached word ids are made again.
TOKENIZER_VERSION = 1
MAX_CAPTION = 20_000  # characters; longer means a broken file, and the GRU would run out of memory

# Most captions: plain words, commas and a full stop at the end. NLTK's dozens of passes then come
# to splitting at spaces, but for the contractions that it knows without a mark. Ten times faster;
# the tests hold it against NLTK.
_PLAIN = re.compile(r"[a-z0-9]+(?:(?: ?,)? [a-z0-9]+)*(?: ?\.)?")
_CONTRACTED = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")


@lru_cache(maxsize=1)
def _tokenizers():
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    from punkt import load_model

    model, parameters = load_model("english"), PunktParameters()
    parameters.abbrev_types.update(model.abbrev_types)
    parameters.collocations.update(model.collocations)
    parameters.sent_starters.update(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters), NLTKWordTokenizer()


def nltk_words(text):
    """The words that NLTK's `word_tokenize` returns."""
    sentences, words = _tokenizers()
    return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]


def tokenize(caption, reading="text"):
    """A caption's words, lower-cased, without <start> and <end>.

    reading: "text" takes the caption as it is. "released" reads it as the released precomputed
    loader does on Python 3, through the `str` of its bytes: `A man.` becomes `b'a man . '`.
    Checkpoints published with that code were trained on this.
    """
    caption = caption.strip(ASCII_SPACE)
    if len(caption) > MAX_CAPTION:
        raise InputError(
            f"a caption has {len(caption)} characters (it begins {caption[:40]!r}), more than "
            f"{MAX_CAPTION}: check the caption file"
        )
    if reading == "released":
        caption = str(caption.encode("utf-8", "surrogatepass"))
    text = caption.lower()
    if _PLAIN.fullmatch(text) and not _CONTRACTED.search(text):
        return text.replace(",", " ,").replace(".", " .").split()
    return nltk_words(text)
