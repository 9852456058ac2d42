"""Galleries of embeddings that another model made: what stands for the checkpoint.

Images' embeddings come from a file (see `embeddings.files`), captions' from a second one, if there
are any. A question is a vector of the same model. If the gallery names the text model, or the
network that saw the photos, words or photos can be asked, too.
"""

import os
import sys
from typing import Any, NamedTuple

import torch

from embeddings.as_model import Embeddings, Files, texts_of
from embeddings.files import read, split_key
from embeddings.relation import Sources, relate
from evaluation import BANK_IMAGES
from features.description import read_features_json
from features.files import CAPTIONS_PER_IMAGE, read_ids
from features.layout import first_of, numbered, same_rows
from features.text_description import KIND, refuse_other
from features.text_models import text_model
from features.texts import FrozenTexts
from gallery.index import spread
from gallery.store import describe, is_whole
from runtime.device import choose_device, choose_products
from runtime.errors import InputError, refuse_useless

OF_CHECKPOINTS = (
    "precomp",
    "split",
    "add",
    "data_path",
    "vocab_path",
    "caption_reading",
    "batch_size",
    "rerank_model",
    "correction_bank",
    "correction_bank_images",
)
BANK_CAPTIONS = CAPTIONS_PER_IMAGE * BANK_IMAGES  # most rows of a correction's bank


class Rows:
    """Rows of a file, made float32, and of length 1 for cosines, when they are asked for."""

    def __init__(self, model, source, numbers):
        """source: (n, D), may be memory-mapped; numbers: (m,) which of its rows"""
        self.model, self.source, self.numbers = model, source, numbers
        self.shape = (len(numbers), source.shape[1])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, chosen):
        """(k, D) on the model's device."""
        return self.model.placed(self.source, self.numbers[chosen]).float()

    def split(self, size):
        """Yield blocks of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


class Material(NamedTuple):
    """What the files hold that a gallery is built from."""

    items: list  # names of n photos
    rows: Rows  # (n, D)
    captions: list  # for each item, the list of its captions
    caption_rows: Any  # Rows (C, D) in the items' order, or None


class OtherModel(Embeddings):
    """Stands for a gallery's `evaluation.Checkpoint`, and for the model in it."""

    img_enc, caption_reading = None, None

    def __init__(self, images, width, device, measure="cosine", features=None):
        """images: the path of their embeddings, as FILE or FILE:NAME; width: D
        measure: "cosine" or "dot"
        features: what describes the network that saw the photos (see `features.description`)
        """
        super().__init__({"test": Files([images])}, device, measure)
        self.path, self.width, self.features, self.model = images, width, features, self
        self.reads_photos = features is not None
        self.bank_path, self.texts, self.content = None, None, None
        self.opt.embed_size = self.opt.img_dim = width
        self.opt.no_imgnorm = measure == "dot"

    @property
    def name(self):
        """What messages call it."""
        return f"the model of {self.path}"

    # As a checkpoint and its model

    @property
    def vocabulary(self):
        """One without words: a frozen text model reads any."""
        return self.texts if self.reads_words else FrozenTexts()

    @property
    def reads_words(self):
        """Whether a question may be in words."""
        return self.texts is not None

    def val_start(self):
        """Nothing: it is always ready."""

    def embed_images(self, rows):
        """What the network that saw the photos gives (B, D), as the gallery's rows are."""
        return rows if self.opt.no_imgnorm else torch.nn.functional.normalize(rows, dim=1)

    def embed_questions(self, questions):
        """(q, D) embeddings of texts, by the text model."""
        rows = self.texts.encode(questions).rows
        return self.placed(rows, torch.arange(len(rows)))

    def bank(self, captions=None):
        """(B, D) embeddings of captions that show which photos are hubs.

        captions: the gallery's own, (C, D) or None, taken if no --bank is named
        Raises InputError if there are neither.
        """
        if self.bank_path is not None:
            captions = read(self.bank_path, "captions", "--bank").rows
            self.check_width(captions, f"--bank {self.bank_path}")
        if captions is None:
            raise InputError(
                "a correction needs captions' embeddings as its bank: give --bank FILE, or build "
                "the gallery with --captions_embeddings"
            )
        if isinstance(captions, Rows):
            return spread(captions, BANK_CAPTIONS)
        return self.placed(captions, spread(torch.arange(len(captions)), BANK_CAPTIONS)).float()

    def check_width(self, rows, shown):
        """Raise InputError unless rows are as wide as the gallery's."""
        if rows.shape[1] != self.width:
            raise InputError(
                f"{shown} has rows of width {rows.shape[1]}, and the gallery's embeddings are of "
                f"width {self.width}: both must come from one model"
            )

    # The text model

    def name_text_model(self, name, weights):
        """Load a text model, so that words can be asked; InputError if its width is another."""
        try:
            found = text_model(name, weights, self.device)
        except InputError as error:
            text = str(error).replace("--text_encoder", "--text_model")
            raise InputError(text) from error
        width = found.description["width"]
        if width != self.width:
            raise InputError(
                f"--text_model {name} gives vectors of width {width}, and {self.path} has rows of "
                f"width {self.width}: name the model that made them"
            )
        self.texts = FrozenTexts(None, found.description)
        self.texts.model = found

    # In gallery.json

    def manifest(self, folder):
        """What gallery.json says of it, with paths relative to the gallery's folder."""
        texts = None
        if self.reads_words:
            texts = {name: self.texts.description[name] for name in (*KIND, "weights")}
        return {
            "model": None,
            "embeddings": {
                "images": relative_to(folder, self.path),
                "measure": self.opt.measure,
                "bank": self.bank_path and relative_to(folder, self.bank_path),
                "text_model": texts,
            },
        }


def relative_to(folder, text):
    """A path as FILE or FILE:NAME, relative to a folder."""
    path, key = split_key(text)
    path = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return path if key is None else f"{path}:{key}"


def joined_to(folder, text):
    """What `relative_to` made relative, as it can be opened from here; None stays None."""
    return text and os.path.normpath(os.path.join(os.path.realpath(folder), text))


# Opening ----------------------------------------------------------------------------------------


def is_asked_for(options, folder):
    """Whether options and gallery mean embeddings of another model, not a checkpoint."""
    return options.embeddings is not None or (
        options.model_path is None and is_whole(folder) and describe(folder)["model"] is None
    )


def opened(options, folder):
    """The OtherModel of the gallery in a folder, or of options.embeddings if there is none yet.

    If words may be asked, the text model is loaded now, so that nobody waits for it later.
    """
    refuse_useless(options, [(True, OF_CHECKPOINTS, "for embeddings that another model made")])
    device = choose_device(options.device)
    choose_products(device)
    about = describe(folder) if is_whole(folder) else None
    if about is None or about["model"] is not None:  # `check_own` refuses a checkpoint's gallery
        content, path = read(options.embeddings, "images", "--embeddings"), options.embeddings
        width, features = content.rows.shape[1], features_beside(path, content.rows)
        found = OtherModel(path, width, device, options.measure or "cosine", features)
        found.content, own = content, None
    else:
        said = about["embeddings"]
        own, path = said["text_model"], joined_to(folder, said["images"])
        found = OtherModel(path, about["width"], device, said["measure"], about["features"])
        found.bank_path = joined_to(folder, said["bank"])
    found.bank_path = options.bank or found.bank_path
    if options.dev:
        found.files["dev"] = Files(options.dev, options.dev_ids)
    found.reads_photos = found.reads_photos or options.encoder is not None
    _add_texts(found, own, options)
    return found


def _add_texts(found, own, options):
    """Give an OtherModel its text model; own: what the gallery says of it, or None."""
    asks = options.question is not None or options.batch is not None or options.serve
    if options.text_model is None and own is not None:
        found.texts = FrozenTexts(None, own)
        if asks:
            found.texts.load(found.device)
    elif options.text_model is not None:
        found.name_text_model(options.text_model, options.text_weights)
        if own is not None:
            where = "--text_model is", "the gallery's vectors were made by"
            refuse_other(found.texts.description, own, *where, "name that one, or leave it out")


def features_beside(path, rows):
    """The features.json of images' embeddings that extract_features.py made; None for others."""
    if not path.endswith("_ims.npy"):
        return None
    found = read_features_json(os.path.dirname(path) or ".")
    return found if found and found["width"] == rows.shape[1] else None


def check_own(folder, options):
    """Raise InputError unless a gallery is of the options' embeddings and measure."""
    about = describe(folder)
    if about["model"] is not None:
        raise InputError(
            f"the gallery {folder} is of the checkpoint {about['model']['path']}, not of "
            f"embeddings: name another --index"
        )
    said = about["embeddings"]
    named = options.embeddings and joined_to(folder, relative_to(folder, options.embeddings))
    if named and named != joined_to(folder, said["images"]):
        raise InputError(
            f"the gallery {folder} is of {joined_to(folder, said['images'])}, not of {named}: name "
            "another --index"
        )
    photos = about["folder"] and joined_to(folder, about["folder"])
    if options.images and os.path.realpath(options.images) != photos:
        raise InputError(
            f"the gallery {folder} has its photos in {photos or 'no folder'}, not in "
            f"{options.images}: name another --index"
        )
    if options.measure not in (None, said["measure"]):
        raise InputError(
            f"the gallery {folder} was built with --measure {said['measure']}: build one with "
            f"--measure {options.measure} in another --index"
        )


# What a gallery is built from -------------------------------------------------------------------


def read_material(found, options):
    """The Material that the options name; raises InputError for files that do not fit each other.

    found: an OtherModel, whose `content` is that of the images' file
    """
    images = found.content
    n, shown = len(images.rows), f"--embeddings {options.embeddings}"
    names, names_shown = images.ids, f"{shown}'s metadata"
    if options.items is not None:
        names, names_shown = read_ids(options.items), f"--items {options.items}"
        if len(names) != n:
            raise InputError(
                f"{names_shown} has {len(names)} lines for the {n} rows of {shown}: give a name "
                "for each row"
            )
    if options.captions_embeddings is None:
        rows = _distinct(images.rows, names, names_shown, shown)
        return Material(_named(names, rows), Rows(found, images.rows, rows), [[]] * len(rows), None)
    return _with_captions(found, options, images.rows, names, names_shown)


def _named(names, rows):
    """Names of the rows, or their numbers if there are no names."""
    if names is None:
        return [str(row) for row in rows.tolist()]
    return [names[row] for row in rows.tolist()] if len(rows) < len(names) else names


def _distinct(rows, names, names_shown, shown):
    """The first row of each name (m,), or all rows without names.

    Raises InputError if rows of one name differ.
    """
    if names is None or len(set(names)) == len(names):
        return torch.arange(len(rows))
    image_of, distinct = numbered(names)
    firsts = first_of(image_of)
    others = torch.arange(len(rows))
    unlike = (~same_rows(rows, others, firsts[image_of])).nonzero().squeeze(1)
    if len(unlike):
        row = int(unlike[0])
        raise InputError(
            f"{names_shown} gives rows {int(firsts[image_of[row]])} and {row} of {shown} one name, "
            f"{names[row]!r}, but they differ: give different photos different names"
        )
    print(
        f"note: {names_shown} has {len(distinct)} names for {len(rows)} rows: the first row of "
        "each is taken",
        file=sys.stderr,
    )
    return firsts


def _with_captions(found, options, rows, names, names_shown):
    """The Material of images' rows (n, D) with captions."""
    shown = f"--embeddings {options.embeddings}"
    captions_shown = f"--captions_embeddings {options.captions_embeddings}"
    captions = read(options.captions_embeddings, "captions", "--captions_embeddings")
    found.check_width(captions.rows, captions_shown)
    texts = texts_of(options.captions, len(captions.rows)) or captions.texts
    if texts is None:
        raise InputError(
            f"{captions_shown} has no texts beside it: name the file with a caption for each row, "
            "one a line, with --captions"
        )
    ids = captions.ids if options.ids is None else read_ids(options.ids)
    ids_shown = f"{captions_shown}'s metadata" if captions.ids else "--ids"
    ids_shown = ids_shown if options.ids is None else f"--ids {options.ids}"
    if ids is not None and names is not None and len(set(names)) == len(names) == len(rows):
        lines, image_of = _by_names(ids, names, len(captions.rows), ids_shown, names_shown)
        row_of, items = torch.arange(len(rows)), names
    else:
        sources = Sources(shown, captions_shown, ids_shown, names_shown)
        lines, image_of, row_of, own = relate(rows, len(captions.rows), ids, names, sources)
        items = own or _named(None, row_of)
    grouped = [[] for _ in items]
    for line, image in zip(lines.tolist(), image_of.tolist()):
        grouped[image].append(texts[line])
    return Material(
        list(items), Rows(found, rows, row_of), grouped, Rows(found, captions.rows, lines)
    )


def _by_names(ids, names, n_captions, ids_shown, names_shown):
    """(captions' rows, each one's photo), image by image; a photo may have no caption.

    ids: each caption's photo; names: of the photos, all different
    """
    if len(ids) != n_captions:
        raise InputError(
            f"{ids_shown} has {len(ids)} lines for {n_captions} captions: give a line for each"
        )
    number_of = {name: number for number, name in enumerate(names)}
    for line, name in enumerate(ids):
        if name not in number_of:
            raise InputError(
                f"{ids_shown}, line {line + 1}: {name!r} is not a name in {names_shown}: mend one "
                "of them"
            )
    image_of = torch.tensor([number_of[name] for name in ids])
    lines = torch.sort(image_of, stable=True).indices
    return lines, image_of[lines]
