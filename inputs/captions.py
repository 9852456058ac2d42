"""Read captions in every layout: text files, tables, Karpathy's JSON, COCO's JSON."""

import codecs
import json
import os
import re
import sys
from typing import NamedTuple

from inputs.tables import Row, names_photos, table_rows
from runtime.errors import InputError, path_type
from runtime.file_kinds import foreign_kind, to_utf8
from runtime.files import check_regular

ASCII_SPACE = " \t\n\r\x0b\x0c"

# What files call a split: what it is called here. COCO's restval is the part of its validation
# images that may be used for training.
SPLITS = {
    "train": "train",
    "restval": "restval",
    "dev": "dev",
    "val": "dev",
    "validation": "dev",
    "test": "test",
    "testall": "testall",
}

COCO_ANNOTATIONS = {
    "train": "annotations/captions_train2014.json",
    "val": "annotations/captions_val2014.json",
}
TEXT_ENDING = ".txt"

# Text -------------------------------------------------------------------------------------------


def read_bytes(path, what="", check=""):
    """The bytes of a text file, without a byte order mark.

    what: the file in words, for messages. check: what to check if the file cannot be read.
    Raises InputError if it is missing, or if its first bytes show that it is no text in UTF-8.
    """
    named = f"{what} {path}".strip()
    check_regular(path)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InputError(
            f"{named} cannot be read ({error.strerror}): check {check or 'the path'}"
        ) from error
    if kind := foreign_kind(content):
        raise InputError(f"{named} is {kind[0]}, but text in UTF-8 is expected: {kind[1]}")
    return content.removeprefix(codecs.BOM_UTF8)


def decode(content, named):
    """Decode UTF-8; raises InputError, naming the line and the likely encoding."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        lines = content[: error.start].split(b"\n")
        raise InputError(
            f"{named}, line {len(lines)}: not UTF-8 ({error.reason} at byte "
            f"{len(lines[-1])}): {_remedy(content)}"
        ) from error


def _remedy(content):
    """What to do about bytes that are not UTF-8."""
    if re.search("[^\x00-\x7f]", content.decode("utf-8", "ignore")):
        return "the file is UTF-8 elsewhere, so mend that line, or fetch the file again"
    return f"it looks like Latin-1 or Windows-1252: {to_utf8('WINDOWS-1252')}"


def read_captions(path):
    """The captions of a text file, one per line, without ASCII white space at both ends.

    Lines end at newlines only. A byte order mark, which editors on Windows write, is not part of
    the first caption. Raises InputError if the file is missing, empty, not UTF-8 (naming the line),
    or has the photos' names beside the captions.
    """
    content = read_bytes(path, "caption file", "--data_path and --data_name")
    if not content:
        raise InputError(
            f"caption file {path} is empty: it needs one caption a line, five for each image"
        )
    lines = decode(content, f"caption file {path}").removesuffix("\n").split("\n")
    captions = [line.strip(ASCII_SPACE) for line in lines]
    if names_photos(captions):
        raise InputError(
            f"caption file {path} has photos' names or numbers before its captions, "
            f"as in {captions[0][:60]!r}: keep the captions alone, one a line, or "
            "give the file to extract_features.py as --captions"
        )
    return captions


def read_json(path, pairs_hook=None):
    """The content of a JSON file, with or without a byte order mark.

    pairs_hook: turns an object's (key, value) pairs into something other than a dict.
    Raises InputError if the file is missing or broken.
    """
    text = decode(read_bytes(path), path)
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}): it may be cut short; fetch it again"
        ) from error


# Data sets --------------------------------------------------------------------------------------


def is_precomputed(data_name):
    """Whether a data set holds features, by its name: `..._precomp`, or VSE++'s `precomp`."""
    return data_set_name(data_name).endswith("precomp")


def data_set_name(text):
    """An argparse type: a data set's name, without the slash that a shell's completion adds."""
    return path_type(text).rstrip("/" + os.sep) or text


def refuse_features(folder, data_name):
    """Raise InputError if a data set holds features, but its name means photos."""
    features = [name for name in sorted(os.listdir(folder)) if name.endswith("_ims.npy")]
    needed = "annotations" if data_name == "coco" else flickr_json_name(data_name)
    if features and not os.path.exists(os.path.join(folder, needed)):
        raise InputError(
            f"data folder {folder} holds features ({features[0]}), but its name does "
            f"not end in precomp, so photos are expected: rename it to "
            f"{data_name}_precomp, and name that as --data_name"
        )


def flickr_json_name(data_name):
    """The name of a photo data set's Karpathy file, such as dataset_flickr8k.json for f8k."""
    name = {"f8k": "flickr8k", "f30k": "flickr30k"}.get(data_name, data_name)
    return f"dataset_{name}.json"


# Photos and their captions ----------------------------------------------------------------------


class CaptionedPhoto(NamedTuple):
    """A photo with any number of captions."""

    name: str  # its path below the folder of photos; bytes that are not UTF-8 become surrogates
    captions: list  # of str
    split: str | None  # one of SPLITS' values, or None if the file gives none


def read_karpathy(path, folder=None):
    """The CaptionedPhotos of a Karpathy-layout JSON file, in its order, each photo once.

    Captions are the raw texts, unchanged. folder: where the photos are (see `_find`).
    Raises InputError if the file is missing, broken, or contradicts itself.
    """
    return _collect(path, _karpathy_rows(read_json(path), path), folder)


def read_photo_captions(path, folder=None):
    """The CaptionedPhotos of a table, a Karpathy JSON or a COCO caption JSON, in the file's order.

    Line breaks within a caption become spaces; empty captions are left out.
    folder: where the photos are (see `_find`).
    Raises InputError if the file is missing, broken, or contradicts itself.
    """
    if path.lower().endswith(".json"):
        content = read_json(path)
        is_coco = isinstance(content, dict) and "annotations" in content
        rows, remedy = (_coco_rows if is_coco else _karpathy_rows)(content, path), "mend it"
    else:
        content = read_bytes(path, "caption file", "--captions")
        # A name may be any bytes; that captions are UTF-8 is checked in `_tidy`.
        rows = table_rows(path, content.decode("utf-8", "surrogateescape"))
        remedy = _remedy(content)
    return _collect(path, _tidy(rows, path, remedy), folder)


def read_caption_texts(folder, names):
    """The photos `names` as CaptionedPhotos, with the lines of `<folder>/a.txt` for `a.jpg`.

    `a.jpg.txt` is read as well, and `A.TXT` unless another photo has that name.
    Raises InputError if a text file cannot be read, is not UTF-8, or is one of two for a photo.
    """
    return _collect(folder, _tidy(_text_rows(folder, names), folder))


def _collect(path, rows, folder=None):
    """Turn Rows into CaptionedPhotos, one for each name."""
    photos, names, guesses = {}, {}, {}
    for row in rows:
        given = row.folder, row.name
        if given not in names:
            names[given] = _find(row, folder, guesses, path)
        name, split = names[given], row.split
        if split is not None:
            split = SPLITS.get(split.strip().lower())
            if split is None:
                raise InputError(
                    f"{path}, {row.where}: split is {row.split!r}: it must be one of "
                    f"{', '.join(SPLITS)}"
                )
        photo = photos.setdefault(name, CaptionedPhoto(name, [], split))
        if photo.split != split:
            raise InputError(
                f"{path}, {row.where}: photo {name} is in split {split or 'none'}, but earlier in "
                f"{photo.split or 'none'}: give each photo one split"
            )
        if row.caption is not None:
            photo.captions.append(row.caption)
    for why, taken in guesses.items():
        found, named = next(iter(taken.items()))
        print(
            f"note: {path}: {len(taken)} photos are looked for elsewhere, such as {named} as "
            f"{found} in {folder}: {why}",
            file=sys.stderr,
        )
    unsplit = next((photo for photo in photos.values() if photo.split is None), None)
    if unsplit and any(photo.split for photo in photos.values()):
        raise InputError(
            f"{path}: photo {unsplit.name} has no split, but others have: give all of "
            "them one, or none"
        )
    return list(photos.values())


def _find(row, folder, guesses, path):
    """The name of a Row's photo, relative to `folder`.

    An absolute name inside the folder becomes relative. If there is no photo of that name, the name
    without the folder's own name in front, and the one without Karpathy's `filepath`, are tried.
    guesses: collects {why: {name: name in the file}}. folder: None keeps all names as they are.
    """
    name = f"{row.folder}/{row.name}" if row.folder else row.name
    if not row.name or "\0" in name:  # no file can have this name: refused where it is used
        return name
    name = os.path.normpath(name)
    if folder is None:
        return name
    if os.path.isabs(name):
        for whole in (os.path.abspath(folder), os.path.realpath(folder)):
            if name.startswith(os.path.join(whole, "")):
                return os.path.relpath(name, whole)
        return name
    others = {"their names begin with that folder's": _without_root(name, folder)}
    if row.folder:
        others["the folders that 'filepath' names are not there"] = os.path.normpath(row.name)
    if not any(others.values()) or os.path.exists(os.path.join(folder, name)):
        return name
    for why, other in others.items():
        if other and os.path.exists(os.path.join(folder, other)):
            before = guesses.setdefault(why, {}).setdefault(other, name)
            if before != name:
                raise InputError(
                    f"{path}, {row.where}: {before} and {name} would both be "
                    f"{os.path.join(folder, other)}: keep the folders that the names "
                    "have"
                )
            return other
    return name


def _without_root(name, folder):
    """`photos/a.jpg` -> `a.jpg` for a folder that ends in `photos`; None for other names."""
    parts, root = name.split(os.sep), os.path.abspath(folder).split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        if parts[:count] == root[-count:]:
            return os.path.join(*parts[count:])
    return None


def _tidy(rows, path, remedy=""):
    """Put each caption on one line; empty ones become None."""
    for row in rows:
        caption = re.sub(r"[\r\n]+", " ", row.caption or "").strip(ASCII_SPACE)
        if re.search("[\ud800-\udfff]", caption):
            raise InputError(f"{path}, {row.where}: the caption is not UTF-8: {remedy}")
        yield row._replace(caption=caption or None)


# JSON -------------------------------------------------------------------------------------------


def _karpathy_rows(content, path):
    """The Rows of a Karpathy-layout file, at least one for each of its entries."""
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise InputError(f"{path} has no list 'images': it should be a Karpathy split file")
    for place, image in enumerate(images):
        where = f"images[{place}]"
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not (
            isinstance(sentences, list)
            and isinstance(image.get("filename"), str)
            and isinstance(image.get("split"), str)
            and isinstance(image.get("filepath") or "", str)
            and all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences)
        ):
            raise InputError(
                f"{path}, {where}: it needs 'filename', 'split' and 'sentences' with "
                "'raw' texts, and 'filepath' must be text if it is there"
            )
        for raw in [sentence["raw"] for sentence in sentences] or [None]:
            yield Row(where, image["filename"], raw, image["split"], image.get("filepath") or "")


def read_coco_captions(path):
    """The captions of a COCO caption file, in its order; InputError if it is missing or broken."""
    return [annotation["caption"] for annotation in _coco_annotations(read_json(path), path)]


def _coco_annotations(content, path):
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(
        isinstance(annotation, dict) and isinstance(annotation.get("caption"), str)
        for annotation in annotations
    ):
        raise InputError(
            f"{path} has no list 'annotations' with a 'caption' each: it should be a "
            "COCO caption file"
        )
    return annotations


def _coco_rows(content, path):
    """The Rows of a COCO caption file, in the order of its annotations."""
    annotations = _coco_annotations(content, path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if len(names) < len(content["images"]):
            raise TypeError("two images have one id")
        rows = [
            (names[annotation["image_id"]], annotation["caption"]) for annotation in annotations
        ]
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError("a file_name is no text")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} needs 'images' with 'id' and 'file_name', and 'annotations' with "
            f"the 'image_id' of one of them ({type(error).__name__}: {error})"
        ) from error
    for place, (name, caption) in enumerate(rows):
        yield Row(f"annotations[{place}]", name, caption, None)


# Text files with the photos' names --------------------------------------------------------------


def _text_rows(folder, names):
    texts = _texts_of(folder, names)
    for name in names:
        path = texts.get(name)
        for caption in read_captions(path) if path and os.path.getsize(path) else [None]:
            yield Row(path or name, name, caption, None)


def _texts_of(folder, names):
    """{photo's name: path of its text file}, for photos that have one; prints what was guessed."""
    listed = {
        os.path.join(below, text)
        for below in dict.fromkeys(map(os.path.dirname, names))
        for text in _texts_in(os.path.join(folder, below))
    }
    exact = _matches(folder, names, listed, str)
    guessed = _matches(
        folder,
        [name for name in names if name not in exact],
        listed - set(exact.values()),
        str.lower,
    )
    if guessed:
        photo, text = next(iter(guessed.items()))
        print(
            f"note: {len(guessed)} text files in {folder} differ from their photo's name in "
            f"capitals only and are used, such as {text} for {photo}",
            file=sys.stderr,
        )
    spare = listed - set(exact.values()) - set(guessed.values())
    if spare:
        print(
            f"note: {len(spare)} text files in {folder} have no photo of their name, such as "
            f"{ascii(min(spare))}",
            file=sys.stderr,
        )
    return {name: os.path.join(folder, text) for name, text in (exact | guessed).items()}


def _matches(folder, names, texts, kind):
    """{photo's name: its text file, a.txt or a.jpg.txt for a.jpg}; `kind` normalises the names."""
    alike = {}
    for text in sorted(texts):
        below, own = os.path.split(text)
        alike.setdefault((below, kind(own)), []).append(text)
    found = {}
    for name in names:
        below, own = os.path.split(name)
        own = kind(own)
        fitting = [
            text
            for stem in dict.fromkeys((os.path.splitext(own)[0], own))
            for text in alike.get((below, stem + TEXT_ENDING), [])
        ]
        if len(fitting) > 1:
            raise InputError(
                f"photo {name} has {len(fitting)} text files in {folder}, "
                f"{' and '.join(fitting)}: keep the one that is meant"
            )
        if fitting:
            found[name] = fitting[0]
    return found


def _texts_in(folder):
    """The names of the text files in a folder; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if entry.is_file() and entry.name.lower().endswith(TEXT_ENDING)
            ]
    except OSError:
        return []
