"""The difference between two losses' recalls, with an interval over test images and over seeds.

Both images and seeds are samples. Every run meets the same test images, so images are resampled for
both losses and all seeds at once: a paired bootstrap, in which images are crossed with seeds (Owen,
"The pigeonhole bootstrap", 2007). An image and its captions are one cluster and are drawn together.

Seeds are not resampled. With few of them, percentiles would give too short an interval: S seeds
drawn with replacement have only (S - 1) / S of the right variance, and percentiles ignore Student's
t (4.3 standard errors for three seeds, not 2). So the variance over seeds enters in closed form,
as the limit of many draws without that factor:

    estimate +- sqrt(max(t(S - 1)^2 s^2 / S + t(N - 1)^2 max(0, V_images - V_both),
                         t(N - 1)^2 V_images))

s^2: sample variance of the S seeds' figures on all N images
V_images: the bootstrap's variance of the seeds' mean
V_both: the part of V_images by which seeds differ from draw to draw; s^2 / S already contains it

Few seeds sometimes agree by chance, which makes s^2 / S nearly 0. The second term of the maximum
then remains: the variance over images with exactly these seeds.

If both sides have the same seeds, differences are taken seed by seed. Otherwise each side has its
own variance over seeds, and their sum has Welch's degrees of freedom. On simulated ranks, the
interval covered the truth in 94 to 98 % of 500 draws with two to five seeds, and in 99 % when two
seeds hardly vary.
"""

import itertools
from typing import NamedTuple

import numpy as np

from retrieval.metrics import DEPTHS
from retrieval.ranking import image_numbers
from runtime.errors import InputError
from runtime.file_kinds import HEAD, ZIP, binary_kind
from runtime.files import check_regular, replacing

CONFIDENCE = 0.95

FIGURES = {
    "rsum": {"i2t": DEPTHS, "t2i": DEPTHS},
    **{f"{side}_r{k}": {side: (k,)} for side in ("i2t", "t2i") for k in DEPTHS},
}
# What comparisons show, and its name there.
COMPARED = {"rsum": "rsum", "i2t_r1": "i2t R@1", "t2i_r1": "t2i R@1"}


class Interval(NamedTuple):
    """An estimate with its 95 % interval, in percentage points (rsum: in their sum)."""

    estimate: float
    low: float
    high: float


def difference(runs_a, runs_b, figure="rsum", draws=2000, seed=0):
    """The Interval of the first loss's figure minus the second's.

    With a single seed on a side, the variance over seeds is unknown and the interval is too short.
    Between a run and itself nothing varies, and the interval has no width.
    Raises InputError if the runs were not ranked on the same test set.

    runs_a, runs_b: {seed: (i2t_ranks (N,), t2i_ranks (C,), image_of (C,))} with 0-based ranks, as
        `read_ranks` returns them
    figure: one of FIGURES
    draws: how often the images are resampled
    seed: of the resampling
    """
    return differences({"a": runs_a, "b": runs_b}, (figure,), draws, seed)["a", "b"][figure]


def differences(runs, figures, draws=2000, seed=0):
    """{(loss, other loss): {figure: Interval}} for all pairs of several losses.

    runs: {loss: its runs, as `difference` takes them}; the other arguments are those of
    `difference`, and so are the errors.
    """
    check_runs(*runs.values())
    *_, image_of = next(iter(next(iter(runs.values())).values()))
    n = int(image_of[-1]) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    weights = np.vstack([np.ones(n), drawn])  # the first row is the plain test set
    found = {
        (loss, figure): recalls([own[key] for key in sorted(own)], figure, weights)
        for loss, own in runs.items()
        for figure in figures
    }
    pairs = {}
    for a, b in itertools.combinations(runs, 2):
        same_seeds = runs[a].keys() == runs[b].keys()
        pairs[a, b] = {
            figure: interval_of(
                [found[a, figure] - found[b, figure]]
                if same_seeds
                else [found[a, figure], -found[b, figure]],
                n,
            )
            for figure in figures
        }
    return pairs


def difference_over_seeds(runs_a, runs_b):
    """The Interval of the first loss's mean figure minus the second's, over seeds alone.

    For figures that resampling the images would change, such as hubness. Equal seeds on both sides
    are paired, as in `difference`.

    runs_a, runs_b: {seed: figure}, with two seeds or more
    """
    a, b = (np.array([own[key] for key in sorted(own)]) for own in (runs_a, runs_b))
    groups = [a - b] if runs_a.keys() == runs_b.keys() else [a, -b]
    # Images are not resampled: every draw equals the plain test set, so only seeds vary.
    return interval_of([np.tile(group, (3, 1)) for group in groups], 2)


def mean_over_seeds(values):
    """The Interval of a figure's mean over seeds; of one seed it has no width.

    values: the figure of each seed
    """
    return interval_of([np.tile(np.array(values), (3, 1))], 2)


def recalls(runs, figure, weights):
    """A figure of each run, in percent, with images weighted by each draw: (draws, runs).

    weights: (draws, n_images), how often each image was drawn
    """
    total, ks = 0.0, FIGURES[figure]
    image_of = np.asarray(runs[0][2])
    if "i2t" in ks:
        hits = np.stack([hits_of(run[0], ks["i2t"]) for run in runs], 1)  # (images, runs)
        total = total + weights @ hits / weights.sum(1, keepdims=True)
    if "t2i" in ks:
        n = weights.shape[1]
        hits = np.stack([np.bincount(image_of, hits_of(run[1], ks["t2i"]), n) for run in runs], 1)
        total = total + weights @ hits / (weights @ np.bincount(image_of, minlength=n))[:, None]
    return 100 * total


def hits_of(ranks, ks):
    """For each query, how many of the depths `ks` its rank lies within: (n,) float64."""
    return sum((np.asarray(ranks) < k).astype(float) for k in ks)


def interval_of(groups, n_images):
    """The Interval of the sum of the groups' means over seeds, by the module's formula.

    groups: arrays (1 + draws, seeds); row 0 on the plain test set, then one row per draw
    n_images: how many images each draw has
    """
    from scipy.stats import t

    estimate = sum(group[0].mean() for group in groups)
    images = sum(group[1:].mean(1) for group in groups).var(ddof=1)
    several = [group for group in groups if group.shape[1] > 1]
    both = sum(
        (group[1:] - group[0]).var(axis=1, ddof=1).mean() / group.shape[1] for group in several
    )
    of_seeds = [(group[0].var(ddof=1) / group.shape[1], group.shape[1] - 1) for group in several]
    seeds = sum(part for part, _ in of_seeds)
    freedom = seeds**2 / sum(part**2 / degrees for part, degrees in of_seeds) if seeds else 1
    quantiles = t.ppf((1 + CONFIDENCE) / 2, [freedom, n_images - 1])
    half = np.sqrt(max(quantiles**2 @ [seeds, max(images - both, 0)], quantiles[1] ** 2 * images))
    return Interval(float(estimate), float(estimate - half), float(estimate + half))


def in_digits(interval, bold=False, digits=1):
    """An interval as "+1.0 (-0.5 to +2.5)"; in bold, if asked for, where it excludes 0."""
    estimate, low, high = (f"{value:+.{digits}f}" for value in interval)
    text = f"{estimate} ({low} to {high})"
    return f"**{text}**" if bold and not interval[1] <= 0 <= interval[2] else text


def smallest_differences(found):
    """The smallest and largest half width of Intervals: the differences that they can detect.

    A true difference of that size is missed every second time.
    """
    halves = [(high - low) / 2 for _, low, high in found]
    return min(halves), max(halves)


def check_runs(*sides):
    """Raise InputError unless every side has runs, all on the same images and captions."""
    runs = [run for side in sides for run in side.values()]
    if not all(sides):
        raise InputError(
            "a loss has no run to compare: give the ranks of at least one seed for each"
        )
    image_of = np.asarray(runs[0][2])
    for i2t, t2i, other in runs:
        if (
            not np.array_equal(other, image_of)
            or len(t2i) != len(image_of)
            or len(i2t) != image_of[-1] + 1
        ):
            raise InputError(
                "the runs to compare were not ranked on the same images and captions: rank all of "
                "them on one split"
            )
    if image_of[-1] < 1:
        raise InputError(
            "the runs to compare were ranked on a single image, which says nothing about others: "
            "rank them on a split of several"
        )


def write_ranks(path, image_of, rankings):
    """Write every query's rank and first items into an .npz file.

    The arrays are int32: image_of (C,), i2t_ranks (N,), i2t_items (N, 10) with caption numbers,
    best first, t2i_ranks (C,), t2i_items (C, 10), and nnn_i2t_ranks etc. after a correction.
    With several folds, arrays have a first dimension for the fold, and numbers start at 0 in each.
    Raises InputError if the file cannot be written.

    image_of: for each fold, (C,)
    rankings: {name of the correction, "" for none: for each fold, (i2t Ranking, t2i Ranking)}
    """
    arrays = {"image_of": image_of}
    for name, folds in rankings.items():
        for place, side in enumerate(("i2t", "t2i")):
            for part, width in (("ranks", None), ("items", max(DEPTHS))):
                arrays["_".join(filter(None, (name, side, part)))] = [
                    getattr(pair[place], part)[..., :width].cpu() for pair in folds
                ]
    with replacing(path) as file:
        np.savez(
            file,
            **{
                name: np.stack(folds).astype(np.int32)[0 if len(folds) == 1 else slice(None)]
                for name, folds in arrays.items()
            },
        )


def read_ranks(path, correction=None):
    """(i2t_ranks (N,), t2i_ranks (C,), image_of (C,)) of a file of compute_results.py --save_ranks.

    Folds are concatenated. Ranks within folds compare only with other ranks within folds; this is
    not checked. Raises InputError if the file is no such file or lacks the correction.

    correction: name of the correction whose ranks are wanted; None: ranks without a correction
    """
    check_regular(path)
    prefix, head = f"{correction}_" if correction else "", ZIP
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        with np.load(path, allow_pickle=False) as content:
            i2t, t2i, image_of = (
                content[name] for name in (f"{prefix}i2t_ranks", f"{prefix}t2i_ranks", "image_of")
            )
        if image_of.ndim == 2:
            image_of = image_of + i2t.shape[1] * np.arange(len(image_of))[:, None]
        if not all(
            part.dtype.kind == "i" and part.ndim == image_of.ndim for part in (i2t, t2i, image_of)
        ):
            raise ValueError("its arrays are of another kind")
        image_of = image_numbers(image_of.ravel(), i2t.size, t2i.size).numpy()
    except KeyError as error:
        raise InputError(
            f"{path} has no ranks {'by ' + correction if correction else 'at all'} "
            f"({error.args[0]}): write it with compute_results.py --save_ranks and the same "
            "--correction"
        ) from error
    except Exception as error:  # torn files raise many kinds
        kind = binary_kind(head, [ZIP])
        reason = f"it is {kind[0]}" if kind else error
        raise InputError(
            f"{path} cannot be read as ranks ({reason}): write it with compute_results.py "
            "--save_ranks"
        ) from error
    return i2t.ravel(), t2i.ravel(), image_of
