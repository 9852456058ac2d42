"""Ties counted for the model, where rankings count them against it.

A query is tied if an item that is not its own scores as high as its best own one. Half-precision
scores tie often: the true figure then lies between the two, and breaking ties by chance, as sorting
does, gives any figure in between.
"""

from typing import NamedTuple

from retrieval.metrics import DEPTHS, Metrics, as_dict, mean_metrics, metrics_of
from retrieval.ranking import rank_shifted


class Ties(NamedTuple):
    """Figures with ties counted against the model and for it, and shares of tied queries."""

    against: Metrics
    favourable: Metrics
    shares: tuple  # of images and of captions, 0 to 1

    def matter(self):
        """Whether a recall, as printed, is not one figure."""
        return any(
            f"{low:.1f}" != f"{high:.1f}"
            for one, other in zip(self.against, self.favourable)
            for low, high in zip(one[: len(DEPTHS)], other)
        )

    def in_words(self):
        """What the report says, if a recall is not one figure; else nothing."""
        if not self.matter():
            return ""
        images, captions = self.shares
        return (
            f"{images:.1%} of images and {captions:.1%} of captions are tied; counted for the "
            f"model, rsum is {self.favourable.rsum:.1f} instead of {self.against.rsum:.1f}"
        )

    def as_dict(self):
        """Names and numbers, for JSON."""
        shares = dict(zip(("images", "captions"), self.shares))
        return {"tied": shares, "counted_for_the_model": as_dict(self.favourable)}


def ties_of(result):
    """The Ties of an `evaluation.Evaluation`."""
    folds, tied = [], []
    for (images, captions, image_of), plain in zip(result.parts(), result.rankings):
        source = result.checkpoint.similarities(images, captions)
        (pair,) = rank_shifted(source, top=0, image_of=image_of, ties_win=True)
        folds.append(metrics_of(pair))
        both = zip(pair, plain)
        tied.append([float((one.ranks != own.ranks).float().mean()) for one, own in both])
    shares = tuple(sum(side) / len(tied) for side in zip(*tied))
    return Ties(result.metrics, mean_metrics(folds), shares)


def print_ties(ties):
    """Print the interval of each recall, if one is not a single figure."""
    if not ties.matter():
        return
    images, captions = ties.shares
    print(
        f"Ties: {images:.1%} of images and {captions:.1%} of captions have an item that scores as "
        "high as their own."
    )
    print("From ties counted against the model (above) to ties counted for it:")
    print(f"rsum: {ties.against.rsum:.1f} to {ties.favourable.rsum:.1f}")
    for name, low, high in zip(("Image to text", "Text to image"), ties.against, ties.favourable):
        recalls = zip(DEPTHS, low, high)
        print(f"{name}: " + ", ".join(f"R@{k} {a:.1f} to {b:.1f}" for k, a, b in recalls))
