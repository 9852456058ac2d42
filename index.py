"""Nearest rows of a matrix of embeddings by inner product: exactly, a block at a time."""

import torch

from ranking import Best

BLOCK_ROWS, BLOCK_QUERIES = 16_384, 256  # of one product


def exact(embeddings, queries, top):
    """(n, D) embeddings, which may be memory-mapped, and (q, D) queries -> scores and numbers of the `top` best rows of
    each query (all, if fewer), best first: (q, top) float32 and int64."""
    best = Best(len(queries), min(top, len(embeddings)), queries)
    for start in range(0, len(embeddings), BLOCK_ROWS):
        rows = embeddings[start:start + BLOCK_ROWS].t()
        for first in range(0, len(queries), BLOCK_QUERIES):
            some = slice(first, first + BLOCK_QUERIES)
            best.update(some, torch.mm(queries[some], rows), 1, start)
    return best.scores, best.items
