"""A gallery: a folder with the embeddings of photos, in which questions find the nearest.

`gallery.json` tells of which model they are, where the photos lie, and in which folder below (`files-...`) the arrays
are. It is written last and replaced in one step: what has none is half-built, and readers see the old gallery or the
new one. Every embedding has one number more than the model gives, minus the shift of the gallery's correction of hubs
(see `corrections`): a question with a 1 there gets corrected scores, with a 0 plain ones.
"""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch

import index
from caption_files import read_json
from corrections import METHODS
from errors import InputError, check_regular, replacing
from features import check_description
from photo_blocks import BLOCKS

FORMAT = 1  # of gallery.json
BLOCK_ROWS = 8192  # embeddings written at a time
ANEW = "delete the gallery's folder and build it again"
NAME, FILES, INDEX = "gallery.json", "gallery-files-", "index.faiss"
MADE = re.compile(rf"{FILES}[a-z0-9_]{{8}}")  # as `new_files` names them
OURS = re.compile(rf"{MADE.pattern}|gallery\.json(\..*)?|broken\.txt(\..*)?|\.lock|\.blocks")
# What gallery.json holds, with its types.
KEYS = {"format": int, "files": str, "sizes": dict, "count": int, "width": int, "captions": int, "model": dict,
        "source": str, "precomp": (dict, type(None)),
        "folder": (str, type(None)), "features": (dict, type(None)), "correction": dict, "index": str,
        "hubs": (str, type(None))}
PARTS = {"model": {"path": str, "sha256": str}, "precomp": {"folder": str, "split": str},
         "correction": {"method": str, "parameters": dict, "bank_split": str, "bank_images": (int, type(None))}}


class Texts(Sequence):
    """Strings kept in two files, `<path>.bin` and where each ends, `<path>.npy`: read when asked for."""

    def __init__(self, path):
        self.ends = _load(path + ".npy")
        there = os.path.isfile(path + ".bin")
        self.bytes = np.memmap(path + ".bin", np.uint8, "r") if there and os.path.getsize(path + ".bin") else b""
        if not there or self.ends.ndim != 1 or self.ends.dtype != np.int64 or (
                len(self.ends) and not (0 <= self.ends[0] and self.ends[-1] == len(self.bytes))):
            raise InputError(f"{path}.npy is not that of {path}.bin: {ANEW}")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, number):
        number = range(len(self))[number]
        start = self.ends[number - 1] if number else 0
        return bytes(self.bytes[start:self.ends[number]]).decode("utf-8", "surrogateescape")


def write_texts(path, texts):
    """Keep strings as `Texts` reads them; bytes that are no UTF-8 stay what they are."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    with replacing(path + ".bin") as file:
        file.writelines(encoded)
    save(path + ".npy", np.cumsum([len(text) for text in encoded], dtype=np.int64))


def save(path, array):
    """Write a .npy file."""
    with replacing(path) as file:
        np.save(file, array)


def save_rows(path, blocks, shape):
    """Write the (n, D) float32 array of `shape` whose rows come in blocks; InputError where they are not finite."""
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        written = 0
        for block in blocks:
            rows = torch.as_tensor(block).float().cpu().contiguous().numpy()
            if not np.isfinite(rows).all():
                raise InputError(f"the model gives embeddings that are not finite, from item {written} on: check the "
                                 "features, or take an earlier checkpoint")
            file.write(rows.data)
            written += len(rows)
    if written != shape[0]:
        raise RuntimeError(f"{written} rows came for {shape[0]}")


def _load(path):
    """A .npy file's array, memory-mapped in private pages; raises InputError where it is not whole."""
    check_regular(path)
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # torn files raise many kinds
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {ANEW}") from error


# Writing ----------------------------------------------------------------------------------------

@contextmanager
def new_files(folder):
    """A new folder for a gallery's arrays, below it, which goes away where the block fails."""
    try:
        files = tempfile.mkdtemp(prefix=FILES, dir=folder)
    except OSError as error:
        raise InputError(f"--index {folder} cannot be written ({error.strerror}): name another folder") from error
    try:
        yield files
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        raise


def write_items(files, items, captions, caption_embeddings, facts):
    """Keep the items, a list of captions for each, these's embeddings (C, D) or None, and the facts of the files."""
    write_texts(os.path.join(files, "items"), items)
    if facts is not None:
        save(os.path.join(files, "facts.npy"), np.array(facts, np.int64))
    if caption_embeddings is not None:
        write_texts(os.path.join(files, "captions"), itertools.chain.from_iterable(captions))
        save(os.path.join(files, "caption_starts.npy"), np.cumsum([0, *map(len, captions)]))
        save_rows(os.path.join(files, "caption_embeddings.npy"), caption_embeddings.split(BLOCK_ROWS),
                  tuple(caption_embeddings.shape))


def publish(folder, files, description):
    """Make `files`, from `new_files`, the gallery's, with what gallery.json says of it; older ones go."""
    os.chmod(files, 0o755)  # mkdtemp's 0700 would lock colleagues out
    sizes = {name: os.path.getsize(os.path.join(files, name)) for name in sorted(os.listdir(files))}
    content = {"format": FORMAT, **description, "files": os.path.basename(files), "sizes": sizes}
    with replacing(os.path.join(folder, NAME), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    clear(folder)
    shutil.rmtree(os.path.join(folder, BLOCKS), ignore_errors=True)


def clear(folder):
    """Remove what killed or earlier builds have left in a gallery's folder."""
    kept = describe(folder)["files"] if is_whole(folder) else None
    for name in os.listdir(folder):
        if MADE.fullmatch(name) and name != kept:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def refuse_foreign(folder):
    """Raise InputError where a folder that is to become a gallery has something else in it."""
    if os.path.isdir(folder) and not is_whole(folder):
        foreign = [name for name in os.listdir(folder) if not OURS.fullmatch(name)]
        if foreign:
            raise InputError(f"--index {folder} is no gallery, and has other files in it, such as {shown(foreign[0])}: "
                             "name an empty or new folder")


def shown(text):
    """The text as it can be printed: what would not be seen, or would move the cursor, as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# Reading ----------------------------------------------------------------------------------------

def is_whole(folder):
    """Whether a gallery was built there to its end."""
    return os.path.lexists(os.path.join(folder, NAME))


def describe(folder):
    """What gallery.json says; raises InputError where it is broken, or of a newer version."""
    path = os.path.join(folder, NAME)
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise InputError(f"{path} does not describe a gallery: {ANEW}")
    if content["format"] > FORMAT:
        raise InputError(f"{path} is of format {content['format']}, newer than this program's {FORMAT}: update it, or "
                         "build the gallery in another folder")
    for part, keys in {None: KEYS, **PARTS}.items():
        for name, kinds in keys.items() if part is None or content[part] is not None else ():
            if not isinstance((content[part] if part else content).get(name, ...), kinds):
                raise InputError(f"{path} lacks {name!r}, or has something odd for it: {ANEW}")
    if content["index"] not in index.TYPES or content["correction"]["method"] not in ("none", *METHODS):
        raise InputError(f"{path} tells of the index {content['index']} and the correction "
                         f"{content['correction']['method']}, of which this program does not know one: update it, or "
                         f"{ANEW}")
    if content["features"] is not None:
        check_description(content["features"], f"the features' part of {path}")
    if not MADE.fullmatch(content["files"]):
        raise InputError(f"{path} names files outside the gallery: {ANEW}")
    return content


class Gallery:
    """A gallery opened for reading: `count` photos of `width` numbers each, and what is known of them.

    items: their paths relative to the one folder, or ids; correction: the method's name, or "none"; n_captions: how
    many there are in all. Raises InputError where it is half-built, truncated or broken.
    """

    def __init__(self, folder, with_index=True):
        """with_index: False where the index is torn, and to be built again."""
        if not is_whole(folder):
            raise InputError(f"there is no whole gallery in {folder}: build it with --images or --precomp")
        self.folder, description = folder, describe(folder)
        try:
            self._open(description, with_index)
        except InputError:
            newer = describe(folder)
            if newer["files"] == description["files"]:
                raise
            self._open(newer, with_index)  # another one took its place meanwhile

    def _open(self, description, with_index):
        folder, self.description = self.folder, description
        self.count, self.width = self.description["count"], self.description["width"]
        self.correction = self.description["correction"]["method"]
        self.files = os.path.join(folder, self.description["files"])
        self._check_sizes(with_index)
        self.embeddings = torch.from_numpy(self._array("embeddings", (self.count, self.width + 1), np.float32))
        self.items = self._texts("items", self.count)
        self.n_captions = self.description["captions"]
        if self.n_captions:
            self.caption_texts = self._texts("captions", self.n_captions)
            self.caption_starts = self._array("caption_starts", (self.count + 1,), np.int64)
            self.caption_embeddings = torch.from_numpy(
                self._array("caption_embeddings", (self.n_captions, self.width), np.float32))
        has_facts = "facts.npy" in self.description["sizes"]
        self.facts = self._array("facts", (self.count, 2), np.int64) if has_facts else None
        self.hub_counts = self._array("hubs", (self.count,), np.int64) if self.description["hubs"] else None
        if with_index:
            self.find = index.read(self.description["index"], os.path.join(self.files, INDEX), self.embeddings)
        photos = self.description["folder"]
        self.photo_folder = None if photos is None else os.path.realpath(os.path.join(folder, photos))

    def _check_sizes(self, with_index):
        """Raise InputError where a file is not as long as it was written."""
        for name, size in self.description["sizes"].items():
            if name == INDEX and not with_index:
                continue
            path = os.path.join(self.files, os.path.basename(name))
            found = os.path.getsize(path) if os.path.isfile(path) else None
            if found != size:
                raise InputError(f"{path} is {'not there' if found is None else f'of {found} bytes'}, and was written "
                                 f"with {size}: {ANEW}")

    def _texts(self, name, n):
        texts = Texts(os.path.join(self.files, name))
        if len(texts) != n:
            raise InputError(f"the gallery {self.folder} has {len(texts)} {name} and tells of {n}: {ANEW}")
        return texts

    def _array(self, name, shape, dtype):
        path = os.path.join(self.files, name + ".npy")
        array = _load(path)
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{path} is {array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of {shape}: "
                             f"{ANEW}")
        return array

    def captions(self, number):
        """The captions of a photo: list of str."""
        if not self.n_captions:
            return []
        return [self.caption_texts[place] for place in range(*self.caption_starts[number:number + 2].tolist())]

    def photo_of(self, caption):
        """The number of the photo that a caption, by its number, belongs to."""
        return int(np.searchsorted(self.caption_starts, caption, "right")) - 1

    def photo(self, number):
        """The absolute path of a photo in the one folder; None if it is not there (any more), is no regular file, or,
        its links followed, lies outside, or the gallery has ids only."""
        if self.photo_folder is None:
            return None
        name = self.items[number]
        return inside(self.photo_folder, name) or inside(self.photo_folder, name + ".jpg")  # ids may have no ending

    def search(self, queries, top, corrected=False):
        """(q, width) queries -> scores and numbers of the best photos: (q, top) float32, int64, best first."""
        queries = queries.float().cpu()
        return self.find(torch.cat([queries, queries.new_full((len(queries), 1), float(corrected))], 1), top)

    def search_captions(self, queries, top):
        """(q, width) queries -> scores and numbers of the best captions, as `search`."""
        return index.exact(self.caption_embeddings, queries.float().cpu(), top)


def inside(folder, name):
    """The path of a regular file below a folder (whose path is real), or None where `name` leads to none there."""
    try:
        path = os.path.realpath(os.path.join(folder, name))
        return path if os.path.isfile(path) and os.path.commonpath([path, folder]) == folder else None
    except ValueError:  # a name that no file can have
        return None
