"""Hubs: targets that are among the nearest of far more queries than their share.

N_k of a target is the number of queries that have it among their k nearest; targets that no query retrieves count
as 0 (anti-hubs), and of equal similarities any may be the nearer. Radovanovic et al., "Hubs in Space", JMLR 2010;
the Robin Hood index as in Feldbauer et al., "Fast approximate hubness reduction", 2018; a hub is a target with
N_k >= 2k as in Feldbauer and Flexer, "A comprehensive empirical comparison of hubness reduction in high-dimensional
spaces", 2019. In image to text ("i2t") images are the queries and captions the targets, in text to image ("t2i") the
other way round. The mean N_k is k times the queries a target: with five captions an image k/5 in i2t and 5k in t2i, so
that 2k is ten times the mean there and less than half of it here.
"""

from typing import NamedTuple

import torch

DEPTHS = (1, 5, 10)  # the k of N_k
TOP_SHARE = 100  # one in so many targets is in the top
HUB_SIZE = 2  # a hub's N_k is at least so many times k


class Hubness(NamedTuple):
    """What N_k of all targets in one direction looks like."""

    skewness: float  # E[(N_k - mean)^3] / deviation^3 over the targets; 0 where all are equal
    anti_hubs: float  # share of targets with N_k = 0
    top_share: float  # share of all k-nearest slots that the top 1 % of targets take
    robin_hood: float  # share of slots that would have to move for all targets to have as many
    hub_occurrence: float  # share of slots that hubs take
    largest: int  # the largest N_k
    largest_item: int  # the target that has it


def k_occurrence(neighbours, n_targets):
    """(n_queries, k) numbers of each query's nearest targets -> N_k, (n_targets,) int64.

    From a matrix: `k_occurrence(similarities.topk(k).indices, similarities.shape[1])`. From embeddings: the
    `.items` of `ranking.rank_both_ways(images, captions, top=k)`, which keeps nothing of the matrix' size.
    """
    return torch.bincount(neighbours.flatten(), minlength=n_targets)


def hubness_of(counts, k):
    """N_k of all targets (n,) and k -> Hubness, computed in float64 on the CPU."""
    counts = counts.cpu().double()
    centred = counts - counts.mean()
    variance = centred.square().mean()
    top = counts.topk(-(-len(counts) // TOP_SHARE)).values
    return Hubness(skewness=float(centred.pow(3).mean() / variance**1.5) if variance else 0.0,
                   anti_hubs=float((counts == 0).double().mean()),
                   top_share=float(top.sum() / counts.sum()),
                   robin_hood=float(centred.abs().sum() / counts.sum() / 2),
                   hub_occurrence=float(counts[counts >= HUB_SIZE * k].sum() / counts.sum()),
                   largest=int(counts.max()), largest_item=int(counts.argmax()))


def occurrences(rankings):
    """(i2t Ranking, t2i Ranking) with 10 items each (all, if fewer) -> N_k of all targets, {"i2t": {k: (n_targets,)},
    "t2i": {k: (n_targets,)}}, on the CPU: the items come over in one copy."""
    items = torch.cat([ranking.items.flatten() for ranking in rankings]).cpu()
    parts = items.split([ranking.items.numel() for ranking in rankings])
    both = [part.view_as(ranking.items) for part, ranking in zip(parts, rankings)]
    return {side: {k: k_occurrence(own[:, :k], len(targets)) for k in DEPTHS}
            for side, own, targets in zip(("i2t", "t2i"), both, both[::-1])}


def hubness_both_ways(rankings):
    """(i2t Ranking, t2i Ranking) with 10 items each (all, if fewer) -> {"i2t": {k: Hubness}, "t2i": {k: Hubness}}."""
    return {side: {k: hubness_of(counts, k) for k, counts in depths.items()}
            for side, depths in occurrences(rankings).items()}


def mean_hubness(folds):
    """The mean of each figure over the folds of a split; no single item has the largest N_k."""
    figures = range(len(Hubness._fields) - 1)  # all but the item
    return {side: {k: Hubness(*(sum(fold[side][k][place] for fold in folds) / len(folds) for place in figures), -1)
                   for k in DEPTHS} for side in ("i2t", "t2i")} if len(folds) > 1 else folds[0]
