"""How far two losses' recalls lie apart, with an interval that counts images and seeds as what they are: samples.

Both losses are measured on the same images, and an image and its captions are one cluster: they are drawn together,
for both losses and all seeds at once, since every run meets the same test images (a paired bootstrap; images are
crossed with seeds, as in Owen, "The pigeonhole bootstrap", 2007). Seeds are the second level. Drawing these, too, and
taking percentiles would make the interval of few seeds too short: S of them, drawn with replacement, vary (S - 1) / S
as much as they should, and percentiles know nothing of Student's t (with three seeds 4.3 standard errors, not 2). So
what drawn seeds come to in the limit, but for that factor, is taken in closed form, and the interval is

    estimate +- sqrt(max(t(S - 1)^2 s^2 / S + t(N - 1)^2 max(0, V_images - V_both), t(N - 1)^2 V_images))

with s^2 the sample variance of the S seeds' figures on all N images, V_images the bootstrap's variance of their mean,
and V_both the part of it in which seeds go apart from draw to draw, which s^2 / S holds already. Few seeds agree by
chance now and then, and s^2 / S is near 0: the second term of the maximum, the images alone with these very seeds, is
what is left to vary then. With the same seeds on both sides, differences are taken seed by seed; else each side has a
variance over seeds of its own, and their sum Welch's degrees of freedom. On made ranks it covered the truth in 94 to
98 % of 500 draws, with two to five seeds, and in 99 % where two seeds hardly vary.
"""

import itertools
from typing import NamedTuple

import numpy as np

from errors import InputError, check_regular, replacing
from ranking import image_numbers

CONFIDENCE = 0.95
DEPTHS = (1, 5, 10)
FIGURES = {"rsum": {"i2t": DEPTHS, "t2i": DEPTHS},
           **{f"{side}_r{k}": {side: (k,)} for side in ("i2t", "t2i") for k in DEPTHS}}


class Interval(NamedTuple):
    """An estimate with its 95 % interval, in percentage points (rsum: in their sum)."""

    estimate: float
    low: float
    high: float


def difference(runs_a, runs_b, figure="rsum", draws=2000, seed=0):
    """The Interval of the first loss's figure less the second's.

    runs_a, runs_b: {seed: (i2t_ranks (N,), t2i_ranks (C,), image_of (C,))}, 0-based ranks, as `read_ranks` gives them;
    figure: one of FIGURES; draws: of the images; seed: of those draws. Of a side with a single seed nothing is known
    of other seeds, and the interval is too short by what they would vary; where nothing varies, as between a run and
    itself, it has no width. Raises InputError where the runs are not of one test set.
    """
    return differences({"a": runs_a, "b": runs_b}, (figure,), draws, seed)["a", "b"][figure]


def differences(runs, figures, draws=2000, seed=0):
    """{(loss, other loss): {figure: Interval}} of all pairs of several losses; runs: {loss: its runs, as `difference`
    takes them}; the rest, and errors, as there."""
    check_runs(*runs.values())
    *_, image_of = next(iter(next(iter(runs.values())).values()))
    n = int(image_of[-1]) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    weights = np.vstack([np.ones(n), drawn])  # first all images as they are
    found = {(loss, figure): recalls([own[key] for key in sorted(own)], figure, weights)
             for loss, own in runs.items() for figure in figures}
    pairs = {}
    for a, b in itertools.combinations(runs, 2):
        same_seeds = runs[a].keys() == runs[b].keys()
        pairs[a, b] = {figure: interval_of(
            [found[a, figure] - found[b, figure]] if same_seeds else [found[a, figure], -found[b, figure]], n)
            for figure in figures}
    return pairs


def difference_over_seeds(runs_a, runs_b):
    """The Interval of the first loss's mean figure less the second's, over seeds alone, the images being what they are.

    For figures of a whole split that images drawn twice would change, such as hubness. runs_a, runs_b: {seed: figure},
    of two seeds or more; the same seeds are taken in pairs, as in `difference`.
    """
    a, b = (np.array([own[key] for key in sorted(own)]) for own in (runs_a, runs_b))
    groups = [a - b] if runs_a.keys() == runs_b.keys() else [a, -b]
    return interval_of([np.tile(group, (3, 1)) for group in groups], 2)  # no image is drawn: every draw is as the first


def recalls(runs, figure, weights):
    """A figure in percent under each row of images' weights, for each run: (draws, n_images) -> (draws, runs)."""
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
    """Of each query, how many of the depths `ks` its rank lies within: (n,) float64."""
    return sum((np.asarray(ranks) < k).astype(float) for k in ks)


def interval_of(groups, n_images):
    """The Interval of the sum of the groups' means over their seeds, as this module's text says.

    groups: arrays (1 + draws, seeds), first on all images, then on each draw of n_images.
    """
    from scipy.stats import t
    estimate = sum(group[0].mean() for group in groups)
    images = sum(group[1:].mean(1) for group in groups).var(ddof=1)
    several = [group for group in groups if group.shape[1] > 1]
    both = sum((group[1:] - group[0]).var(axis=1, ddof=1).mean() / group.shape[1] for group in several)
    of_seeds = [(group[0].var(ddof=1) / group.shape[1], group.shape[1] - 1) for group in several]
    seeds = sum(part for part, _ in of_seeds)
    freedom = seeds**2 / sum(part**2 / degrees for part, degrees in of_seeds) if seeds else 1
    quantiles = t.ppf((1 + CONFIDENCE) / 2, [freedom, n_images - 1])
    half = np.sqrt(max(quantiles**2 @ [seeds, max(images - both, 0)], quantiles[1]**2 * images))
    return Interval(float(estimate), float(estimate - half), float(estimate + half))


def smallest_differences(found):
    """The least and the greatest of the differences from which on Intervals tell theirs from none: half their width.

    A true difference of that size is missed every second time.
    """
    halves = [(high - low) / 2 for _, low, high in found]
    return min(halves), max(halves)


def check_runs(*sides):
    """Raise InputError unless all runs are there and of the same images and captions."""
    runs = [run for side in sides for run in side.values()]
    if not all(sides):
        raise InputError("a loss has no run to compare: give the ranks of at least one seed for each")
    image_of = np.asarray(runs[0][2])
    for i2t, t2i, other in runs:
        if not np.array_equal(other, image_of) or len(t2i) != len(image_of) or len(i2t) != image_of[-1] + 1:
            raise InputError("the runs to compare were not ranked on the same images and captions: rank all of them "
                             "on one split")
    if image_of[-1] < 1:
        raise InputError("the runs to compare were ranked on a single image, which tells nothing of others: rank them "
                         "on a split of several")


def write_ranks(path, image_of, rankings):
    """Write ranks and first items of every query into an .npz file.

    image_of: of each fold, (C,); rankings: {correction's name, "" for none: of each fold, (i2t Ranking, t2i Ranking)}.
    The arrays, int32, are image_of, i2t_ranks (N,), i2t_items (N, 10): caption numbers, best first, t2i_ranks (C,),
    t2i_items (C, 10), and nnn_i2t_ranks and so on after a correction; of several folds with a first dimension for
    them, and numbers that start again in each. Raises InputError where the file can't be written.
    """
    arrays = {"image_of": image_of}
    for name, folds in rankings.items():
        for place, side in enumerate(("i2t", "t2i")):
            for part, width in (("ranks", None), ("items", max(DEPTHS))):
                arrays["_".join(filter(None, (name, side, part)))] = [
                    getattr(pair[place], part)[..., :width].cpu() for pair in folds]
    with replacing(path) as file:
        np.savez(file, **{name: np.stack(folds).astype(np.int32)[0 if len(folds) == 1 else slice(None)]
                          for name, folds in arrays.items()})


def read_ranks(path, correction=None):
    """(i2t_ranks (N,), t2i_ranks (C,), image_of (C,)) of a file of compute_results.py --save_ranks.

    correction: the name of one whose ranks are wanted; None: those before any. Folds are laid end to end, and only
    compare with folds, which nobody checks. Raises InputError where the file is not one, or holds no such correction.
    """
    check_regular(path)
    prefix = f"{correction}_" if correction else ""
    try:
        with np.load(path, allow_pickle=False) as content:
            i2t, t2i, image_of = (content[name] for name in (f"{prefix}i2t_ranks", f"{prefix}t2i_ranks", "image_of"))
        if image_of.ndim == 2:
            image_of = image_of + i2t.shape[1] * np.arange(len(image_of))[:, None]
        if not all(part.dtype.kind == "i" and part.ndim == image_of.ndim for part in (i2t, t2i, image_of)):
            raise ValueError("its arrays are of another kind")
        image_of = image_numbers(image_of.ravel(), i2t.size, t2i.size).numpy()
    except KeyError as error:
        raise InputError(f"{path} has no ranks {'by ' + correction if correction else 'at all'} ({error.args[0]}): "
                         "write it with compute_results.py --save_ranks and the same --correction") from error
    except Exception as error:  # torn files raise many kinds
        raise InputError(f"{path} cannot be read as ranks ({error}): write it with compute_results.py --save_ranks"
                         ) from error
    return i2t.ravel(), t2i.ravel(), image_of
