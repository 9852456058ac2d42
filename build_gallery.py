"""Building a gallery (see `gallery`): features or photos in, embeddings, captions, correction and hubs out."""

import argparse
import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
import torch

import gallery
import run_record
from data import Loader, PrecompDataset, check_form, open_features, read_ids
from errors import InputError
from evaluation import embed
from features import read_features_json, refuse_other
from ranking import filled

BLOCK_ROWS = 8192  # embeddings handled at a time
HASHED_BYTES = 2**20  # at a time


class Contents(NamedTuple):
    """What goes into a gallery."""

    items: list  # paths of the photos, relative to `folder`, or ids
    rows: Any  # iterable of (m, D) embeddings, in the items' order
    captions: list  # of str, each photo's together
    caption_counts: list  # how many of them each photo has
    caption_embeddings: Any  # (C, D), or None where there are none
    source: str  # what it was made from, in words
    folder: str | None  # of the photos
    features: dict | None  # what made the features (see `features`), or None


def refuse_unsearchable(loaded):
    """Raise InputError for a model whose similarity is no product of two vectors."""
    if loaded.opt.measure == "order":
        raise InputError(f"checkpoint {loaded.path} was trained with --measure order, whose similarity is no product "
                         "of embeddings, so that there is nothing to index: take one of --measure cosine")
    if loaded.opt.cross_attn:
        raise InputError(f"checkpoint {loaded.path} is SCAN, with a vector for each region and word instead of one an "
                         "item: search with a VSE model, and give this one as --rerank_model")


def hash_file(path):
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()


# From features ----------------------------------------------------------------------------------

def from_features(loaded, folder, split, photos=None):
    """The Contents of a split of precomputed features, `<folder>/<split>_ims.npy`, and its captions and ids, if any.

    photos: the folder in which the ids name photos (default: `<folder>/images`, if it is there).
    """
    opt = loaded.opt
    if hasattr(loaded.model.img_enc, "cnn"):
        raise InputError(f"checkpoint {loaded.path} was trained on photos, not on features: build its gallery with "
                         "--images")
    description = read_features_json(folder)
    if description and loaded.features:
        refuse_other(description, loaded.features, folder, f"checkpoint {loaded.path}")
    if os.path.exists(os.path.join(folder, f"{split}_caps.txt")) or not os.path.isdir(folder):
        dataset = PrecompDataset(folder, split, loaded.vocabulary, opt.caption_reading, opt.img_dim)
        check_form(dataset, opt)
        images, caption_embeddings = embed(loaded.model, Loader(dataset, opt.batch_size))
        rows, captions, image_of = images.split(BLOCK_ROWS), dataset.captions, dataset.image_of
    else:
        features = open_features(os.path.join(folder, f"{split}_ims.npy"))
        check_form(argparse.Namespace(images=features), opt)
        if features.shape[-1] != opt.img_dim:
            raise InputError(f"{folder} has features of width {features.shape[-1]}, and the model was trained on "
                             f"{opt.img_dim}: take features of the same encoder")
        rows, captions, caption_embeddings = embedded(loaded.model, features, opt.batch_size), [], None
        image_of = torch.empty(0, dtype=torch.int64)
    n = int(image_of[-1]) + 1 if captions else len(features)
    if photos is None and os.path.isdir(os.path.join(folder, "images")):
        photos = os.path.join(folder, "images")
    return Contents(items_of(folder, split, n, image_of), rows, captions, torch.bincount(image_of, minlength=n).tolist(),
                    caption_embeddings, f"{os.path.abspath(folder)}, {split}", photos, description or loaded.features)


def embedded(model, features, batch_size):
    """(n, ...) features -> their embeddings, a batch at a time."""
    model.val_start()
    for batch in features.split(batch_size):
        yield model.embed_images(filled(batch.float(), batch_size))[:len(batch)]


def items_of(folder, split, n, image_of):
    """A name for each of n photos: their ids, or numbers where there is no file of them."""
    path = os.path.join(folder, f"{split}_ids.txt")
    if not os.path.exists(path):
        return [str(number) for number in range(n)]
    ids = read_ids(path)
    if len(ids) != n and len(ids) >= len(image_of) > 0:  # a line a caption
        ids = [ids[first] for first in torch.searchsorted(image_of, torch.arange(n)).tolist()]
    if len(ids) != n:
        raise InputError(f"{path} has {len(ids)} lines for {n} photos: mend or remove it")
    return ids


# Writing ----------------------------------------------------------------------------------------

def write(folder, loaded, contents, correction):
    """Write a gallery of Contents, with a `corrections` method's name and what else is to be said of it."""
    with run_record.lock(folder, "--index"):
        gallery.clear(folder, kept=gallery.describe(folder)["files"] if gallery.is_whole(folder) else None)
        files = gallery.new_files(folder)
        n, width = len(contents.items), loaded.opt.embed_size
        rows = (with_shift(block, None) for block in contents.rows)
        gallery.save_rows(os.path.join(files, "embeddings.npy"), rows, (n, width + 1))
        gallery.write_texts(os.path.join(files, "items"), contents.items)
        if contents.captions:
            gallery.write_texts(os.path.join(files, "captions"), contents.captions)
            gallery.save(os.path.join(files, "caption_starts.npy"), np.cumsum([0, *contents.caption_counts]))
            gallery.save_rows(os.path.join(files, "caption_embeddings.npy"),
                              contents.caption_embeddings.split(BLOCK_ROWS), (len(contents.captions), width))
        gallery.publish(folder, files, {
            "count": n, "width": width, "captions": len(contents.captions),
            "model": {"path": relative(loaded.path, folder), "sha256": hash_file(loaded.path)},
            "source": contents.source,
            "folder": None if contents.folder is None else relative(contents.folder, folder),
            "features": contents.features, "correction": {"method": "none"}, "index": "exact", "hubs": None})


def with_shift(rows, shift):
    """(m, D) embeddings -> (m, D + 1), the last number minus the correction's shift (m,), or 0."""
    last = rows.new_zeros(len(rows)) if shift is None else -shift.to(rows)
    return torch.cat([rows, last.unsqueeze(1)], 1)


def relative(path, folder):
    """A path as seen from a gallery's folder, so that both can be moved together."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
