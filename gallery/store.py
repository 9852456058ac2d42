"""A gallery: a folder with the embeddings of photos, in which questions find the nearest.

`gallery.json` names the model, the folder of the photos, and the subfolder that holds the arrays
(`gallery-files-...`). It is written last and replaced in one step: a folder without it is
half-built, and readers see either the old gallery or the new one.

Every embedding has one number more than the model gives: minus its shift by the gallery's hub
correction (see `retrieval.corrections`). A question with a 1 there gets corrected scores, one with
a 0 plain scores.
"""

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch

from features.blocks import BLOCKS
from features.description import check_description
from features.text_description import KIND
from gallery import index
from inputs.captions import read_json
from retrieval.corrections import METHODS
from runtime.errors import InputError
from runtime.files import check_regular, replacing

FORMAT = 2  # of gallery.json, the newest; a gallery of a checkpoint is of format 1
BLOCK_ROWS = 8192  # embeddings written at a time
SUMMED_BYTES = 2**20  # at a time
OPENING_BYTES = 2**27  # checked whenever a gallery is opened, smallest files first
ANEW = "delete the gallery's folder and build it again"
NAME, FILES, INDEX = "gallery.json", "gallery-files-", "index.faiss"
MADE = re.compile(rf"{FILES}[a-z0-9_]{{8}}")  # folders as `new_files` names them
OURS = re.compile(
    rf"{MADE.pattern}|gallery\.json(\..*)?|(broken\.txt|part\.json)(\..*)?|\.lock|\.blocks"
)

# The keys of gallery.json and the types of their values.
KEYS = {
    "format": int,
    "files": str,
    "sizes": dict,
    "count": int,
    "width": int,
    "captions": int,
    "model": (dict, type(None)),
    "source": str,
    "precomp": (dict, type(None)),
    "folder": (str, type(None)),
    "features": (dict, type(None)),
    "correction": dict,
    "index": str,
    "hubs": (str, type(None)),
    "checksums": (dict, type(None)),
}

# A gallery of embeddings that another model made has no model, but this.
EMBEDDINGS = {
    "images": str,
    "measure": str,
    "bank": (str, type(None)),
    "text_model": (dict, type(None)),
}

PARTS = {
    "model": {"path": str, "sha256": str},
    "precomp": {"folder": str, "split": str},
    "correction": {
        "method": str,
        "parameters": dict,
        "bank_split": str,
        "bank_images": (int, type(None)),
    },
}


class Texts(Sequence):
    """Strings in two files: `<path>.bin`, and where each string ends in it, `<path>.npy`.

    They are read when asked for, because a gallery may have millions of captions.
    """

    def __init__(self, path):
        self.ends = _load(path + ".npy")
        there = os.path.isfile(path + ".bin")
        self.bytes = (
            np.memmap(path + ".bin", np.uint8, "r")
            if there and os.path.getsize(path + ".bin")
            else b""
        )
        if not there or self.ends.dtype != np.int64 or not ascend(self.ends, len(self.bytes)):
            raise InputError(f"{path}.npy is not that of {path}.bin: {ANEW}")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, number):
        number = range(len(self))[number]
        start = self.ends[number - 1] if number else 0
        return bytes(self.bytes[start : self.ends[number]]).decode("utf-8", "surrogateescape")


def ascend(numbers, last):
    """Whether integers (n,) ascend from 0 or more to exactly `last` (n = 0: whether that is 0)."""
    if numbers.ndim != 1 or not len(numbers):
        return numbers.ndim == 1 and last == 0
    return numbers[0] >= 0 and numbers[-1] == last and bool((numbers[1:] >= numbers[:-1]).all())


def write_texts(path, texts):
    """Write strings as `Texts` reads them; bytes that are not UTF-8 are preserved."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    with replacing(path + ".bin") as file:
        file.writelines(encoded)
    save(path + ".npy", np.cumsum([len(text) for text in encoded], dtype=np.int64))


def save(path, array):
    """Write a .npy file."""
    with replacing(path) as file:
        np.save(file, array)


def save_rows(path, blocks, shape):
    """Write an (n, D) float32 array of `shape` from blocks of rows; InputError if not finite."""
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        written = 0
        for block in blocks:
            rows = torch.as_tensor(block).float().cpu().contiguous().numpy()
            if not np.isfinite(rows).all():
                raise InputError(
                    f"the model gives embeddings that are not finite, from item {written} on: "
                    "check the features, or take an earlier checkpoint"
                )
            file.write(rows.data)
            written += len(rows)
    if written != shape[0]:
        raise RuntimeError(f"{written} rows came for {shape[0]}")


def _load(path):
    """A .npy file's array, memory-mapped copy-on-write; raises InputError if it is damaged."""
    check_regular(path)
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # torn files raise many kinds
        raise InputError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {ANEW}"
        ) from error


# Writing ----------------------------------------------------------------------------------------


@contextmanager
def new_files(folder):
    """A new folder for arrays below the gallery's folder; it is removed if the block fails."""
    try:
        files = tempfile.mkdtemp(prefix=FILES, dir=folder)
    except OSError as error:
        raise InputError(
            f"--index {folder} cannot be written ({error.strerror}): name another folder"
        ) from error
    try:
        yield files
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        raise


def write_items(files, items, captions, caption_embeddings, facts):
    """Write the items, their captions and the facts of their files into the folder `files`.

    captions: a list for each item; caption_embeddings: (C, D) or None; facts: see build.Contents
    """
    write_texts(os.path.join(files, "items"), items)
    if facts is not None:
        save(os.path.join(files, "facts.npy"), np.array(facts, np.int64))
    if caption_embeddings is not None:
        write_texts(os.path.join(files, "captions"), itertools.chain.from_iterable(captions))
        save(os.path.join(files, "caption_starts.npy"), np.cumsum([0, *map(len, captions)]))
        save_rows(
            os.path.join(files, "caption_embeddings.npy"),
            caption_embeddings.split(BLOCK_ROWS),
            tuple(caption_embeddings.shape),
        )


def publish(folder, files, description):
    """Make `files`, from `new_files`, the gallery's current arrays, and remove older ones.

    description: what gallery.json says beside names, sizes and checksums of the files
    """
    os.chmod(files, 0o755)  # mkdtemp's 0700 would lock colleagues out
    sizes = {name: os.path.getsize(os.path.join(files, name)) for name in sorted(os.listdir(files))}
    content = {
        "format": 1 if description["model"] else FORMAT,
        **description,
        "files": os.path.basename(files),
        "sizes": sizes,
        "checksums": {name: checksum(os.path.join(files, name)) for name in sizes},
    }
    content["checksums"][NAME] = own_checksum(content)
    with replacing(os.path.join(folder, NAME), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    clear(folder)
    shutil.rmtree(os.path.join(folder, BLOCKS), ignore_errors=True)


def checksum(path):
    """CRC-32 of a file's content, or None if it cannot be read.

    It detects damage, not tampering. SHA-256 would take twice as long.
    """
    found = 0
    check_regular(path)
    try:
        with open(path, "rb") as file:
            while part := file.read(SUMMED_BYTES):
                found = zlib.crc32(part, found)
    except OSError:  # such as of a bad disk
        return None
    return found


def own_checksum(content):
    """CRC-32 of gallery.json's content without its own checksum, independent of its layout."""
    others = {name: value for name, value in content["checksums"].items() if name != NAME}
    plain = json.loads(json.dumps({**content, "checksums": others}))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def clear(folder):
    """Remove what killed or earlier builds left in a gallery's folder."""
    kept = describe(folder)["files"] if is_whole(folder) else None
    for name in os.listdir(folder):
        if MADE.fullmatch(name) and name != kept:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def refuse_foreign(folder):
    """Raise InputError if a folder that is to become a gallery holds something else."""
    if os.path.isdir(folder) and not is_whole(folder):
        foreign = [name for name in os.listdir(folder) if not OURS.fullmatch(name)]
        if foreign:
            raise InputError(
                f"--index {folder} is not a gallery, but has other files in it, such as "
                f"{shown(foreign[0])}: name an empty or new folder"
            )


def shown(text):
    """The text with unprintable characters, such as those that move the cursor, as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# Reading ----------------------------------------------------------------------------------------


def is_whole(folder):
    """Whether the folder holds a completely built gallery."""
    return os.path.lexists(os.path.join(folder, NAME))


def describe(folder):
    """The content of gallery.json; raises InputError if it is broken or of a newer version."""
    path = os.path.join(folder, NAME)
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise InputError(f"{path} does not describe a gallery: {ANEW}")
    content.setdefault("checksums", None)  # older ones have none
    if content["format"] > FORMAT:
        raise InputError(
            f"{path} is of format {content['format']}, newer than this program's {FORMAT}: update "
            "it, or build the gallery in another folder"
        )
    _check_keys(content, path)
    if content["index"] not in index.TYPES or content["correction"]["method"] not in (
        "none",
        *METHODS,
    ):
        raise InputError(
            f"{path} names the index {content['index']} and the correction "
            f"{content['correction']['method']}, one of which this program does not know: update "
            f"it, or {ANEW}"
        )
    if content["features"] is not None:
        check_description(content["features"], f"the features' part of {path}")
    if not MADE.fullmatch(content["files"]) or any(
        os.path.basename(name) != name for name in content["sizes"]
    ):
        raise InputError(f"{path} names files outside the gallery: {ANEW}")
    if "facts.npy" in content["sizes"] and content["folder"] is None:
        raise InputError(f"{path} names photos, but not their folder: {ANEW}")
    if content["checksums"] is not None and content["checksums"].get(NAME) != own_checksum(content):
        raise InputError(f"{path} is not as it was written: {ANEW}")
    return content


def model_path(folder):
    """The path of the checkpoint that a gallery is of; None if another model made it."""
    model = describe(folder)["model"]
    return model and os.path.normpath(os.path.join(os.path.realpath(folder), model["path"]))


def _check_keys(content, path):
    """Raise InputError unless gallery.json has all its keys, with values of their types."""
    parts = [(content, KEYS), *((content.get(part), keys) for part, keys in PARTS.items())]
    if content.get("model", ...) is None:
        own = content.get("embeddings")
        texts = own.get("text_model") if isinstance(own, dict) else None
        parts += [(content, {"embeddings": dict}), (own, EMBEDDINGS), (texts, KIND)]
    for part, keys in parts:
        for name, kinds in keys.items() if part is not None else ():
            if not isinstance(part, dict) or not isinstance(part.get(name, ...), kinds):
                raise InputError(f"{path} lacks {name!r}, or has something odd for it: {ANEW}")


def damaged(files, description, names):
    """The names whose file in the folder `files` is not as it was written."""
    paths = {name: os.path.join(files, name) for name in names}
    return [
        name
        for name, path in paths.items()
        if not os.path.isfile(path) or checksum(path) != description["checksums"].get(name)
    ]


def check_whole(folder):
    """Check every byte of a gallery; returns the number of files and of bytes.

    Raises InputError, naming the damaged files, unless all are as they were written.
    """
    if not is_whole(folder):
        raise InputError(f"there is no whole gallery in {folder} to check: name one with --index")
    description = describe(folder)
    if description["checksums"] is None:
        raise InputError(
            f"the gallery {folder} was built without checksums and cannot be checked: "
            "--rebuild_index writes them"
        )
    files, sizes = os.path.join(folder, description["files"]), description["sizes"]
    if wrong := damaged(files, description, sizes):
        mend = "make it again with --rebuild_index" if wrong == [INDEX] else ANEW
        raise InputError(
            f"{', '.join(wrong)} in {files} {'is' if len(wrong) == 1 else 'are'} not as written: "
            f"{mend}"
        )
    return len(sizes), sum(sizes.values())


class Gallery:
    """A gallery opened for reading; raises InputError if it is half-built, truncated or broken.

    count, width: number of photos, and of numbers in an embedding without its shift
    items: paths relative to the photos' folder, or ids
    correction: the method's name, or "none"
    n_captions: number of captions of all photos
    """

    def __init__(self, folder, with_index=True, whole=False):
        """with_index: False if the index may be damaged, because it will be rebuilt
        whole: check every byte, not only the smaller files, because all of it will be rewritten
        """
        if not is_whole(folder):
            raise InputError(
                f"there is no whole gallery in {folder}: build it with --images, --precomp or "
                "--embeddings"
            )
        self.folder, description = folder, describe(folder)
        try:
            self._open(description, with_index, whole)
        except InputError:
            newer = describe(folder)
            if newer["files"] == description["files"]:
                raise
            self._open(newer, with_index, whole)  # it was replaced while it was being opened

    def _open(self, description, with_index, whole):
        folder, self.description = self.folder, description
        self.count, self.width = self.description["count"], self.description["width"]
        self.correction = self.description["correction"]["method"]
        self.files = os.path.join(folder, self.description["files"])
        self._check_sizes(with_index)
        self._check_content(with_index, whole)
        self.embeddings = torch.from_numpy(
            self._array("embeddings", (self.count, self.width + 1), np.float32)
        )
        self.items = self._texts("items", self.count)
        self.n_captions = self.description["captions"]
        if self.n_captions:
            self.caption_texts = self._texts("captions", self.n_captions)
            self.caption_starts = self._array("caption_starts", (self.count + 1,), np.int64)
            if self.caption_starts[0] or not ascend(self.caption_starts, self.n_captions):
                raise InputError(
                    f"{os.path.join(self.files, 'caption_starts.npy')} does not say which "
                    f"captions are whose: {ANEW}"
                )
            self.caption_embeddings = torch.from_numpy(
                self._array("caption_embeddings", (self.n_captions, self.width), np.float32)
            )
        self.own_captions = self.caption_embeddings if self.n_captions else None
        has_facts = "facts.npy" in self.description["sizes"]
        self.facts = self._array("facts", (self.count, 2), np.int64) if has_facts else None
        self.hub_counts = (
            self._array("hubs", (self.count,), np.int64) if self.description["hubs"] else None
        )
        kind = self.description["index"] if with_index else index.EXACT
        self.find = index.read(kind, os.path.join(self.files, INDEX), self.embeddings)
        photos = self.description["folder"]
        self.photo_folder = (
            None if photos is None else os.path.realpath(os.path.join(folder, photos))
        )

    def _check_sizes(self, with_index):
        """Raise InputError if a file's size is not that with which it was written."""
        for name, size in self.description["sizes"].items():
            if name == INDEX and not with_index:
                continue
            path = os.path.join(self.files, os.path.basename(name))
            found = os.path.getsize(path) if os.path.isfile(path) else None
            if found != size:
                raise InputError(
                    f"{path} is {'not there' if found is None else f'of {found} bytes'}, and was "
                    f"written with {size}: {ANEW}"
                )

    def _check_content(self, with_index, whole):
        """Raise InputError if a file is not as it was written; large files only with `whole`."""
        if self.description["checksums"] is None:
            print(
                f"note: the gallery {shown(self.folder)} was built without checksums, so damage to "
                "it may go unseen: --rebuild_index writes them",
                file=sys.stderr,
            )
            return
        names, left = [], OPENING_BYTES
        for name, size in sorted(self.description["sizes"].items(), key=lambda item: item[1]):
            left -= size
            if (whole or left >= 0) and (with_index or name != INDEX):
                names.append(name)
        for name in damaged(self.files, self.description, names):
            raise InputError(
                f"{os.path.join(self.files, name)} is not as it was written: "
                f"{'make it again with --rebuild_index' if name == INDEX else ANEW}"
            )

    def _texts(self, name, n):
        texts = Texts(os.path.join(self.files, name))
        if len(texts) != n:
            raise InputError(
                f"the gallery {self.folder} has {len(texts)} {name}, but gallery.json says {n}: "
                f"{ANEW}"
            )
        return texts

    def _array(self, name, shape, dtype):
        path = os.path.join(self.files, name + ".npy")
        array = _load(path)
        if array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"{path} is {array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of "
                f"{shape}: {ANEW}"
            )
        return array

    def captions(self, number):
        """The captions of a photo: list of str."""
        if not self.n_captions:
            return []
        return [
            self.caption_texts[place]
            for place in range(*self.caption_starts[number : number + 2].tolist())
        ]

    def photo_of(self, caption):
        """The number of the photo that a caption, by its number, belongs to."""
        return int(np.searchsorted(self.caption_starts, caption, "right")) - 1

    def photo(self, number):
        """The absolute path of a photo, or None.

        None if the gallery has only ids, or if the photo is missing, is not a regular file, or lies
        outside the photos' folder once links are followed.
        """
        if self.photo_folder is None:
            return None
        name = self.items[number]
        # Ids may have no ending.
        return inside(self.photo_folder, name) or inside(self.photo_folder, name + ".jpg")

    def search(self, queries, top, corrected=False):
        """Scores and numbers of the best photos, best first: (q, top) float32 and int64.

        queries: (q, width); corrected: whether the gallery's hub correction is applied
        """
        queries = queries.float().cpu()
        return self.find(
            torch.cat([queries, queries.new_full((len(queries), 1), float(corrected))], 1), top
        )

    def search_alike(self, queries, top, normalised):
        """Cosines and numbers of the photos most similar to other photos, as `search`.

        queries: (q, width) embeddings of photos
        normalised: whether the gallery's embeddings have length 1, so that its index, which
            compares by products, can be used; otherwise all embeddings are compared
        """
        if normalised:
            return self.search(queries, top)
        return index.exact(self.embeddings[:, :-1], queries.float().cpu(), top, cosine=True)

    def search_captions(self, queries, top):
        """Scores and numbers of the best captions for (q, width) queries, as `search`."""
        return index.exact(self.caption_embeddings, queries.float().cpu(), top)


def inside(folder, name):
    """The path of the regular file `name` below a folder, given by its real path, or None."""
    try:
        path = os.path.realpath(os.path.join(folder, name))
        return (
            path if os.path.isfile(path) and os.path.commonpath([path, folder]) == folder else None
        )
    except ValueError:  # a name that no file can have
        return None
