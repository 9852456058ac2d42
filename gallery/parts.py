"""Galleries in parts: each of n machines embeds a share of the photos, and then the parts are joined.

A part is an ordinary gallery of its share, and can be asked by itself. Its `gallery.json` says
under `part` which share of which photos it is (see `features.parts`); any change of the gallery
removes that. A part without a readable photo is no gallery, and has a `part.json` instead.
"""

import functools
import os

from features.description import refuse_other
from features.parts import BROKEN, KEYS, Part, Share, in_order, read_part
from gallery import build
from gallery import hubs as gallery_hubs
from gallery.store import NAME, Gallery, describe, is_whole, model_path
from runtime.errors import InputError
from runtime.files import hash_file, replacing


def read_parts(folders):
    """The Parts in these folders, in order; raises InputError unless they make one whole."""
    return in_order([_read(folder) for folder in folders])


def _read(folder):
    """The Part in a folder; raises InputError if there is none."""
    if not is_whole(folder):
        if (found := read_part(folder)) is not None:
            return found
        raise InputError(f"--merge {folder} is no part: build one there with --part")
    content = describe(folder).get("part")
    if content is None:
        raise InputError(
            f"--merge {folder} is a gallery, but not a part, or was changed since it was one: "
            "build it anew with --part"
        )
    kinds = {**KEYS, "bank_sha256": (str, type(None))}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key, ...), kind) for key, kind in kinds.items()
    ):
        raise InputError(
            f"{os.path.join(folder, NAME)} does not say which part it is: build it anew with --part"
        )
    return Part(folder, content)


def check_same(folder, found, options):
    """Raise InputError if a gallery is not the part, or the merged parts, that the options name.

    found: its gallery.json
    """
    own = found.get("part")
    own = own and Share(own["number"], own["of"])
    if options.part and own != options.part:
        raise InputError(
            f"the gallery {folder} is {own or 'not a part'}, not {options.part}: name another "
            "--index"
        )
    if options.merge is None:
        return
    parts = [describe(part) for part in options.merge if is_whole(part)]
    models = [(part["model"] or {}).get("sha256") for part in (found, *parts)]
    if own or found["count"] != sum(part["count"] for part in parts) or len({*models}) > 1:
        raise InputError(
            f"the gallery {folder} is {own or 'not that of the parts'}: name another --index for "
            "the merged one"
        )


def model_of(folders):
    """The path of the parts' checkpoint; raises InputError if the parts do not lead to one."""
    found = [part.folder for part in read_parts(folders) if is_whole(part.folder)]
    path = model_path(found[0]) if found else None
    if path is None or not os.path.exists(path):
        raise InputError(
            f"the parts' checkpoint is not here (in {path}): name it with --model_path"
            if found
            else "no photo of any part could be read, so there is nothing to merge"
        )
    return path


def merge(options, loaded, folder):
    """Write into `folder`, which must be locked, the gallery that one build would have made.

    Only the index, the count of hubs and the captions' embeddings are computed here: in other
    batches, captions' embeddings would be rounded otherwise. Raises InputError, naming them, for
    parts that are missing, doubled, damaged, or not of the same model, photos and correction.

    options: of search.py; images is the photos' folder here, if it is not the first part's
    """
    parts = read_parts(options.merge)
    galleries = [
        Gallery(part.folder, with_index=False, whole=True)
        for part in parts
        if is_whole(part.folder)
    ]
    if not galleries:
        raise InputError(f"none of {parts[0].content['photos']} photos can be read: check them")
    for other in galleries[1:]:
        _check_alike(galleries[0], other)
    correction = _correction(galleries[0], loaded)
    contents = functools.reduce(build.joined, map(build.from_gallery, galleries))
    photos = options.images or contents.folder
    if not os.path.isdir(photos):
        build.tell(f"note: there are no photos in {photos}: name their folder with --images")
    contents = contents._replace(
        caption_embeddings=build.embed_captions(loaded, contents.captions),
        source=contents.source if options.images is None else os.path.realpath(photos),
        folder=photos,
    )
    _write_broken(folder, parts)
    build.write(folder, loaded, contents, correction, options.index_type)


def _check_alike(one, other):
    """Raise InputError unless two Galleries are of one model, encoder and correction."""
    mine, theirs = one.description, other.description
    where = f"{one.folder} and {other.folder}"
    if mine["model"]["sha256"] != theirs["model"]["sha256"]:
        raise InputError(f"{where} are of different models: build all parts with one checkpoint")
    if mine["features"] and theirs["features"]:
        refuse_other(theirs["features"], mine["features"], other.folder, one.folder)
    if mine["correction"] != theirs["correction"]:
        words = [
            " ".join(f"{key} {value}" for key, value in found["correction"].items())
            for found in (mine, theirs)
        ]
        raise InputError(
            f"{where} correct hubs differently ({words[0]}; {words[1]}): build all parts with the "
            "same --correction and parameters"
        )
    if mine["part"]["bank_sha256"] != theirs["part"]["bank_sha256"]:
        raise InputError(
            f"{where} correct hubs by banks of different captions: build all parts with the same "
            "data in --data_path"
        )


def _correction(first, loaded):
    """The Correction of the parts, with its bank; raises InputError if that is another one here.

    first: the first part's Gallery
    """
    own = hash_file(loaded.path)
    if first.description["model"]["sha256"] != own:
        raise InputError(
            f"{first.folder} is of another model than {loaded.path}: name the parts' checkpoint "
            "with --model_path"
        )
    wanted = first.description["part"]["bank_sha256"]
    if wanted is None:
        said = first.description["correction"]
        return gallery_hubs.Correction(
            said["method"], said["parameters"], None, said["bank_split"], said["bank_images"]
        )
    found = gallery_hubs.correction_of(first, loaded)
    if found.bank_sha256 != wanted:
        raise InputError(
            f"the captions of the parts' bank (split {found.bank_split}) are not in the data "
            "here, or differ: name the folder of the same data with --data_path"
        )
    return found


def _write_broken(folder, parts):
    """Write broken.txt, with the lines of all parts."""
    lines, path = set(), os.path.join(folder, BROKEN)
    for part in parts:
        name = os.path.join(part.folder, BROKEN)
        if os.path.exists(name):
            with open(name, "rb") as file:
                lines |= set(file.read().splitlines(keepends=True))
    if lines:
        with replacing(path) as file:
            file.writelines(sorted(lines))
        build.tell(f"{len(lines)} photos are left out: {path} lists them")
