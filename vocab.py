"""The vocabulary that numbers words, and the script that builds one.

    python3 vocab.py --data_path data --data_name f30k_precomp --vocab_path ./vocab/

It counts the words of a data set's captions (for features, those of train and dev). Words are those
of NLTK's `word_tokenize` (Punkt sentences, then the Treebank-style word tokenizer), without its
download: the English Punkt model comes from a package.
"""

import json
import os
import pickle
from collections import Counter

from inputs.captions import (
    COCO_ANNOTATIONS,
    data_set_name,
    flickr_json_name,
    is_precomputed,
    read_captions,
    read_coco_captions,
    read_json,
    read_karpathy,
    refuse_features,
)
from inputs.tokenizer import SPECIAL_WORDS, tokenize
from runtime.errors import ArgumentParser, InputError, number, path_type, run_script
from runtime.file_kinds import HEAD, foreign_kind
from runtime.files import check_regular, replacing

# Stands for words that size augmentation hides; the last word of a vocabulary that has it.
MASK = "<mask>"
# Their names in VSE++ code.
from_txt, from_coco_json = read_captions, read_coco_captions


def from_flickr_json(path):
    """All captions of a Karpathy-layout JSON file, in its order."""
    return [caption for photo in read_karpathy(path) for caption in photo.captions]


# Vocabulary -------------------------------------------------------------------------------------


class Vocabulary:
    """Numbers words in the order in which they are added; unknown words have <unk>'s number."""

    def __init__(self):
        self.word2idx, self.idx2word, self.idx = {}, {}, 0

    def add_word(self, word):
        """Give `word` the next number, unless it has one."""
        if word not in self.word2idx:
            self.word2idx[word] = self.idx
            self.idx2word[self.idx] = word
            self.idx += 1

    def __call__(self, word):
        return self.word2idx[word if word in self.word2idx else "<unk>"]

    def __len__(self):
        return len(self.word2idx)

    @property
    def words(self):
        """All words, in the order of their numbers."""
        return sorted(self.word2idx, key=self.word2idx.get)  # JSON gives idx2word's keys as text


def vocabulary_of(words, source="the word list"):
    """The Vocabulary of a list of words, in their order.

    source: where they come from, for messages.
    Raises InputError unless it can number captions: the special words come first, at least one
    other follows, and none comes twice.
    """
    if list(words[: len(SPECIAL_WORDS)]) != list(SPECIAL_WORDS):
        raise InputError(
            f"{source} does not begin with the special words {' '.join(SPECIAL_WORDS)} "
            f"(found {' '.join(map(repr, words[:4])) or 'nothing'}): build it with vocab.py"
        )
    vocabulary = Vocabulary()
    for word in words:
        vocabulary.add_word(word)
    if len(vocabulary) != len(words):
        raise InputError(
            f"{source} holds {len(words) - len(vocabulary)} words twice: build it with vocab.py"
        )
    if set(words) <= {*SPECIAL_WORDS, MASK}:
        raise InputError(
            f"{source} holds no word but the special ones, so every caption would look alike: "
            "build it with vocab.py from captions that have spaces between words, with a lower "
            "--threshold if they are few"
        )
    return vocabulary


def _caption_sources(folder, data_name):
    """The caption files that a data set's vocabulary is built from: those of training and dev."""
    if is_precomputed(data_name):
        return ["train_caps.txt", "dev_caps.txt"]
    if os.path.isdir(folder):
        refuse_features(folder, data_name)
    if data_name == "coco":
        return list(COCO_ANNOTATIONS.values())
    return [flickr_json_name(data_name)]


def build_vocab(
    data_path, data_name, jsons=None, threshold=4, *, caption_file=None, caption_files=None
):
    """The Vocabulary of the special words and every word that occurs at least `threshold` times.

    Words are in the order of first appearance.

    jsons: {data_name: [file, ...]}, or the files alone, instead of the data set's own; names are
        relative to `<data_path>/<data_name>`
    caption_file, caption_files: SCAN code's names for `jsons`
    """
    counts = Counter()
    folder = os.path.join(data_path, data_name)
    files = jsons or caption_file or caption_files
    if isinstance(files, dict):
        files = files.get(data_name)
    files = [files] if isinstance(files, str) else files
    for name in files or _caption_sources(folder, data_name):
        path = os.path.join(folder, name)
        if path.endswith(".txt"):
            captions = read_captions(path)
        else:
            captions = (from_coco_json if data_name == "coco" else from_flickr_json)(path)
        for caption in captions:
            counts.update(tokenize(caption))
    return vocabulary_of(
        [*SPECIAL_WORDS, *(word for word, count in counts.items() if count >= threshold)],
        f"the vocabulary of {data_name}, of words that its captions have at least {threshold} "
        "times,",
    )


# Files ------------------------------------------------------------------------------------------


class _VocabularyUnpickler(pickle._Unpickler):
    """Admits a class named Vocabulary only, so a stranger's pickle cannot run code.

    The class may be of any module: none is imported, and `Record` takes its place. Based on the
    unpickler in Python: the one in C would allocate gigabytes for one damaged number.
    """

    class Record:
        """Takes the pickled attributes, and does nothing."""

    # What pickles of protocols 0 and 1 ask for besides the class.
    OLDER = {
        ("copy_reg", "_reconstructor"): lambda kind, base, state: kind(),
        ("copyreg", "_reconstructor"): lambda kind, base, state: kind(),
        ("__builtin__", "object"): object,
        ("builtins", "object"): object,
    }

    def find_class(self, module, name):
        if name == "Vocabulary":
            return self.Record
        if (module, name) in self.OLDER:
            return self.OLDER[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no vocabulary needs")


def _unpickled(file):
    """The record in a pickle. Python 2's plain strings are bytes: UTF-8, or else Latin-1."""
    try:
        return _VocabularyUnpickler(file, encoding="utf-8").load()
    except UnicodeDecodeError:
        file.seek(0)
        return _VocabularyUnpickler(file, encoding="latin-1").load()


def _load_pickle(path):
    check_regular(path)
    try:
        with open(path, "rb") as file:
            if kind := foreign_kind(file.read(HEAD)):
                raise InputError(
                    f"vocabulary {path} is {kind[0]}, not a vocabulary pickle: {kind[1]}"
                )
            file.seek(0)
            record = _unpickled(file)
        return vars(record) if isinstance(record, _VocabularyUnpickler.Record) else None
    except OSError as error:
        raise InputError(f"vocabulary {path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except Exception as error:  # a broken stream may raise anything
        raise InputError(
            f"vocabulary {path} is not a vocabulary pickle ({error}): build one with vocab.py"
        ) from error


def _load_json(path):
    def each_key_once(pairs):
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InputError(
                f"vocabulary {path} has {twice[:40]!r} twice in one table: build one with vocab.py"
            )
        return content

    return read_json(path, each_key_once)


def _agrees(idx2word, numbers):
    """Whether idx2word {index: word} is the reverse of numbers {word: index}.

    JSON turns the keys of idx2word into text.
    """
    return (
        isinstance(idx2word, dict)
        and len(idx2word) == len(numbers)
        and all(
            idx2word.get(index, idx2word.get(str(index))) == word for word, index in numbers.items()
        )
    )


def read_vocabulary(path):
    """The Vocabulary in a JSON file of SCAN's format, or in the released code's pickle.

    Raises InputError if the file is broken, contradicts itself, asks to run code, or lacks the
    special words.
    """
    path = os.fspath(path)
    content = _load_pickle(path) if path.endswith(".pkl") else _load_json(path)
    numbers = content.get("word2idx") if isinstance(content, dict) else None
    if not isinstance(numbers, dict) or not all(isinstance(word, str) for word in numbers):
        raise InputError(f"vocabulary {path} has no 'word2idx': build one with vocab.py")
    if not all(type(index) is int for index in numbers.values()) or sorted(
        numbers.values()
    ) != list(range(len(numbers))):
        raise InputError(
            f"vocabulary {path} does not number its {len(numbers)} words from 0 on: build one with "
            "vocab.py"
        )
    if content.get("idx2word") and not _agrees(content["idx2word"], numbers):
        raise InputError(
            f"vocabulary {path} contradicts itself, 'idx2word' is not the reverse of 'word2idx': "
            "build one with vocab.py"
        )
    return vocabulary_of(sorted(numbers, key=numbers.get), source=f"vocabulary {path}")


def vocabulary_path(vocab_path, data_name, suffix="json"):
    """The path of a data set's vocabulary file."""
    return os.path.join(vocab_path, f"{data_name}_vocab.{suffix}")


def check_folder(vocab_path):
    """Raise InputError if --vocab_path is a file."""
    if os.path.exists(vocab_path) and not os.path.isdir(vocab_path):
        raise InputError(
            f"--vocab_path {vocab_path} is not a folder: name the one that holds "
            "<data_name>_vocab.json"
        )


def find_vocabulary(vocab_path, data_name):
    """A data set's Vocabulary from its JSON or pickle file; None if there is neither.

    Raises InputError if vocab_path is a file, or if both are there and differ: either might be
    meant.
    """
    check_folder(vocab_path)
    paths = [vocabulary_path(vocab_path, data_name, suffix) for suffix in ("json", "pkl")]
    found = {path: read_vocabulary(path) for path in paths if os.path.exists(path)}
    if len(found) == 2 and len({tuple(vocabulary.words) for vocabulary in found.values()}) == 2:
        raise InputError(f"{' and '.join(found)} differ: remove the one that is not meant")
    return next(iter(found.values()), None)


def serialize_vocab(vocab, dest):
    """Write a Vocabulary to the file `dest` in SCAN's JSON: word2idx, idx2word and idx."""
    content = {name: getattr(vocab, name) for name in ("word2idx", "idx2word", "idx")}
    with replacing(os.fspath(dest), "w", encoding="utf-8") as file:
        json.dump(content, file)


deserialize_vocab = read_vocabulary  # its name in SCAN code


def write_vocabulary(vocabulary, path):
    """Write SCAN's JSON (see `serialize_vocab`); for a .pkl path the released code's pickle."""
    if not path.endswith(".pkl"):
        serialize_vocab(vocabulary, path)
        return
    with replacing(path) as file:
        pickle.dump(vocabulary, file, protocol=2)


# Script -----------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser(
        "Build a vocabulary file from a data set's captions (of features: train's and dev's)."
    )
    parser.add_argument(
        "--data_path", type=path_type, default="data", help="folder that holds the data sets"
    )
    parser.add_argument(
        "--data_name",
        default="sample_precomp",
        type=data_set_name,
        help="data set: *_precomp, coco, f8k, f30k, ...",
    )
    parser.add_argument(
        "--vocab_path", type=path_type, default="./vocab/", help="folder for <data_name>_vocab.json"
    )
    parser.add_argument(
        "--threshold",
        default=4,
        type=number(int, 1),
        help="how often a word must occur to get a number",
    )
    parser.add_argument(
        "--pickle", action="store_true", help="also write the released code's <data_name>_vocab.pkl"
    )
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
    from vocab import main  # not __main__'s, so that pickles refer to vocab.Vocabulary

    run_script(main, outlasts_reader=True)
