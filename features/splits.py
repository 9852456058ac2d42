"""Splits of photos, and the files of a data set made from them.

`args` in these functions are extract_features.py's options, of which they read captions, dev, test
and seed.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys

import numpy as np

from features.files import CAPTIONS_PER_IMAGE, check_features
from inputs.captions import SPLITS, CaptionedPhoto
from runtime.errors import InputError
from runtime.files import replacing

# dev and test get a tenth of the photos each, and at most 1,000.
DEFAULT_SHARE, DEFAULT_MOST = 10, 1000
GALLERY = "gallery"

SPLIT_FILES = [
    f"{split}_{part}"
    for split in {*SPLITS.values(), GALLERY} - {"restval"}
    for part in ("ims.npy", "caps.txt", "ids.txt")
]
# What an extraction writes beside features.json.
OURS = {"broken.txt", "part.json", *SPLIT_FILES}


def with_restval_in_train(photos):
    """Move the photos of COCO's split restval to train, and print how many they are."""
    moved = sum(photo.split == "restval" for photo in photos)
    if moved:
        print(f"note: {moved} photos of split restval become part of train", file=sys.stderr)
    return [
        photo._replace(split="train") if photo.split == "restval" else photo for photo in photos
    ]


def gallery_of(names):
    """Photos without captions; raises InputError if there are none."""
    if not names:
        raise InputError("there is no photo in --images: names must end in .jpg, .png or the like")
    return [CaptionedPhoto(name, [], GALLERY) for name in names]


def check_splits(args, photos):
    """Raise InputError if --dev and --test do not apply, or leave nothing to train on."""
    if photos[0].split is None:
        draw_splits(args, [photo.name for photo in photos])
    elif args.dev is not None or args.test is not None:
        raise InputError(
            "--dev and --test draw splits, but "
            + (
                "a gallery has none"
                if photos[0].split == GALLERY
                else f"{args.captions} gives them"
            )
            + ": leave them out"
        )


def draw_splits(args, photos):
    """Draw the split of each photo, given by name; --dev and --test say how many of each.

    A photo's place in the draw depends only on the seed and its name, so adding photos moves few of
    the others to another split.
    """
    n = len(photos)
    usual = min(DEFAULT_MOST, max(n // DEFAULT_SHARE, 1 if n > 2 else 0))
    dev, test = (usual if given is None else given for given in (args.dev, args.test))
    if dev + test >= n:
        raise InputError(
            f"--dev {dev} and --test {test} leave none of {n} photos to train on: ask for fewer"
        )
    drawn = [
        hashlib.sha256(f"{args.seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        for name in photos
    ]
    order = sorted(range(n), key=drawn.__getitem__)
    splits = dict.fromkeys(order[:dev], "dev") | dict.fromkeys(order[n - test :], "test")
    return [splits.get(number, "train") for number in range(n)]


def splits_of(args, photos, whole):
    """{split: numbers of its photos, in order}, for the photos that could be read."""
    names = [photos[number].split for number in whole]
    if names and names[0] is None:
        names = draw_splits(args, [photos[number].name for number in whole])
    splits = {}
    for photo, name in zip(whole, names):
        splits.setdefault(name, []).append(photo)
    return splits


def write_texts(folder, split, photos):
    """Write a split's captions and ids; return the files' names.

    If each photo has five captions, there is an id per photo, as in VSE++'s data; a gallery's
    photos have one id each as well. Otherwise there is an id per caption, and equal neighbours are
    captions of one photo.
    """
    if split == GALLERY:
        return write_lines(folder, f"{split}_ids.txt", [photo.name for photo in photos])
    five_each = all(len(photo.captions) == CAPTIONS_PER_IMAGE for photo in photos)
    captions = write_lines(
        folder, f"{split}_caps.txt", [caption for photo in photos for caption in photo.captions]
    )
    return captions + write_lines(
        folder,
        f"{split}_ids.txt",
        [photo.name for photo in photos for _ in range(1 if five_each else len(photo.captions))],
    )


def write_lines(folder, name, lines):
    """Write a text file, with names in the bytes that they have on disk; return [name]."""
    with replacing(os.path.join(folder, name)) as file:
        file.writelines(line.encode("utf-8", "surrogateescape") + b"\n" for line in lines)
    return [name]


def on_one_line(text):
    """The text with its line breaks, and what no file name can hold, as \\n, \\r and \\ud800."""
    return re.sub("[\n\r\ud800-\udc7f\udd00-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def write_header(file, shape, dtype):
    """Begin a .npy file of this shape and dtype; its numbers follow, row by row."""
    kind = np.lib.format.dtype_to_descr(np.dtype(dtype))
    facts = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)


def write_rows(scratch, output, sizes, row_shape, dtype, blocks, check=True):
    """Write all splits' features into the folder `scratch`; return the files' names.

    output: the folder that they will go to, for messages
    sizes: {split: how many rows it gets}
    blocks: of (rows (m, *row_shape), each one's split (m,)), in order
    check: raise InputError, and remove `scratch`, if all of a split's features are zero
    """
    names = {split: f"{split}_ims.npy" for split in sizes}
    with contextlib.ExitStack() as files:
        targets = {
            split: files.enter_context(replacing(os.path.join(scratch, name)))
            for split, name in names.items()
        }
        for split, target in targets.items():
            write_header(target, (sizes[split], *row_shape), dtype)
        for rows, in_split in blocks:
            for split, target in targets.items():
                target.write(rows[in_split == split].tobytes())
    try:
        for name in names.values() if check else ():
            features = np.load(os.path.join(scratch, name), mmap_mode="c")
            check_features(features, os.path.join(output, name))
    except InputError:
        shutil.rmtree(scratch)
        raise
    return list(names.values())


def install(scratch, output, names):
    """Move the named files to their places, and remove `scratch` and an earlier data set's files.

    The last name is that of the file that says that all are there.
    """
    for name in names:
        os.replace(os.path.join(scratch, name), os.path.join(output, name))
    for name in OURS - set(names):  # of an earlier extraction with other splits
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(output, name))
    shutil.rmtree(scratch)
