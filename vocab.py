"""Words: tokenizing captions, and the vocabulary that numbers the words.

As a script it builds a vocabulary file from a data set's captions (of features: those of train and dev):

    python3 vocab.py --data_path data --data_name f30k_precomp --vocab_path ./vocab/

The words are those of NLTK's `word_tokenize` (Punkt sentences, then the Treebank-style
word tokenizer), without its download: the English Punkt model comes from a package.
"""

import json
import os
import pickle
import re
from collections import Counter
from functools import lru_cache

from caption_files import (
    ASCII_SPACE,
    COCO_ANNOTATIONS,
    flickr_json_name,
    is_precomputed,
    read_captions,
    read_coco_captions,
    read_flickr_json,
    read_json,
)
from errors import ArgumentParser, InputError, check_regular, number, replacing, run_script

SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")
MASK = "<mask>"  # stands for words that size augmentation hides; the last of a vocabulary that has it
READINGS = ("text", "released")
TOKENIZER_VERSION = 1  # goes up with any change of `tokenize`'s words: cached ones are then made again
MAX_CAPTION = 20_000  # characters; more is a broken file, and would take the memory of the GRU


# Words ---------------------------------------------------------------------------------------

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
    """What NLTK's `word_tokenize` gives."""
    sentences, words = _tokenizers()
    return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]


# Most captions: plain words, commas and a full stop at the end. NLTK's dozens of passes then come to splitting at
# spaces, but for the contractions that it knows without a mark. Ten times faster; the tests hold it against NLTK.
_PLAIN = re.compile(r"[a-z0-9]+(?:(?: ?,)? [a-z0-9]+)*(?: ?\.)?")
_CONTRACTED = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")


def tokenize(caption, reading="text"):
    """A caption's words, lower-cased, without <start> and <end>.

    reading: "text" takes the caption as it stands. "released" reads it as the released
    precomputed loader does on Python 3, through the `str` of its bytes: `A man.` becomes
    `b'a man . '`, which checkpoints published with that code were trained on.
    """
    caption = caption.strip(ASCII_SPACE)
    if len(caption) > MAX_CAPTION:
        raise InputError(f"a caption has {len(caption)} characters (it begins {caption[:40]!r}): captions may have "
                         f"{MAX_CAPTION}; check the caption file")
    if reading == "released":
        caption = str(caption.encode("utf-8", "surrogatepass"))
    text = caption.lower()
    if _PLAIN.fullmatch(text) and not _CONTRACTED.search(text):
        return text.replace(",", " ,").replace(".", " .").split()
    return nltk_words(text)


from_txt = read_captions  # the family's name for it


# Vocabulary -------------------------------------------------------------------------------------

class Vocabulary:
    """Numbers words in the order in which they are added; `vocab(word)` is <unk>'s number for a stranger."""

    def __init__(self):
        self.word2idx, self.idx2word, self.idx = {}, {}, 0

    def add_word(self, word):
        """Give the next number to `word`, unless it has one."""
        if word not in self.word2idx:
            self.word2idx[word] = self.idx
            self.idx2word[self.idx] = word
            self.idx += 1

    def __call__(self, word):
        return self.word2idx.get(word, self.word2idx["<unk>"])

    def __len__(self):
        return len(self.word2idx)

    @property
    def words(self):
        """All words, in the order of their numbers."""
        return [self.idx2word[index] for index in range(len(self.idx2word))]


def vocabulary_of(words, source="the word list"):
    """A Vocabulary of the given words in their order; raises InputError unless it can number captions."""
    if list(words[:len(SPECIAL_WORDS)]) != list(SPECIAL_WORDS):
        raise InputError(f"{source} does not begin with the special words {' '.join(SPECIAL_WORDS)} "
                         f"(found {' '.join(map(repr, words[:4])) or 'nothing'}): build it with vocab.py")
    vocabulary = Vocabulary()
    for word in words:
        vocabulary.add_word(word)
    if len(vocabulary) != len(words):
        raise InputError(f"{source} holds {len(words) - len(vocabulary)} words twice: build it with vocab.py")
    return vocabulary


def _caption_sources(data_name):
    """The caption files that a data set's vocabulary is built from: its training and dev captions."""
    if is_precomputed(data_name):
        return ["train_caps.txt", "dev_caps.txt"]
    if data_name == "coco":
        return list(COCO_ANNOTATIONS.values())
    return [flickr_json_name(data_name)]


def build_vocab(data_path, data_name, jsons=None, threshold=4):
    """A Vocabulary of the special words and every word counted at least `threshold` times.

    Words stand in order of first appearance. jsons: {data_name: [file, ...]} overrides the
    caption files, which are named relative to `<data_path>/<data_name>`.
    """
    counts = Counter()
    for name in (jsons or {}).get(data_name) or _caption_sources(data_name):
        path = os.path.join(data_path, data_name, name)
        if path.endswith(".txt"):
            captions = read_captions(path)
        elif data_name == "coco":
            captions = read_coco_captions(path)
        else:
            captions = [sentence["raw"] for image in read_flickr_json(path) for sentence in image["sentences"]]
        for caption in captions:
            counts.update(tokenize(caption))
    vocabulary = vocabulary_of(list(SPECIAL_WORDS))
    for word, count in counts.items():
        if count >= threshold:
            vocabulary.add_word(word)
    return vocabulary


# Files ------------------------------------------------------------------------------------------

class _VocabularyUnpickler(pickle._Unpickler):
    """Admits the vocabulary class and nothing else: a pickle from a stranger can never run code.

    pickle.Unpickler, written in C, would take gigabytes for one damaged number of its memo.
    """

    class Record:
        """Takes the pickled attributes; has no behaviour of its own."""

    def find_class(self, module, name):
        if (module, name) in {("vocab", "Vocabulary"), ("__main__", "Vocabulary")}:
            return self.Record
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no vocabulary needs")


def _load_pickle(path):
    check_regular(path)
    try:
        with open(path, "rb") as file:
            record = _VocabularyUnpickler(file).load()
        return vars(record) if isinstance(record, _VocabularyUnpickler.Record) else None
    except OSError as error:
        raise InputError(f"vocabulary {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # an unpickler may raise anything on a broken stream
        raise InputError(f"vocabulary {path} is not a vocabulary pickle ({error}): build one with vocab.py") from error


def _load_json(path):
    def each_key_once(pairs):
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InputError(f"vocabulary {path} has {twice[:40]!r} twice in one table: build one with vocab.py")
        return content
    return read_json(path, each_key_once)


def _agrees(idx2word, numbers):
    """Whether {index: word}, whose keys are text in JSON, is the reverse of {word: index}."""
    return isinstance(idx2word, dict) and len(idx2word) == len(numbers) and all(
        idx2word.get(index, idx2word.get(str(index))) == word for word, index in numbers.items())


def read_vocabulary(path):
    """The Vocabulary in a JSON file of SCAN's format or in the released code's pickle.

    Raises InputError if the file is broken, contradicts itself, runs code, or lacks the special words.
    """
    content = _load_pickle(path) if path.endswith(".pkl") else _load_json(path)
    numbers = content.get("word2idx") if isinstance(content, dict) else None
    if not isinstance(numbers, dict) or not all(isinstance(word, str) for word in numbers):
        raise InputError(f"vocabulary {path} has no 'word2idx': build one with vocab.py")
    if not all(type(index) is int for index in numbers.values()) or sorted(numbers.values()) != list(
            range(len(numbers))):
        raise InputError(f"vocabulary {path} does not number its {len(numbers)} words from 0 on: build one with "
                         "vocab.py")
    if content.get("idx2word") and not _agrees(content["idx2word"], numbers):
        raise InputError(f"vocabulary {path} contradicts itself, 'idx2word' is not the reverse of 'word2idx': build "
                         "one with vocab.py")
    return vocabulary_of(sorted(numbers, key=numbers.get), source=f"vocabulary {path}")


def vocabulary_path(vocab_path, data_name, suffix="json"):
    """Where a data set's vocabulary file stands."""
    return os.path.join(vocab_path, f"{data_name}_vocab.{suffix}")


def check_folder(vocab_path):
    """Raise InputError where a file stands in place of the vocabularies' folder."""
    if os.path.exists(vocab_path) and not os.path.isdir(vocab_path):
        raise InputError(f"--vocab_path {vocab_path} is not a folder: name the one that holds <data_name>_vocab.json")


def find_vocabulary(vocab_path, data_name):
    """The Vocabulary of a data set from its JSON or pickle file, or None where there is neither.

    Raises InputError if vocab_path is a file, or if both are there and differ, since either could be the one that
    was meant.
    """
    check_folder(vocab_path)
    paths = [vocabulary_path(vocab_path, data_name, suffix) for suffix in ("json", "pkl")]
    found = {path: read_vocabulary(path) for path in paths if os.path.exists(path)}
    if len(found) == 2 and len({tuple(vocabulary.words) for vocabulary in found.values()}) == 2:
        raise InputError(f"{' and '.join(found)} differ: remove the one that is not meant")
    return next(iter(found.values()), None)


def write_vocabulary(vocabulary, path):
    """Write SCAN's JSON (word2idx, idx2word, idx), or the released code's pickle where the path ends in .pkl."""
    if path.endswith(".pkl"):
        with replacing(path) as file:
            pickle.dump(vocabulary, file, protocol=2)
        return
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump({"word2idx": vocabulary.word2idx, "idx2word": vocabulary.idx2word, "idx": vocabulary.idx}, file)


# Script -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Build a vocabulary file from a data set's captions (of features: train's and dev's).")
    parser.add_argument("--data_path", default="data", help="folder that holds the data sets")
    parser.add_argument("--data_name", default="sample_precomp", help="data set: *_precomp, coco, f8k, f30k, ...")
    parser.add_argument("--vocab_path", default="./vocab/", help="folder for <data_name>_vocab.json")
    parser.add_argument("--threshold", default=4, type=number(int, 1),
                        help="smallest count of a word that gets a number")
    parser.add_argument("--pickle", action="store_true", help="also write the released code's <data_name>_vocab.pkl")
    return parser.parse_args(argv)


def main(argv=None):
    """Build and write the vocabulary."""
    options = parse_args(argv)
    check_folder(options.vocab_path)
    vocabulary = build_vocab(options.data_path, options.data_name, threshold=options.threshold)
    for suffix in ("json", "pkl") if options.pickle else ("json",):
        path = vocabulary_path(options.vocab_path, options.data_name, suffix)
        write_vocabulary(vocabulary, path)
        print(f"{path}: {len(vocabulary)} words")


if __name__ == "__main__":
    from vocab import main  # under its own name, so that the pickle names vocab.Vocabulary
    run_script(main)
