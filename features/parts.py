"""Features in parts: each of n machines encodes a share of the photos, and then the parts are joined.

A part is an ordinary folder of features with `part.json`. That file says which share of which
photos the part is, who encoded them, and what its files held when they were written. A share is a
run of whole blocks (see `features.blocks`): its batches are those of one run over all photos, and
so is their rounding.
"""

import argparse
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from typing import NamedTuple

import numpy as np

from features.blocks import BLOCKS, file_facts, the_only_one
from features.description import check_description, refuse_other
from features.files import CAPTIONS_PER_IMAGE, map_array, rows_at_a_time
from features.splits import (
    GALLERY,
    SPLIT_FILES,
    draw_splits,
    install,
    write_lines,
    write_rows,
    write_texts,
)
from inputs.captions import CaptionedPhoto, read_json
from runtime.errors import InputError
from runtime.files import hash_file

PART = "part.json"
FORMAT = 1  # of part.json
BROKEN = "broken.txt"

# The keys of part.json and the types of their values: of any part, and of a part of features.
KEYS = {"number": int, "of": int, "photos": int, "photos_sha256": str, "first": int, "end": int}
OF_FEATURES = {
    "drawn": (dict, type(None)),
    "description": dict,
    "small": int,
    "rows": dict,
    "files": dict,
}


class Share(NamedTuple):
    """Which part of the work is one machine's."""

    number: int  # from 1
    of: int

    def __str__(self):
        return f"part {self.number} of {self.of}"


class Part(NamedTuple):
    """A part that was made."""

    folder: str
    content: dict  # what part.json, or gallery.json's part, says

    @property
    def share(self):
        """Its Share."""
        return Share(self.content["number"], self.content["of"])


def share_type(text):
    """An argparse type: the Share that `i/n` names."""
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not i/n with i from 1 to n: the third of four parts is 3/4"
        )
    return Share(int(found[1]), int(found[2]))


def blocks_of(share, blocks):
    """A share's Blocks; raises InputError if some part would get none."""
    if share.of > len(blocks):
        raise InputError(
            f"--part {share.number}/{share.of}: there are only {len(blocks)} blocks of photos, and "
            f"a block is not divided: make {max(1, len(blocks))} parts at most"
        )
    first, end = (len(blocks) * number // share.of for number in (share.number - 1, share.number))
    return blocks[first:end]


def identity(share, blocks, folder, photos):
    """What a part says of its share, and of the photos that all parts together are of.

    blocks: the share's; folder: of the photos; photos: all CaptionedPhotos, in order
    """
    return {
        "format": FORMAT,
        **share._asdict(),
        "photos": len(photos),
        "photos_sha256": hash_photos(folder, photos),
        "first": blocks[0].first,
        "end": blocks[-1].end,
    }


def hash_photos(folder, photos):
    """SHA-256 of photos' names, splits, captions and sizes in bytes.

    Paths and times of change are left out, because they differ from machine to machine.
    """
    digest = hashlib.sha256()
    for photo in photos:
        size = file_facts(os.path.join(folder, photo.name))[:1]
        digest.update(json.dumps([photo.name, photo.split, photo.captions, size]).encode())
    return digest.hexdigest()


# part.json --------------------------------------------------------------------------------------


def write_part(folder, content, names=()):
    """Write a part's `part.json` with the checksums of the named files beside it; return [name]."""
    files = {name: hash_file(os.path.join(folder, name)) for name in names}
    content = {**content, "files": files}
    text = json.dumps({**content, "sha256": _own_hash(content)}, indent=1)
    return write_lines(folder, PART, [text])


def _own_hash(content):
    """SHA-256 of part.json's content but for this hash, whatever its layout."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_part(folder, keys=()):
    """The Part in a folder, or None if it has no part.json.

    keys: what it must have beside KEYS, with types. Raises InputError if it is not as written.
    """
    path = os.path.join(folder, PART)
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("sha256") != _own_hash(content):
        raise InputError(f"{path} is not as it was written: make this part again")
    if content.get("format") != FORMAT or not all(
        isinstance(content.get(key, ...), kinds) for key, kinds in {**KEYS, **dict(keys)}.items()
    ):
        raise InputError(
            f"{path} is not of a kind that --merge takes here: make this part again with --part, "
            "by this version of the program"
        )
    return Part(folder, content)


def in_order(parts):
    """The Parts by their numbers; raises InputError unless they make one whole.

    The sentence names the parts that are missing, doubled or foreign.
    """
    first, found = parts[0], {}
    for part in parts:
        if part.share.of != first.share.of:
            raise InputError(
                f"{first.folder} is {first.share}, but {part.folder} is {part.share}: merge parts "
                "of one division"
            )
        if part.content["photos_sha256"] != first.content["photos_sha256"]:
            raise InputError(
                f"{first.folder} ({first.share}, of {first.content['photos']} photos) and "
                f"{part.folder} ({part.share}, of {part.content['photos']}) are not of the same "
                "photos: make them again from equal photos and captions"
            )
        if part.share.number in found:
            other = found[part.share.number].folder
            raise InputError(f"{part.share} is there twice, {other} and {part.folder}: name one")
        found[part.share.number] = part
    missing = [str(number) for number in range(1, first.share.of + 1) if number not in found]
    if missing:
        *others, last = missing
        which = f"parts {', '.join(others)} and {last}" if others else f"part {last}"
        raise InputError(
            f"{which} of {first.share.of} {'are' if others else 'is'} missing: name the folders of "
            "all parts after --merge"
        )
    ordered = [part for _, part in sorted(found.items())]
    _check_ranges(ordered)
    return ordered


def _check_ranges(parts):
    """Raise InputError unless each of the ordered Parts begins where the one before it ends."""
    ends = [0, *(part.content["end"] for part in parts)]
    for part, end in zip(parts, ends):
        if part.content["first"] != end:
            raise InputError(
                f"{part.folder} ({part.share}) begins with photo {part.content['first']} instead "
                f"of {end}: make all parts by one version of the program"
            )
    if ends[-1] != parts[0].content["photos"]:
        raise InputError(
            f"the parts end after photo {ends[-1]} of {parts[0].content['photos']}: make all parts "
            "by one version of the program"
        )


# Features ---------------------------------------------------------------------------------------


def about_features(args, photos, blocks, description, small, splits):
    """What part.json says of a part of features.

    args: extract_features.py's options; photos: all; blocks: the part's
    small: how many of its photos are small
    splits: {split: its readable photos, or their numbers}
    """
    drawn = {"dev": args.dev, "test": args.test, "seed": args.seed}
    return {
        **identity(args.part, blocks, args.images, photos),
        "drawn": drawn if photos[0].split is None else None,
        "description": description,
        "small": small,
        "rows": {split: len(members) for split, members in splits.items()},
    }


def undrawn(photos):
    """The photos, in train if their splits are to be drawn: only --merge knows all readable ones."""
    return [photo._replace(split=photo.split or "train") for photo in photos]


def refuse_output(output, share=None):
    """Raise InputError if --output holds what a part (share) or a merge (None) would spoil."""
    there, wanted = read_part(output), share or "the whole"
    if there and there.share != share:
        raise InputError(f"--output {output} holds {there.share}: name another one for {wanted}")
    if share and not there and os.path.lexists(os.path.join(output, "features.json")):
        raise InputError(f"--output {output} holds a whole data set: name another one for {wanted}")
    if not share and glob.glob(os.path.join(glob.escape(output), BLOCKS, "*.npz")):
        raise InputError(
            f"--output {output} holds an extraction that was stopped: finish it, or name another "
            "folder for the whole"
        )


def read_parts(folders):
    """The Parts in these folders, in order.

    Raises InputError unless they make one whole, by one encoder, and are as they were written.
    """
    found = []
    for folder in folders:
        part = read_part(folder, OF_FEATURES)
        if part is None:
            raise InputError(
                f"--merge {folder} is no part, for it has no {PART}: make one with --part"
            )
        check_description(part.content["description"], os.path.join(folder, PART))
        found.append(part)
    found = in_order(found)
    for part in found[1:]:
        _check_alike(found[0], part)
    for part in found:
        _check_files(part)
    return found


def _check_alike(one, other):
    """Raise InputError unless two parts' features are by one encoder, in one form."""
    first, second = (part.content["description"] for part in (one, other))
    refuse_other(second, first, other.folder, one.folder)
    for name, mine, theirs in (
        *((name, first[name], second[name]) for name in ("dtype", "amp")),
        *(
            (name, value, (other.content["drawn"] or {}).get(name))
            for name, value in (one.content["drawn"] or {}).items()
        ),
    ):
        if mine != theirs:
            raise InputError(
                f"{one.folder} was made with --{name} {mine}, but {other.folder} with {theirs}: "
                "make all parts with the same flags"
            )
    if first["versions"] != second["versions"]:
        print(
            f"note: {one.folder} and {other.folder} were made by different versions "
            f"({first['versions']} and {second['versions']}): features.json names the first",
            file=sys.stderr,
        )


def _check_files(part):
    """Raise InputError unless a part's files are as they were written, and all there."""
    files = part.content["files"]
    needed = {
        f"{split}_{kind}"
        for split in part.content["rows"]
        for kind in ("ims.npy", "ids.txt", *(["caps.txt"] if split != GALLERY else []))
    }
    if not needed <= files.keys() <= {*SPLIT_FILES, BROKEN, "features.json"}:
        raise InputError(f"{os.path.join(part.folder, PART)} names odd files: make it again")
    for name, digest in files.items():
        path = os.path.join(part.folder, name)
        if not os.path.isfile(path) or hash_file(path) != digest:
            raise InputError(f"{path} is not as it was written: make {part.share} again")


class Piece(NamedTuple):
    """A split of a part."""

    photos: list  # CaptionedPhotos
    rows: np.ndarray  # (photos, *row_shape), memory-mapped


class Merged(NamedTuple):
    """What `merge` wrote."""

    splits: dict  # {split: its CaptionedPhotos}
    broken: int
    small: int


def merge(parts, output):
    """Write the data set that one run over all photos would write; returns what is Merged.

    parts: as `read_parts` gives them. Raises InputError, and leaves nothing, if it fails.
    """
    with the_only_one(output):
        scratch = os.path.join(output, BLOCKS)
        try:
            pieces = [_piece(part, split) for part in parts for split in part.content["rows"]]
            if not pieces:
                raise InputError(f"none of {parts[0].content['photos']} photos can be read")
            splits, names = _write_pieces(parts, pieces, scratch, output)
            broken = [line for part in parts for line in _broken_lines(part)]
            names += write_lines(scratch, BROKEN, broken) if broken else []
            text = json.dumps(parts[0].content["description"], indent=1)
            names += write_lines(scratch, "features.json", [text])
            install(scratch, output, names)
        except InputError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return Merged(splits, len(broken), sum(part.content["small"] for part in parts))


def _broken_lines(part):
    """The lines of a part's broken.txt."""
    return _lines(part, BROKEN) if BROKEN in part.content["files"] else []


def _write_pieces(parts, pieces, scratch, output):
    """Write all splits' files; returns {split: its CaptionedPhotos}, and the files' names."""
    photos = [photo for piece in pieces for photo in piece.photos]
    drawn = parts[0].content["drawn"]
    of_photo = [photo.split for photo in photos]
    if drawn is not None:
        of_photo = draw_splits(argparse.Namespace(**drawn), [photo.name for photo in photos])
    splits, names = {}, []
    for photo, split in zip(photos, of_photo):
        splits.setdefault(split, []).append(photo)
    for split, own in splits.items():
        names += write_texts(scratch, split, own)
    row_shape, dtype = pieces[0].rows.shape[1:], pieces[0].rows.dtype
    blocks = _some_at_a_time(pieces, np.array(of_photo))
    sizes = {split: len(own) for split, own in splits.items()}
    return splits, names + write_rows(scratch, output, sizes, row_shape, dtype, blocks)


def _some_at_a_time(pieces, of_photo):
    """Yield blocks of the pieces' rows, with each row's split; of_photo: (n,) that of all rows."""
    place = 0
    for piece in pieces:
        block = rows_at_a_time(piece.rows)
        for start in range(0, len(piece.rows), block):
            rows = piece.rows[start : start + block]
            yield rows, of_photo[place : place + len(rows)]
            place += len(rows)


def _piece(part, split):
    """A part's Piece of a split; raises InputError if its files do not belong together."""
    rows = map_array(os.path.join(part.folder, f"{split}_ims.npy"), "feature file", "--merge")
    description, ids = part.content["description"], _lines(part, f"{split}_ids.txt")
    texts = [] if split == GALLERY else _lines(part, f"{split}_caps.txt")
    if split == GALLERY:
        named = [(name, []) for name in ids]
    elif len(ids) == len(rows) and len(texts) == CAPTIONS_PER_IMAGE * len(ids):
        named = zip(ids, map(list, zip(*[iter(texts)] * CAPTIONS_PER_IMAGE)))
    else:  # an id for each caption, see `features.splits.write_texts`
        together = itertools.groupby(zip(ids, texts), key=lambda pair: pair[0])
        named = [(name, [text for _, text in pairs]) for name, pairs in together]
    photos = [CaptionedPhoto(name, captions, split) for name, captions in named]
    counts = len(photos), len(texts)
    if (
        counts != (part.content["rows"][split], sum(len(photo.captions) for photo in photos))
        or len(rows) != len(photos)
        or rows.dtype != description["dtype"]
        or rows.shape[-1] != description["width"]
    ):
        raise InputError(
            f"{part.folder} has {rows.dtype} rows of shape {rows.shape} for {len(photos)} photos "
            f"of {split} with {len(texts)} captions: make {part.share} again"
        )
    return Piece(photos, rows)


def _lines(part, name):
    """A text file's lines as `features.splits.write_lines` wrote them."""
    with open(os.path.join(part.folder, name), "rb") as file:
        return file.read().decode("utf-8", "surrogateescape").split("\n")[:-1]
