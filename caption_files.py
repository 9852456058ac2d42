"""Reading captions of every layout: text files, tables, Karpathy's JSON, COCO's JSON."""

import codecs
import csv
import json
import os
import re
from typing import NamedTuple

from errors import InputError, check_regular

ASCII_SPACE = " \t\n\r\x0b\x0c"
# What a split may be called, and what the data set's files call it.
SPLITS = {"train": "train", "restval": "train", "dev": "dev", "val": "dev", "test": "test", "testall": "testall"}
COCO_ANNOTATIONS = {"train": "annotations/captions_train2014.json", "val": "annotations/captions_val2014.json"}


def read_captions(path):
    """The captions of a text file, one a line, split at newlines only and stripped of ASCII white space.

    A byte order mark at the start, as Windows' editors write it, is no part of the first caption.
    Raises InputError if the file is missing, empty, or not UTF-8 (naming the line).
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            lines = file.read().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(f"caption file {path} cannot be read ({error.strerror}): check --data_path and "
                         "--data_name") from error
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"caption file {path} is empty: it needs one caption a line, five for each image")
    captions = []
    for place, line in enumerate(lines, start=1):
        try:
            captions.append(line.strip(ASCII_SPACE.encode()).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"caption file {path}, line {place}: not UTF-8 ({error.reason} at byte "
                             f"{error.start}); convert the file to UTF-8") from error
    return captions


def read_json(path, pairs_hook=None):
    """A JSON file's content, with or without a byte order mark; raises InputError if it is missing or broken.

    pairs_hook: what makes an object of its (key, value) pairs, where a dict will not do.
    """
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=pairs_hook)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): it may be cut short; fetch it again") from error


def is_precomputed(data_name):
    """Whether a data set is one of features, by its name: `..._precomp`, or VSE++'s plain `precomp`."""
    return data_name.endswith("precomp")


def flickr_json_name(data_name):
    """The Karpathy-layout file of a raw-image data set: dataset_flickr8k.json for f8k, dataset_<name>.json else."""
    name = {"f8k": "flickr8k", "f30k": "flickr30k"}.get(data_name, data_name)
    return f"dataset_{name}.json"


def read_flickr_json(path):
    """The `images` of a Karpathy-layout JSON file, each checked to have filename, split and raw sentences."""
    return _flickr_images(read_json(path), path)


def _flickr_images(content, path):
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise InputError(f"{path} has no list 'images': it should be a Karpathy split file")
    for place, image in enumerate(images):
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not (isinstance(sentences, list) and isinstance(image.get("filename"), str)
                and isinstance(image.get("split"), str)
                and all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences)):
            raise InputError(f"{path}, images[{place}]: it needs 'filename', 'split' and 'sentences' with 'raw' texts")
    return images


def read_coco_captions(path):
    """The captions of a COCO caption file, in its order; raises InputError if it is missing or broken."""
    return [annotation["caption"] for annotation in _coco_annotations(read_json(path), path)]


def _coco_annotations(content, path):
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) and isinstance(
            annotation.get("caption"), str) for annotation in annotations):
        raise InputError(f"{path} has no list 'annotations' with a 'caption' each: it should be a COCO caption file")
    return annotations


# A photo's captions, of every layout ------------------------------------------------------------

class CaptionedPhoto(NamedTuple):
    """A photo with any number of captions."""

    name: str  # its path below the folder of photos; bytes that are not UTF-8 as surrogates
    captions: list  # of str, each on one line
    split: str | None  # one of SPLITS' values, or None where the file gives none


def read_photo_captions(path):
    """The CaptionedPhotos of a table (CSV or TSV), a Karpathy JSON or a COCO caption JSON, in the file's order.

    Empty captions are left out. Raises InputError if the file is missing, broken, or contradicts itself.
    """
    if not path.lower().endswith(".json"):
        return _collect(path, _table_rows(path))
    content = read_json(path)
    rows = _coco_rows if isinstance(content, dict) and "annotations" in content else _flickr_rows
    return _collect(path, rows(content, path))


def read_caption_texts(folder, names):
    """The photos `names` as CaptionedPhotos, with the lines of `<folder>/a.txt` for `a.jpg`, where there is one.

    Raises InputError if a text file cannot be read or is not UTF-8.
    """
    return _collect(folder, _text_rows(folder, names))


def _collect(path, rows):
    """CaptionedPhotos of rows (where, name, caption or None, split or None), one for each name."""
    photos = {}
    for where, name, caption, split in rows:
        if split is not None and split not in SPLITS:
            raise InputError(f"{path}, {where}: split is {split!r}: it must be one of {', '.join(SPLITS)}")
        split = SPLITS.get(split)
        name = os.path.normpath(name) if name else name
        photo = photos.setdefault(name, CaptionedPhoto(name, [], split))
        if photo.split != split:
            raise InputError(f"{path}, {where}: photo {name} is in split {split or 'none'}, but before in "
                             f"{photo.split or 'none'}: give each photo one split")
        caption = re.sub(r"[\r\n]+", " ", caption or "").strip(ASCII_SPACE)
        if re.search("[\ud800-\udfff]", caption):
            raise InputError(f"{path}, {where}: the caption is not UTF-8; convert the file to UTF-8")
        if caption:
            photo.captions.append(caption)
    unsplit = next((photo for photo in photos.values() if photo.split is None), None)
    if unsplit and any(photo.split for photo in photos.values()):
        raise InputError(f"{path}: photo {unsplit.name} has no split, but others have: give all of them one, or none")
    return list(photos.values())


def _table_rows(path):
    """Rows of a table with a header: columns image, caption and, where there is one, split."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",\t;", key=first.count), strict=True)
            header = [cell.strip().lower() for cell in next(reader, [])]
            if not {"image", "caption"} <= set(header) or len(set(header)) < len(header):
                raise InputError(f"{path} has the columns {header}: its first line must name image and caption (and, "
                                 "if you like, split) once each, parted by commas or tabs")
            image, caption = header.index("image"), header.index("caption")
            split = header.index("split") if "split" in header else None
            for cells in reader:
                if not any(map(str.strip, cells)):  # as Excel leaves them at the end
                    continue
                if len(cells) != len(header):
                    raise InputError(f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has "
                                     f"{len(header)}: put quotation marks around cells with a comma or tab")
                name = cells[image].strip()
                if not name:
                    raise InputError(f"{path}, line {reader.line_num}: the cell of the image is empty: name a file")
                own = cells[split].strip().lower() if split is not None else None
                yield f"line {reader.line_num}", name, cells[caption], own or None
    except OSError as error:
        raise InputError(f"caption file {path} cannot be read ({error.strerror}): check --captions") from error
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}: check the quotation marks there") from error


def _flickr_rows(content, path):
    """Rows of a Karpathy-layout file; a photo's folder comes before its name where the file gives one (`filepath`)."""
    for place, image in enumerate(_flickr_images(content, path)):
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if isinstance(folder, str) and folder else image["filename"]
        for sentence in image["sentences"] or [{"raw": None}]:
            yield f"images[{place}]", name, sentence["raw"], image["split"]


def _coco_rows(content, path):
    """Rows of a COCO caption file, in the order of its annotations."""
    annotations = _coco_annotations(content, path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if len(names) < len(content["images"]):
            raise TypeError("two images have one id")
        rows = [(names[annotation["image_id"]], annotation["caption"]) for annotation in annotations]
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError("a file_name is no text")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} needs 'images' with 'id' and 'file_name', and 'annotations' with the 'image_id' of "
                         f"one of them ({type(error).__name__}: {error})") from error
    for place, (name, caption) in enumerate(rows):
        yield f"annotations[{place}]", name, caption, None


def _text_rows(folder, names):
    for name in names:
        path = os.path.join(folder, os.path.splitext(name)[0] + ".txt")
        found = os.path.isfile(path) and os.path.getsize(path)
        for caption in read_captions(path) if found else [None]:
            yield path, name, caption, None
