"""Ties counted against and for the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retrieval.metrics import metrics_of
from retrieval.ranking import rank_shifted
from retrieval.similarity import Matrix
from retrieval.ties import print_ties, ties_of
from tests.helpers import loops

CPU = torch.device("cpu")


def result_of(scores, image_of=None):
    """An Evaluation of a matrix, as far as `ties_of` reads it."""
    matrix = torch.as_tensor(scores)
    n, c = matrix.shape
    image_of = torch.arange(c) // (c // n) if image_of is None else torch.tensor(image_of)
    numbers = torch.arange(n), torch.arange(c)
    model = SimpleNamespace(similarities=lambda i, j: Matrix(matrix, i, j, CPU))
    rankings = rank_shifted(model.similarities(*numbers), image_of=image_of)
    return SimpleNamespace(
        checkpoint=model,
        rankings=rankings,
        metrics=metrics_of(rankings[0]),
        parts=lambda: [(*numbers, image_of)],
    )


def test_known_ties_give_the_known_interval(capsys):
    """Two images of one caption each: the first ties with the other caption, the second wins."""
    ties = ties_of(result_of([[0.5, 0.5], [0.1, 0.9]]))
    assert (ties.against.i2t.r1, ties.favourable.i2t.r1) == (50, 100)
    assert (ties.against.t2i.r1, ties.favourable.t2i.r1) == (100, 100)
    assert ties.shares == (0.5, 0.0) and ties.matter()
    print_ties(ties)
    printed = capsys.readouterr().out
    assert "Ties: 50.0% of images and 0.0% of captions" in printed
    assert "rsum: 550.0 to 600.0" in printed
    assert "Image to text: R@1 50.0 to 100.0, R@5 100.0 to 100.0" in printed


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 10, 50])
def test_ties_are_those_of_a_loop(kind, levels):
    rng = np.random.default_rng(levels)
    image_of = np.repeat(np.arange(9), [1, 2, 5, 1, 3, 4, 2, 6, 1]).tolist()
    scores = (rng.integers(0, levels, (9, 25)) / levels).astype(kind)
    ties = ties_of(result_of(scores, image_of))
    wide = scores.astype(np.float32) if kind == np.float16 else scores
    for found, ties_win in ((ties.against, False), (ties.favourable, True)):
        expected = loops.ranks_of_groups(wide, image_of, ties_win)
        assert [list(side) for side in found] == [
            pytest.approx(loops.recall(ranks)) for ranks in expected
        ]
    both = [loops.ranks_of_groups(wide, image_of, ties_win) for ties_win in (False, True)]
    for share, low, high in zip(ties.shares, *both):
        assert share == pytest.approx(np.mean([a != b for a, b in zip(low, high)]))


def test_scores_within_two_units_in_the_last_place_tie():
    one = np.float32(0.5)
    up = np.float32(1)
    two, three = one, one
    for _ in range(2):
        two = np.nextafter(two, up)
    for _ in range(3):
        three = np.nextafter(three, up)
    near = ties_of(result_of(np.array([[one, two], [0, 1]], np.float32)))
    far = ties_of(result_of(np.array([[one, three], [0, 1]], np.float32)))
    assert near.favourable.i2t.r1 == 100 and far.favourable.i2t.r1 == 50


def test_without_ties_nothing_is_printed(capsys):
    ties = ties_of(result_of(np.random.default_rng(0).random((6, 30))))
    print_ties(ties)
    assert not ties.matter() and ties.shares == (0, 0) and capsys.readouterr().out == ""
    assert ties.as_dict()["counted_for_the_model"]["rsum"] == ties.against.rsum


def test_a_number_that_is_not_one_never_ties():
    scores = np.array([[np.nan, 0.3], [0.2, 0.9]], np.float32)
    assert ties_of(result_of(scores)).favourable.i2t.r1 == 50
