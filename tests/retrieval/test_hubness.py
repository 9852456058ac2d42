"""N_k and its figures: a hand-made 6 x 8 example, plain loops, SciPy's skewness, and limiting cases."""

import numpy as np
import pytest
import scipy.stats
import torch

from retrieval.hubness import (
    DEPTHS,
    Hubness,
    hubness_both_ways,
    hubness_of,
    k_occurrence,
    mean_hubness,
)
from retrieval.ranking import Ranking, rank_both_ways
from retrieval.similarity import SOURCES

# Six queries, eight targets. Target 1 is a hub; targets 6 and 7 are nobody's neighbour.
SIMILARITIES = [
    [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.0, 0.1],
    [0.3, 0.9, 0.8, 0.1, 0.2, 0.0, 0.1, 0.2],
    [0.1, 0.8, 0.9, 0.4, 0.3, 0.2, 0.0, 0.1],
    [0.2, 0.7, 0.1, 0.9, 0.3, 0.0, 0.1, 0.0],
    [0.1, 0.9, 0.2, 0.3, 0.8, 0.0, 0.2, 0.1],
    [0.4, 0.6, 0.5, 0.1, 0.2, 0.9, 0.3, 0.0],
]

N_1 = [1, 2, 1, 1, 0, 1, 0, 0]  # counted by hand

N_2 = [1, 6, 2, 1, 1, 1, 0, 0]


def loop_counts(similarities, k):
    """N_k by sorting every row."""
    counts = [0] * len(similarities[0])
    for row in similarities:
        for target in sorted(range(len(row)), key=lambda j: -row[j])[:k]:
            counts[target] += 1
    return counts


def loop_figures(counts, k):
    """The seven figures, one number at a time."""
    n, slots = len(counts), sum(counts)
    mean = slots / n
    variance = sum((count - mean) ** 2 for count in counts) / n
    third = sum((count - mean) ** 3 for count in counts) / n
    in_top = -(-n // 100)
    return Hubness(
        third / variance**1.5 if variance else 0.0,
        sum(count == 0 for count in counts) / n,
        sum(sorted(counts)[n - in_top :]) / slots,
        sum(max(0, count - mean) for count in counts) / slots,
        sum(count for count in counts if count >= 2 * k) / slots,
        max(counts),
        counts.index(max(counts)),
    )


@pytest.mark.parametrize("k, expected", [(1, N_1), (2, N_2)])
def test_n_k_of_the_hand_made_example(k, expected):
    assert loop_counts(SIMILARITIES, k) == expected
    assert k_occurrence(torch.tensor(SIMILARITIES).topk(k).indices, 8).tolist() == expected


@pytest.mark.parametrize(
    "counts, k",
    [
        (N_1, 1),
        (N_2, 2),
        ([5, 0, 0, 0], 1),
        ([0, 3], 1),
        (list(range(201)), 10),
        (list(range(300)), 149),
        (list(range(300)), 150),
    ],
    ids=["1", "2", "one", "two", "many", "all but the largest", "none"],
)
def test_figures_agree_with_the_loop_and_scipy(counts, k):
    figures = hubness_of(torch.tensor(counts), k)
    assert figures == pytest.approx(loop_figures(counts, k), abs=1e-12)
    assert figures.skewness == pytest.approx(scipy.stats.skew(counts), abs=1e-12)


def test_figures_of_the_hand_made_example():
    figures = hubness_of(torch.tensor(N_2), 2)
    assert figures.anti_hubs == 2 / 8
    assert figures.top_share == 6 / 12  # one target is the top 1 % of eight
    assert figures.robin_hood == pytest.approx((6 - 1.5 + 2 - 1.5) / 12)
    assert (figures.largest, figures.largest_item) == (6, 1)


def test_hubs_are_the_targets_with_at_least_twice_k():
    """By hand: of N_1 target 1 alone (2 of 6 slots), of N_2 target 1 alone (6 of 12), since 2 is not twice 2."""
    assert hubness_of(torch.tensor(N_1), 1).hub_occurrence == pytest.approx(2 / 6)
    assert hubness_of(torch.tensor(N_2), 2).hub_occurrence == 6 / 12
    assert hubness_of(torch.tensor([4, 3, 5, 0]), 2).hub_occurrence == 9 / 12


def test_without_hubs_every_figure_is_at_its_least():
    assert hubness_of(torch.full((200,), 3), 3) == Hubness(0.0, 0.0, 2 / 200, 0.0, 0.0, 3, 0)


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("n", [2, 37])
def test_both_directions_agree_with_loops_over_the_matrix(monkeypatch, n, measure):
    """37 images are three tiles."""
    monkeypatch.setattr(SOURCES[measure], "tile_images", 16)
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 20, generator=generator, dtype=torch.float64)
    captions = torch.randn(5 * n, 20, generator=generator, dtype=torch.float64)
    matrix = (
        images @ captions.T
        if measure == "cosine"
        else -torch.stack([(captions - image).clamp(min=0).norm(dim=1) for image in images])
    )
    hubs = hubness_both_ways(rank_both_ways(images, captions, measure, top=10))
    for side, scores in (("i2t", matrix.tolist()), ("t2i", matrix.T.tolist())):
        for k in DEPTHS:
            assert hubs[side][k] == pytest.approx(loop_figures(loop_counts(scores, k), k), abs=1e-9)


def test_the_items_of_a_ranking_are_the_best_ones_best_first():
    images, captions = (
        torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (1100, 5500)
    )
    for ranking, scores in zip(
        rank_both_ways(images, captions, top=10), (images @ captions.T, captions @ images.T)
    ):
        kept = scores.gather(1, ranking.items)
        assert torch.allclose(kept, scores.topk(10).values, atol=1e-5)
        assert (kept[:, :-1] >= kept[:, 1:] - 1e-5).all()


def test_fewer_targets_than_k_are_all_neighbours():
    ranking = rank_both_ways(torch.eye(3), torch.eye(3).repeat_interleave(5, 0), top=10)[1]
    assert sorted(ranking.items[0].tolist()) == [0, 1, 2]


def test_the_mean_over_folds_names_no_item():
    folds = [
        {
            side: {k: Hubness(s, 0.1 * s, 0.2 * s, 0.3 * s, 0.4 * s, s, 7) for k in DEPTHS}
            for side in ("i2t", "t2i")
        }
        for s in (1, 2)
    ]
    mean = mean_hubness(folds)
    assert mean["t2i"][5] == pytest.approx((1.5, 0.15, 0.3, 0.45, 0.6, 1.5, -1))
    assert mean_hubness(folds[:1]) == folds[0]


def test_a_single_image_has_figures():
    ranking = Ranking(torch.tensor([0]), torch.tensor([[0, 1, 2, 3, 4]]))
    other = Ranking(torch.zeros(5).long(), torch.zeros(5, 1).long())
    hubs = hubness_both_ways((ranking, other))
    assert hubs["i2t"][10].skewness == 0 and hubs["t2i"][1].largest == 5


def test_counts_fit_numpy_too():
    assert (
        np.bincount([1, 1, 2], minlength=4).tolist()
        == k_occurrence(torch.tensor([[1], [1], [2]]), 4).tolist()
    )
