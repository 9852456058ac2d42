"""Pretrained word vectors, such as GloVe's, for the words of a vocabulary.

A text file has a word and its numbers on each line (a first line of two counts, as word2vec's and
fastText's have, is skipped). A .npy file (words, width) has its words in the .txt file of the same
name, one a line.
"""

import os

import numpy as np
import torch

from inputs.tokenizer import SPECIAL_WORDS
from runtime.errors import InputError
from runtime.files import check_regular

SIGNS = "-.'"  # left out of a word that is missing, as PCME (Chun et al., CVPR 2021) does


def read_word_vectors(path, words):
    """(Rows (n, width) float32, found (n,) bool) for n words; rows of missing words are 0.

    A missing word is looked up once more without `SIGNS`, and up to its first slash.
    Raises InputError if the file is not of a known form, or has none of the words.
    """
    plain = {word: _without_signs(word) for word in words if word not in SPECIAL_WORDS}
    wanted = {*plain, *plain.values()}
    known = (_of_npy if path.endswith(".npy") else _of_text)(path, wanted)
    if not known:
        raise InputError(f"--word_vectors {path} has none of the vocabulary's {len(words)} words")
    width = len(next(iter(known.values())))
    rows, found = torch.zeros(len(words), width), torch.zeros(len(words), dtype=torch.bool)
    for number, word in enumerate(words):
        vector = known.get(word, known.get(plain.get(word, word)))
        if vector is not None and word in plain:
            rows[number], found[number] = torch.from_numpy(vector), True
    if not rows.isfinite().all():
        bad = words[int((~rows.isfinite().all(1)).nonzero()[0])]
        raise InputError(f"--word_vectors {path} has NaN or infinity for the word {bad!r}")
    return rows, found


def _without_signs(word):
    return "".join(letter for letter in word if letter not in SIGNS).split("/")[0]


def _of_text(path, wanted):
    """{word: vector} of the wanted words in a text file."""
    check_regular(path)
    known, width = {}, None
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                parts = line.rstrip().split(" ")
                if number == 1 and len(parts) == 2:
                    continue  # word2vec's counts
                width = width or len(parts) - 1
                if len(parts) <= width:
                    raise InputError(
                        f"--word_vectors {path}, line {number}: {len(parts) - 1} numbers after the "
                        f"word, where the first line has {width}: give a whole file"
                    )
                word = " ".join(parts[:-width])  # GloVe's largest file has words with blanks
                if word in wanted and word not in known:
                    known[word] = np.array(parts[-width:], np.float32)
    except OSError as error:
        raise InputError(f"--word_vectors {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise InputError(
            f"--word_vectors {path} is not a text file of a word and its numbers a line ({error}): "
            "give GloVe's .txt, or a .npy with its words in a .txt beside it"
        ) from error
    return known


def _of_npy(path, wanted):
    """{word: vector} of the wanted words in a .npy file and the .txt file of the same name."""
    names = f"{os.path.splitext(path)[0]}.txt"
    for one in (path, names):
        check_regular(one)
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        with open(names, encoding="utf-8") as file:
            words = file.read().splitlines()
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--word_vectors {path} needs {names} beside it, with a word a line, and both must be "
            f"whole ({reason})"
        ) from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != len(words):
        raise InputError(
            f"--word_vectors {path} is {vectors.dtype} of shape {vectors.shape}, and {names} has "
            f"{len(words)} words: there must be a row of numbers for each word"
        )
    return {
        word: np.array(vectors[number], np.float32)
        for number, word in reversed([*enumerate(words)])
        if word in wanted
    }
