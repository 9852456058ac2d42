"""Several models as one: the mean of their similarities, as SCAN's and VSE-infinity's papers report their best figures.

Any mix of VSE and SCAN, each with features of its own, over one split: the same images and captions for all.
"""

from argparse import Namespace
from typing import NamedTuple

import torch

from errors import InputError


class Mean:
    """The mean of several sources' scores, as a source of similarities (see `ranking`)."""

    def __init__(self, sources):
        self.sources = sources
        self.n_images, self.n_captions = sources[0].n_images, sources[0].n_captions
        self.tile_images = min(source.tile_images for source in sources)
        self.width = max(source.width for source in sources)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices."""
        return self._mean(source.tile(images, captions, shape) for source in self.sources)

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        return self._mean(source.across(side, targets) for source in self.sources)

    def pairs(self, images, captions):
        """(n,) scores of pairs, given by the numbers of their images and captions."""
        return self._mean(source.pairs(images, captions) for source in self.sources)

    def _mean(self, scores):
        """Each is valid until the next is made: the first is copied. In the widest of their types."""
        total = next(scores).clone()
        for one in scores:
            total = total.add_(one) if one.dtype == total.dtype else total + one
        return total.div_(len(self.sources))


class Together:
    """The same images, or captions, as several models embed them: what `evaluation.embed` gives of each."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, chosen):
        return Together([part[chosen] for part in self.parts])

    def chunk(self, n):
        """In n parts."""
        return [Together(parts) for parts in zip(*(part.chunk(n) for part in self.parts))]


class Loaders(NamedTuple):
    """A split as each model reads it; `dataset` is the first one's."""

    loaders: list

    @property
    def dataset(self):
        """Whose images and captions are those of all."""
        return self.loaders[0].dataset


class Ensemble:
    """Several of `evaluation.Checkpoint` as one, with the mean of their similarities.

    `opt` is the first one's, but for what tells all of them apart from it.
    """

    def __init__(self, members):
        self.members = members
        options = [member.opt for member in members]
        cross_attn = [opt.cross_attn for opt in options]
        self.opt = Namespace(**{**vars(options[0]), "cross_attn": next(filter(None, cross_attn), None),
                                "logger_name": " + ".join(opt.logger_name for opt in options),
                                "measure": "mean of " + ", ".join(opt.cross_attn or opt.measure for opt in options)})

    def loader(self, split):
        """The Loaders of a split; raises InputError where it has not the same images and captions for all."""
        loaders = [member.loader(split) for member in self.members]
        first, *others = [loader.dataset for loader in loaders]
        for member, other in zip(self.members[1:], others):
            if not _alike(first, other):
                raise InputError(
                    f"an ensemble needs one split for all its models, and {split} of {self.members[0].opt.data_name} "
                    f"({first.n_images} images, {len(first)} captions) and of {member.opt.data_name} "
                    f"({other.n_images} images, {len(other)} captions) have not the same captions of the same images: "
                    "give each model its own features of one split by --data_name")
        return Loaders(loaders)

    def embed(self, split, stride=1):
        """(images, captions), each Together, of a split's Loaders."""
        embedded = [member.embed(loader, stride) for member, loader in zip(self.members, split.loaders)]
        return tuple(map(Together, zip(*embedded)))

    def sources(self, images, captions):
        """Each model's source of similarities."""
        return [member.similarities(*own) for member, *own in zip(self.members, images.parts, captions.parts)]

    def similarities(self, images, captions):
        """The source of their means, for `ranking` and `corrections`."""
        return Mean(self.sources(images, captions))


def _alike(one, other):
    """Whether two data sets have the same captions of as many images, the same for each."""
    return torch.equal(one.image_of, other.image_of) and all(
        mine.strip() == theirs.strip() for mine, theirs in zip(one.captions, other.captions))
