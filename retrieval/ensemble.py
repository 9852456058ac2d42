"""Several models as one: the mean of their similarities.

The papers of SCAN and VSE-infinity report their best figures this way. VSE and SCAN can be mixed,
and each model can have its own features, but all need the same images and captions.
"""

from argparse import Namespace
from typing import NamedTuple

import torch

from retrieval.similarity import Mean
from runtime.errors import InputError


class Together:
    """The same images, or captions, embedded by several models.

    parts: for each model, what its `embed` returns
    """

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, chosen):
        return Together([part[chosen] for part in self.parts])

    def chunk(self, n):
        """Split into n parts, in order."""
        return [Together(parts) for parts in zip(*(part.chunk(n) for part in self.parts))]


class Loaders(NamedTuple):
    """A split as each model reads it; `dataset` is the first one's."""

    loaders: list

    @property
    def dataset(self):
        """The first model's data set; all have the same images and captions."""
        return self.loaders[0].dataset


class Ensemble:
    """Several models (see `evaluation`) as one model, with the mean of their similarities.

    `opt` is the first member's, except `cross_attn`, `measure` and `logger_name`, which describe
    all members.
    """

    def __init__(self, members):
        self.members = members
        options = [member.opt for member in members]
        cross_attn = [opt.cross_attn for opt in options]
        self.opt = Namespace(
            **{
                **vars(options[0]),
                "cross_attn": next(filter(None, cross_attn), None),
                "logger_name": " + ".join(opt.logger_name for opt in options),
                "measure": "mean of " + ", ".join(opt.cross_attn or opt.measure for opt in options),
            }
        )

    def loader(self, split):
        """The Loaders of a split; raises InputError unless all have the same images and captions.

        split: "train", "dev", "test" or "testall"
        """
        loaders = [member.loader(split) for member in self.members]
        first, *others = [loader.dataset for loader in loaders]
        for member, other in zip(self.members[1:], others):
            if not _alike(first, other):
                raise InputError(
                    f"an ensemble needs one split for all its models, and {split} of "
                    f"{self.members[0].opt.data_name} ({first.n_images} images, {len(first)} "
                    f"captions) and of {member.opt.data_name} ({other.n_images} images, "
                    f"{len(other)} captions) have not the same captions of the same images: give "
                    "each model its own features of one split by --data_name"
                )
        return Loaders(loaders)

    def embed(self, split, stride=1):
        """(images, captions), each a Together, of a split's Loaders."""
        embedded = [
            member.embed(loader, stride) for member, loader in zip(self.members, split.loaders)
        ]
        return tuple(map(Together, zip(*embedded)))

    def sources(self, images, captions):
        """Each member's source of similarities (see `retrieval.ranking`)."""
        return [
            member.similarities(*own)
            for member, *own in zip(self.members, images.parts, captions.parts)
        ]

    def similarities(self, images, captions):
        """The source of the mean similarities (see `retrieval.ranking`)."""
        return Mean(self.sources(images, captions))


def _alike(one, other):
    """Whether two data sets have the same captions for the same images."""
    return torch.equal(one.image_of, other.image_of) and all(
        mine.strip() == theirs.strip() for mine, theirs in zip(one.captions, other.captions)
    )
