"""Comparing models: paired intervals over images, and the folds joined."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from retrieval.comparison import compared_models, print_differences, ranks_of
from retrieval.metrics import metrics_of
from retrieval.ranking import Ranking

N = 40


def result_of(seed, folds=1):
    """An Evaluation of random ranks, two captions an image, as far as it is read."""
    rng = np.random.default_rng(seed)

    def ranking(n):
        return Ranking(torch.from_numpy(rng.integers(0, 30, n)), torch.zeros(n, 10).long())

    rankings = [(ranking(N // folds), ranking(2 * N // folds)) for _ in range(folds)]
    return SimpleNamespace(
        rankings=rankings,
        metrics=metrics_of(rankings[0]),
        dataset=SimpleNamespace(image_of=torch.arange(2 * N) // 2),
    )


def test_folds_are_joined():
    result = result_of(0, folds=4)
    i2t, t2i, image_of = ranks_of(result)
    assert i2t.tolist() == [rank for pair in result.rankings for rank in pair[0].ranks.tolist()]
    assert t2i.tolist() == [rank for pair in result.rankings for rank in pair[1].ranks.tolist()]
    assert image_of.tolist() == [caption // 2 for caption in range(2 * N)]


def test_the_difference_and_its_interval_are_those_of_paired_images():
    """R@1's interval is close to that of the mean of N differences."""
    results = {"a": result_of(1), "b": result_of(2)}
    found = compared_models(results).differences["a - b"]
    hits = [(ranks_of(result)[0] < 1).astype(float) for result in results.values()]
    paired = 100 * (hits[0] - hits[1])
    estimate, low, high = found["i2t_r1"]
    assert estimate == pytest.approx(paired.mean())
    half = scipy.stats.t.ppf(0.975, N - 1) * paired.std() / N**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    rsums = [sum(sum(side[:3]) for side in result.metrics) for result in results.values()]
    assert found["rsum"].estimate == pytest.approx(rsums[0] - rsums[1])


def test_every_pair_is_printed_and_in_the_json(capsys):
    compared = compared_models({name: result_of(seed) for seed, name in enumerate("abc")})
    assert list(compared.differences) == ["a - b", "a - c", "b - c"]
    print_differences(compared)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Differences, with 95 % intervals over images:"
    assert [line.split(": rsum ")[0] for line in lines[2:]] == ["a - b", "a - c", "b - c"]
    content = compared.as_dict()
    assert content["differences"]["a - c"]["rsum"] == list(compared.differences["a - c"]["rsum"])
    assert list(content["models"]) == ["a", "b", "c"]
    assert set(compared.hubness()["a"]) == {"i2t", "t2i"}


def test_a_model_and_itself_do_not_differ():
    found = compared_models({"a": result_of(1), "b": result_of(1)}).differences["a - b"]
    assert all(interval == (0, 0, 0) for interval in found.values())
