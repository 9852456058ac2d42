"""Hub corrections at inference: no training, one shift per target.

Each method lowers a target's similarities by how close the target is to a bank of other queries,
such as those of the training split. For the ranking of one query, every method reduces to
S'[q, t] = S[q, t] - shift[t], because terms that depend on the query alone do not change its
ranking. Shifts are on the scale of S.

A shift is a pure function of the similarities between targets and bank, (n_targets, n_bank). It is
computed row by row, except Sinkhorn's, which needs all rows. Image to text shifts captions with a
bank of images; text to image shifts images with a bank of captions.
"""

import inspect
import itertools
import math
from typing import NamedTuple

import torch

from retrieval.metrics import DEPTHS
from retrieval.ranking import Best, Ranking, rank_shifted
from runtime.errors import number

BLOCK = 2**22  # similarities (for order embeddings, differences) held in memory at once


def csls(similarities, k=10):
    """Half the mean similarity to the k nearest bank queries (all, if there are fewer).

    CSLS, Conneau et al., "Word Translation Without Parallel Data", ICLR 2018:
    2 S[q, t] - r(q) - r(t).
    """
    return nnn(similarities, k, alpha=0.5)


def nnn(similarities, k=128, alpha=0.75):
    """alpha times the mean similarity to the k nearest bank queries (all, if there are fewer).

    NNN, Chowdhury et al., "Nearest Neighbor Normalization Improves Multimodal Retrieval",
    EMNLP 2024.
    """
    return alpha * similarities.topk(min(k, similarities.shape[1]), sorted=False).values.mean(1)


def inverted_softmax(similarities, temperature=0.05):
    """temperature * log mean exp(similarities / temperature) over the bank.

    Inverted softmax, Smith et al., "Offline bilingual word vectors, orthogonal transformations and
    the inverted softmax", ICLR 2017: exp(S[q, t] / T) / sum_b exp(S[b, t] / T).
    """
    return _soft_mean(similarities, temperature, 1)


def qbnorm(similarities, temperature=0.05, k=1):
    """The inverted softmax, applied only to queries whose nearest target is activated.

    A target is activated if it is among the k nearest of any bank query. That depends on all
    targets, so `corrections_of` finds them, not this function.

    QB-Norm's dynamic inverted softmax, Bogolin et al., "Cross Modal Retrieval with Querybank
    Normalisation", CVPR 2022.
    """
    return inverted_softmax(similarities, temperature)


def sinkhorn(similarities, temperature=0.05, iterations=10):
    """The targets' potentials after Sinkhorn balancing of exp(similarities / temperature).

    Targets are balanced first, so one iteration is the inverted softmax. Needs all rows at once.

    Cuturi, "Sinkhorn Distances", NIPS 2013; for retrieval, Park et al., "Normalized Contrastive
    Learning for Text-Video Retrieval", EMNLP 2022.
    """
    shift = _soft_mean(similarities, temperature, 1)
    for _ in range(iterations - 1):
        bank_shift = _soft_mean(similarities, temperature, 0, shift.unsqueeze(1))
        shift = _soft_mean(similarities, temperature, 1, bank_shift.unsqueeze(0))
    return shift


def _soft_mean(similarities, temperature, dim, shift=None):
    """temperature * log mean exp((similarities - shift) / temperature) along dim, in blocks."""
    # Blocks of rows are small enough to stay in cache; columns need long pieces of rows.
    size = BLOCK // 16 if dim == 1 else BLOCK
    height = max(1, size // similarities.shape[dim])
    blocks = similarities.split(height, 1 - dim)
    shifts = (
        [0.0] * len(blocks)
        if shift is None
        else shift.expand_as(similarities).split(height, 1 - dim)
    )
    soft = torch.cat(
        [((block - off) / temperature).logsumexp(dim) for block, off in zip(blocks, shifts)]
    )
    return temperature * (soft - math.log(similarities.shape[dim]))


METHODS = {
    "csls": csls,
    "inverted_softmax": inverted_softmax,
    "qbnorm": qbnorm,
    "nnn": nnn,
    "sinkhorn": sinkhorn,
}
# Those that are one shift per target, whatever the query, so a gallery's index can carry them. It
# tries them in this order, and takes the first of equally good ones.
SHIFTS = ["nnn", "csls", "inverted_softmax"]
_TEMPERATURES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)

# Parameters that a flag may set: its type and what it means.
ADJUSTABLE = {
    "k": (number(int, 1), "how many nearest bank items count"),
    "temperature": (number(float, 1e-4, 100), "temperature of the softmax"),
    "alpha": (number(float, 0, low_allowed=False), "weight of the shift"),
}

GRIDS = {  # values that `tune` tries; parameters not listed keep their defaults
    "csls": {"k": (1, 5, 10, 20, 50, 100, 200, 500)},
    "inverted_softmax": {"temperature": _TEMPERATURES},
    "qbnorm": {"temperature": _TEMPERATURES},
    "nnn": {"k": (8, 16, 32, 64, 128, 256, 512), "alpha": (0.25, 0.5, 0.75, 1.0, 1.25)},
    "sinkhorn": {"temperature": _TEMPERATURES},
}


def parameters_of(name, **given):
    """A method's parameters, {name: value}: its defaults, overridden by what is `given`.

    given: None means "not given"; parameters that the method does not have are ignored.
    """
    own = inspect.signature(METHODS[name]).parameters
    return {
        key: own[key].default if given.get(key) is None else given[key]
        for key in own
        if key in ADJUSTABLE
    }


def add_flags(group, methods):
    """Add a flag --correction_<parameter> to an argparse group for each of the methods' parameters.

    methods: names from METHODS
    """
    own = {method: parameters_of(method) for method in methods}
    for name, (kind, meaning) in ADJUSTABLE.items():
        defaults = {method: given[name] for method, given in own.items() if name in given}
        values = ", ".join(str(value) for value in dict.fromkeys(defaults.values()))
        group.add_argument(
            f"--correction_{name}",
            type=kind,
            help=f"{', '.join(defaults)}: {meaning} (default: {values})",
        )


def given_by(options):
    """{parameter: value or None} of the flags that `add_flags` adds."""
    return {name: getattr(options, f"correction_{name}") for name in ADJUSTABLE}


def in_words(parameters):
    """{"i2t": {name: value}, "t2i": ...} as text, once if both directions have the same values."""
    sides = {
        side: " ".join(f"{name}={value}" for name, value in own.items())
        for side, own in parameters.items()
    }
    return (
        sides["i2t"] if sides["i2t"] == sides["t2i"] else f"i2t {sides['i2t']}, t2i {sides['t2i']}"
    )


class Correction(NamedTuple):
    """What a method comes to for one direction."""

    shift: torch.Tensor  # (n_targets,)
    # (n_targets,) bool: only queries whose nearest target is active are corrected; None: all are
    activation: torch.Tensor | None = None


def corrections_of(side, source, wanted):
    """A Correction for each (method, parameters) of `wanted`.

    One pass over the similarities of targets and bank serves all methods. Only Sinkhorn keeps the
    whole matrix.

    side: "i2t" (targets are captions) or "t2i" (targets are images)
    source: of similarities (see `retrieval.ranking`) of bank images and captions for "i2t", of
        images and bank captions for "t2i"
    """
    n_targets, n_bank = (
        (source.n_captions, source.n_images)
        if side == "i2t"
        else (source.n_images, source.n_captions)
    )
    height = max(1, BLOCK // (n_bank * source.width))
    depth = max((parameters["k"] for name, parameters in wanted if name == "qbnorm"), default=0)
    keeps_all = any(name == "sinkhorn" for name, _ in wanted)
    shifts = {place: [] for place, (name, _) in enumerate(wanted) if name != "sinkhorn"}
    matrix = nearest = None
    for start in range(0, n_targets, height):
        similarities = source.across(side, slice(start, min(start + height, n_targets)))
        for place, parts in shifts.items():
            name, parameters = wanted[place]
            parts.append(METHODS[name](similarities, **parameters))
        if depth:
            nearest = nearest or Best(n_bank, min(depth, n_targets), similarities)
            nearest.update(slice(None), similarities, 0, start)
        if keeps_all:
            matrix = similarities.new_empty(n_targets, n_bank) if matrix is None else matrix
            matrix[start : start + height] = similarities
    corrections = []
    for place, (name, parameters) in enumerate(wanted):
        shift = torch.cat(shifts[place]) if place in shifts else sinkhorn(matrix, **parameters)
        activation = None
        if name == "qbnorm":
            activation = torch.zeros(n_targets, dtype=torch.bool, device=shift.device)
            activation[nearest.items[:, : parameters["k"]]] = True
        corrections.append(Correction(shift, activation))
    return corrections


def rank_corrected(source, rankings, corrections, top=10, image_of=None):
    """(i2t Ranking, t2i Ranking) for each (i2t Correction, t2i Correction) of `corrections`.

    source, image_of: as for `ranking.rank_shifted`
    rankings: the uncorrected ones, with as many items
    """
    shifted = rank_shifted(
        source, [(i2t.shift, t2i.shift) for i2t, t2i in corrections], top, image_of
    )
    return [
        tuple(
            _where_active(correction, plain, ranking)
            for correction, plain, ranking in zip(pair, rankings, corrected)
        )
        for pair, corrected in zip(corrections, shifted)
    ]


def _where_active(correction, plain, corrected):
    """The corrected Ranking, but the plain one for queries that the correction leaves alone."""
    if correction.activation is None:
        return corrected
    active = correction.activation[plain.top1]
    return Ranking(
        torch.where(active, corrected.ranks, plain.ranks),
        torch.where(active.unsqueeze(1), corrected.items, plain.items),
    )


class Tuned(NamedTuple):
    """The parameters chosen for each direction, and the rsum that they gave on dev."""

    i2t: dict
    t2i: dict
    rsum: float


def candidates(names, given):
    """[(method, parameters)]: for each method, every combination in GRIDS.

    given: {parameter: value} that is not varied, or None.
    """
    wanted = []
    for name in names:
        grid = {key: values for key, values in GRIDS[name].items() if given.get(key) is None}
        wanted += [
            (name, parameters_of(name, **{**given, **dict(zip(grid, values))}))
            for values in itertools.product(*grid.values())
        ]
    return wanted


def tune(names, source, banks, given, image_of=None):
    """A `Tuned` for each method: the parameters with the best sum of recalls on dev.

    source, image_of: of the dev split, as for `ranking.rank_shifted`
    banks: the sources that `corrections_of` takes for i2t and t2i
    given: {parameter: value} that is not varied, or None
    """
    wanted = candidates(names, given)
    corrections = list(
        zip(*(corrections_of(side, bank, wanted) for side, bank in zip(("i2t", "t2i"), banks)))
    )
    (plain,) = rank_shifted(source, image_of=image_of)
    # Sums of recalls, before division by the number of queries.
    hits = [
        [
            sum(int((ranks < k).sum()) for k in DEPTHS)
            for ranks in (i2t.ranks.cpu(), t2i.ranks.cpu())
        ]
        for i2t, t2i in rank_corrected(source, plain, corrections, 1, image_of)
    ]
    best = []
    for name in names:
        own = [place for place, (other, _) in enumerate(wanted) if other == name]
        i2t, t2i = (max(own, key=lambda place: hits[place][side]) for side in (0, 1))
        rsum = 100 * (hits[i2t][0] / source.n_images + hits[t2i][1] / source.n_captions)
        best.append(Tuned(wanted[i2t][1], wanted[t2i][1], rsum))
    return best
