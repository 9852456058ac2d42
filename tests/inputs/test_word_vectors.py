"""Pretrained word vectors: read, matched with a vocabulary, and put into the text encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from inputs.tokenizer import SPECIAL_WORDS
from inputs.word_vectors import read_word_vectors
from runtime.errors import InputError
from tests.helpers.made import TINY, load, write_precomp

WORDS = [*SPECIAL_WORDS, "dog", "t-shirt", "and/or", "purple", "cat"]

VECTORS = {
    "dog": [1.0, 2.0, 3.0],
    "tshirt": [4.0, 5.0, 6.0],
    "and": [7.0, 8.0, 9.0],
    "cat": [0.5, 0.25, 0.125],
    "<unk>": [9.0, 9.0, 9.0],
    "an other": [1.0, 1.0, 1.0],
}

EXPECTED = {4: VECTORS["dog"], 5: VECTORS["tshirt"], 6: VECTORS["and"], 8: VECTORS["cat"]}


def write_text(path="vectors.txt", head=""):
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in VECTORS.items()]
    Path(path).write_text(head + "".join(lines), encoding="utf-8")
    return path


def write_array(path="vectors.npy"):
    np.save(path, np.array([*VECTORS.values()], np.float16))
    Path("vectors.txt").write_text("".join(f"{word}\n" for word in VECTORS), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "write", [write_text, write_array, lambda: write_text(head="6 3\n")], ids=["text", "npy", "w2v"]
)
def test_words_get_their_vectors_and_missing_ones_none(write):
    """A word that is missing is looked up without signs; special words stay random."""
    rows, found = read_word_vectors(write(), WORDS)
    assert found.nonzero().flatten().tolist() == [*EXPECTED]
    for number in range(len(WORDS)):
        assert rows[number].tolist() == EXPECTED.get(number, [0.0] * 3)


@pytest.mark.parametrize("encoder", ["gru", "transformer"])
def test_training_begins_with_them(encoder, capsys):
    write_precomp(Path("data/tiny_precomp"))
    Path("vectors.txt").write_text("dog 1 2 3 4 5 6\nred 6 5 4 3 2 1\nnowhere 1 1 1 1 1 1\n")
    flags = [*TINY, "--text_encoder", encoder, "--num_epochs", "1", "--learning_rate", "1e-30"]
    train.main([*flags, "--logger_name", "runs/random"])
    assert "Word vectors" not in capsys.readouterr().err
    train.main([*flags, "--word_vectors", "vectors.txt"])
    content, other = (load(f"runs/{run}/model_best.pth.tar") for run in ("runX", "random"))
    words, rows = content["vocabulary"], content["model"][1]["embed.weight"]
    assert f"Word vectors: 2 of the vocabulary's {len(words)} words" in capsys.readouterr().err
    assert rows[words.index("dog")].tolist() == [1, 2, 3, 4, 5, 6]
    assert rows[words.index("red")].tolist() == [6, 5, 4, 3, 2, 1]
    rest = [number for number, word in enumerate(words) if word not in ("dog", "red")]
    assert torch.equal(rows[rest], other["model"][1]["embed.weight"][rest])


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ("dog 1 2 3\n", [], "has 3 numbers a word, and --word_dim is 6: add --word_dim 3"),
        ("dog 1 2 3\nred 1 2\n", [], "line 2: 2 numbers after the word"),
        ("dog one two\n", [], "not a text file of a word and its numbers"),
        ("nowhere 1 2 3\n", [], "has none of the vocabulary's"),
        ("dog nan 1 2 3 4 5\n", [], "NaN or infinity for the word 'dog'"),
        (None, [], "cannot be read"),
        ("dog 1 2 3 4 5 6\n", ["--text_features"], "--word_vectors does not go with"),
    ],
)
def test_bad_input_is_one_sentence(content, flags, said):
    write_precomp(Path("data/tiny_precomp"))
    if content is not None:
        Path("vectors.txt").write_text(content)
    with pytest.raises(InputError, match=said):
        train.main([*TINY, "--word_vectors", "vectors.txt", *flags])
    assert not Path("runs").exists()


def test_an_array_without_its_words_is_one_sentence():
    np.save("vectors.npy", np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="needs vectors.txt beside it"):
        read_word_vectors("vectors.npy", WORDS)
    Path("vectors.txt").write_text("dog\n")
    with pytest.raises(InputError, match="has 1 words: there must be a row of numbers"):
        read_word_vectors("vectors.npy", WORDS)
