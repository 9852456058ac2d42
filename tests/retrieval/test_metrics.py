"""Recalls, their sums and their means over folds, against plain loops."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import compute_results
from retrieval import metrics
from retrieval.metrics import mean_metrics, metrics_of, recall_of
from retrieval.ranking import rank_both_ways
from tests.helpers import loops
from tests.helpers.loops import whole_numbers


@pytest.mark.parametrize(
    "ranks",
    [[0], [1], [0, 0, 4, 9], [0, 5, 10], [4, 5, 9, 10], [3, 3, 4, 5], list(range(101)), [7] * 6],
    ids=str,
)
def test_recall_equals_the_loop(ranks):
    assert list(recall_of(ranks)) == pytest.approx(loops.recall(ranks), abs=1e-12)


@pytest.mark.parametrize("container", [np.array, torch.tensor], ids=["array", "tensor"])
def test_recall_takes_any_container(container):
    assert recall_of(container([0, 5, 10])) == recall_of([0, 5, 10])


def test_metrics_have_the_averages_and_the_sum_of_the_six_recalls():
    images, captions = whole_numbers(20, 5, seed=9)
    metrics = metrics_of(rank_both_ways(torch.from_numpy(images), torch.from_numpy(captions)))
    to_text, to_image = map(loops.recall, loops.ranks(images @ captions.T))
    assert list(metrics.i2t) == pytest.approx(to_text) and list(metrics.t2i) == pytest.approx(
        to_image
    )
    assert metrics.ar == pytest.approx((to_text[0] + to_text[1] + to_text[2]) / 3)
    assert metrics.ari == pytest.approx((to_image[0] + to_image[1] + to_image[2]) / 3)
    assert metrics.rsum == pytest.approx(sum(to_text[:3]) + sum(to_image[:3]))


def test_the_mean_of_folds_is_that_of_each_figure():
    folds = [
        metrics_of(rank_both_ways(*map(torch.from_numpy, whole_numbers(8, 5, seed=seed))))
        for seed in range(3)
    ]
    mean = mean_metrics(folds)
    assert list(mean.i2t) == pytest.approx(
        [(a + b + c) / 3 for a, b, c in zip(*(fold.i2t for fold in folds))]
    )
    assert list(mean.t2i) == pytest.approx(
        [(a + b + c) / 3 for a, b, c in zip(*(fold.t2i for fold in folds))]
    )


class WithReciprocalRank(NamedTuple):
    """Recall, and the mean reciprocal rank."""

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float
    mrr: float

    def __str__(self):
        return " ".join(f"{value:.1f}" for value in self)


def test_another_metric_is_added_in_this_module_alone(evaluated, monkeypatch, capsys):
    """One more field of Recall, and its formula.

    It is printed, written, and averaged over folds.
    """

    def with_reciprocal_rank(ranks):
        ranks = torch.as_tensor(ranks).tolist()
        reciprocal = sum(1 / (rank + 1) for rank in ranks) / len(ranks)
        return WithReciprocalRank(*loops.recall(ranks), reciprocal)

    compute_results.main(["--save_json", "before.json"])
    plain = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(metrics, "Recall", WithReciprocalRank)
    monkeypatch.setattr(metrics, "recall_of", with_reciprocal_rank)
    compute_results.main(["--save_json", "after.json", "--save_ranks", "ranks.npz"])
    printed = capsys.readouterr().out.splitlines()
    before, after = (json.loads((evaluated / f"{x}.json").read_text()) for x in ("before", "after"))
    ranks = np.load("ranks.npz")
    for side, title in (("i2t", "Image to text"), ("t2i", "Text to image")):
        expected = float(np.mean(1 / (ranks[f"{side}_ranks"] + 1.0)))
        assert after[side].pop("mrr") == pytest.approx(expected) and 0 < expected <= 1
        (old,), (new,) = (
            [line for line in lines if line.startswith(title)] for lines in (plain, printed)
        )
        assert new.startswith(old) and new != old
        assert after[side] == pytest.approx(before[side], abs=1e-9)
    assert after["rsum"] == pytest.approx(before["rsum"], abs=1e-9)
    folds = [
        metrics_of(rank_both_ways(*map(torch.from_numpy, whole_numbers(8, 5, seed=seed))))
        for seed in range(3)
    ]
    assert mean_metrics(folds).t2i.mrr == pytest.approx(sum(fold.t2i.mrr for fold in folds) / 3)
