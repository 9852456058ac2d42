"""Read embeddings, or a matrix of similarities, from a file of any common kind.

    x.npy                 NumPy's array, memory-mapped; or a dict in it, such as {"npts", "sims"}
    x.npz:key             one of NumPy's arrays, such as those of compute_results.py --save_embeddings
    x.pt:key              a tensor, or one of a dict of tensors; weights only
    x.safetensors:key     one of its tensors
    x.parquet:column      a column of vectors
    x.pkl:key             a pickled array, or one of a dict of arrays (see `embeddings.pickles`)
    folder                of `*_emb_<number>.npy`, as clip-retrieval writes them, with its metadata

`:key` may be left out if a file holds one array, or one with a usual name. What a file is, its
first bytes say. No file runs code.
"""

import io
import os
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from embeddings import pickles
from features.files import CHECKED_BYTES, map_array
from runtime import torch_files
from runtime.errors import InputError
from runtime.file_kinds import HEAD, ZIP, binary_kind
from runtime.files import check_regular
from runtime.finite import LARGEST

# Names that arrays usually have: of VSE++ codes, Hugging Face's CLIP, open_clip and others.
USUAL = {
    "images": ("img_embs", "image_embeds", "image_features", "image_embeddings", "images"),
    "captions": (
        "cap_embs",
        "text_embeds",
        "text_features",
        "text_embeddings",
        "caption_embeddings",
        "texts",
        "captions",
    ),
    "similarities": ("sims", "similarities"),
}
PARTS = {"images": "img_emb", "captions": "text_emb"}  # clip-retrieval's folders and file names
NUMPY, PARQUET = b"\x93NUMPY", b"PAR1"
SAFE_PYARROW = 15  # the first whose every release has CVE-2023-47248 closed
SHOWN = 5  # rows or names listed in a message


class Found(NamedTuple):
    """What a file or folder holds."""

    rows: torch.Tensor  # (n, width), of any float type
    ids: list | None = None  # n names of images, if its metadata has them
    texts: list | None = None  # n captions, likewise
    count: int | None = None  # the dict's "npts"


def read(text, side, flag):
    """The Found of a path, with `:key` or without.

    side: "images", "captions" or "similarities"; flag: the one that names the file, for messages
    Raises InputError if it cannot be read, or is no matrix of finite numbers.
    """
    path, key = split_key(text)
    shown = f"{flag} {path}"
    if os.path.isdir(path) and side in PARTS:
        return read_parts(path, side, flag)
    check_regular(path, shown)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}): check the path") from error
    reader = reader_of(path, head, shown)
    try:
        content = reader(path, shown, flag, chooser(key, side, shown))
    except pickles.HasTensors as error:
        raise InputError(
            f"{shown} is refused: {error}: save NumPy's arrays, or tensors by torch.save"
        ) from error
    if isinstance(content, Found):
        return content._replace(rows=checked(as_matrix(content.rows, shown), shown))
    return Found(checked(as_matrix(content, shown), shown))


def split_key(text):
    """(path, key or None) of `path` or `path:key`."""
    path, _, key = text.rpartition(":")
    return (
        (path, key) if key and os.path.exists(path) and not os.path.exists(text) else (text, None)
    )


def reader_of(path, head, shown):
    """The function that reads a file with these first bytes; raises InputError if none does."""
    if head.startswith(NUMPY):
        return _numpy
    if head.startswith(ZIP):
        return _torch if b"data.pkl" in head else _npz
    if head.startswith(torch_files.LEGACY_START):
        return _torch
    if head.startswith(PARQUET):
        return _parquet
    if path.endswith(".safetensors"):
        return _safetensors
    if head.startswith(b"\x80") or path.endswith((".pkl", ".pickle")):
        return _pickle
    what, remedy = binary_kind(head) or ("of an unknown kind", "give another file")
    raise InputError(
        f"{shown} is {what}, not .npy, .npz, .pt, .safetensors, .parquet or a pickle: {remedy}"
    )


def chooser(key, side, shown):
    """A function that chooses one of a file's names: the key, the only one, or the usual one."""

    def choose(names, what="arrays"):
        """The chosen one of `names`; raises InputError if none is, or several could be."""
        names = list(names)
        listed = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") or "none"
        if key is not None and key in names:
            return key
        if key is not None:
            raise InputError(f"{shown} has no {key!r}: its {what} are {listed}; name one of them")
        usual = [name for name in USUAL[side] if name in names]
        if len(names) == 1 or usual:
            return names[0] if len(names) == 1 else usual[0]
        raise InputError(
            f"{shown} does not say which of its {what} are the {side}: they are {listed}; name "
            "one after a colon, as in FILE:NAME"
        )

    return choose


# Files ------------------------------------------------------------------------------------------


def _numpy(path, shown, flag, choose):
    """The array of a .npy file, or one of the dict in it."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            *_, kind = (
                np.lib.format.read_array_header_1_0(file)
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0(file)
            )
            has_objects = kind.hasobject
        except Exception:  # a torn header may raise anything
            has_objects = False  # map_array says what is wrong
        if has_objects:
            return _unpickled(file, os.path.getsize(path) - file.tell(), shown, choose)
    return map_array(path, flag, "the path")


def _pickle(path, shown, flag, choose):
    with open(path, "rb") as file:
        return _unpickled(file, os.path.getsize(path), shown, choose)


def _unpickled(file, size, shown, choose):
    """The array of a pickle, or the chosen one of its dict, with the dict's `npts`.

    Raises HasTensors if it is PyTorch's.
    """
    try:
        content = pickles.load(file, size)
    except pickles.HasTensors:
        raise
    except pickles.Refused as error:
        raise InputError(f"{shown} is refused: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(
            f"{shown} is not a whole pickle of arrays ({error}): fetch or make it again"
        ) from error
    if not isinstance(content, dict):
        return content
    arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    count = content.get("npts")
    matrices = [name for name, value in arrays.items() if value.ndim]
    return Found(arrays[choose(matrices)], count=None if count is None else int(count))


def _npz(path, shown, flag, choose):
    try:
        with np.load(path, allow_pickle=False) as content:
            return content[choose(content.files)]
    except InputError:
        raise
    except Exception as error:  # torn archives raise many kinds
        raise InputError(
            f"{shown} cannot be read as .npz ({error}): fetch or make it again"
        ) from error


def _torch(path, shown, flag, choose):
    """A tensor of torch.save, or an array that was saved with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = archive.read(name)
        return _unpickled(io.BytesIO(content), len(content), shown, choose)
    except InputError:
        raise
    except Exception:  # it has tensors, is a legacy file, or is damaged, which is said there
        content = torch_files.read(path, "file of embeddings", flag=flag)
    if isinstance(content, torch.Tensor):
        tensors, name = {"": content}, ""
    else:
        items = content.items() if isinstance(content, dict) else ()
        tensors = {str(name): own for name, own in items if isinstance(own, torch.Tensor)}
        name = choose(tensors, "tensors")
    if not torch_files.is_whole(tensors[name]):
        raise InputError(f"{shown} is refused: its tensor {name} is not a whole, dense one")
    return tensors[name].detach()


def _safetensors(path, shown, flag, choose):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise missing(shown, "safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(choose(file.keys(), "tensors"))
    except InputError:
        raise
    except Exception as error:  # the package has errors of its own
        raise InputError(
            f"{shown} cannot be read as safetensors ({error}): fetch or make it again"
        ) from error


def _parquet(path, shown, flag, choose):
    """A column of vectors as an array."""
    with _open_parquet(path, shown) as file:
        from pyarrow.compute import list_value_length

        is_vector = re.compile("(large_|fixed_size_)?list<").match
        vectors = [one.name for one in file.schema_arrow if is_vector(str(one.type))]
        name = choose(vectors, "columns of vectors")
        column = file.read(columns=[name]).column(0)
        lengths = list_value_length(column).to_numpy()  # NaN for a row without a vector
        if not len(lengths) or not (lengths == lengths[0]).all():
            raise InputError(
                f"{shown} has rows without {name}, or vectors of different widths: make it again"
            )
        rows = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate(rows).reshape(len(lengths), int(lengths[0]))


@contextmanager
def _open_parquet(path, shown):
    """A parquet file, whose errors become an InputError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing(shown, "pyarrow") from error
    if int(pyarrow.__version__.split(".")[0]) < SAFE_PYARROW:
        raise InputError(
            f"{shown} needs pyarrow {SAFE_PYARROW} or newer, since {pyarrow.__version__} may run a "
            "file's code: pip install --upgrade pyarrow"
        )
    try:
        with ParquetFile(path) as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # the package has errors of its own
        raise InputError(
            f"{shown} cannot be read as parquet ({error}): fetch or make it again"
        ) from error


def missing(shown, package):
    """The InputError for a package that is not installed."""
    return InputError(
        f"{shown} needs the package {package}, which is not installed: pip install {package}"
    )


# clip-retrieval's folders -----------------------------------------------------------------------


def read_parts(folder, side, flag):
    """The Found of a folder of parts `*_emb_<number>.npy`, in the order of their numbers.

    The folder is that of the parts, or clip-retrieval's output folder, which has `img_emb` and
    `text_emb`. `metadata_<number>.parquet` gives each row's image_path and caption, if it is there.
    """
    inner = os.path.join(folder, PARTS[side])
    folder = inner if os.path.isdir(inner) else folder
    shown = f"{flag} {folder}"
    parts = numbered_files(folder, r"(\w+_emb)_(\d+)\.npy", shown, PARTS[side])
    if not parts:
        raise InputError(
            f"{shown} has no {PARTS[side]}_0.npy or the like: give a file, or the folder that "
            "clip-retrieval has written"
        )
    arrays = [as_matrix(map_array(path, flag, "the path"), f"{flag} {path}") for path in parts]
    for path, array in zip(parts, arrays):
        if array.shape[1] != arrays[0].shape[1]:
            raise InputError(
                f"{flag} {path} has rows of width {array.shape[1]}, and {parts[0]} of width "
                f"{arrays[0].shape[1]}: all parts must come from one model"
            )
    rows = arrays[0] if len(arrays) == 1 else torch.cat(arrays)
    about = metadata(folder, [len(array) for array in arrays], flag)
    return Found(checked(rows, shown), about.get("image_path"), about.get("caption"))


def numbered_files(folder, pattern, shown, name=None):
    """The paths in a folder that match, by number; raises InputError if a number lacks or is twice.

    pattern: has two groups, a name and a number; name: taken if several names are there
    """
    found = {}
    for entry in sorted(os.listdir(folder)):
        if match := re.fullmatch(pattern, entry):
            found.setdefault(match[1], []).append((int(match[2]), os.path.join(folder, entry)))
    own = found.get(name) or (next(iter(found.values())) if len(found) == 1 else [])
    numbers, paths = zip(*sorted(own)) if own else ((), ())
    for one, following in zip(numbers, numbers[1:]):
        if following != one + 1:
            fault = f"part {one} twice" if following == one else f"no part {one + 1}"
            raise InputError(
                f"{shown} has parts {numbers[0]} to {numbers[-1]}, but {fault}: mend the folder"
            )
    return paths


def metadata(folder, sizes, flag):
    """{"image_path": texts, "caption": texts} of the parts' metadata, as far as it is there.

    sizes: rows of each part
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), "metadata")
    for place in (folder, beside):
        paths = os.path.isdir(place) and numbered_files(
            place, r"(metadata)_(\d+)\.parquet", f"{flag} {place}"
        )
        if paths:
            break
    else:
        return {}
    if len(paths) != len(sizes):
        raise InputError(
            f"{flag} {folder} has {len(sizes)} parts, and {place} has metadata of {len(paths)}: "
            "complete them"
        )
    about = {}
    for path, size in zip(paths, sizes):
        shown = f"{flag} {path}"
        with _open_parquet(path, shown) as file:
            there = [n for n in ("image_path", "caption") if n in file.schema_arrow.names]
            if file.metadata.num_rows != size:
                raise InputError(
                    f"{shown} has {file.metadata.num_rows} rows, and its part of the embeddings "
                    f"{size}: fetch or make them again"
                )
            table = file.read(columns=there)
        for name in there:
            values = table.column(name).to_pylist()
            about.setdefault(name, []).extend([] if None in values else map(str, values))
    return {name: texts for name, texts in about.items() if len(texts) == sum(sizes)}


# Matrices ---------------------------------------------------------------------------------------


def as_matrix(array, shown):
    """An array or tensor as a tensor (n, width) of a float type, without a copy if possible.

    Whole numbers become float64. Raises InputError for other shapes and types.
    """
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(
            f"{shown} has shape {tuple(array.shape)}: it must be (rows, width), with a vector a row"
        )
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise InputError(f"{shown} holds {array.dtype}, not numbers: save floats")
        if array.dtype not in (np.float16, np.float32, np.float64):
            array = array.astype(np.float64)
        elif not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of memory that may not be written to
            return torch.from_numpy(array)
    if array.dtype.is_complex or array.dtype == torch.bool:
        raise InputError(f"{shown} holds {array.dtype}, not numbers: save floats")
    return array if array.dtype.is_floating_point else array.double()


def checked(rows, shown):
    """The rows; raises InputError if one is not finite, or if half of them or more are zero."""
    bad, zeros, largest = [], 0, min(LARGEST, torch.finfo(rows.dtype).max)
    for start, block in in_blocks(rows):
        whole = ((block >= -largest) & (block <= largest)).all(1)  # False for NaN, too
        bad += (start + (~whole).nonzero().squeeze(1)).tolist()
        zeros += int((~block.any(1)).sum())
    if bad:
        rest = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise InputError(
            f"{shown} has NaN, infinity or a number beyond {LARGEST:g} in row"
            f"{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:SHOWN]))}{rest} (the first is 0): "
            "make the file again, or leave these items out"
        )
    if 2 * zeros >= len(rows):
        raise InputError(
            f"{shown} has {zeros} of {len(rows)} rows of nothing but zeros: make it again"
        )
    if zeros:
        print(
            f"Warning: {shown} has {zeros} of {len(rows)} rows of nothing but zeros, equally near "
            "to everything: check how it was made",
            file=sys.stderr,
        )
    return rows


def in_blocks(rows):
    """Yield (first row, block of rows), small enough to be converted."""
    size = max(1, CHECKED_BYTES // (rows.shape[1] * rows.element_size()))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]
