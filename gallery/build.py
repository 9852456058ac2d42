"""Build or change a gallery (see `gallery.store`) from photos, from features or from a gallery."""

import argparse
import itertools
import os
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data import Loader, PrecompDataset, check_form
from evaluation import embed, embed_texts
from features import encoders
from features.blocks import (
    BLOCK_PHOTOS,
    encode_blocks,
    file_facts,
    plan_blocks,
    read_notes,
    read_rows,
)
from features.description import read_features_json, refuse_other
from features.files import open_features, read_ids
from features.layout import first_of, numbered
from features.parts import blocks_of, identity, write_part
from features.texts import read_texts
from gallery import hubs as gallery_hubs
from gallery import index, store
from gallery.other_models import OtherModel, read_material
from inputs.captions import CaptionedPhoto, read_caption_texts, read_photo_captions
from inputs.photos import image_transform, photo_names
from inputs.word_ids import unknown_in_words
from retrieval.similarity import filled
from runtime.errors import InputError
from runtime.files import check_regular, hash_file, replacing
from runtime.finite import checked

BLOCK_ROWS = 8192  # embeddings handled at a time
RECALL_QUERIES = 1000  # queries that measure an index's recall
PROBE_QUERIES = 200  # queries that decide how many of its lists an index searches
BROKEN = "broken.txt"


class Contents(NamedTuple):
    """What goes into a gallery."""

    items: list  # paths of the photos, relative to `folder`, or ids
    rows: Iterable  # blocks (m, D) of embeddings in the items' order; (m, D + 1) with their shifts
    captions: list  # for each item, the list of its captions
    caption_embeddings: Any  # (C, D), or None without captions
    source: str  # what it is made from, in words
    folder: str | None  # of the photos
    features: dict | None  # what made the features (see `features.description`), or None
    facts: list | None = None  # for each photo, its file's (size, time of change)
    precomp: tuple | None = None  # (folder, split) of features with one row for each item
    part: dict | None = None  # which part of the photos it is (see `gallery.parts`), or None


def refuse_unsearchable(loaded):
    """Raise InputError for a model whose similarity is not a product of two vectors."""
    if loaded.opt.cross_attn:
        raise InputError(
            f"checkpoint {loaded.path} is SCAN, with a vector for each region and word instead of "
            "one an item: search with a VSE model, and give this one as --rerank_model"
        )
    if loaded.opt.measure == "order":
        raise InputError(
            f"checkpoint {loaded.path} was trained with --measure order, whose similarity is no "
            "product of embeddings, so that there is nothing to index: take one of --measure "
            "cosine"
        )


# From features ----------------------------------------------------------------------------------


def from_features(loaded, folder, split, photos=None):
    """The Contents of a split of precomputed features, with its captions and ids, if it has any.

    folder, split: the features are `<folder>/<split>_ims.npy`
    photos: the folder of the photos that the ids name (default: `<folder>/images`, if it exists)
    """
    if sees_photos(loaded.model):
        raise InputError(
            f"checkpoint {loaded.path} was trained on photos, not on features: build its gallery "
            "with --images alone"
        )
    description = read_features_json(folder)
    if description and loaded.features:
        refuse_other(description, loaded.features, folder, f"checkpoint {loaded.path}")
    has_captions = os.path.exists(os.path.join(folder, f"{split}_caps.txt"))
    read = captioned if has_captions or not os.path.isdir(folder) else uncaptioned
    found, items, rows, captions, caption_embeddings = read(loaded, folder, split)
    if photos is None and os.path.isdir(os.path.join(folder, "images")):
        photos = os.path.join(folder, "images")
    return Contents(
        list(items),
        rows,
        captions,
        caption_embeddings,
        source_of(folder, split),
        photos,
        description or loaded.features,
        precomp=(folder, split) if len(found) == len(captions) else None,
    )


def captioned(loaded, folder, split):
    """A split with captions: its features, and `Contents`' first four fields."""
    opt = loaded.opt
    dataset = PrecompDataset(
        folder, split, loaded.vocabulary, opt.caption_reading, opt.img_dim, together=True
    )
    check_form(dataset, opt)
    tell(unknown_in_words(dataset.word_ids, split, loaded.path))
    images, caption_embeddings = embed(loaded.model, Loader(dataset, opt.batch_size))
    captions = grouped(dataset.captions, dataset.image_of)
    items = dataset.names or map(str, range(dataset.n_images))
    if dataset.left_out:
        tell(
            f"note: {split}'s first {len(dataset)} captions are taken, as everywhere: "
            f"{len(captions)} photos"
        )
    return dataset.images, items, images.split(BLOCK_ROWS), captions, caption_embeddings


def uncaptioned(loaded, folder, split):
    """As `captioned`, for a split without captions."""
    opt, ids_file = loaded.opt, os.path.join(folder, f"{split}_ids.txt")
    found = open_features(os.path.join(folder, f"{split}_ims.npy"))
    check_form(argparse.Namespace(images=found), opt)
    if found.shape[-1] != opt.img_dim:
        raise InputError(
            f"{folder} has features of width {found.shape[-1]}, and the model was trained on "
            f"{opt.img_dim}: take features of the same encoder"
        )
    items, first = list(map(str, range(len(found)))), torch.arange(len(found))
    if os.path.exists(ids_file):
        ids = read_ids(ids_file)
        if len(ids) != len(found):
            raise InputError(
                f"{ids_file} has {len(ids)} lines for {len(found)} photos: mend or remove it"
            )
        numbers, items = numbered(ids)
        first = first_of(numbers)
    if len(items) < len(found):
        tell(
            f"note: {ids_file} names {len(items)} photos for {len(found)} rows: the first row of "
            "each is taken"
        )
    rows = checked(embedded(loaded.model, found, first, opt.batch_size), "photos")
    return found, items, rows, [[]] * len(items), None


def source_of(folder, split):
    """The source that gallery.json names for a gallery of these features."""
    return f"{os.path.realpath(folder)}, {split}"


def source_of_gallery(folder, found):
    """What a gallery was made from, in words, even if it was moved together with its source.

    found: its gallery.json
    """
    if found["precomp"]:
        return source_of(
            os.path.join(folder, found["precomp"]["folder"]), found["precomp"]["split"]
        )
    if "facts.npy" in found["sizes"]:
        return os.path.realpath(os.path.join(folder, found["folder"]))
    return found["source"]


def grouped(captions, image_of):
    """For each image, the list of its captions; image_of: (C,), ascending."""
    counts = torch.bincount(image_of).tolist()
    remaining = iter(captions)
    return [list(itertools.islice(remaining, count)) for count in counts]


def embedded(model, features, rows, batch_size):
    """The embeddings of these rows of features, batch by batch."""
    model.val_start()
    for batch in rows.split(batch_size):
        yield model.embed_images(filled(features[batch].float(), batch_size))[: len(batch)]


# From embeddings --------------------------------------------------------------------------------


def from_embeddings(loaded, options):
    """The Contents of embeddings that another model made; loaded: an OtherModel."""
    found = read_material(loaded, options)
    return Contents(
        found.items,
        found.rows.split(BLOCK_ROWS),
        found.captions,
        found.caption_rows,
        os.path.realpath(options.embeddings),
        options.images,
        loaded.features,
    )


# From photos ------------------------------------------------------------------------------------


class _Embedding(nn.Module):
    """Embeddings (B, D) of pictures (B, ...): the net that makes features, then the model."""

    def __init__(self, net, model, normalised):
        super().__init__()
        self.net, self.model, self.normalised = net, model, normalised

    def forward(self, pictures):
        rows = self.net(pictures).float()
        return self.model.embed_images(
            nn.functional.normalize(rows, dim=-1) if self.normalised else rows
        )


def sees_photos(model):
    """Whether a model takes photos, not features."""
    return hasattr(model.img_enc, "cnn")


def photo_encoder(loaded, known=None, options=None):
    """(`features.encoders.Encoder` of photos' embeddings, description of its features or None).

    The Encoder's rows are the model's embeddings. A model of photos has no features to describe.
    Raises InputError if the network that made the model's features is unknown or not available.

    known: a gallery's description of its features, or None
    options: encoder, encoder_weights, pooling, regions, normalise; None: not given
    """
    if sees_photos(loaded.model):
        description = {
            "encoder": loaded.opt.cnn_type,
            "weights": "the checkpoint's",
            "normalised": False,
            "resize": 256,
        }
        encoder = encoders.Encoder(
            nn.Identity(),
            image_transform(False, loaded.opt.crop_size),
            description,
            loaded.model.device,
        )
        features = None
    else:
        encoder = feature_encoder(loaded, known or loaded.features, options)
        description = encoder.description
        features = {"dtype": "float32", "amp": "off", **description}
    own = {**description, "normalised": False, "regions": None, "width": loaded.opt.embed_size}
    net = _Embedding(encoder.net, loaded.model, description["normalised"])
    return encoder._replace(net=net, description=own), features


def feature_encoder(loaded, known, options):
    """The `features.encoders.Encoder` of the features that a model takes.

    known, options: as for `photo_encoder`
    """
    device = loaded.model.device
    if getattr(options, "encoder", None):
        encoder = encoders.build_encoder(
            options.encoder,
            options.encoder_weights or "imagenet",
            options.pooling or "pooled",
            options.regions,
            options.normalise,
            device,
        )
        if known:
            refuse_other(
                encoder.description,
                known,
                f"--encoder {options.encoder}",
                loaded.name,
            )
    elif known:
        encoder = encoders.encoder_from(known, device, getattr(options, "encoder_weights", None))
    else:
        raise InputError(
            f"{loaded.name} does not say which network saw its photos: name it with "
            "--encoder, --encoder_weights and --pooling, as extract_features.py takes them"
        )
    name, width = encoder.description["encoder"], encoder.description["width"]
    if width != loaded.opt.img_dim:
        raise InputError(
            f"{name} gives features of width {width}, and the model {loaded.path} was trained on "
            f"{loaded.opt.img_dim}: name the encoder of its features"
        )
    check_form(argparse.Namespace(images=torch.empty(1, *encoder.row_shape)), loaded.opt)
    return encoder


def from_photos(loaded, encoder, description, output, folder, photos, options):
    """The Contents of CaptionedPhotos, encoded in blocks below `output`, so a killed build resumes.

    Photos that cannot be read are left out and listed in broken.txt.

    encoder, description: as `photo_encoder` returns them
    folder: which the photos' names are relative to
    options: batch_size, workers, part
    """
    links = links_outside(folder, [photo.name for photo in photos])
    whole = [photo for photo in photos if photo.name not in links]
    args = argparse.Namespace(
        images=folder,
        output=output,
        batch_size=min(options.batch_size or 32, BLOCK_PHOTOS),
        workers=options.workers,
        dtype="float32",
        amp="off",
        encoder="the model",
    )
    loaded.model.val_start()
    blocks = plan_blocks(args, whole, {**encoder.description, "model": hash_file(loaded.path)})
    part, seen = None, photos
    if options.part:
        blocks = blocks_of(options.part, blocks)
        part = identity(options.part, blocks, folder, whole)
        seen = [*whole[part["first"] : part["end"]], *(one for one in photos if one.name in links)]
    encode_blocks(args, whole, blocks, encoder)
    notes = [read_notes(block) for block in blocks]
    broken = {whole[number].name: why for note in notes for number, why in note.broken.items()}
    broken |= dict.fromkeys(links, "it is a link that leads outside the folder")
    chosen = [whole[number] for note in notes for number in note.numbers]
    write_broken(output, folder, broken, [photo.name for photo in seen])
    captions = [photo.captions for photo in chosen]
    rows = checked(
        (torch.from_numpy(read_rows(block)) for block, note in zip(blocks, notes) if note.numbers),
        "photos",
    )
    return Contents(
        [photo.name for photo in chosen],
        rows,
        captions,
        embed_captions(loaded, captions),
        os.path.realpath(folder),
        folder,
        description,
        [file_facts(os.path.join(folder, photo.name)) or (0, 0) for photo in chosen],
        part=part,
    )


def links_outside(folder, names):
    """The names below `folder` that are links to a file outside of it."""
    root = os.path.realpath(folder)
    return {
        name
        for name in names
        if os.path.islink(os.path.join(folder, name)) and store.inside(root, name) is None
    }


def photos_of(folder, names, captions, others=()):
    """The named photos as CaptionedPhotos.

    captions: the file or folder with their captions; None: text files beside the photos
    others: further names that a table may hold without a note
    """
    if captions is None or os.path.isdir(captions):
        return read_caption_texts(captions or folder, names)
    known = {photo.name: photo.captions for photo in read_photo_captions(captions, folder)}
    if unnamed := set(names) - known.keys():
        tell(
            f"note: {len(unnamed)} photos in {folder} are not named in {captions}, such as "
            f"{min(unnamed)}"
        )
    if missing := known.keys() - {*names, *others}:
        tell(
            f"note: {len(missing)} photos of {captions} are not in {folder}, such as {min(missing)}"
        )
    return [CaptionedPhoto(name, known.get(name, []), None) for name in names]


def embed_captions(loaded, captions):
    """Embeddings (C, D) of all captions, or None without any; captions: a list for each photo."""
    texts = list(itertools.chain.from_iterable(captions))
    if not texts:
        return None
    words = read_texts(texts, loaded.vocabulary, loaded.opt.caption_reading)
    tell(unknown_in_words(words, "these photos", loaded.path))
    return embed_texts(loaded.model, words, loaded.opt.batch_size)


def write_broken(output, folder, broken, names):
    """List in broken.txt the photos that are left out.

    Lines of photos that were not looked at now, but still exist, stay.

    broken: {name: reason}
    names: all photos that were looked at now
    """
    path, looked_at = os.path.join(output, BROKEN), set(map(store.shown, names))
    lines = [f"{store.shown(name)}\t{store.shown(why)}" for name, why in broken.items()]
    there = os.path.exists(path)
    check_regular(path)
    if there:
        with open(path, encoding="utf-8") as file:
            lines += [
                line
                for line in file.read().splitlines()
                if (name := line.split("\t")[0]) not in looked_at
                and os.path.lexists(os.path.join(folder, name))
            ]
    if lines:
        with replacing(path) as file:
            file.writelines(f"{line}\n".encode() for line in sorted(lines))
    elif there:
        os.unlink(path)
    if broken:
        tell(f"{len(broken)} of {len(names)} photos are left out: {path} lists them")


def names_below(folder, root):
    """Paths, relative to `root`, of the photos below `folder`, which is `root` or lies in it."""
    below = os.path.relpath(os.path.realpath(folder), os.path.realpath(root))
    if below.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"--add {folder} does not lie in the gallery's one folder {root}: move it there, or "
            "build a gallery of the folder that holds both"
        )
    names = [os.path.normpath(os.path.join(below, name)) for name in photo_names(folder)]
    if not names:
        raise InputError(
            f"there is no photo in {folder}: its files must end in .jpg, .png, or such"
        )
    return names


# From a gallery ---------------------------------------------------------------------------------


def from_gallery(found, kept=None, shifted=True):
    """The Contents of a Gallery.

    kept: numbers of the photos to take, ascending; None: all
    shifted: whether the rows keep their shifts
    """
    kept = np.arange(found.count) if kept is None else np.array(kept, np.int64)
    width = found.width + shifted
    rows = (
        found.embeddings[torch.from_numpy(part), :width]
        for part in np.array_split(kept, max(1, len(kept) // BLOCK_ROWS))
    )
    captions, caption_embeddings = [found.captions(number) for number in kept.tolist()], None
    if any(captions):
        starts = found.caption_starts
        caption_embeddings = torch.cat(
            [
                found.caption_embeddings[starts[number] : starts[number + 1]]
                for number in kept.tolist()
            ]
        )
    facts, own = found.facts, found.description["precomp"] if len(kept) == found.count else None
    return Contents(
        [found.items[number] for number in kept.tolist()],
        rows,
        captions,
        caption_embeddings,
        found.description["source"],
        found.photo_folder,
        found.description["features"],
        None if facts is None else [tuple(facts[number].tolist()) for number in kept.tolist()],
        own and (os.path.join(os.path.realpath(found.folder), own["folder"]), own["split"]),
    )


def joined(one, other):
    """Two Contents as one, with the folder and source of the first."""
    embeddings = [
        part.cpu()
        for part in (one.caption_embeddings, other.caption_embeddings)
        if part is not None
    ]
    return one._replace(
        items=one.items + other.items,
        rows=itertools.chain(one.rows, other.rows),
        captions=one.captions + other.captions,
        facts=one.facts + other.facts,
        caption_embeddings=torch.cat(embeddings) if embeddings else None,
    )


# Writing ----------------------------------------------------------------------------------------


def write(folder, loaded, contents, correction, kind=None):
    """Write a gallery of Contents into a folder, which must be locked.

    kind: the type of index; None: the usual one for that many photos
    """
    n = len(contents.items)
    if not n:
        raise InputError(
            "no photo would be left in the gallery: leave it as it is, or build another one"
        )
    kind = kind or index.usual_type(n)
    index.check_count(kind, n)
    store.clear(folder)
    with store.new_files(folder) as files:
        hubs = write_arrays(files, loaded, contents, correction, kind)
        store.publish(
            folder,
            files,
            {
                "count": n,
                "width": loaded.opt.embed_size,
                "captions": sum(map(len, contents.captions)),
                **manifest(loaded, folder),
                "source": contents.source,
                "precomp": contents.precomp
                and {"folder": relative(contents.precomp[0], folder), "split": contents.precomp[1]},
                "folder": None if contents.folder is None else relative(contents.folder, folder),
                "features": contents.features,
                "index": kind,
                "hubs": hubs,
                "correction": {
                    "method": correction.method,
                    "parameters": correction.parameters,
                    "bank_split": correction.bank_split,
                    "bank_images": correction.bank_images,
                },
                **about_part(contents.part, correction),
            },
        )


def about_part(part, correction):
    """What gallery.json says if a gallery is a part (see `gallery.parts`)."""
    return {"part": {**part, "bank_sha256": correction.bank_sha256}} if part else {}


def manifest(loaded, folder):
    """What gallery.json says of the model."""
    if isinstance(loaded, OtherModel):
        return loaded.manifest(folder)
    return {"model": {"path": relative(loaded.path, folder), "sha256": hash_file(loaded.path)}}


def write_arrays(files, loaded, contents, correction, kind):
    """Write embeddings, index, hubs and names into the folder `files`.

    Returns, in words, which questions the hubs were counted over, or None.
    """
    n, captions, path = (
        len(contents.items),
        contents.caption_embeddings,
        os.path.join(files, "embeddings.npy"),
    )
    store.save_rows(
        path,
        (with_shift(loaded, block, correction) for block in contents.rows),
        (n, loaded.opt.embed_size + 1),
    )
    embeddings = torch.from_numpy(np.load(path, mmap_mode="c"))
    if kind != index.EXACT:
        like = embeddings[:, :-1] if captions is None else captions
        queries = index.spread(like, PROBE_QUERIES).float().cpu()
        asked = queries.new_full((len(queries), 1), float(correction.method != "none"))
        index.build(
            kind, embeddings, torch.cat([queries, asked], 1), os.path.join(files, store.INDEX)
        )
    search = index.read(kind, os.path.join(files, store.INDEX), embeddings)
    hubs, words = gallery_hubs.count_hubs(search, captions, correction.bank, n)
    if hubs is not None:
        store.save(os.path.join(files, "hubs.npy"), hubs)
    store.write_items(files, contents.items, contents.captions, captions, contents.facts)
    return words


def recall_of(found, corrected=True):
    """How much of its queries' ten nearest a Gallery's index finds: (share, n queries, words).

    corrected: whether the gallery's hub correction is applied
    """
    queries, words = found.embeddings[:, :-1], "of its own photos"
    if found.n_captions:
        queries, words = found.caption_embeddings, "of its own captions"
    queries = index.spread(queries, RECALL_QUERIES)
    corrected = float(corrected and found.correction != "none")
    queries = torch.cat([queries, queries.new_full((len(queries), 1), corrected)], 1)
    numbers = (
        search(queries, index.DEPTH)[1]
        for search in (found.find, partial(index.exact, found.embeddings))
    )
    return index.recall(*numbers), len(queries), words


def with_shift(loaded, rows, correction):
    """(m, D + 1): embeddings (m, D) with minus the correction's shift appended.

    Embeddings (m, D + 1), which have theirs already, stay as they are.
    """
    if rows.shape[1] > loaded.opt.embed_size:
        return rows
    rows = rows.float()
    return torch.cat([rows, -correction.shift(loaded, rows).to(rows).unsqueeze(1)], 1)


def build(options, loaded, folder, photo_folder):
    """Build a gallery of options.embeddings, of options.precomp, or of photos in photo_folder."""
    if options.embeddings is not None:
        contents = from_embeddings(loaded, options)
        correction = gallery_hubs.choose_correction(options, loaded, contents.caption_embeddings)
        write(folder, loaded, contents, correction, options.index_type)
        return
    names = [] if options.precomp is not None else names_below(photo_folder, photo_folder)
    if names:
        index.check_count(options.index_type, len(names))
    correction = gallery_hubs.choose_correction(options, loaded)
    if options.precomp is not None:
        contents = from_features(loaded, options.precomp, options.split, photo_folder)
    else:
        contents = from_photos(
            loaded,
            *photo_encoder(loaded, None, options),
            folder,
            photo_folder,
            photos_of(photo_folder, names, options.captions),
            options,
        )
        if not contents.items:
            count = len(names)
            if contents.part:  # --merge goes on without it
                write_part(folder, contents.part)
                count = contents.part["end"] - contents.part["first"]
            raise InputError(
                f"none of the {count} photos in {photo_folder} can be read: "
                f"{os.path.join(folder, BROKEN)} says why"
            )
    write(folder, loaded, contents, correction, options.index_type)


def change(options, loaded, folder):
    """Change an existing gallery by options.add, prune, rebuild_index, correction, index_type."""
    found = store.Gallery(folder, with_index=not options.rebuild_index, whole=True)
    anew = options.rebuild_index and options.correction is not None
    correction = (
        gallery_hubs.choose_correction(options, loaded, found.own_captions)
        if anew
        else gallery_hubs.correction_of(found, loaded)
    )
    kept, new = range(found.count), []
    if options.add is not None:
        kept, new = what_is_new(found, options.add, options.captions)
    if options.prune:
        kept = [number for number in kept if found.photo(number) is not None]
    if (
        (len(kept), new) == (found.count, [])
        and not options.rebuild_index
        and (options.index_type in (None, found.description["index"]))
    ):
        tell(f"{folder}: nothing to change, {found.count} photos")
        return
    contents = from_gallery(found, kept, shifted=not anew)
    if new:
        encoder, description = photo_encoder(loaded, found.description["features"], options)
        added = from_photos(loaded, encoder, description, folder, found.photo_folder, new, options)
        if options.hub_alarm != "off":
            rows = gallery_hubs.watched(
                added.rows, added.items, found, correction.bank, options.hub_alarm or "warn"
            )
            added = added._replace(rows=rows)
        contents = joined(contents, added)
    write(
        folder,
        loaded,
        contents,
        correction,
        options.index_type
        or (
            None
            if found.description["index"] == index.usual_type(found.count)
            else found.description["index"]
        ),
    )
    tell(f"{folder}: {len(contents.items)} photos, before {found.count}; {len(new)} were encoded")


def what_is_new(found, folder, captions):
    """(numbers of a Gallery's photos that stay, CaptionedPhotos below `folder` to encode).

    captions: see `photos_of`; photos in the gallery that have none there keep the gallery's
    """
    if found.facts is None:
        raise InputError(
            f"the gallery {found.folder} was built from features, and photos can't be added to "
            "those: build one with --images"
        )
    number_of = {name: number for number, name in enumerate(found.items)}
    new, changed = [], set()
    for photo in photos_of(
        found.photo_folder, names_below(folder, found.photo_folder), captions, number_of
    ):
        number = number_of.get(photo.name)
        if number is not None:
            own, facts = (
                found.captions(number),
                file_facts(os.path.join(found.photo_folder, photo.name)),
            )
            photo = photo if photo.captions else photo._replace(captions=own)
            if photo.captions == own and tuple(found.facts[number].tolist()) == facts:
                continue
            changed.add(number)
        new.append(photo)
    return [number for number in range(found.count) if number not in changed], new


def relative(path, folder):
    """A path relative to a gallery's folder, so that both can be moved together."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def tell(line):
    """Print a line for the person at the keyboard."""
    print(store.shown(line), file=sys.stderr)
