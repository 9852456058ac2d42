"""Reranking: a slow model orders the shortlist of a fast one.

A VSE model compares a query with all targets in one matrix product. SCAN compares regions and
words, at about a thousand times the cost, so it only orders the K targets that VSE finds nearest.
Sources of similarities and Rankings are those of `retrieval.ranking`.
"""

import time
from typing import NamedTuple

import torch

from retrieval.ranking import Ranking, just_below, rank_shifted
from runtime.errors import InputError

PAIRS = 2**20  # pairs scored at a time


def candidate_scores(source, side, candidates, queries=None):
    """Scores (n, K) of queries with their candidates.

    side: "i2t" (queries are images, candidates captions) or "t2i"
    candidates: (n, K) numbers of targets
    queries: (n,) numbers of queries; None: 0 to n - 1
    """
    if queries is None:
        queries = torch.arange(len(candidates), device=candidates.device)
    pairs = queries.unsqueeze(1).expand_as(candidates).flatten(), candidates.flatten()
    return source.pairs(*(pairs if side == "i2t" else pairs[::-1])).view(candidates.shape)


def rerank(source, shortlists, k, image_of):
    """(i2t Ranking, t2i Ranking) with each query's first k targets reordered by another model.

    A query with no own item among its k keeps its rank, which is at least k, because all k rank
    before its own. So does a query whose own item is among the k only because it ties with the k-th
    best score.

    source: the other model's similarities
    shortlists: both Rankings of the first model, with at least k items (all, if there are fewer)
    image_of: (C,), each caption's image
    """
    sides = [ranking.items[:, :k] for ranking in shortlists]
    images, captions = (
        torch.arange(len(side), device=side.device).unsqueeze(1).expand_as(side) for side in sides
    )
    pairs = ((images, sides[0]), (sides[1], captions))  # (image, caption), both ways
    numbers = (torch.cat([one.flatten() for one in both]).split(PAIRS) for both in zip(*pairs))
    scores = torch.cat([source.pairs(*some) for some in zip(*numbers)])
    scores = [
        part.view_as(side)
        for part, side in zip(scores.split([side.numel() for side in sides]), sides)
    ]
    image_of = image_of.to(sides[0].device)
    own = [image_of[captions] == images for images, captions in pairs]
    return tuple(_reordered(*one) for one in zip(shortlists, scores, own))


def _reordered(ranking, scores, own):
    """The Ranking with its first k items reordered by `scores`.

    scores, own: (n, k); own says which items are the query's own
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    items = torch.cat((ranking.items.gather(1, order), ranking.items[:, scores.shape[1] :]), 1)
    bars = just_below(scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True))
    before = (~own & ~(scores < bars)).sum(1)  # equal scores, and NaN, count against the model
    found = own.any(1) & (ranking.ranks < scores.shape[1])
    return Ranking(torch.where(found, before, ranking.ranks), items)


# Evaluating it ----------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A way of ranking a split: (i2t Ranking, t2i Ranking) of each fold, and the seconds taken."""

    rankings: tuple
    seconds: float


def by_kind(ensemble):
    """The places of the VSE and the SCAN model in an Ensemble; InputError unless it has both."""
    kinds = [bool(member.opt.cross_attn) for member in ensemble.members]
    if sorted(kinds) != [False, True]:
        raise InputError(
            "--rerank needs a VSE and a SCAN checkpoint (one trained with --cross_attn), and "
            f"--model_path names {kinds.count(False)} of the one and {kinds.count(True)} of the "
            "other"
        )
    return kinds.index(False), kinds.index(True)


def rank_three_ways(result, k, top):
    """{"vse", "reranked", "scan": Timed}: VSE alone, VSE's first k reordered by SCAN, SCAN alone.

    Seconds are from embeddings to ranks; those of "reranked" include making the shortlists.

    result: an Evaluation of an Ensemble of both models
    top: items kept per query
    """
    places, folds = by_kind(result.checkpoint), []
    for images, captions, image_of in result.parts():
        sources = result.checkpoint.sources(images, captions)
        vse, scan = (sources[place] for place in places)
        (alone,), vse_seconds = _timed(rank_shifted, vse, top=top, image_of=image_of)
        (shortlists,), short_seconds = _timed(rank_shifted, vse, top=max(k, top), image_of=image_of)
        reranked, seconds = _timed(rerank, scan, shortlists, k, image_of)
        (full,), scan_seconds = _timed(rank_shifted, scan, top=top, image_of=image_of)
        folds.append(
            {
                "vse": (alone, vse_seconds),
                "reranked": (reranked, short_seconds + seconds),
                "scan": (full, scan_seconds),
            }
        )
    ways = {way: tuple(zip(*(fold[way] for fold in folds))) for way in folds[0]}
    return {way: Timed(rankings, sum(seconds)) for way, (rankings, seconds) in ways.items()}


def _timed(function, *arguments, **named):
    """What a function that returns rankings returns, and the seconds it takes."""
    start = time.perf_counter()
    found = function(*arguments, **named)
    for ranking in found if isinstance(found[0], Ranking) else found[0]:
        ranking.ranks.cpu()  # waits for the device
    return found, time.perf_counter() - start
