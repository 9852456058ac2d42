"""Building a gallery (see `gallery`): photos or features in; embeddings, captions, a correction and an index out."""

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import features
import gallery
import gallery_hubs
import index
from caption_files import CaptionedPhoto, read_caption_texts, read_photo_captions
from data import Loader, PrecompDataset, check_form, image_names, open_features, read_ids
from errors import InputError, replacing
from evaluation import embed, embed_texts
from images import image_transform, photo_names
from photo_blocks import BLOCK_PHOTOS, encode_blocks, file_facts, plan_blocks, read_notes, read_rows
from ranking import filled
from word_ids import number_words

BLOCK_ROWS = 8192  # embeddings handled at a time
HASHED_BYTES = 2**20  # at a time
RECALL_QUERIES = 1000  # that tell how much of the nearest it finds
PROBE_QUERIES = 200  # that tell how much an index has to look through
BROKEN = "broken.txt"


class Contents(NamedTuple):
    """What goes into a gallery."""

    items: list  # paths of the photos, relative to `folder`, or ids
    rows: Iterable  # blocks (m, D) of embeddings in the items' order, or (m, D + 1), which have their shifts
    captions: list  # for each item, the list of its captions
    caption_embeddings: Any  # (C, D), or None where there are none
    source: str  # what it was made from, in words
    folder: str | None  # of the photos
    features: dict | None  # what made the features (see `features`), or None
    facts: list | None = None  # for each photo (size, time of change) of its file
    precomp: tuple | None = None  # the features' (folder, split), which have a row for each item


def refuse_unsearchable(loaded):
    """Raise InputError for a model whose similarity is no product of two vectors."""
    if loaded.opt.cross_attn:
        raise InputError(f"checkpoint {loaded.path} is SCAN, with a vector for each region and word instead of one an "
                         "item: search with a VSE model, and give this one as --rerank_model")
    if loaded.opt.measure == "order":
        raise InputError(f"checkpoint {loaded.path} was trained with --measure order, whose similarity is no product "
                         "of embeddings, so that there is nothing to index: take one of --measure cosine")


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
    if sees_photos(loaded.model):
        raise InputError(f"checkpoint {loaded.path} was trained on photos, not on features: build its gallery with "
                         "--images alone")
    description = features.read_features_json(folder)
    if description and loaded.features:
        features.refuse_other(description, loaded.features, folder, f"checkpoint {loaded.path}")
    ids_file = os.path.join(folder, f"{split}_ids.txt")
    has_ids = os.path.exists(ids_file)
    if os.path.exists(os.path.join(folder, f"{split}_caps.txt")) or not os.path.isdir(folder):
        dataset = PrecompDataset(folder, split, loaded.vocabulary, opt.caption_reading, opt.img_dim)
        check_form(dataset, opt)
        images, caption_embeddings = embed(loaded.model, Loader(dataset, opt.batch_size))
        found, rows, captions = dataset.images, images.split(BLOCK_ROWS), grouped(dataset.captions, dataset.image_of)
        items = image_names(dataset, ids_file) if has_ids else map(str, range(dataset.n_images))
        if int(dataset.row_of[-1]) + 1 < len(found):
            tell(f"note: {split}'s first {len(dataset)} captions are taken, as everywhere: {len(captions)} photos")
    else:
        found = open_features(os.path.join(folder, f"{split}_ims.npy"))
        check_form(argparse.Namespace(images=found), opt)
        if found.shape[-1] != opt.img_dim:
            raise InputError(f"{folder} has features of width {found.shape[-1]}, and the model was trained on "
                             f"{opt.img_dim}: take features of the same encoder")
        rows, caption_embeddings, captions = embedded(loaded.model, found, opt.batch_size), None, [[]] * len(found)
        items = read_ids(ids_file) if has_ids else map(str, range(len(found)))
        if has_ids and len(items) != len(found):
            raise InputError(f"{ids_file} has {len(items)} lines for {len(found)} photos: mend or remove it")
    if photos is None and os.path.isdir(os.path.join(folder, "images")):
        photos = os.path.join(folder, "images")
    return Contents(list(items), rows, captions, caption_embeddings,
                    source_of(folder, split), photos, description or loaded.features,
                    precomp=(folder, split) if len(found) == len(captions) else None)


def source_of(folder, split):
    """What gallery.json says of a gallery of such features."""
    return f"{os.path.realpath(folder)}, {split}"


def source_of_gallery(folder, found):
    """What a gallery was made from, in words, wherever it and that were moved to together; found: its gallery.json."""
    if found["precomp"]:
        return source_of(os.path.join(folder, found["precomp"]["folder"]), found["precomp"]["split"])
    if "facts.npy" in found["sizes"]:
        return os.path.realpath(os.path.join(folder, found["folder"]))
    return found["source"]


def grouped(captions, image_of):
    """Captions (list of str) and their images' numbers (C,), in order -> a list of them for each image."""
    counts = torch.bincount(image_of).tolist()
    remaining = iter(captions)
    return [list(itertools.islice(remaining, count)) for count in counts]


def embedded(model, rows, batch_size):
    """(n, ...) features -> their embeddings, a batch at a time."""
    model.val_start()
    for batch in rows.split(batch_size):
        yield model.embed_images(filled(batch.float(), batch_size))[:len(batch)]


# From photos ------------------------------------------------------------------------------------

class _Embedding(nn.Module):
    """Pictures (B, ...) -> their embeddings (B, D), by the net that makes features and the model over these."""

    def __init__(self, net, model, normalised):
        super().__init__()
        self.net, self.model, self.normalised = net, model, normalised

    def forward(self, pictures):
        rows = self.net(pictures).float()
        return self.model.embed_images(nn.functional.normalize(rows, dim=-1) if self.normalised else rows)


def sees_photos(model):
    """Whether a model takes photos, and not their features."""
    return hasattr(model.img_enc, "cnn")


def photo_encoder(loaded, known=None, options=None):
    """(a `features.Encoder` whose rows are the model's embeddings of photos, what features.json would say of it).

    known: a gallery's description of its features, or None; options: encoder, encoder_weights, pooling, regions and
    normalise, of which None are not given. Raises InputError where it is not known how the model sees a photo, or that
    cannot be built here.
    """
    known, device = known or loaded.features, loaded.model.device
    if sees_photos(loaded.model):
        description = {"encoder": loaded.opt.cnn_type, "weights": "the checkpoint's", "normalised": False,
                       "resize": 256}
        encoder = features.Encoder(nn.Identity(), image_transform(False, loaded.opt.crop_size), description, device)
        known = None
    elif getattr(options, "encoder", None):
        encoder = features.build_encoder(options.encoder, options.encoder_weights or "imagenet",
                                         options.pooling or "pooled", options.regions, options.normalise, device)
        if known:
            features.refuse_other(encoder.description, known, f"--encoder {options.encoder}",
                                  f"checkpoint {loaded.path}")
    elif known:
        encoder = features.encoder_from(known, device, getattr(options, "encoder_weights", None))
    else:
        raise InputError(f"checkpoint {loaded.path} does not tell which network saw its photos: name it with "
                         "--encoder, --encoder_weights and --pooling, as extract_features.py takes them")
    description = encoder.description
    if not sees_photos(loaded.model):
        if description["width"] != loaded.opt.img_dim:
            raise InputError(f"{description['encoder']} gives features of width {description['width']}, and the model "
                             f"{loaded.path} was trained on {loaded.opt.img_dim}: name the encoder of its features")
        check_form(argparse.Namespace(images=torch.empty(1, *encoder.row_shape)), loaded.opt)
    own = {**description, "normalised": False, "regions": None, "width": loaded.opt.embed_size}
    encoder = encoder._replace(net=_Embedding(encoder.net, loaded.model, description["normalised"]), description=own)
    return encoder, None if sees_photos(loaded.model) else {"dtype": "float32", "amp": "off", **description}


def from_photos(loaded, encoder, description, output, folder, photos, options):
    """The Contents of CaptionedPhotos, encoded block by block below `output`, so that a killed build goes on.

    folder: that their names are relative to; options: batch_size, workers. Photos that cannot be read are left out, and
    listed in broken.txt.
    """
    links = {photo.name for photo in photos if os.path.islink(os.path.join(folder, photo.name))
             and gallery.inside(os.path.realpath(folder), photo.name) is None}
    whole = [photo for photo in photos if photo.name not in links]
    args = argparse.Namespace(images=folder, output=output, batch_size=min(options.batch_size or 32, BLOCK_PHOTOS),
                              workers=options.workers, dtype="float32", amp="off", encoder="the model")
    loaded.model.val_start()
    blocks = plan_blocks(args, whole, {**encoder.description, "model": hash_file(loaded.path)})
    encode_blocks(args, whole, blocks, encoder)
    notes = [read_notes(block) for block in blocks]
    broken = {whole[number].name: why for note in notes for number, why in note.broken.items()}
    broken |= dict.fromkeys(links, "it is a link that leads outside the folder")
    chosen = [whole[number] for note in notes for number in note.numbers]
    write_broken(output, folder, broken, [photo.name for photo in photos])
    captions = [photo.captions for photo in chosen]
    rows = (torch.from_numpy(read_rows(block)) for block, note in zip(blocks, notes) if note.numbers)
    return Contents([photo.name for photo in chosen], rows, captions, embed_captions(loaded, captions),
                    os.path.realpath(folder), folder, description,
                    [file_facts(os.path.join(folder, photo.name)) or (0, 0) for photo in chosen])


def photos_of(folder, names, captions, others=()):
    """CaptionedPhotos of the names: captions are of text files beside them, or of the file or folder `captions`.

    others: names of photos that a table may tell of, too.
    """
    if captions is None or os.path.isdir(captions):
        return read_caption_texts(captions or folder, names)
    known = {photo.name: photo.captions for photo in read_photo_captions(captions)}
    if missing := known.keys() - {*names, *others}:
        tell(f"note: {len(missing)} photos of {captions} are not in {folder}, such as {min(missing)}")
    return [CaptionedPhoto(name, known.get(name, []), None) for name in names]


def embed_captions(loaded, captions):
    """Lists of captions, one a photo -> (C, D) embeddings, or None where there are none."""
    texts = list(itertools.chain.from_iterable(captions))
    if not texts:
        return None
    return embed_texts(loaded.model, number_words(texts, loaded.vocabulary, loaded.opt.caption_reading),
                       loaded.opt.batch_size)


def write_broken(output, folder, broken, names):
    """List the photos below a folder that are left out, {name: why}, of those `names` that were looked at now; others
    that are listed already and still there stay so."""
    path, looked_at = os.path.join(output, BROKEN), set(map(gallery.shown, names))
    lines = [f"{gallery.shown(name)}\t{gallery.shown(why)}" for name, why in broken.items()]
    there = os.path.exists(path)
    if there:
        with open(path, encoding="utf-8") as file:
            lines += [line for line in file.read().splitlines() if (name := line.split("\t")[0]) not in looked_at
                      and os.path.lexists(os.path.join(folder, name))]
    if lines:
        with replacing(path) as file:
            file.writelines(f"{line}\n".encode() for line in sorted(lines))
    elif there:
        os.unlink(path)
    if broken:
        tell(f"{len(broken)} of {len(names)} photos are left out: {path} lists them")


def names_below(folder, root):
    """The photo files below `folder`, which is `root` or lies in it, by their paths relative to `root`."""
    below = os.path.relpath(os.path.realpath(folder), os.path.realpath(root))
    if below.split(os.sep)[0] == os.pardir:
        raise InputError(f"--add {folder} does not lie in the gallery's one folder {root}: move it there, or build a "
                         "gallery of the folder that holds both")
    names = [os.path.normpath(os.path.join(below, name)) for name in photo_names(folder)]
    if not names:
        raise InputError(f"there is no photo in {folder}: its files must end in .jpg, .png, or such")
    return names


# From a gallery ---------------------------------------------------------------------------------

def from_gallery(found, kept=None, shifted=True):
    """The Contents of a Gallery, of the photos `kept` (their numbers, in order; None: all).

    shifted: whether the rows keep their shifts.
    """
    kept = np.arange(found.count) if kept is None else np.array(kept, np.int64)
    width = found.width + shifted
    rows = (found.embeddings[torch.from_numpy(part), :width] for part in np.array_split(
        kept, max(1, len(kept) // BLOCK_ROWS)))
    captions, caption_embeddings = [found.captions(number) for number in kept.tolist()], None
    if any(captions):
        starts = found.caption_starts
        caption_embeddings = torch.cat([found.caption_embeddings[starts[number]:starts[number + 1]]
                                        for number in kept.tolist()])
    facts, own = found.facts, found.description["precomp"] if len(kept) == found.count else None
    return Contents([found.items[number] for number in kept.tolist()], rows, captions, caption_embeddings,
                    found.description["source"], found.photo_folder, found.description["features"],
                    None if facts is None else [tuple(facts[number].tolist()) for number in kept.tolist()],
                    own and (os.path.join(os.path.realpath(found.folder), own["folder"]), own["split"]))


def joined(one, other):
    """Two Contents as one, which is of the first's folder and source."""
    embeddings = [part.cpu() for part in (one.caption_embeddings, other.caption_embeddings) if part is not None]
    return one._replace(items=one.items + other.items, rows=itertools.chain(one.rows, other.rows),
                        captions=one.captions + other.captions, facts=one.facts + other.facts,
                        caption_embeddings=torch.cat(embeddings) if embeddings else None)


# Writing ----------------------------------------------------------------------------------------

def write(folder, loaded, contents, correction, kind=None):
    """Write a gallery of Contents; kind: the type of index (None: the usual one). The folder must be locked."""
    n = len(contents.items)
    if not n:
        raise InputError("no photo would be left in the gallery: leave it as it is, or build another one")
    kind = kind or index.usual_type(n)
    index.check_count(kind, n)
    gallery.clear(folder)
    with gallery.new_files(folder) as files:
        hubs = write_arrays(files, loaded, contents, correction, kind)
        gallery.publish(folder, files, {
            "count": n, "width": loaded.opt.embed_size, "captions": sum(map(len, contents.captions)),
            "model": {"path": relative(loaded.path, folder), "sha256": hash_file(loaded.path)},
            "source": contents.source,
            "precomp": contents.precomp and {"folder": relative(contents.precomp[0], folder),
                                             "split": contents.precomp[1]},
            "folder": None if contents.folder is None else relative(contents.folder, folder),
            "features": contents.features, "index": kind, "hubs": hubs,
            "correction": {"method": correction.method, "parameters": correction.parameters,
                           "bank_split": correction.bank_split, "bank_images": correction.bank_images}})


def write_arrays(files, loaded, contents, correction, kind):
    """Write embeddings, index, hubs and names into the folder `files`; returns what tells the hubs, or None."""
    n, captions, path = len(contents.items), contents.caption_embeddings, os.path.join(files, "embeddings.npy")
    gallery.save_rows(path, (with_shift(loaded, block, correction) for block in contents.rows),
                      (n, loaded.opt.embed_size + 1))
    embeddings = torch.from_numpy(np.load(path, mmap_mode="c"))
    if kind != index.EXACT:
        queries = index.spread(embeddings[:, :-1] if captions is None else captions.float().cpu(), PROBE_QUERIES)
        asked = queries.new_full((len(queries), 1), float(correction.method != "none"))
        index.build(kind, embeddings, torch.cat([queries, asked], 1), os.path.join(files, gallery.INDEX))
    search = index.read(kind, os.path.join(files, gallery.INDEX), embeddings)
    hubs, words = gallery_hubs.count_hubs(search, captions, correction.bank, n)
    if hubs is not None:
        gallery.save(os.path.join(files, "hubs.npy"), hubs)
    gallery.write_items(files, contents.items, contents.captions, captions, contents.facts)
    return words


def recall_of(found):
    """What share of some queries' ten nearest a Gallery's index finds: (share, how many queries, in words which)."""
    queries, words = found.embeddings[:, :-1], "of its own photos"
    if found.n_captions:
        queries, words = found.caption_embeddings, "of its own captions"
    queries = index.spread(queries, RECALL_QUERIES)
    queries = torch.cat([queries, queries.new_full((len(queries), 1), float(found.correction != "none"))], 1)
    numbers = (search(queries, index.DEPTH)[1] for search in (found.find, partial(index.exact, found.embeddings)))
    return index.recall(*numbers), len(queries), words


def with_shift(loaded, rows, correction):
    """A block of embeddings (m, D) -> (m, D + 1), minus the correction's shift last; one that has it stays as it is."""
    if rows.shape[1] > loaded.opt.embed_size:
        return rows
    rows = rows.float()
    return torch.cat([rows, -correction.shift(loaded, rows).to(rows).unsqueeze(1)], 1)


def build(options, loaded, folder, photo_folder):
    """Build the gallery of what the options name: precomp and split, or photo_folder (see also `photo_encoder`)."""
    names = [] if options.precomp is not None else names_below(photo_folder, photo_folder)
    if names:
        index.check_count(options.index_type, len(names))
    correction = gallery_hubs.choose_correction(options, loaded)
    if options.precomp is not None:
        contents = from_features(loaded, options.precomp, options.split, photo_folder)
    else:
        contents = from_photos(loaded, *photo_encoder(loaded, None, options), folder, photo_folder,
                               photos_of(photo_folder, names, options.captions), options)
        if not contents.items:
            raise InputError(f"none of the {len(names)} photos in {photo_folder} can be read: "
                             f"{os.path.join(folder, BROKEN)} says why")
    write(folder, loaded, contents, correction, options.index_type)


def change(options, loaded, folder):
    """Carry out what the options ask of a gallery that is there: add, prune, rebuild_index, correction, index_type."""
    found = gallery.Gallery(folder, with_index=not options.rebuild_index)
    anew = options.rebuild_index and options.correction is not None
    correction = (gallery_hubs.choose_correction(options, loaded) if anew else
                  gallery_hubs.correction_of(found, loaded))
    kept, new = range(found.count), []
    if options.add is not None:
        kept, new = what_is_new(found, options.add, options.captions)
    if options.prune:
        kept = [number for number in kept if found.photo(number) is not None]
    if (len(kept), new) == (found.count, []) and not options.rebuild_index and (
            options.index_type in (None, found.description["index"])):
        tell(f"{folder}: nothing to change, {found.count} photos")
        return
    contents = from_gallery(found, kept, shifted=not anew)
    if new:
        encoder, description = photo_encoder(loaded, found.description["features"], options)
        contents = joined(contents, from_photos(loaded, encoder, description, folder, found.photo_folder, new, options))
    write(folder, loaded, contents, correction, options.index_type or (
        None if found.description["index"] == index.usual_type(found.count) else found.description["index"]))
    tell(f"{folder}: {len(contents.items)} photos, before {found.count}; {len(new)} were encoded")


def what_is_new(found, folder, captions):
    """(numbers of a Gallery's photos that stay as they are, CaptionedPhotos below `folder` to encode).

    captions: see `photos_of`; a photo that is there already, and of which these tell nothing, keeps its own.
    """
    if found.facts is None:
        raise InputError(f"the gallery {found.folder} was built from features, and photos can't be added to those: "
                         "build one with --images")
    number_of = {name: number for number, name in enumerate(found.items)}
    new, changed = [], set()
    for photo in photos_of(found.photo_folder, names_below(folder, found.photo_folder), captions, number_of):
        number = number_of.get(photo.name)
        if number is not None:
            own, facts = found.captions(number), file_facts(os.path.join(found.photo_folder, photo.name))
            photo = photo if photo.captions else photo._replace(captions=own)
            if photo.captions == own and tuple(found.facts[number].tolist()) == facts:
                continue
            changed.add(number)
        new.append(photo)
    return [number for number in range(found.count) if number not in changed], new


def relative(path, folder):
    """A path as seen from a gallery's folder, so that both can be moved together."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def tell(line):
    """A line for the person at the keyboard."""
    print(gallery.shown(line), file=sys.stderr)
