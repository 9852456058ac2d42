"""Several models on the same images and captions: differences in recalls, with paired intervals."""

from typing import NamedTuple

import torch

from retrieval import intervals
from retrieval.hubness import hubness_both_ways, mean_hubness
from retrieval.metrics import as_dict


class Compared(NamedTuple):
    """Each model's `evaluation.Evaluation`, by its label, and what lies between them."""

    results: dict
    differences: dict  # {"A - B": {figure of intervals.COMPARED: Interval}} of all pairs

    def as_dict(self):
        """Names and numbers, for JSON."""
        return {
            "models": {label: as_dict(result.metrics) for label, result in self.results.items()},
            "differences": {
                pair: {name: list(interval) for name, interval in figures.items()}
                for pair, figures in self.differences.items()
            },
        }

    def hubness(self):
        """{label: Hubness both ways}; the rankings need ten items a query."""
        return {
            label: mean_hubness(list(map(hubness_both_ways, result.rankings)))
            for label, result in self.results.items()
        }

    def ranks(self):
        """{label: (i2t_ranks (N,), t2i_ranks (C,), image_of (C,))}, as `intervals` takes them."""
        return {label: ranks_of(result) for label, result in self.results.items()}


def ranks_of(result):
    """An Evaluation's (i2t_ranks (N,), t2i_ranks (C,), image_of (C,)) as arrays, folds joined."""
    sides = zip(*result.rankings)
    ranks = [torch.cat([one.ranks for one in side]).cpu().numpy() for side in sides]
    return (*ranks, result.dataset.image_of.numpy())


def compared_models(results):
    """The Compared of {label: Evaluation}; images are resampled for all models at once."""
    runs = {label: {0: ranks_of(result)} for label, result in results.items()}
    found = intervals.differences(runs, intervals.COMPARED)
    return Compared(results, {f"{a} - {b}": own for (a, b), own in found.items()})


def print_differences(compared):
    """Print a line for each pair of models."""
    print(f"\nDifferences, with {100 * intervals.CONFIDENCE:.0f} % intervals over images:")
    for pair, figures in compared.differences.items():
        told = (
            f"{intervals.COMPARED[name]} {intervals.in_digits(own)}"
            for name, own in figures.items()
        )
        print(f"{pair}: {', '.join(told)}")
