"""Reading captions of every layout: text files, Karpathy's JSON, COCO's JSON."""

import codecs
import json

from errors import InputError, check_regular

ASCII_SPACE = " \t\n\r\x0b\x0c"
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
    content = read_json(path)
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
    content = read_json(path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) and isinstance(
            annotation.get("caption"), str) for annotation in annotations):
        raise InputError(f"{path} has no list 'annotations' with a 'caption' each: it should be a COCO caption file")
    return [annotation["caption"] for annotation in annotations]
