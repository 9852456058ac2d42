"""Sources of similarities: tiles, pairs and rows against whole matrices."""

from argparse import Namespace

import pytest
import torch

from loss import SIMILARITIES
from retrieval.similarity import Cosine, CrossAttention, Matrix, Mean, Order, Words


def sources(kinds=(torch.float64, torch.float64, torch.float64)):
    """Three sources of 9 images and 20 captions, and the mean of their matrices in float64."""
    generator = torch.Generator().manual_seed(1)
    made, matrices = [], []
    for source, kind in zip((Cosine, Order, Cosine), kinds):
        images, captions = (
            torch.randn(n, 4, generator=generator, dtype=torch.float64).to(kind) for n in (9, 20)
        )
        made.append(source(images, captions))
        matrices.append(
            SIMILARITIES["order" if source is Order else "cosine"](
                images.double(), captions.double()
            )
        )
    return Mean(made), sum(matrices) / 3


def test_tiles_pairs_and_rows_across_are_the_mean_s():
    source, matrix = sources()
    assert (source.n_images, source.n_captions, source.tile_images) == (9, 20, Order.tile_images)
    tile = source.tile(slice(2, 7), slice(3, 12), (6, 10))
    assert tile.dtype == torch.float64 and (tile - matrix[2:7, 3:12]).abs().max() < 1e-14
    assert (source.across("i2t", slice(4, 9)) - matrix.t()[4:9]).abs().max() < 1e-14
    assert (source.across("t2i", slice(4, 9)) - matrix[4:9]).abs().max() < 1e-14
    images, captions = torch.tensor([0, 8, 3]), torch.tensor([19, 0, 2])
    assert (source.pairs(images, captions) - matrix[images, captions]).abs().max() < 1e-14


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ((torch.float32,) * 3, torch.float32),
        ((torch.float32, torch.float64, torch.float32), torch.float64),
        ((torch.float64, torch.float32, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_scores_are_of_the_widest_type(kinds, expected):
    source, matrix = sources(kinds)
    tile = source.tile(slice(0, 9), slice(0, 20), (9, 20))
    assert tile.dtype == expected and (tile - matrix).abs().max() < 1e-6


def test_the_members_scores_are_left_as_they_are():
    """Cosine's tile is its own block of memory, which it gives out again."""
    source, _ = sources()
    before = source.sources[0].tile(slice(0, 9), slice(0, 20), (9, 20))
    kept = before.clone()
    source.tile(slice(0, 9), slice(0, 20), (9, 20))
    assert torch.equal(before, kept)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
@pytest.mark.parametrize("source", [Cosine, Order])
def test_scores_across_and_of_pairs_are_those_of_the_tiles(source, side):
    generator = torch.Generator().manual_seed(0)
    source = source(*(torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 9)))
    matrix = source.tile(slice(0, 6), slice(0, 9), (6, 9)).clone()
    across = source.across(side, slice(2, 5))
    assert torch.allclose(across, matrix.t()[2:5] if side == "i2t" else matrix[2:5])
    images, captions = torch.tensor([0, 5, 3]), torch.tensor([8, 0, 2])
    assert torch.allclose(source.pairs(images, captions), matrix[images, captions])


# SCAN's scores, text to image.
SCAN_SCORES = Namespace(
    cross_attn="t2i",
    raw_feature_norm="clipped_l2norm",
    agg_func="LogSumExp",
    lambda_lse=6.0,
    lambda_softmax=9.0,
)


@pytest.mark.parametrize("images", [[0, 0, 0, 1], [0, 1, 2, 3]], ids=["by image", "by caption"])
def test_equal_captions_make_equal_pairs(images):
    """Captions 0, 2 and 5 are one; to the bit, wherever they stand beside others."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(40, 32, generator=generator)
    words = Words(vectors, torch.tensor([7, 0, 7, 20, 30, 7]), torch.tensor([5, 7, 5, 5, 5, 5]))
    source = CrossAttention(torch.randn(4, 9, 32, generator=generator), words, SCAN_SCORES)
    numbers = torch.tensor(images)
    first, second, third = (
        source.pairs(numbers, torch.tensor(captions))
        for captions in ([0, 1, 3, 4], [2, 1, 5, 0], [5, 3, 0, 2])
    )
    alike = [source.pairs(numbers, torch.full((4,), caption)) for caption in (0, 2, 5)]
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], alike[2])
    expected = torch.stack(
        [
            source.of(source.images[i : i + 1], words[c : c + 1]).squeeze()
            for i, c in zip(images * 3, [0, 1, 3, 4, 2, 1, 5, 0, 5, 3, 0, 2])
        ]
    )
    assert torch.allclose(torch.cat((first, second, third)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
def test_a_matrix_gives_its_own_entries(kind, permuted):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(9, 20, generator=generator).to(kind)
    rows = torch.randperm(9, generator=generator)[:7] if permuted else torch.arange(2, 9)
    columns = torch.randperm(20, generator=generator)[:15] if permuted else torch.arange(1, 16)
    source = Matrix(matrix, rows, columns, torch.device("cpu"))
    assert (source.n_images, source.n_captions) == (7, 15)
    expected = torch.tensor(
        [[float(matrix[row, column]) for column in columns] for row in rows], dtype=torch.float64
    )
    tile = source.tile(slice(2, 6), slice(3, 12), (6, 10))
    assert tile.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert torch.equal(tile.double(), expected[2:6, 3:12])
    assert torch.equal(source.across("i2t", slice(4, 9)).double(), expected.t()[4:9])
    assert torch.equal(source.across("t2i", slice(4, 7)).double(), expected[4:7])
    images, captions = torch.tensor([0, 6, 3]), torch.tensor([14, 0, 2])
    assert torch.equal(source.pairs(images, captions).double(), expected[images, captions])


@pytest.mark.parametrize(
    "device, expected", [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)]
)
def test_a_matrix_in_float64_is_one_only_where_the_device_has_it(device, expected):
    matrix = torch.zeros(2, 2, dtype=torch.float64)
    numbers = torch.arange(2)
    assert Matrix(matrix, numbers, numbers, torch.device(device)).dtype == expected
