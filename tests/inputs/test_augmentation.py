"""Dropped words and dropped regions: what is left, and in which shares."""

import json

import pytest
import torch

from inputs.augmentation import drop_regions, drop_words
from inputs.word_ids import WordIds
from layers.pooling import (
    region_lengths,
)
from tests.helpers.made import REFERENCE


def unpacked(numbered):
    return [numbered.words[a:b].tolist() for a, b in zip(numbered.offsets, numbered.offsets[1:])]


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
        assert (
            1 <= len(after) <= len(before) and own == sorted(set(own)) and set(own) <= set(before)
        )
        assert all(word < VOCAB_SIZE for word in after if word not in own)


def test_without_a_rate_every_word_is_left():
    captions = numbered([3, 2])
    assert unpacked(dropped(captions, 0.0)) == unpacked(captions)


def test_one_word_is_left_of_each_caption_and_not_always_the_same():
    captions = numbered([2] * 3000)
    alone = [
        (before, after[0])
        for before, after in zip(unpacked(captions), unpacked(dropped(captions, 1.0)))
        if len(after) == 1 and after[0] >= 1000
    ]
    first = sum(before[0] == word for before, word in alone)
    assert len(alone) == pytest.approx(0.4**2 * 3000, rel=0.2)  # both were to be removed
    assert first == pytest.approx(len(alone) / 2, rel=0.2)


def test_the_shares_of_masked_drawn_and_removed_words_are_the_released_ones():
    n = 200_000
    words = dropped(numbered([20] * (n // 20)), 0.2).words
    drawn = words[words < VOCAB_SIZE]
    masks = int((drawn == MASK).sum())
    shares = {
        "masked": (masks - n * 0.02 / VOCAB_SIZE) / n,
        "drawn": (len(drawn) - masks) / n * 71 / 70,
        "removed": 1 - len(words) / n,
    }
    assert shares == pytest.approx(
        {"masked": 0.1, "drawn": 0.02, "removed": 0.08}, abs=4 * (0.1 * 0.9 / n) ** 0.5
    )
    released = json.loads((REFERENCE / "vse_infty" / "augmentation.json").read_text())["rates"]
    sampling = 4 * (0.1 * 0.9 / released["words"]) ** 0.5
    assert shares["masked"] == pytest.approx(released["masked_share"], abs=2 * sampling)
    assert shares["removed"] == pytest.approx(released["removed_share"], abs=2 * sampling)
    assert len(set(drawn.tolist())) == VOCAB_SIZE  # any word, the special ones too


def test_the_draws_follow_from_the_generator_and_the_captions_are_as_before():
    captions = numbered([9] * 5)
    before = unpacked(captions)
    assert (
        unpacked(dropped(captions, 0.5, 1))
        == unpacked(dropped(captions, 0.5, 1))
        != unpacked(dropped(captions, 0.5, 2))
    )
    assert unpacked(captions) == before


def numbered_images(lengths, longest):
    """Image b's region p is [100 b + p + 1, 1], p below its length; zeros behind."""
    images = torch.zeros(len(lengths), longest, 2)
    for item, length in enumerate(lengths):
        for place in range(length):
            images[item, place] = torch.tensor([100 * item + place + 1, 1])
    return images


def kept_regions(images, rate, seed=0):
    """For each image the first numbers of the regions that are left.

    Checks that only zeros follow.
    """
    draws = torch.rand(images.shape[:2], generator=torch.Generator().manual_seed(seed))
    left = drop_regions(images, region_lengths(images), rate, draws)
    lists = [[row[0] for row in image if row[1]] for image in left.tolist()]
    assert left.shape[1] == max(map(len, lists))
    assert all(left[item, len(numbers) :].eq(0).all() for item, numbers in enumerate(lists))
    return lists


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9, 1.0])
def test_regions_that_are_left_keep_their_order(rate):
    lengths = [9, 1, 4, 9, 2]
    for item, numbers in enumerate(kept_regions(numbered_images(lengths, 9), rate)):
        assert numbers == sorted(set(numbers)) and numbers
        assert set(numbers) <= {100 * item + place + 1 for place in range(lengths[item])}


def test_without_a_rate_every_region_is_left():
    images = numbered_images([3, 2], 5)
    assert torch.equal(
        drop_regions(images, region_lengths(images), 0.0, torch.rand(images.shape[:2])),
        images[:, :3],
    )


def test_one_region_is_left_of_each_image_and_not_always_the_same():
    lists = kept_regions(numbered_images([3] * 300, 3), 1.0)
    assert all(len(numbers) == 1 for numbers in lists)
    counts = [
        sum(numbers[0] % 100 == place for item, numbers in enumerate(lists)) for place in (1, 2, 3)
    ]
    assert sum(counts) == 300 and min(counts) > 60


def test_a_fifth_of_the_regions_is_dropped():
    """Of 36 that is 28.8 +- 2.4, by the binomial distribution."""
    counts = torch.tensor(
        [len(numbers) for numbers in kept_regions(numbered_images([36] * 4000, 36), 0.2)]
    ).double()
    assert counts.mean().item() == pytest.approx(28.8, abs=4 * 2.4 / 4000**0.5)
    assert counts.std().item() == pytest.approx(2.4, abs=0.12)
    released = json.loads((REFERENCE / "vse_infty" / "augmentation.json").read_text())["rates"]
    assert counts.mean().item() == pytest.approx(released["regions_kept_mean"], abs=0.2)


def test_the_draws_follow_from_the_generator():
    images = numbered_images([9] * 4, 9)
    assert (
        kept_regions(images, 0.5, seed=1)
        == kept_regions(images, 0.5, seed=1)
        != kept_regions(images, 0.5, seed=2)
    )
