"""Reranking: the shortlist of a fast model, put in order by the scores of a slow one.

A VSE model compares a query with all targets by one product; SCAN compares regions and words, at about a thousand
times the cost, and so only orders the K targets that VSE finds nearest. Sources and rankings are those of `ranking`.
"""

import time
from typing import NamedTuple

import torch

from errors import InputError
from ranking import Ranking, just_below, rank_shifted

PAIRS = 2**20  # scored at a time


def candidate_scores(source, side, candidates, queries=None):
    """Scores (n, K) of queries with their candidates.

    source: of all similarities; side: "i2t", where queries are images and candidates captions, or "t2i"; candidates:
    (n, K) numbers of targets; queries: (n,) numbers, all queries in turn unless given.
    """
    if queries is None:
        queries = torch.arange(len(candidates), device=candidates.device)
    pairs = queries.unsqueeze(1).expand_as(candidates).flatten(), candidates.flatten()
    return source.pairs(*(pairs if side == "i2t" else pairs[::-1])).view(candidates.shape)


def rerank(source, shortlists, k, image_of):
    """(i2t Ranking, t2i Ranking) with the first k targets of each query put in order by another model's scores.

    source: of the other model's similarities; shortlists: both Rankings of the one that makes the shortlists, with k
    items or more (all, if fewer); image_of: for each caption its image's number, (C,).
    A query with none of its own among the k keeps its rank, which is k at least: those k all stand before its own. So
    does one whose own is there by chance, as one of several with the k-th best score.
    """
    sides = [ranking.items[:, :k] for ranking in shortlists]
    images, captions = (torch.arange(len(side), device=side.device).unsqueeze(1).expand_as(side) for side in sides)
    pairs = ((images, sides[0]), (sides[1], captions))  # of an image and a caption, both ways
    numbers = (torch.cat([one.flatten() for one in both]).split(PAIRS) for both in zip(*pairs))
    scores = torch.cat([source.pairs(*some) for some in zip(*numbers)])
    scores = [part.view_as(side) for part, side in zip(scores.split([side.numel() for side in sides]), sides)]
    image_of = image_of.to(sides[0].device)
    own = [image_of[captions] == images for images, captions in pairs]
    return tuple(_reordered(*one) for one in zip(shortlists, scores, own))


def _reordered(ranking, scores, own):
    """A Ranking whose first k items stand by these scores (n, k); own: (n, k), which are the query's own."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    items = torch.cat((ranking.items.gather(1, order), ranking.items[:, scores.shape[1]:]), 1)
    bars = just_below(scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True))
    before = (~own & ~(scores < bars)).sum(1)  # equal scores, and NaN, count against the model
    found = own.any(1) & (ranking.ranks < scores.shape[1])
    return Ranking(torch.where(found, before, ranking.ranks), items)


# An evaluation ----------------------------------------------------------------------------------

class Timed(NamedTuple):
    """One way of ranking a split: of each of its folds (i2t Ranking, t2i Ranking), and the seconds they took."""

    rankings: tuple
    seconds: float


def by_kind(ensemble):
    """The places of the VSE and of the SCAN model in an Ensemble; raises InputError where it has not one of each."""
    kinds = [bool(member.opt.cross_attn) for member in ensemble.members]
    if sorted(kinds) != [False, True]:
        raise InputError("--rerank needs a VSE and a SCAN checkpoint (one trained with --cross_attn), and --model_path "
                         f"names {kinds.count(False)} of the one and {kinds.count(True)} of the other")
    return kinds.index(False), kinds.index(True)


def rank_three_ways(result, k, top):
    """{"vse", "reranked", "scan": Timed}: by VSE alone, by SCAN among the first k of VSE's, by SCAN alone.

    result: an Evaluation by an Ensemble of both; top: items kept for each query. The seconds are those from embeddings
    to ranks; the reranked ones' include the shortlists'.
    """
    places, folds = by_kind(result.checkpoint), []
    for images, captions, image_of in result.parts():
        sources = result.checkpoint.sources(images, captions)
        vse, scan = (sources[place] for place in places)
        (alone,), vse_seconds = _timed(rank_shifted, vse, top=top, image_of=image_of)
        (shortlists,), short_seconds = _timed(rank_shifted, vse, top=max(k, top), image_of=image_of)
        reranked, seconds = _timed(rerank, scan, shortlists, k, image_of)
        (full,), scan_seconds = _timed(rank_shifted, scan, top=top, image_of=image_of)
        folds.append({"vse": (alone, vse_seconds), "reranked": (reranked, short_seconds + seconds),
                      "scan": (full, scan_seconds)})
    ways = {way: tuple(zip(*(fold[way] for fold in folds))) for way in folds[0]}
    return {way: Timed(rankings, sum(seconds)) for way, (rankings, seconds) in ways.items()}


def _timed(function, *arguments, **named):
    """What a function of rankings gives, and the seconds until it is there."""
    start = time.perf_counter()
    found = function(*arguments, **named)
    for ranking in found if isinstance(found[0], Ranking) else found[0]:
        ranking.ranks.cpu()  # waits for the device
    return found, time.perf_counter() - start
