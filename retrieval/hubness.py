"""Hubs: targets that are among the nearest of far more queries than their share.

N_k of a target is the number of queries that have it among their k nearest (Radovanovic et al.,
"Hubs in Space", JMLR 2010). Targets that no query retrieves count as 0 (anti-hubs); among equal
similarities, any may count as the nearer. The Robin Hood index is that of Feldbauer et al., "Fast
approximate hubness reduction", 2018. A hub is a target with N_k >= 2k, as in Feldbauer and Flexer,
"A comprehensive empirical comparison of hubness reduction in high-dimensional spaces", 2019.

In image to text ("i2t") images are the queries and captions the targets; in text to image ("t2i")
it is the other way round. The mean N_k is k * n_queries / n_targets. With five captions per image
that is k/5 in i2t and 5k in t2i, so a hub's 2k is ten times the mean in i2t, but less than half of
it in t2i.
"""

from typing import NamedTuple

import torch

DEPTHS = (1, 5, 10)  # the k of N_k
TOP_SHARE = 100  # the top is one target in 100
HUB_SIZE = 2  # a hub has N_k >= HUB_SIZE * k


class Hubness(NamedTuple):
    """How unevenly N_k is spread over the targets of one direction."""

    skewness: float  # E[(N_k - mean)^3] / deviation^3 over the targets; 0 if all are equal
    anti_hubs: float  # share of targets with N_k = 0
    top_share: float  # share of all k-nearest slots that the top 1 % of targets take
    robin_hood: float  # share of slots that would have to move for all targets to have equally many
    hub_occurrence: float  # share of slots that hubs take
    largest: int  # the largest N_k
    largest_item: int  # the target that has it; -1 in a mean over folds


def k_occurrence(neighbours, n_targets):
    """N_k of all targets, (n_targets,) int64.

    neighbours: (n_queries, k) numbers of each query's nearest targets. From a similarity matrix:
    `similarities.topk(k).indices`. From embeddings, without holding the matrix: the `.items` of
    `ranking.rank_both_ways(images, captions, top=k)`.
    """
    return torch.bincount(neighbours.flatten(), minlength=n_targets)


def hubness_of(counts, k):
    """The Hubness of N_k, computed in float64 on the CPU.

    counts: (n_targets,) N_k of all targets
    """
    counts = counts.cpu().double()
    centred = counts - counts.mean()
    variance = centred.square().mean()
    top = counts.topk(-(-len(counts) // TOP_SHARE)).values
    return Hubness(
        skewness=float(centred.pow(3).mean() / variance**1.5) if variance else 0.0,
        anti_hubs=float((counts == 0).double().mean()),
        top_share=float(top.sum() / counts.sum()),
        robin_hood=float(centred.abs().sum() / counts.sum() / 2),
        hub_occurrence=float(counts[counts >= HUB_SIZE * k].sum() / counts.sum()),
        largest=int(counts.max()),
        largest_item=int(counts.argmax()),
    )


def occurrences(rankings):
    """N_k of all targets both ways, on the CPU: {"i2t": {k: (n_targets,)}, "t2i": ...}.

    rankings: (i2t Ranking, t2i Ranking) with 10 items per query (all, if there are fewer)
    """
    items = torch.cat([ranking.items.flatten() for ranking in rankings]).cpu()  # one copy for both
    parts = items.split([ranking.items.numel() for ranking in rankings])
    both = [part.view_as(ranking.items) for part, ranking in zip(parts, rankings)]
    return {
        side: {k: k_occurrence(own[:, :k], len(targets)) for k in DEPTHS}
        for side, own, targets in zip(("i2t", "t2i"), both, both[::-1])
    }


def hubness_both_ways(rankings):
    """{"i2t": {k: Hubness}, "t2i": {k: Hubness}} of two Rankings, as `occurrences` takes them."""
    return {
        side: {k: hubness_of(counts, k) for k, counts in depths.items()}
        for side, depths in occurrences(rankings).items()
    }


def mean_hubness(folds):
    """The mean of each figure over a split's folds, each as `hubness_both_ways` returns it."""
    if len(folds) == 1:
        return folds[0]
    return {
        side: {k: _mean([fold[side][k] for fold in folds]) for k in DEPTHS}
        for side in ("i2t", "t2i")
    }


def _mean(rows):
    """The mean of several Hubness."""
    *figures, _ = (sum(values) / len(rows) for values in zip(*rows))
    return Hubness(*figures, largest_item=-1)  # of the item, there is no mean
