"""Splits of photos, and the text files of a data set made from them.

`args` in these functions are extract_features.py's options, of which they read captions, dev, test
and seed.
"""

import hashlib
import os
import re
import sys

import numpy as np

from features.files import CAPTIONS_PER_IMAGE
from inputs.captions import CaptionedPhoto
from runtime.errors import InputError
from runtime.files import replacing

# dev and test get a tenth of the photos each, and at most 1,000.
DEFAULT_SHARE, DEFAULT_MOST = 10, 1000
GALLERY = "gallery"


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
    if names[0] is None:
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
