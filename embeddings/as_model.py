"""Files of embeddings, or of similarities, as models to be evaluated (see `evaluation`)."""

from argparse import Namespace
from typing import NamedTuple

import torch

from embeddings.files import in_blocks, read
from embeddings.relation import Sources, relate
from features.files import CAPTIONS_PER_IMAGE, read_ids
from inputs.captions import read_captions
from retrieval.similarity import SOURCES, Matrix
from runtime.errors import InputError

SIDES = ("images", "captions")
UNIT = 4e-6  # a row whose length differs less from 1 keeps its bits: its scores are then as saved
# The splits of a model to be evaluated, and the flags that name their files.
FLAGS = {"test": "--embeddings", "train": "--bank", "dev": "--dev"}
IDS = {"test": "--ids", "train": "--bank_ids", "dev": "--dev_ids"}


class Files(NamedTuple):
    """What the flags name for one split."""

    paths: list  # of images and captions, or the one that has both
    ids: list | None = None  # of captions and, if there is a second one, of images
    texts: str | None = None  # of captions
    flag: str = ""  # default: that of FLAGS


class Pairs:
    """A split as a data set: which captions belong to which image, and what they are called."""

    def __init__(self, relation, texts, ids_file):
        self.image_of, self.lines, self.names = relation.image_of, relation.lines, relation.names
        self.row_of, self.n_images, self.ids_file = relation.row_of, len(relation.row_of), ids_file
        lines = self.lines.tolist()
        self.captions = [texts[line] if texts else f"caption {line}" for line in lines]

    def __len__(self):
        return len(self.lines)


class Split(NamedTuple):
    """A split's data set, and the rows of its files."""

    dataset: Pairs
    images: torch.Tensor
    captions: torch.Tensor
    title: str  # what it is called in print


class Embeddings:
    """Files of image and caption embeddings as a model.

    files: {split: Files} of "test" and, for corrections, "train" (the bank) and "dev"
    measure: "cosine" makes rows length 1; "dot" and "order" leave them as they are
    """

    def __init__(self, files, device, measure="cosine"):
        self.files, self.device, self.width = files, device, None
        name = " ".join(files["test"].paths)
        self.opt = Namespace(
            data_path="", data_name=name, logger_name=name, measure=measure, cross_attn=None
        )

    @property
    def members(self):
        """Itself alone."""
        return [self]

    @property
    def facts(self):
        """What the report says of it."""
        images, captions = both(self.files["test"].paths)
        return {"Images": images, "Captions": captions}

    def loader(self, split):
        """The Split of files; raises InputError if they are not given, or do not fit."""
        files = self.files.get(split)
        if files is None:
            raise InputError(
                f"embeddings of the {'bank' if split == 'train' else 'dev split'} are needed: give "
                f"{FLAGS[split]} IMAGES CAPTIONS"
            )
        flag, (images, captions) = files.flag or FLAGS[split], both(files.paths)
        rows = [read(path, side, flag) for path, side in zip((images, captions), SIDES)]
        for path, found in zip((images, captions), rows):
            width = found.rows.shape[1]
            self.width = self.width or width
            if width != self.width:
                raise InputError(
                    f"{flag} {path} has rows of width {width}, and {self.facts['Images']} of "
                    f"width {self.width}: both must come from one model"
                )
        ids, sources = ids_of(files, split, rows, (images, captions))
        relation = relate(rows[0].rows, len(rows[1].rows), *ids, sources)
        texts = texts_of(files.texts, len(rows[1].rows)) or rows[1].texts
        dataset = Pairs(relation, texts, sources.ids)
        title = "embeddings" if split == "test" else f"{FLAGS[split]} {' '.join(files.paths)}"
        return Split(dataset, rows[0].rows, rows[1].rows, title)

    def embed(self, split, stride=1):
        """(images, captions) of every stride-th image, on the device."""
        dataset = split.dataset
        return (
            self.placed(split.images, dataset.row_of[::stride]),
            self.placed(split.captions, dataset.lines[dataset.image_of % stride == 0]),
        )

    def placed(self, rows, numbers):
        """Rows by number, in float32 or float64, of length 1 if cosines are measured."""
        half = torch.promote_types(rows.dtype, torch.float32)
        kind = torch.float32 if self.device.type == "mps" else half
        placed = torch.empty(len(numbers), rows.shape[1], dtype=kind, device=self.device)
        for start, part in in_blocks(placed):
            own = rows.index_select(0, numbers[start : start + len(part)])
            part.copy_(own)
            if self.opt.measure == "cosine":
                lengths = torch.linalg.vector_norm(part, dim=1, keepdim=True)
                keeps = ((lengths - 1).abs() < UNIT) | (lengths == 0)
                part.div_(lengths.masked_fill(keeps, 1))
        return placed

    def similarities(self, images, captions):
        """The source of similarities (see `retrieval.ranking`)."""
        return SOURCES["order" if self.opt.measure == "order" else "cosine"](images, captions)


def both(paths):
    """The paths of images and of captions; a single file has both."""
    return (*paths, *paths)[:2]


def ids_of(files, split, rows, paths):
    """(ids of captions or None, ids of images or None), and how messages name them."""
    flag = files.flag or FLAGS[split]
    shown = [f"{flag} {path}" for path in paths]
    if files.ids:
        ids = [read_ids(path) for path in files.ids]
        told = [f"{IDS[split]} {path}" for path in files.ids]
        return (*ids, None)[:2], Sources(*shown, *told)
    image_ids, ids = rows[0].ids, rows[1].ids
    names = [f"{one}'s metadata" if own.ids else IDS[split] for one, own in zip(shown, rows)]
    if ids is None and image_ids is not None:
        return (image_ids, None), Sources(*shown, names[0])
    return (ids, image_ids), Sources(*shown, names[1], names[0])


def texts_of(path, n_captions):
    """The captions in a text file, one a line; None without a file."""
    texts = path and read_captions(path)
    if texts and len(texts) != n_captions:
        raise InputError(
            f"--captions {path} has {len(texts)} lines for {n_captions} captions: give a line for "
            "each"
        )
    return texts


# Similarities -----------------------------------------------------------------------------------


class Places(NamedTuple):
    """Images or captions of a split, by the numbers of their rows or columns in a matrix."""

    split: str
    numbers: torch.Tensor

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, chosen):
        return Places(self.split, self.numbers[chosen])

    def chunk(self, n):
        """In n parts."""
        return [Places(self.split, part) for part in self.numbers.chunk(n)]


class Similarities:
    """A matrix of similarities, (images, captions), as a model.

    path: of the matrix; ids, texts: as of Files
    bank: paths of (bank images, captions) and (images, bank captions), for corrections; or None
    """

    def __init__(self, path, device, ids=None, texts=None, bank=None, flag="--sims"):
        self.path, self.device, self.ids, self.texts, self.flag = path, device, ids, texts, flag
        self.matrices = {"test": read(path, "similarities", flag)}
        self.bank = bank
        self.opt = Namespace(
            data_path="", data_name=path, logger_name=path, measure="given", cross_attn=None
        )

    @property
    def members(self):
        """Itself alone."""
        return [self]

    @property
    def facts(self):
        """What the report says of it."""
        return {"Similarities": self.path}

    def loader(self, split):
        """The Split of the matrix, or of the bank's; raises InputError if it is not given."""
        if split == "test":
            return self._own()
        if split != "train" or not self.bank:
            raise InputError(
                "--sims has no bank: give --bank_sims I2T T2I, the similarities of bank images "
                "with the captions and of the images with bank captions, or say --transductive"
            )
        own = self.matrices["test"].rows
        for name, path in zip(("i2t", "t2i"), self.bank):
            self.matrices[name] = read(path, "similarities", "--bank_sims")
        i2t, t2i = (self.matrices[name].rows for name in ("i2t", "t2i"))
        for path, matrix, side, what in (
            (self.bank[0], i2t, 1, "bank images x captions"),
            (self.bank[1], t2i, 0, "images x bank captions"),
        ):
            if matrix.shape[side] != own.shape[side]:
                raise InputError(
                    f"--bank_sims {path} has shape {tuple(matrix.shape)}, and {self.flag} "
                    f"{self.path} {tuple(own.shape)}: it must be {what}, with "
                    f"{own.shape[side]} {'rows' if side == 0 else 'columns'}"
                )
        dataset = Namespace(n_images=len(i2t), image_of=None)
        return Split(dataset, i2t, t2i, f"--bank_sims {' '.join(self.bank)}")

    def _own(self):
        found, shown = self.matrices["test"], f"{self.flag} {self.path}"
        n_rows, n_captions = found.rows.shape
        if found.count not in (None, n_rows):
            raise InputError(
                f"{shown} says npts {found.count}, and its matrix has {n_rows} rows: there must be "
                "a row for each image"
            )
        if self.ids is None and n_rows == CAPTIONS_PER_IMAGE * n_captions:
            raise InputError(
                f"{shown} has shape ({n_rows}, {n_captions}), as if rows and columns were swapped: "
                "save the matrix transposed, with a row for each image"
            )
        ids = [read_ids(path) for path in self.ids or ()]
        told = [f"{IDS['test']} {path}" for path in self.ids or ()] or [IDS["test"]]
        sources = Sources(shown, f"{shown}'s columns", *told)
        relation = relate(found.rows, n_captions, *(*ids, None, None)[:2], sources)
        texts = texts_of(self.texts, n_captions)
        dataset = Pairs(relation, texts, sources.ids)
        return Split(dataset, found.rows, found.rows, "similarities")

    def embed(self, split, stride=1):
        """(images, captions) of every stride-th image, each a Places."""
        dataset = split.dataset
        if (
            dataset.image_of is None
        ):  # of the bank, what belongs together is neither known nor needed
            sizes = len(split.images), split.captions.shape[1]
            return tuple(Places("bank", torch.arange(size)[::stride]) for size in sizes)
        captions = dataset.lines[dataset.image_of % stride == 0]
        return Places("test", dataset.row_of[::stride]), Places("test", captions)

    def similarities(self, images, captions):
        """The source of similarities (see `retrieval.ranking`)."""
        name = {"bank": "i2t"}.get(images.split) or {"bank": "t2i"}.get(captions.split, "test")
        return Matrix(self.matrices[name].rows, images.numbers, captions.numbers, self.device)
