"""Read bottom-up attention's features from a TSV or HDF5 file (Anderson et al., CVPR 2018).

A line of a TSV has the cells image_id, image_w, image_h, num_boxes, boxes, features (base64 of
float32), or LXMERT's ten, or image_id and features alone. An HDF5 file has `features`
(n, boxes, width) with the images' ids beside it, or features (boxes, width) under each image's id.
"""

import base64
import glob
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from features.blocks import BLOCKS, the_only_one
from features.files import check_features
from features.splits import (
    check_splits,
    gallery_of,
    on_one_line,
    splits_of,
    with_restval_in_train,
    write_header,
    write_texts,
)
from inputs.captions import read_photo_captions
from inputs.photos import HEIC_ENDINGS, PHOTO_ENDINGS
from runtime import distributed
from runtime.errors import InputError
from runtime.file_kinds import HDF5, HEAD, binary_kind
from runtime.files import check_regular, remove_leftovers, replacing

BOXES_CELL = {2: None, 6: 3, 10: 7}  # cells of a line: index of the one with the number of boxes
USUAL_WIDTH = 2048  # of features, if their line does not give the number of boxes
ID_NAMES = ("image_id", "image_ids", "ids", "img_ids", "img_id")
FEATURE_NAMES = ("features", "image_features")
MOST_BOXES = 1000  # per image; bottom-up attention has 10 to 100


class Entry(NamedTuple):
    """Where an image's features are in a file, and their shape."""

    image: str  # its id as the file has it
    where: str  # the place in words
    boxes: int
    width: int
    place: Any  # tells the reader where the features are


def image_key(name):
    """The part of an image's id and of its file name that is the same.

    For COCO it is the number at the end of the file name; for other images the name without its
    ending.
    """
    stem = os.path.basename(name.strip())
    if stem.lower().endswith(PHOTO_ENDINGS + HEIC_ENDINGS):
        stem = os.path.splitext(stem)[0]
    number = re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", stem)
    return number[1] if number else stem


def open_source(path, files):
    """Open a file; return its Entries in order, and a function Entry -> (boxes, width) float32.

    files: an ExitStack, which closes the file. Raises InputError, also from the returned function,
    if the file is missing, damaged or of another kind.
    """
    check_regular(path, f"--from {path}")
    try:
        file = files.enter_context(open(path, "rb"))
        head = file.read(HEAD)
        file.seek(0)
    except OSError as error:
        raise InputError(f"--from {path} cannot be read ({error.strerror or error})") from error
    if not head.startswith(HDF5):
        _refuse_other(head, path)
        return _tsv_entries(file, path), lambda entry: _tsv_rows(file, entry)
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            f"--from {path} is an HDF5 file, which needs h5py: pip install h5py"
        ) from error
    with _hdf5_errors(path):
        content = files.enter_context(h5py.File(path, "r"))
        return _hdf5_entries(content, path), lambda entry: _hdf5_rows(content, entry, path)


def _refuse_other(head, path):
    kind = binary_kind(head)
    if b"\t" not in head or (kind and kind[0] not in ("text", "a tab-separated table")):
        found = f"is {kind[0]}, not" if kind else "is not"
        remedy = kind[1] if kind and kind[0] != "text" else "give one of these"
        raise InputError(
            f"--from {path} {found} bottom-up attention's table (TSV) or HDF5 file: {remedy}"
        )


# Tables -----------------------------------------------------------------------------------------


def _tsv_entries(file, path):
    """The Entries of a table's lines, without decoding the features."""
    entries, start = [], 0
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        cells = line.rstrip(b"\r\n").split(b"\t")
        if len(cells) not in BOXES_CELL:
            raise InputError(
                f"{where} has {len(cells)} cells, but bottom-up attention's tables have 6 "
                "(image_id, image_w, image_h, num_boxes, boxes, features): it may be cut short, "
                "so fetch it again"
            )
        if number > 1 or cells[-1] != b"features":  # a header
            boxes, width = _sizes(cells, where)
            image = cells[0].decode("utf-8", "replace").strip()
            entries.append(Entry(image, where, boxes, width, start))
        start += len(line)
    return entries


def _sizes(cells, where):
    """(boxes, width) of a line's features, from their length; without boxes the width is 0."""
    encoded, boxes_cell = cells[-1], BOXES_CELL[len(cells)]
    numbers, rest = divmod(len(encoded) // 4 * 3 - encoded[-2:].count(b"="), 4)
    if boxes_cell is None:
        given = b"%d" % (numbers // USUAL_WIDTH)
        rest = rest or numbers % USUAL_WIDTH
    else:
        given = cells[boxes_cell].strip()
    boxes = int(given) if given.isdigit() and len(given) < 10 else -1
    if len(encoded) % 4 or rest or boxes < 0 or numbers % (boxes or numbers + 1):
        raise InputError(
            f"{where}: its features are not base64 of float32 numbers for "
            f"{given[:20].decode('ascii', 'replace')} boxes: it may be cut short, so fetch the "
            "file again"
        )
    return boxes, numbers // max(boxes, 1)


def _tsv_rows(file, entry):
    file.seek(entry.place)
    encoded = file.readline().rstrip(b"\r\n").split(b"\t")[-1]
    try:
        content = base64.b64decode(encoded, validate=True)
        return np.frombuffer(content, "<f4").reshape(entry.boxes, entry.width)
    except ValueError as error:
        raise InputError(
            f"{entry.where}: its features are not base64 of float32 numbers: fetch the file again"
        ) from error


# HDF5 -------------------------------------------------------------------------------------------


@contextmanager
def _hdf5_errors(path):
    """Turn what h5py raises for a damaged file into InputError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"--from {path} is damaged or cut short ({error}): fetch it again"
        ) from error


def _hdf5_entries(file, path):
    """The Entries of `features` with ids beside it, or of each id's own features."""
    table = next((file[name] for name in FEATURE_NAMES if hasattr(file.get(name), "shape")), None)
    if table is None:
        return [entry for name in file if (entry := _hdf5_entry(file, name, path))]
    ids = next((file[name] for name in ID_NAMES if hasattr(file.get(name), "shape")), None)
    if ids is None or table.ndim not in (2, 3) or ids.shape[:1] != table.shape[:1]:
        found = ", ".join(f"{name} {getattr(file[name], 'shape', '(a group)')}" for name in file)
        raise InputError(
            f"--from {path} holds {found}: it needs features (images, boxes, width), and "
            f"{' or '.join(ID_NAMES[:3])} of as many images"
        )
    boxes = table.shape[1] if table.ndim == 3 else 1
    return [
        Entry(
            _as_text(image), f"{path}, image {place}", boxes, table.shape[-1], (table.name, place)
        )
        for place, image in enumerate(np.asarray(ids).ravel())
    ]


def _hdf5_entry(file, name, path):
    """The Entry of an image whose features stand under its id; None for anything else."""
    found = file[name]
    if hasattr(found, "keys"):  # a group
        found = next((found[part] for part in FEATURE_NAMES if part in found), None)
    elif re.search("_(?!features)[a-z]", name):  # such as 7_boxes beside 7_features
        return None
    if getattr(found, "ndim", 0) not in (1, 2) or found.dtype.kind != "f":
        return None
    boxes = 1 if found.ndim == 1 else len(found)
    image = name.removesuffix("_features")
    return Entry(image, f"{path}, {name}", boxes, found.shape[-1], (found.name, None))


def _as_text(image):
    if isinstance(image, bytes):
        return image.decode("utf-8", "replace")
    return str(int(image) if isinstance(image, np.floating) and image == int(image) else image)


def _hdf5_rows(file, entry, path):
    name, place = entry.place
    with _hdf5_errors(path):
        rows = file[name][()] if place is None else file[name][place]
        return np.asarray(rows, np.float32).reshape(entry.boxes, entry.width)


# A data set of them -----------------------------------------------------------------------------


def convert(args):
    """Make a data set of the features in the files of --from, or a gallery without captions."""
    if distributed.size() > 1:
        raise InputError("--from needs one process only: call it without torchrun")
    scratch = os.path.join(args.output, BLOCKS)
    if os.path.isdir(args.output) and (
        set(os.listdir(args.output)) - {BLOCKS}
        or glob.glob(os.path.join(glob.escape(scratch), "*.npz"))
    ):
        raise InputError(f"--output {args.output} is not empty: name another folder")
    with ExitStack() as files:
        opened = [open_source(path, files) for path in args.sources]
        entries = [(entry, read) for found, read in opened for entry in found]
        check_entries(args, [entry for entry, _ in entries])
        photos, found = match(args, entries)
        check_splits(args, photos)
        with the_only_one(args.output):
            remove_leftovers(scratch, ".*")  # of a killed run; they would take as much space again
            try:
                write_converted(args, scratch, photos, found)
            finally:
                shutil.rmtree(scratch)


def check_entries(args, entries):
    """Raise InputError unless there are features, all of one width, with a sane number of boxes."""
    if not entries:
        raise InputError(f"--from {args.sources[0]} has no image's features: check the file")
    widths = {entry.width for entry in entries if entry.boxes}
    if len(widths) != 1:
        raise InputError(
            f"--from {args.sources[0]} has features of widths {sorted(widths)}: all must have the "
            "same"
        )
    most = max(entries, key=lambda entry: entry.boxes)
    if most.boxes > MOST_BOXES:
        raise InputError(
            f"{most.where} has {most.boxes} boxes, more than {MOST_BOXES}: it is damaged, or of "
            "another kind"
        )


def match(args, entries):
    """The photos that have features, and for each its (Entry, function that reads it).

    Prints one line that counts what has no counterpart. Raises InputError if nothing has one.
    """
    found = {}
    for entry, read in entries:
        found.setdefault(image_key(entry.image), (entry, read))
    notes = {"ids come again, and their first features are taken": len(entries) - len(found)}
    if args.captions in (None, "none"):
        photos = gallery_of([on_one_line(entry.image) for entry, _ in found.values()])
    else:
        captioned = [
            photo
            for photo in with_restval_in_train(read_photo_captions(args.captions))
            if photo.captions
        ]
        photos = [
            photo
            for photo in captioned
            if image_key(photo.name) in found and "\n" not in photo.name
        ]
        if not photos:
            raise InputError(
                f"none of {len(found)} images in --from, such as {entries[0][0].image!r}, is one "
                f"of {len(captioned)} in {args.captions}"
                + "".join(f", such as {photo.name!r}" for photo in captioned[:1])
                + ": give the captions of these images"
            )
        notes["photos have no features and are left out"] = len(captioned) - len(photos)
        notes["images have no captions and are left out"] = len(found) - len(photos)
    keys = [image_key(photo.name) for photo in photos]
    ((key, times),) = Counter(keys).most_common(1)
    if times > 1:
        raise InputError(
            f"{args.captions} has {times} photos that may be image {key!r} of --from: rename them"
        )
    if any(notes.values()):
        print(
            "note: " + "; ".join(f"{n} {what}" for what, n in notes.items() if n), file=sys.stderr
        )
    return photos, [found[key] for key in keys]


def write_converted(args, scratch, photos, found):
    """Write every split's files to the scratch folder, then move all of them to their places."""
    regions = max(entry.boxes for entry, _ in found)
    width = next((entry.width for entry, _ in found if entry.boxes), 1)
    names, splits = [], splits_of(args, photos, range(len(photos)))
    for split, numbers in splits.items():
        names += write_texts(scratch, split, [photos[number] for number in numbers])
        names.append(name := f"{split}_ims.npy")
        with replacing(os.path.join(scratch, name)) as file:
            write_header(file, (len(numbers), regions, width), args.dtype)
            for number in tqdm(numbers, split, unit="image", disable=None):
                file.write(padded(*found[number], regions, width, args))
        check_features(
            np.load(os.path.join(scratch, name), mmap_mode="c"), os.path.join(args.output, name)
        )
    for name in names:
        os.replace(os.path.join(scratch, name), os.path.join(args.output, name))
    fewest = min(entry.boxes for entry, _ in found)
    counts = ", ".join(f"{len(numbers)} {split}" for split, numbers in splits.items())
    print(
        f"{args.output}: {counts} images, "
        + (f"{regions}" if fewest == regions else f"{fewest} to {regions}")
        + f" regions of width {width}"
        + ("" if fewest == regions else ", padded with rows of zeros")
    )


def padded(entry, read, regions, width, args):
    """An image's features as the bytes of (regions, width), padded with rows of zeros."""
    rows = np.zeros((regions, width), np.float32)
    rows[: entry.boxes] = read(entry) if entry.boxes else 0
    if args.normalise:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        rows = rows.astype(args.dtype)
    if not np.isfinite(rows).all():
        raise InputError(
            f"{entry.where} has features that are not finite in {args.dtype}: fetch the file "
            "again, or choose --dtype float32"
        )
    return rows.tobytes()
