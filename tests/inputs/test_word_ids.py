"""Captions as word ids, and their cache."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import REFERENCE

from vocab import tokenize, vocabulary_of
from word_ids import WordIds, by_length, drop_words, number_words

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat", "red", "the", "is", ".", "on", "grass"]


@pytest.fixture(scope="module")
def words():
    return vocabulary_of(WORDS)


def ids(caption, reading="text"):
    """A caption's word ids by hand."""
    return [1, *(WORDS.index(word) if word in WORDS else 3 for word in tokenize(caption, reading)), 2]


def unpacked(numbered):
    return [numbered.words[a:b].tolist() for a, b in zip(numbered.offsets, numbered.offsets[1:])]


@pytest.mark.parametrize("reading", ["text", "released"])
def test_captions_are_numbered_between_start_and_end(words, reading):
    captions = ["A dog.", "", "zebra unheard", "the red cat is on the grass ."]
    numbered = number_words(captions, words, reading)
    assert len(numbered) == 4
    assert [numbered.words[a:b].tolist() for a, b in zip(numbered.offsets, numbered.offsets[1:])] == [
        ids(caption, reading) for caption in captions]
    assert numbered.lengths.tolist() == [len(ids(caption, reading)) for caption in captions]


@pytest.mark.parametrize("indices", [[0], [1], [3, 0, 1], [1, 1], [2, 3]], ids=str)
def test_captions_are_padded_with_0_to_the_longest(words, indices):
    captions = ["a dog", "", "a a a a", "cat"]
    longest = max(len(ids(captions[index])) for index in indices)
    padded = number_words(captions, words).padded(torch.tensor(indices), longest)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [ids(captions[index]) + [0] * (longest - len(ids(captions[index]))) for index in indices]


@pytest.mark.parametrize("lengths", [[3, 5, 3, 5, 2, 3], [1], [4, 4, 4], list(range(40)) * 3], ids=len)
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


@pytest.mark.parametrize("captions, reading, change", [
    (["a dog", "a cat"], "text", {}), (["the dog", "cat"], "released", {}), (["the dog", "cat"], "text", {5: "hound"}),
    (["the dog cat"], "text", {}), (["the", "dog\ncat"], "text", {})],
    ids=["captions", "reading", "vocabulary", "fewer", "line breaks"])
def test_the_cache_tells_apart_what_differs(tmp_path, words, captions, reading, change):
    before = ["the\ndog", "cat"] if "dog\ncat" in captions else ["the dog", "cat"]
    number_words(before, words, cache_dir=str(tmp_path))
    mine = [change.get(place, word) for place, word in enumerate(WORDS)]
    found = number_words(captions, vocabulary_of(mine), reading, cache_dir=str(tmp_path))
    assert unpacked(found) == [[1, *(mine.index(word) if word in mine else 3 for word in tokenize(caption, reading)), 2]
                               for caption in captions]


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-3], lambda content: content[:50], lambda content: b"x" * 500,
    lambda content: content[:-4] + (10**6).to_bytes(4, "little"),
    lambda content: content[:-4] + (-1).to_bytes(4, "little", signed=True),
    lambda content: content.replace(b"<i4", b"<f4"), lambda content: content.replace(b"<i4", b">i4")],
    ids=["empty", "torn", "torn header", "other", "unknown word", "negative word", "floats", "big-endian"])
def test_a_damaged_cache_is_made_again(tmp_path, words, damage):
    captions = ["a dog", "", "the cat"]
    number_words(captions, words, cache_dir=str(tmp_path))
    path = tmp_path / os.listdir(tmp_path)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert unpacked(number_words(captions, words, cache_dir=str(tmp_path))) == [ids(c) for c in captions]
    assert unpacked(number_words(captions, words, cache_dir=str(tmp_path))) == [ids(c) for c in captions]


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
    assert unpacked(number_words(["a dog"], words, cache_dir=str(tmp_path / "taken"))) == [ids("a dog")]
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


# Size augmentation ------------------------------------------------------------------------------

VOCAB_SIZE, MASK = 71, 70


def numbered(lengths):
    """Captions of different words: ids from 1000 on, so that no drawn id is one of them."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return WordIds(torch.arange(1000, 1000 + int(offsets[-1]), dtype=torch.int32), offsets)


def dropped(captions, rate, seed=0):
    return drop_words(captions, rate, VOCAB_SIZE, MASK, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7, 1.0])
def test_words_that_are_left_keep_their_order_and_caption(rate):
    captions = numbered([5, 1, 12, 2, 30] * 40)
    left = dropped(captions, rate)
    assert left.words.dtype == torch.int32 and len(left) == len(captions)
    for before, after in zip(unpacked(captions), unpacked(left)):
        own = [word for word in after if word >= 1000]
        assert 1 <= len(after) <= len(before) and own == sorted(set(own)) and set(own) <= set(before)
        assert all(word < VOCAB_SIZE for word in after if word not in own)


def test_without_a_rate_every_word_is_left():
    captions = numbered([3, 2])
    assert unpacked(dropped(captions, 0.0)) == unpacked(captions)


def test_one_word_is_left_of_each_caption_and_not_always_the_same():
    captions = numbered([2] * 3000)
    alone = [(before, after[0]) for before, after in zip(unpacked(captions), unpacked(dropped(captions, 1.0)))
             if len(after) == 1 and after[0] >= 1000]
    first = sum(before[0] == word for before, word in alone)
    assert len(alone) == pytest.approx(0.4 ** 2 * 3000, rel=0.2)  # both were to be removed
    assert first == pytest.approx(len(alone) / 2, rel=0.2)


def test_the_shares_of_masked_drawn_and_removed_words_are_the_released_ones():
    n = 200_000
    words = dropped(numbered([20] * (n // 20)), 0.2).words
    drawn = words[words < VOCAB_SIZE]
    masks = int((drawn == MASK).sum())
    shares = {"masked": (masks - n * 0.02 / VOCAB_SIZE) / n, "drawn": (len(drawn) - masks) / n * 71 / 70,
              "removed": 1 - len(words) / n}
    assert shares == pytest.approx({"masked": 0.1, "drawn": 0.02, "removed": 0.08}, abs=4 * (0.1 * 0.9 / n) ** 0.5)
    released = json.loads((REFERENCE / "vse_infty" / "augmentation.json").read_text())["rates"]
    sampling = 4 * (0.1 * 0.9 / released["words"]) ** 0.5
    assert shares["masked"] == pytest.approx(released["masked_share"], abs=2 * sampling)
    assert shares["removed"] == pytest.approx(released["removed_share"], abs=2 * sampling)
    assert len(set(drawn.tolist())) == VOCAB_SIZE  # any word, the special ones too


def test_the_draws_follow_from_the_generator_and_the_captions_are_as_before():
    captions = numbered([9] * 5)
    before = unpacked(captions)
    assert unpacked(dropped(captions, 0.5, 1)) == unpacked(dropped(captions, 0.5, 1)) != unpacked(
        dropped(captions, 0.5, 2))
    assert unpacked(captions) == before
