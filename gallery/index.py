"""Indexes of embeddings: find the nearest rows of a matrix by inner product.

exact           goes through all rows, block by block
ivf_sq8         FAISS: rows lie in lists around centres, 8 bits per number; few lists are searched
opq_ivf_pq64    FAISS: as before, but rows are rotated (Ge et al., "Optimized Product Quantization",
                CVPR 2013) and stored in 64 bytes each

FAISS's indexes find nearly all of the nearest in a small part of the time. What they find is ranked
again by the exact rows.

The last number of a row is minus a correction's shift (see `gallery.store`). FAISS gets the rows
at one length: see `levelled`. The product quantizer gives these two numbers a separate part: mixed
with others they would use up codes, although questions have the same numbers there.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from model import l2norm
from retrieval.ranking import Best
from runtime.errors import InputError
from runtime.files import check_regular

EXACT, IVF, PQ = TYPES = ("exact", "ivf_sq8", "opq_ivf_pq64")
EXACT_MOST, IVF_MOST = 200_000, 5_000_000  # most rows for which these are the usual types
BLOCK_ROWS, BLOCK_QUERIES = 16_384, 256  # of one product
AGAIN = 100  # at least so many of FAISS's finds are ranked exactly
AGAIN_QUERIES = 32  # ranked exactly at a time
DEPTH, WANTED_RECALL = 10, 0.98  # recall@10 that decides how many lists are searched
# Lists per square root of the number of rows. With fewer, groups of rows have no centre nearby.
LISTS = 4
TRAINED_ON, ITERATIONS = 40, 10  # training of FAISS's centres: rows per centre, rounds
CODE_ROWS, CODES = 16_384, 256  # product quantizer: rows it is trained on, codes per part
ROTATION_ROUNDS = 8
PARTS = 64  # of a product quantizer, not counting the shift's


def usual_type(n):
    """The type of index for n rows."""
    return EXACT if n <= EXACT_MOST else IVF if n <= IVF_MOST else PQ


def exact(embeddings, queries, top, cosine=False):
    """Scores and numbers of each query's `top` best rows, best first: (q, top) float32 and int64.

    embeddings: (n, D), may be memory-mapped
    queries: (q, D)
    top: all rows, if there are fewer
    cosine: scores are cosines instead of products; a row of zeros has 0
    """
    queries = l2norm(queries) if cosine else queries
    best = Best(len(queries), min(top, len(embeddings)), queries)
    for start in range(0, len(embeddings), BLOCK_ROWS):
        rows = embeddings[start : start + BLOCK_ROWS]
        rows = (l2norm(rows) if cosine else rows).t()
        for first in range(0, len(queries), BLOCK_QUERIES):
            some = slice(first, first + BLOCK_QUERIES)
            best.update(some, torch.mm(queries[some], rows), 1, start)
    return best.scores, best.items


def recall(found, wanted):
    """The share of `wanted` (q, k) numbers that are among `found` (q, any)."""
    return float((found.unsqueeze(1) == wanted.unsqueeze(2)).any(2).float().mean())


def spread(rows, most):
    """At most `most` of the rows, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).long()]


class Level(NamedTuple):
    """How rows come to one length, see `levelled`."""

    middle: float  # mean of minus the shifts
    length: float  # of the longest row once `middle` is subtracted


def level_of(blocks):
    """The Level of the rows that `blocks()`, called twice, yields in blocks (m, D + 1)."""
    count, total = 0, 0.0
    for rows in blocks():
        count, total = count + len(rows), total + float(rows[:, -1].double().sum())
    middle = total / max(count, 1)
    lengths = (float(_lengths(_centred(rows, middle)).max()) for rows in blocks() if len(rows))
    return Level(middle, max(lengths, default=0.0))


def _centred(rows, middle):
    """Rows (m, D + 1) with `middle` subtracted from their last number."""
    return torch.cat([rows[:, :-1], rows[:, -1:] - middle], 1)


def _lengths(rows):
    """(m, 1): the rows' lengths in float64."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)


def levelled(rows, level):
    """Rows (m, D + 1) -> (m, D + 2) of length 1, whose products with questions order as before.

    A photo x with the shift s becomes [x, -t, sqrt(length^2 - |x|^2 - t^2)] / length, where t is s
    less the mean of all shifts, and a question q becomes [q, 1, 0]. The mean takes the same from all
    scores of a question. The last number fills each row up to one length and is never asked for, so
    that inner product, cosine and Euclidean distance all order alike (Bachrach et al., "Speeding Up
    the Xbox Recommender System Using a Euclidean Transformation for Inner-Product Spaces", RecSys
    2014, equation 5). Centres and codes that are learned by distance then serve products, too.

    level: the Level of all rows of the gallery
    """
    centred = _centred(rows, level.middle)
    rest = (level.length**2 - _lengths(centred).square()).clamp(min=0).sqrt()
    return torch.cat([centred, rest.to(rows)], 1) / (level.length or 1)


# FAISS ------------------------------------------------------------------------------------------


def check_count(kind, n):
    """Raise InputError if n rows are too few for a type of index."""
    if kind in (IVF, PQ) and n < CODES:
        raise InputError(
            f"--index_type {kind} needs at least {CODES} photos to learn its codes from, and there "
            f"are {n}: take exact"
        )


def build(kind, embeddings, queries, path):
    """Write FAISS's index of (n, D + 1) embeddings, of type `kind`, into the file `path`.

    Raises InputError for too few rows, or if the file cannot be written.

    queries: (q, D + 1), like those that will be asked; as many lists are searched as these need to
        find WANTED_RECALL of their ten nearest
    """
    import faiss

    n, width = embeddings.shape
    check_count(kind, n)
    level = level_of(partial(embeddings.split, BLOCK_ROWS))
    lists = 2 ** round(np.log2(LISTS * n**0.5))
    sample = spread(embeddings, max(TRAINED_ON * lists, CODE_ROWS * (kind == PQ)))
    sample = levelled(sample, level).numpy()
    found = (_scalar if kind == IVF else _product)(faiss, sample, width + 1, lists)
    found.train(sample)
    for rows in embeddings.split(BLOCK_ROWS):
        found.add(levelled(rows, level).numpy())
    _choose_probes(Approximate(found, embeddings), queries)
    try:
        faiss.write_index(found, path)
    except RuntimeError as error:
        raise InputError(
            f"{path} could not be written ({_reason(error)}): free some space or name another "
            "folder"
        ) from error


def _scalar(faiss, sample, width, lists):
    """An empty ivf_sq8."""
    found = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width),
        width,
        lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    _set_rounds(found.cp)
    return found


def _set_rounds(clustering):
    """Set a clustering's rounds, and silence its warning about centres with few points."""
    clustering.niter, clustering.min_points_per_centroid = ITERATIONS, 1


def _product(faiss, sample, width, lists):
    """An empty opq_ivf_pq64. All numbers but the last two are rotated into parts.

    The last two, padded with zeros, are a part by themselves, or two if parts have one number each.
    """
    width -= 2
    parts = min(PARTS, width)
    each = width // parts
    tail = max(each, 2)
    rotation = faiss.OPQMatrix(width, parts, parts * each)
    rotation.niter, rotation.niter_pq_0, rotation.max_train_points = (
        ROTATION_ROUNDS,
        ITERATIONS,
        CODE_ROWS,
    )
    quantizer = faiss.ProductQuantizer(parts * each, parts, 8)
    _set_rounds(quantizer.cp)
    rotation.pq = quantizer
    rotation.train(np.ascontiguousarray(sample[:, :width]))
    matrix = np.zeros((parts * each + tail, width + 2), np.float32)
    matrix[:-tail, :-2] = faiss.vector_to_array(rotation.A).reshape(-1, width)
    matrix[parts * each, -2] = matrix[parts * each + 1, -1] = 1
    turned = faiss.LinearTransform(width + 2, len(matrix))
    faiss.copy_array_to_vector(matrix.ravel(), turned.A)
    turned.is_trained = True
    inner = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(len(matrix)),
        len(matrix),
        lists,
        len(matrix) // each,
        8,
        faiss.METRIC_INNER_PRODUCT,
    )
    _set_rounds(inner.cp)
    _set_rounds(inner.pq.cp)
    return faiss.IndexPreTransform(turned, inner)


def _choose_probes(found, queries):
    """Set the fewest lists, a power of two, that find WANTED_RECALL of the queries' ten nearest."""
    wanted = exact(found.embeddings, queries, DEPTH)[1]
    probes = 1
    while probes < found.lists.nlist:
        found.lists.nprobe = probes
        if recall(found.search(queries, DEPTH)[1], wanted) >= WANTED_RECALL:
            return
        probes *= 2
    found.lists.nprobe = found.lists.nlist


class Approximate:
    """FAISS's index of (n, D + 1) embeddings, with exact scores from the embeddings.

    Older ones have the embeddings as they are, not `levelled`.
    """

    def __init__(self, found, embeddings):
        import faiss

        self.faiss, self.embeddings = found, embeddings
        self.lists = faiss.downcast_index(faiss.extract_index_ivf(found))

    def search(self, queries, top):
        """As `exact`. If the searched lists hold fewer than `top`, -1 with score -inf follows."""
        n, count = len(self.embeddings), max(AGAIN, top)
        probes = self.lists.nprobe
        self.lists.nprobe = min(
            self.lists.nlist, max(probes, -(-2 * count * self.lists.nlist // n))
        )
        asked = nn.functional.pad(queries, (0, self.faiss.d - queries.shape[1]))
        numbers = torch.from_numpy(self.faiss.search(asked.numpy(), min(count, n))[1])
        self.lists.nprobe = probes
        found = [
            self._again(*pair, min(top, n))
            for pair in zip(queries.split(AGAIN_QUERIES), numbers.split(AGAIN_QUERIES))
        ]
        return tuple(torch.cat(parts) for parts in zip(*found))

    def _again(self, queries, numbers, top):
        """The best of the rows `numbers` (q, count) by their exact scores."""
        rows = self.embeddings[numbers.clamp(min=0).flatten()].unflatten(0, numbers.shape)
        scores = (
            torch.bmm(rows, queries.unsqueeze(2)).squeeze(2).masked_fill_(numbers < 0, -torch.inf)
        )
        scores, places = scores.topk(top, 1)
        return scores, numbers.gather(1, places)


def read(kind, path, embeddings):
    """The search function of an index: `exact` with only queries and top as arguments.

    FAISS's indexes are memory-mapped if they can be.
    Raises InputError if the file is damaged or does not belong to these embeddings.
    """
    if kind == EXACT:
        return partial(exact, embeddings)
    import faiss

    check_regular(path)
    try:
        found = Approximate(
            faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY), embeddings
        )
    except RuntimeError as error:
        raise InputError(
            f"{path} is not a whole FAISS index ({_reason(error)}): make it again with "
            "--rebuild_index"
        ) from error
    own = faiss.IndexIVFScalarQuantizer if kind == IVF else faiss.IndexIVFPQ
    if (
        not isinstance(found.lists, own)
        or found.faiss.metric_type != faiss.METRIC_INNER_PRODUCT
        or found.faiss.ntotal != len(embeddings)
        or found.faiss.d - embeddings.shape[1] not in (0, 1)
    ):
        raise InputError(
            f"{path} is not the {kind} index of this gallery: make it again with --rebuild_index"
        )
    return found.search


def _reason(error):
    """FAISS's error without the places in its source."""
    lines = str(error).splitlines()
    return lines[-1] if lines else type(error).__name__
