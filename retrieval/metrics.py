"""Recalls with names, and their means over folds."""

from typing import NamedTuple

import numpy as np
import torch

DEPTHS = (1, 5, 10)  # the K of R@K


class Recall(NamedTuple):
    """One direction's recalls in percent, and its median and mean rank, counted from 1.

    A metric of your own is a field after these and its formula in `recall_of`: it is then printed
    and written everywhere. VSE++ code unpacks these five from `i2t` and `t2i`, so it has to follow.
    """

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    def __str__(self):
        return " ".join(f"{value:.1f}" for value in self)


class Metrics(NamedTuple):
    """Both directions' recalls."""

    i2t: Recall
    t2i: Recall

    @property
    def ar(self):
        """Mean of the three image-to-text recalls."""
        return sum(self.i2t[:3]) / 3

    @property
    def ari(self):
        """Mean of the three text-to-image recalls."""
        return sum(self.t2i[:3]) / 3

    @property
    def rsum(self):
        """Sum of the six recalls."""
        return sum(self.i2t[:3]) + sum(self.t2i[:3])


def recall_of(ranks):
    """The Recall of 0-based ranks (n,); medr is floor(median) + 1, as in the released code.

    >>> print(recall_of([0, 0, 4, 9]))
    50.0 75.0 100.0 3.0 4.2
    """
    ranks = torch.as_tensor(ranks).cpu().numpy()
    return Recall(
        *(100.0 * np.count_nonzero(ranks < k) / len(ranks) for k in DEPTHS),
        float(np.floor(np.median(ranks)) + 1),
        float(ranks.mean() + 1),
    )


def metrics_of(rankings):
    """The Metrics of (image-to-text Ranking, text-to-image Ranking)."""
    return Metrics(*(recall_of(ranking.ranks) for ranking in rankings))


def mean_metrics(folds):
    """The mean of each figure over the folds."""
    return Metrics(
        *(Recall(*np.mean([fold[side] for fold in folds], axis=0).tolist()) for side in (0, 1))
    )


def as_dict(metrics):
    """Metrics as names and numbers, for JSON."""
    return {
        "i2t": metrics.i2t._asdict(),
        "t2i": metrics.t2i._asdict(),
        "ar": metrics.ar,
        "ari": metrics.ari,
        "rsum": metrics.rsum,
    }
