"""Captions as word ids, and their cache."""

import json
import os

import numpy as np
import pytest
import torch

from inputs.tokenizer import tokenize
from inputs.word_ids import by_length, number_words, unknown_in_words
from tests.helpers.made import REFERENCE
from vocab import (
    read_vocabulary,
    vocabulary_of,
)

WORDS = [
    "<pad>",
    "<start>",
    "<end>",
    "<unk>",
    "a",
    "dog",
    "cat",
    "red",
    "the",
    "is",
    ".",
    "on",
    "grass",
]


@pytest.fixture(scope="module")
def words():
    return vocabulary_of(WORDS)


def ids(caption, reading="text"):
    """A caption's word ids by hand."""
    return [
        1,
        *(WORDS.index(word) if word in WORDS else 3 for word in tokenize(caption, reading)),
        2,
    ]


def unpacked(numbered):
    return [numbered.words[a:b].tolist() for a, b in zip(numbered.offsets, numbered.offsets[1:])]


@pytest.mark.parametrize("reading", ["text", "released"])
def test_captions_are_numbered_between_start_and_end(words, reading):
    captions = ["A dog.", "", "zebra unheard", "the red cat is on the grass ."]
    numbered = number_words(captions, words, reading)
    assert len(numbered) == 4
    assert [
        numbered.words[a:b].tolist() for a, b in zip(numbered.offsets, numbered.offsets[1:])
    ] == [ids(caption, reading) for caption in captions]
    assert numbered.lengths.tolist() == [len(ids(caption, reading)) for caption in captions]


@pytest.mark.parametrize(
    "captions, reading, share",
    [
        (["A dog.", "", "zebra unheard", "the red cat is on the grass ."], "text", 2 / 13),
        (["", ""], "text", 0),
        (["a dog", "the cat"], "released", 4 / 6),  # b'a dog ' and b'the cat '
        (["quokka"], "text", 1),
        (["a dog"], "text", 0),
    ],
    ids=str,
)
def test_the_share_of_unknown_words_leaves_out_start_and_end(
    tmp_path, words, captions, reading, share
):
    assert number_words(captions, words, reading, str(tmp_path)).unknown_share == pytest.approx(
        share
    )
    assert number_words(captions, words, reading, str(tmp_path)).unknown_share == pytest.approx(
        share
    )  # the cache's


@pytest.mark.parametrize("unknown, warned", [(2, False), (3, True), (10, True)])
def test_unknown_words_are_warned_of_from_three_in_ten_on(words, unknown, warned):
    line = unknown_in_words(
        number_words(["zebra " * unknown + "dog " * (10 - unknown)], words), "dev", "runs/x"
    )
    assert (
        line.startswith("Warning: ") == warned
        and f"{unknown}0.0%" in line
        and "captions of dev" in line
    )
    assert all(
        (words in line) == warned for words in ("runs/x", "spaces between words", "--vocab_path")
    )


@pytest.mark.parametrize("indices", [[0], [1], [3, 0, 1], [1, 1], [2, 3]], ids=str)
def test_captions_are_padded_with_0_to_the_longest(words, indices):
    captions = ["a dog", "", "a a a a", "cat"]
    longest = max(len(ids(captions[index])) for index in indices)
    padded = number_words(captions, words).padded(torch.tensor(indices), longest)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [
        ids(captions[index]) + [0] * (longest - len(ids(captions[index]))) for index in indices
    ]


@pytest.mark.parametrize(
    "lengths", [[3, 5, 3, 5, 2, 3], [1], [4, 4, 4], list(range(40)) * 3], ids=len
)
def test_by_length_puts_the_longest_first_and_is_stable(lengths):
    expected = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    assert by_length(torch.tensor(lengths)).tolist() == expected


def test_many_captions_are_numbered_in_their_order(words):
    """Enough of them to be shared out among processes."""
    captions = [f"{'dog ' * (c % 3)}cat{' red' * (c % 7)}" for c in range(4500)]
    assert unpacked(number_words(captions, words)) == [ids(caption) for caption in captions]


@pytest.mark.parametrize("reading", ["text", "released"])
def test_the_cache_gives_the_same_ids(tmp_path, words, reading):
    captions = ["a dog", "", "the \u00e9 cat"]
    first = number_words(captions, words, reading, cache_dir=str(tmp_path / "cache"))
    files = os.listdir(tmp_path / "cache")
    again = number_words(captions, words, reading, cache_dir=str(tmp_path / "cache"))
    assert unpacked(first) == unpacked(again) == [ids(caption, reading) for caption in captions]
    assert len(files) == 1 and os.listdir(tmp_path / "cache") == files


@pytest.mark.parametrize(
    "captions, reading, change",
    [
        (["a dog", "a cat"], "text", {}),
        (["the dog", "cat"], "released", {}),
        (["the dog", "cat"], "text", {5: "hound"}),
        (["the dog cat"], "text", {}),
        (["the", "dog\ncat"], "text", {}),
    ],
    ids=["captions", "reading", "vocabulary", "fewer", "line breaks"],
)
def test_the_cache_tells_apart_what_differs(tmp_path, words, captions, reading, change):
    before = ["the\ndog", "cat"] if "dog\ncat" in captions else ["the dog", "cat"]
    number_words(before, words, cache_dir=str(tmp_path))
    mine = [change.get(place, word) for place, word in enumerate(WORDS)]
    found = number_words(captions, vocabulary_of(mine), reading, cache_dir=str(tmp_path))
    assert unpacked(found) == [
        [1, *(mine.index(word) if word in mine else 3 for word in tokenize(caption, reading)), 2]
        for caption in captions
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-3],
        lambda content: content[:50],
        lambda content: b"x" * 500,
        lambda content: content[:-8] + (10**6).to_bytes(4, "little") + content[-4:],
        lambda content: content[:-8] + (-1).to_bytes(4, "little", signed=True) + content[-4:],
        lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
        lambda content: content.replace(b"<i4", b"<f4"),
        lambda content: content.replace(b"<i4", b">i4"),
    ],
    ids=[
        "empty",
        "torn",
        "torn header",
        "other",
        "unknown word",
        "negative word",
        "another word",
        "floats",
        "big-endian",
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, words, damage):
    captions = ["a dog", "", "the cat"]
    number_words(captions, words, cache_dir=str(tmp_path))
    path = tmp_path / os.listdir(tmp_path)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert unpacked(number_words(captions, words, cache_dir=str(tmp_path))) == [
        ids(c) for c in captions
    ]
    assert unpacked(number_words(captions, words, cache_dir=str(tmp_path))) == [
        ids(c) for c in captions
    ]


def test_a_cache_that_would_run_code_does_not(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Smuggled:
        def __reduce__(self):
            return os.system, ("touch smuggled",)

    number_words(["a dog"], words, cache_dir="cache")
    path = tmp_path / "cache" / os.listdir(tmp_path / "cache")[0]
    np.save(path, np.array([Smuggled()], object), allow_pickle=True)
    assert unpacked(number_words(["a dog"], words, cache_dir="cache")) == [ids("a dog")]
    assert not (tmp_path / "smuggled").exists()


def test_without_a_place_for_the_cache_it_is_done_without(tmp_path, words, capsys):
    (tmp_path / "taken").write_text("a file")
    assert unpacked(number_words(["a dog"], words, cache_dir=str(tmp_path / "taken"))) == [
        ids("a dog")
    ]
    assert "not cached" in capsys.readouterr().err


def test_captions_of_json_may_hold_lone_surrogates(tmp_path, words):
    captions = json.loads('["a \\ud800 dog"]')
    assert unpacked(number_words(captions, words, cache_dir=str(tmp_path))) == [ids(captions[0])]


def test_another_release_of_the_tokenizer_has_its_own_cache(tmp_path, monkeypatch):
    vocabulary = vocabulary_of(["<pad>", "<start>", "<end>", "<unk>", "dog"])
    number_words(["a dog"], vocabulary, cache_dir=str(tmp_path))
    number_words(["a dog"], vocabulary, cache_dir=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    number_words(["a dog"], vocabulary, cache_dir=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


VSE_INFTY = REFERENCE / "vse_infty"


def test_words_and_ids_of_vse_infinity_s_captions_are_its_own():
    words = read_vocabulary(str(VSE_INFTY / "released_checkpoint/vocab/f30k_precomp_vocab.json"))
    words.add_word("<mask>")
    cases = json.loads((VSE_INFTY / "tokenization.json").read_text(encoding="utf-8"))["captions"]
    assert len(cases) > 30 and [tokenize(case["caption"]) for case in cases] == [
        case["words"] for case in cases
    ]
    ids = number_words([case["caption"] for case in cases], words)
    assert [ids[number].tolist() for number in range(len(cases))] == [case["ids"] for case in cases]
