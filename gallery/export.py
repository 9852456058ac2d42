"""Export a gallery as Parquet parts, which vector databases import (see docs/scale.md).

A row is a photo: its number `id`, its `item`, its `captions`, its `shift`, and a `vector` that
orders by inner product, cosine and Euclidean distance as the gallery does (`index.levelled`),
padded with zeros. A question q is asked as [q, 1, 0, ...] for corrected scores and as [q, 0, 0, ...]
for plain ones. Its score is the inner product times the manifest's `length`, plus, if it is
corrected, `middle`.

`unfinished.json` lists the parts that are written, until `manifest.json` takes its place, last.
"""

import hashlib
import json
import os
import re
import sys
from contextlib import suppress

import numpy as np
import torch
from torch import nn

from embeddings.files import missing
from gallery import index
from gallery.store import Gallery, shown
from inputs.captions import read_json
from runtime.errors import InputError
from runtime.files import hash_file, lock, remove_leftovers, replacing

FORMAT = 1  # of manifest.json
ROWS_PER_PART = 1_000_000
BLOCK_ROWS = 8192  # rows of a row group, written at a time
MULTIPLE = 16  # vectors are padded to a multiple of it, because quantizers split them evenly
DTYPES = ("float32", "float16")
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
OURS = re.compile(r"part-\d{5,}\.parquet(\..*)?|(manifest|unfinished)\.json(\..*)?|\.lock")
PART = {"file", "rows", "sha256", "bytes"}  # what the manifest says of each part
# The gallery's files that an export holds.
CONTENT = (
    *("embeddings.npy", "items.bin", "items.npy"),
    *("captions.bin", "captions.npy", "caption_starts.npy"),
)


def padded(width):
    """Numbers of a vector for embeddings of that width."""
    return -(-(width + 2) // MULTIPLE) * MULTIPLE


def key_of(found):
    """What identifies a Gallery's photos, captions and embeddings: 32 hexadecimal digits.

    Another index of the same rows has the same key. Raises InputError for an old gallery without
    checksums.
    """
    checksums = found.description["checksums"]
    if checksums is None:
        raise InputError(
            f"the gallery {shown(found.folder)} was built without checksums, which tell it from "
            "others: write them with --rebuild_index"
        )
    sizes = found.description["sizes"]
    own = [[name, sizes.get(name), checksums.get(name)] for name in CONTENT]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:32]


def stamp_of(plan):
    """The text by which a store of these rows is known, as parts carry it in their schema."""
    return json.dumps({name: plan[name] for name in ("gallery", "width", "middle", "length")})


def level_in(stamp, count, found, shown):
    """The `index.Level` in the stamp of a store's table of `count` rows, text, bytes or None.

    Raises InputError, with `shown` for the store, unless the rows are a Gallery's.
    """
    said = json.loads(stamp or '{"gallery": "no name"}')
    if (said["gallery"], count) != (key_of(found), found.count):
        raise InputError(
            f"{shown} holds {count} rows of the gallery {said['gallery']}, but {found.folder} is "
            f"{key_of(found)} with {found.count}: import all of its export into a new table"
        )
    return index.Level(said["middle"], said["length"])


def export(folder, output, rows_per_part=ROWS_PER_PART, dtype="float32"):
    """Write the gallery in `folder` into the folder `output`, or finish what a killed run began.

    Returns the manifest. Raises InputError if `output` holds something else, or the disk is full.
    """
    pyarrow = _pyarrow()
    refuse_foreign(output)
    plan = plan_of(Gallery(folder, with_index=False, whole=True), rows_per_part, dtype)
    with lock(output, "--export"):
        remove_leftovers(output)
        kept = {part["file"]: part for part in done_parts(output, plan) if _is_whole(output, part)}
        names = {
            f"part-{start // rows_per_part:05d}.parquet": start
            for start in range(0, plan["rows"], rows_per_part)
        }
        lacking = [name for name in names if name not in kept]
        if lacking:
            # Before a damaged part is written again, so that a manifest always means whole parts.
            _write_json(output, UNFINISHED, {**plan, "parts": list(kept.values())})
            _remove(output, MANIFEST)
        for name in lacking:
            kept[name] = _write_part(pyarrow, folder, plan, output, name, names[name])
            _write_json(output, UNFINISHED, {**plan, "parts": list(kept.values())})
        manifest = {**plan, "parts": [kept[name] for name in names]}
        if not os.path.exists(os.path.join(output, MANIFEST)):
            _write_json(output, MANIFEST, manifest)
        _remove(output, UNFINISHED)
    return manifest


def plan_of(found, rows_per_part, dtype):
    """manifest.json's content without its parts, for a Gallery."""
    said = found.description
    starts = range(0, found.count, BLOCK_ROWS)
    level = index.level_of(lambda: (_rows(found, start, start + BLOCK_ROWS) for start in starts))
    return {
        "format": FORMAT,
        "model": said["model"] and said["model"]["sha256"],
        "embeddings": said.get("embeddings"),
        "gallery": key_of(found),
        "correction": said["correction"]["method"],
        "width": found.width,
        "padded_width": padded(found.width),
        "dtype": dtype,
        **level._asdict(),
        "rows": found.count,
        "rows_per_part": rows_per_part,
    }


def refuse_foreign(output):
    """Raise InputError if the folder of an export holds something else."""
    names = os.listdir(output) if os.path.isdir(output) else []
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if not {MANIFEST, UNFINISHED} & set(names):
        foreign += [name for name in names if name.endswith(".parquet")]
    if foreign:
        raise InputError(
            f"--export {output} is not an export, but has other files in it, such as "
            f"{shown(min(foreign))}: name an empty or new folder"
        )


def done_parts(output, plan):
    """The parts that an export in the folder `output` says are written; [] for a new one.

    Raises InputError unless it is of this plan.
    """
    paths = [os.path.join(output, name) for name in (UNFINISHED, MANIFEST)]
    path = next((path for path in paths if os.path.exists(path)), None)
    if path is None:
        return []
    said = read_json(path)
    parts = said.get("parts") if isinstance(said, dict) else None
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.keys() == PART and OURS.fullmatch(str(part["file"]))
        for part in parts
    ):
        raise InputError(f"{path} does not list an export's parts: name another folder")
    for name, value in plan.items():
        if said.get(name) != value:
            raise InputError(
                f"--export {output} holds parts of another gallery, or made with other flags "
                f"({name} is {said.get(name)}, not {value}): name another folder, or delete that one"
            )
    return parts


def _is_whole(output, part):
    """Whether a part is as it was written."""
    path = os.path.join(output, part["file"])
    return (
        os.path.isfile(path)
        and os.path.getsize(path) == part["bytes"]
        and hash_file(path) == part["sha256"]
    )


def _write_json(output, name, content):
    with replacing(os.path.join(output, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _remove(output, name):
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(output, name))


# Parts ------------------------------------------------------------------------------------------


def _pyarrow():
    """The package pyarrow with its `parquet`; raises InputError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing("--export", "pyarrow") from error
    return pyarrow


def schema_of(pa, plan):
    """The Parquet schema of a plan's parts, with their stamp."""
    kind = {"float32": pa.float32(), "float16": pa.float16()}[plan["dtype"]]
    columns = {
        "id": pa.int64(),
        "item": pa.string(),
        "captions": pa.list_(pa.string()),
        "shift": pa.float32(),
        "vector": pa.list_(kind, plan["padded_width"]),
    }
    return pa.schema(columns.items(), metadata={"gallery": stamp_of(plan)})


def _write_part(pa, folder, plan, output, name, first):
    """Write the part `name`, whose first photo is `first`; returns its entry of the manifest."""
    # Opened anew for each part, since pages of mapped files count as this process's memory.
    found = Gallery(folder, with_index=False)
    if key_of(found) != plan["gallery"]:
        raise _changed(folder)
    path, schema = os.path.join(output, name), schema_of(pa, plan)
    stop = min(first + plan["rows_per_part"], plan["rows"])
    # Random floats do not shrink, and a dictionary of them would only take memory.
    compression = {column: "none" for column in ("id", "shift", "vector.list.element")}
    compression |= dict.fromkeys(("item", "captions.list.element"), "zstd")
    options = {"compression": compression, "use_dictionary": False, "write_statistics": ["id"]}
    with replacing(path) as file, pa.parquet.ParquetWriter(file, schema, **options) as writer:
        for start in range(first, stop, BLOCK_ROWS):
            numbers = range(start, min(start + BLOCK_ROWS, stop))
            writer.write_batch(_batch(pa, schema, found, plan, numbers))
    size = os.path.getsize(path)
    print(f"{shown(path)}: {stop - first} rows, {size / 1e6:.1f} MB", file=sys.stderr)
    return {"file": name, "rows": stop - first, "sha256": hash_file(path), "bytes": size}


def _batch(pa, schema, found, plan, numbers):
    """The photos of these numbers, a range, as a batch of the schema."""
    rows = _rows(found, numbers.start, numbers.stop)
    vectors = index.levelled(rows, index.Level(plan["middle"], plan["length"]))
    vectors = nn.functional.pad(vectors, (0, plan["padded_width"] - vectors.shape[1]))
    flat = pa.array(vectors.numpy().astype(plan["dtype"]).ravel())
    columns = {
        "id": np.arange(numbers.start, numbers.stop),
        "item": [_utf8(found.items[number]) for number in numbers],
        "captions": [[_utf8(text) for text in found.captions(number)] for number in numbers],
        "shift": (0 - rows[:, -1]).numpy(),
        "vector": pa.FixedSizeListArray.from_arrays(flat, plan["padded_width"]),
    }
    return pa.record_batch(columns, schema=schema)


def _rows(found, start, stop):
    """Rows (m, D + 1) of a Gallery, read from a mapping that is closed again."""
    try:
        mapped = np.load(os.path.join(found.files, "embeddings.npy"), mmap_mode="r")
    except FileNotFoundError as error:
        raise _changed(found.folder) from error
    return torch.from_numpy(mapped[start:stop].copy())


def _changed(folder):
    return InputError(
        f"the gallery {shown(folder)} was changed while it was exported: export it to another "
        "folder"
    )


def _utf8(text):
    """The text with what UTF-8 cannot encode, such as an odd byte in a file name, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
