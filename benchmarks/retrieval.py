"""Time ranks, recalls and hub figures, in comparison with the original style."""

import time
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.made_up import made_up_embeddings
from benchmarks.timing import peak_extra_memory, ratio, row, spread, watched
from evaluation import FOLDS
from features.files import CAPTIONS_PER_IMAGE
from loss import cosine_sim
from retrieval.corrections import METHODS, corrections_of, parameters_of, rank_corrected
from retrieval.hubness import DEPTHS, hubness_both_ways
from retrieval.metrics import metrics_of
from retrieval.ranking import rank_both_ways
from retrieval.similarity import Cosine

HARD_SCORES = 1e-6  # scores closer than this may be ranked in another order


def reference_ranks(images, captions):
    """Ranks (image to text, text to image) by argsort in float64, row by row."""
    images, captions = (x.cpu().numpy().astype(np.float64) for x in (images, captions))
    images = images.repeat(CAPTIONS_PER_IMAGE, 0)
    n = len(captions) // CAPTIONS_PER_IMAGE
    to_text, to_image = np.zeros(n), np.zeros(len(captions))
    for i in watched(range(n)):
        order = np.argsort(images[CAPTIONS_PER_IMAGE * i] @ captions.T)[::-1]
        own = range(CAPTIONS_PER_IMAGE * i, CAPTIONS_PER_IMAGE * (i + 1))
        to_text[i] = min(np.where(order == c)[0][0] for c in own)
    unique = images[::CAPTIONS_PER_IMAGE]
    for i in watched(range(n)):
        scores = captions[CAPTIONS_PER_IMAGE * i : CAPTIONS_PER_IMAGE * (i + 1)] @ unique.T
        for c, own_scores in enumerate(scores):
            to_image[CAPTIONS_PER_IMAGE * i + c] = np.where(np.argsort(own_scores)[::-1] == i)[0][0]
    return to_text, to_image


def bench_evaluation(options, timer, n_images):
    """Time ranks in both directions, against the product alone and against argsort."""
    images, captions = made_up_embeddings(n_images, options.embed_size, timer.device)
    fold = n_images // FOLDS
    fold_images, fold_captions = images.split(fold), captions.split(fold * CAPTIONS_PER_IMAGE)

    def product():
        return images @ captions.t()

    def fold_products():
        for pair in zip(fold_images, fold_captions):
            cosine_sim(*pair)

    def folds():
        for pair in zip(fold_images, fold_captions):
            metrics_of(rank_both_ways(*pair, top=0))

    name = f"evaluation, {n_images} x {len(captions)}"
    fold_floor, fold_times = timer.turns(fold_products, folds)
    yield {
        f"five folds of {fold}: times their products alone": {"ours": ratio(fold_times, fold_floor)}
    }
    floor_times, times = timer.turns(product, lambda: rank_both_ways(images, captions, top=0))
    yield {f"{name}: times the product alone": {"ours": ratio(times, floor_times)}}
    start = time.perf_counter()
    expected = reference_ranks(images, captions)
    reference_seconds = time.perf_counter() - start
    ranked = rank_both_ways(images, captions)
    check_ranks(images, captions, ranked, expected)
    memory = peak_extra_memory(lambda: rank_both_ways(images, captions))
    yield {
        f"{name} (s; reference: argsort)": row(
            times, [reference_seconds] * len(times), 1, median(floor_times)
        ),
        f"{name}: peak extra memory (MB)": {"ours": spread([memory], 1e6)}
        if memory is not None
        else {},
    }


def bench_hubs(options, timer, n_images):
    """Time the hubness table and each correction against one product.

    The corrections' bank is as large as the split.
    """
    images, captions = made_up_embeddings(n_images, options.embed_size, timer.device)
    bank_images, bank_captions = images.flip(1), captions.flip(1)
    plain = rank_both_ways(images, captions, top=max(DEPTHS))

    def product():
        return images @ captions.t()

    def hubness():
        hubness_both_ways(rank_both_ways(images, captions, top=max(DEPTHS)))

    def corrected(name):
        wanted = [(name, parameters_of(name))]
        pairs = zip(
            corrections_of("i2t", Cosine(bank_images, captions), wanted),
            corrections_of("t2i", Cosine(images, bank_captions), wanted),
        )
        rank_corrected(Cosine(images, captions), plain, list(pairs))

    floor, table, *times = timer.turns(
        product, hubness, *(partial(corrected, name) for name in METHODS)
    )
    memory, size = peak_extra_memory(hubness), f"{n_images} x {len(captions)}"
    peak = {"ours": spread([memory], 1e6)} if memory is not None else {}
    yield {
        f"hubness table, {size}: times the product alone": {"ours": ratio(table, floor)},
        f"hubness table, {size}: peak extra memory (MB)": peak,
        **{
            f"{name}, {size}, bank as large, both ways: times the product alone": {
                "ours": ratio(own, floor)
            }
            for name, own in zip(METHODS, times)
        },
    }


def check_ranks(images, captions, ranked, expected):
    """Raise AssertionError unless the ranks equal the reference's, near ties aside.

    A near tie: float64 scores within HARD_SCORES of the pair's.
    """
    scores = images.cpu().double() @ captions.cpu().double().t()
    own = scores.unflatten(1, (len(images), CAPTIONS_PER_IMAGE)).diagonal().t()
    for ranking, ranks, pairs, matrix in (
        (ranked[0], expected[0], own.amax(1), scores),
        (ranked[1], expected[1], own.flatten(), scores.t()),
    ):
        near = (
            torch.cat(
                [
                    ((rows - bars.unsqueeze(1)).abs() < HARD_SCORES).sum(1)
                    for rows, bars in zip(matrix.split(500), pairs.split(500))
                ]
            )
            > 1
        )
        differ = torch.from_numpy(ranks).long() != ranking.ranks.cpu()
        assert not (differ & ~near).any(), "ranks differ from the reference's"
        assert differ.float().mean() < 0.01, "too many near ties to compare"
