"""Ranks, nearest items and hubs for any number of captions per image and any type of number."""

import numpy as np
import pytest
import torch

from retrieval.corrections import corrections_of, rank_corrected
from retrieval.hubness import k_occurrence
from retrieval.ranking import TILE_ASPECT, Tiles, image_numbers, rank_both_ways, rank_shifted
from retrieval.similarity import SOURCES, Cosine
from tests.helpers import loops

TILE = Cosine.tile_images


def uneven(n, seed, width=5):
    """n images with 1 to 7 captions each, of embeddings whose similarities are exact and full of ties, and image_of."""
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n), rng.integers(1, 8, n))
    return (
        *(rng.integers(-1, 2, (rows, width)).astype(np.float32) for rows in (n, len(image_of))),
        image_of,
    )


def scores_of(images, captions, measure):
    if measure == "cosine":
        return images @ captions.T
    return -np.sqrt((np.maximum(0, captions[None] - images[:, None]) ** 2).sum(2, dtype=np.float32))


def loop_ranks(scores, image_of):
    """0-based ranks both ways, one query at a time."""
    image_ranks, caption_ranks = [], []
    for i, row in enumerate(scores):
        best = np.max(row[image_of == i])  # NaN where one is
        image_ranks.append(
            sum(loops.tied_or_better(row[c], best) for c in range(len(row)) if image_of[c] != i)
        )
    for c, column in enumerate(scores.T):
        own = column[image_of[c]]
        caption_ranks.append(
            sum(
                loops.tied_or_better(column[i], own) for i in range(len(scores)) if i != image_of[c]
            )
        )
    return [image_ranks, caption_ranks]


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 49])
def test_ranks_of_one_to_seven_captions_an_image_equal_the_loop(n, measure):
    images, captions, image_of = uneven(n, seed=n)
    found = rank_both_ways(images, captions, measure, image_of=image_of)
    assert [side.ranks.tolist() for side in found] == loop_ranks(
        scores_of(images, captions, measure), image_of
    )


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_tile_borders_change_nothing(monkeypatch, tile, measure):
    images, captions, image_of = uneven(20, seed=4)
    monkeypatch.setattr(SOURCES[measure], "tile_images", tile)
    found = rank_both_ways(images, captions, measure, image_of=image_of)
    assert [side.ranks.tolist() for side in found] == loop_ranks(
        scores_of(images, captions, measure), image_of
    )


@pytest.mark.parametrize("tile", [3, 1000])
@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_several_shifts_at_once_are_those_of_the_shifted_matrices(monkeypatch, tile, measure):
    images, captions, image_of = uneven(20, seed=8)
    rng = np.random.default_rng(0)
    shifts = [
        None,
        *(
            [rng.integers(0, 3, n).astype(np.float32) for n in (len(captions), 20)]
            for _ in range(3)
        ),
    ]
    monkeypatch.setattr(SOURCES[measure], "tile_images", tile)
    found = rank_shifted(
        SOURCES[measure](images, captions),
        [shift and list(map(torch.as_tensor, shift)) for shift in shifts],
        image_of=image_of,
    )
    scores = scores_of(images, captions, measure)
    assert len(found) == len(shifts)
    for pair, (off_captions, off_images) in zip(
        found, (shift or (0, np.zeros(20)) for shift in shifts)
    ):
        assert pair[0].ranks.tolist() == loop_ranks(scores - off_captions, image_of)[0]
        assert pair[1].ranks.tolist() == loop_ranks(scores - off_images[:, None], image_of)[1]


@pytest.mark.parametrize("top, kept", [(1, (1, 1)), (7, (7, 4)), (99, (20, 4))])
def test_as_many_items_are_kept_as_asked_for_or_as_there_are(top, kept):
    images, captions = np.eye(4), np.eye(4).repeat(5, axis=0)
    ranked, plain = rank_both_ways(images, captions, top=top), rank_both_ways(images, captions)
    assert [side.items.shape for side in ranked] == [(4, kept[0]), (20, kept[1])]
    assert all(torch.equal(one.ranks, other.ranks) for one, other in zip(ranked, plain))


@pytest.mark.parametrize("broken", ["image", "caption"])
@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_nan_among_uneven_captions_equals_the_loop(measure, broken):
    images, captions, image_of = uneven(9, seed=2)
    (images if broken == "image" else captions)[4] = np.nan
    found = rank_both_ways(images, captions, measure, image_of=image_of)
    assert [side.ranks.tolist() for side in found] == loop_ranks(
        scores_of(images, captions, measure), image_of
    )


def test_with_no_items_asked_for_the_ranks_are_the_same():
    images, captions, image_of = uneven(17, seed=3)
    found = rank_both_ways(images, captions, top=0, image_of=image_of)
    assert [side.ranks.tolist() for side in found] == loop_ranks(images @ captions.T, image_of)
    assert [tuple(side.items.shape) for side in found] == [(17, 0), (len(captions), 0)]


@pytest.mark.parametrize("tile", [3, 1000])
@pytest.mark.parametrize("top", [1, 2, 10])
def test_the_items_are_the_best_in_their_order(monkeypatch, top, tile):
    rng = np.random.default_rng(2)
    monkeypatch.setattr(Cosine, "tile_images", tile)
    *_, image_of = uneven(30, seed=8)
    images, captions = rng.standard_normal((30, 6)), rng.standard_normal((len(image_of), 6))
    to_text, to_image = rank_both_ways(images, captions, top=top, image_of=image_of)
    assert np.array_equal(to_text.items, np.argsort(-images @ captions.T, axis=1)[:, :top])
    assert np.array_equal(to_image.items, np.argsort(-captions @ images.T, axis=1)[:, :top])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_n_k_of_uneven_captions_equals_the_loop(k):
    rng = np.random.default_rng(0)
    *_, image_of = uneven(40, seed=7)
    images, captions = rng.standard_normal((40, 6)), rng.standard_normal((len(image_of), 6))
    for ranking, scores in zip(
        rank_both_ways(images, captions, top=10, image_of=image_of),
        (images @ captions.T, captions @ images.T),
    ):
        expected = [0] * scores.shape[1]
        for row in scores.tolist():
            for target in sorted(range(len(row)), key=lambda t: -row[t])[:k]:
                expected[target] += 1
        assert k_occurrence(ranking.items[:, :k], scores.shape[1]).tolist() == expected


def test_corrections_of_uneven_captions_equal_those_of_the_matrix():
    rng = np.random.default_rng(1)
    *_, image_of = uneven(30, seed=5)
    images, captions, bank = (rng.standard_normal((n, 6)) for n in (30, len(image_of), 11))
    wanted = [("nnn", {"k": 3, "alpha": 0.5})]
    pair = (
        corrections_of("i2t", Cosine(bank, captions), wanted)[0],
        corrections_of("t2i", Cosine(images, bank), wanted)[0],
    )
    source = Cosine(images, captions)
    (plain,) = rank_shifted(source, top=10, image_of=image_of)
    ((to_text, to_image),) = rank_corrected(source, plain, [pair], image_of=image_of)
    scores = images @ captions.T
    off_captions = 0.5 * np.sort(captions @ bank.T)[:, -3:].mean(1)
    off_images = 0.5 * np.sort(images @ bank.T)[:, -3:].mean(1)
    assert to_text.ranks.tolist() == loop_ranks(scores - off_captions, image_of)[0]
    assert to_image.ranks.tolist() == loop_ranks(scores - off_images[:, None], image_of)[1]


@pytest.mark.parametrize(
    "image_of",
    [[0, 0, 1], [0, 2, 2, 1], [1, 1, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1, 2], [0, 1, 2, 3]],
    ids=str,
)
def test_captions_that_do_not_go_through_the_images_in_order_are_refused(image_of):
    with pytest.raises(ValueError, match="3 images"):
        rank_both_ways(np.eye(3), np.ones((4, 3)), image_of=image_of)


def test_numbers_of_no_captions_are_refused():
    with pytest.raises(ValueError, match="each of the 0 captions"):
        image_numbers([], 3, 0)


@pytest.mark.parametrize("images, captions", [(3, 14), (0, 5), (3, 0)])
def test_without_numbers_all_images_have_as_many_captions(images, captions):
    assert image_numbers(None, 3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=f"{captions} captions for {images} images"):
        image_numbers(None, images, captions)


def test_tiles_stay_small_where_images_have_many_captions():
    image_of = np.repeat(np.arange(40), 400)
    tiles = Tiles(Cosine(np.zeros((40, 1)), np.zeros((16000, 1))), image_of)
    assert tiles.shape[1] <= TILE * TILE_ASPECT < 16000
    assert [rows.stop for rows in tiles.caption_rows][-1] == 16000 and tiles.image_rows[
        -1
    ].stop == 40


# Kinds of numbers -------------------------------------------------------------------------------


def both_ranks(images, captions):
    return [side.ranks.tolist() for side in rank_both_ways(images, captions)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [5, 1000, 5000])
def test_half_precision_ranks_as_the_same_values_do_in_float32(n, dtype):
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 32, generator=generator)
    captions = images.repeat_interleave(5, 0) + 2 * torch.randn(5 * n, 32, generator=generator)
    images, captions = images.to(dtype), captions.to(dtype)
    assert both_ranks(images, captions) == both_ranks(images.float(), captions.float())


def test_half_precision_counts_beyond_what_it_can_hold():
    """A query with 4,000 captions before its own.

    Float16 cannot count to 2,049, bfloat16 not to 257.
    """
    captions = torch.ones(4005, 1)
    captions[:5] = 0.5
    images = torch.ones(801, 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert rank_both_ways(images.to(dtype), captions.to(dtype))[0].ranks[0] == 4000


@pytest.mark.parametrize(
    "kinds",
    [
        (np.float32, np.float64),
        (np.float16, np.float32),
        (np.int64, np.int64),
        (np.int8, np.float32),
        (np.int64, np.float64),
        (np.uint8, np.int32),
    ],
    ids=str,
)
def test_mixed_and_whole_numbers_rank_as_numpy_s_products(kinds):
    rng = np.random.default_rng(3)
    images, captions = (
        (9 * rng.random((rows, 4))).astype(kind) for rows, kind in zip((6, 30), kinds)
    )
    wide = images.astype(np.float64) @ captions.astype(np.float64).T
    assert both_ranks(images, captions) == list(loops.ranks(wide))


def test_large_whole_numbers_are_told_apart():
    """Products that float32 cannot distinguish: 2^26 + 1 and 2^26."""
    images, captions = np.array([[2**26 + 1], [2**26]]), np.ones((10, 1), int)
    assert both_ranks(images, captions)[1] == [0] * 5 + [1] * 5


def test_embeddings_that_require_grad_are_taken():
    images, captions = torch.eye(3, requires_grad=True), torch.eye(3).repeat_interleave(5, 0)
    assert both_ranks(images, captions) == [[0] * 3, [0] * 15]
    assert not rank_both_ways(images, captions)[0].ranks.requires_grad
