"""Encode photos block by block, each block in a file of its own: a killed run loses one at most.

`args` in these functions are a script's options: images (the photos' folder), output, batch_size,
workers, amp, dtype and encoder (its name).
"""

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from features.encoders import check_photo, encode
from inputs.decoding import decode_image
from runtime import distributed
from runtime.errors import InputError
from runtime.files import check_regular, lock, replacing

BLOCKS = ".blocks"  # folder below the output, for finished blocks until all are finished
BLOCK_PHOTOS = 256
AHEAD = 4  # batches that a worker decodes ahead


class Block(NamedTuple):
    """Photos that are encoded and stored together; the file's name depends on all that made it."""

    path: str
    first: int
    end: int


def plan_blocks(args, photos, description):
    """The Blocks of all photos, in order."""
    made_by = json.dumps(description, sort_keys=True)
    blocks = []
    for first in range(0, len(photos), BLOCK_PHOTOS):
        part = photos[first : first + BLOCK_PHOTOS]
        facts = [
            made_by,
            first,
            [(photo.name, *file_facts(os.path.join(args.images, photo.name))) for photo in part],
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        blocks.append(
            Block(os.path.join(args.output, BLOCKS, f"{digest}.npz"), first, first + len(part))
        )
    return blocks


def file_facts(path):
    """A file's size and time of change, which show whether a photo has changed."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):  # it does not exist; no file can have this name
        return ()


class Photos(torch.utils.data.Dataset):
    """Photos, decoded and transformed: (i, tensor, whether it is small) or (i, None, the fault)."""

    def __init__(self, folder, names, encoder):
        self.folder, self.names, self.transform = folder, names, encoder.transform
        self.resize = encoder.description["resize"]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        if "\n" in name or "\r" in name:
            return index, None, "its name has a line break"
        try:
            picture = decode_image(os.path.join(self.folder, name))
            check_photo(picture)
            return index, self.transform(picture), min(picture.size) < self.resize
        except InputError as error:
            reason = error.__cause__ or error
            return (
                index,
                None,
                getattr(reason, "strerror", None) or str(reason) or type(reason).__name__,
            )


def collate(items):
    """Combine items of `Photos` into a batch.

    Returns (numbers of the readable photos, their tensors (B, ...), how many are small,
    {number of an unreadable photo: what is wrong}).
    """
    whole = [item for item in items if item[1] is not None]
    return (
        [index for index, _, _ in whole],
        torch.stack([tensor for _, tensor, _ in whole]) if whole else None,
        sum(small for _, _, small in whole),
        {index: reason for index, tensor, reason in items if tensor is None},
    )


class Part(NamedTuple):
    """An encoded batch of photos."""

    numbers: list  # of the photos that could be read
    rows: np.ndarray  # (len(numbers), *row_shape) float32
    small: int
    broken: dict  # {number: what is wrong}

    @property
    def photos(self):
        """The number of photos in the batch, broken ones included."""
        return len(self.numbers) + len(self.broken)


def encode_blocks(args, photos, blocks, encoder):
    """Encode this process's blocks that do not exist yet, each into its file."""
    mine = [
        block
        for block in blocks[distributed.rank() :: distributed.size()]
        if read_notes(block) is None
    ]
    total = sum(block.end - block.first for block in (blocks if distributed.size() == 1 else mine))
    todo = sum(block.end - block.first for block in mine)
    loader = load_photos(args, [photo.name for photo in photos], mine, encoder)
    started, ends = time.monotonic(), []  # ends: (time, photos so far) after each batch
    with tqdm(total=total, initial=total - todo, unit="photo", disable=None) as bar:
        for block in mine:
            parts = []
            while sum(part.photos for part in parts) < block.end - block.first:
                parts.append(next_part(loader, encoder, args.amp))
                bar.update(parts[-1].photos)
                ends.append((time.monotonic(), (ends[-1][1] if ends else 0) + parts[-1].photos))
            write_block(block, parts, args, photos)
    if len(ends) > 1:
        (first_end, first), (end, encoded) = ends[0], ends[-1]
        print(
            f"{encoded} photos encoded: the first batch took {first_end - started:.1f} s, then "
            f"{(encoded - first) / (end - first_end):.1f} photos a second",
            file=sys.stderr,
        )


def load_photos(args, names, blocks, encoder):
    """Iterate over batches of the blocks' photos, as `collate` makes them; workers decode ahead."""
    step = min(args.batch_size, encoder.batch_limit or args.batch_size)
    batches = [
        range(start, min(start + step, block.end))
        for block in blocks
        for start in range(block.first, block.end, step)
    ]
    workers = min(args.workers, len(batches))
    return iter(
        torch.utils.data.DataLoader(
            Photos(args.images, names, encoder),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=leave_interrupts,
            pin_memory=encoder.device.type == "cuda",
        )
    )


def leave_interrupts(worker):
    """Ignore Ctrl-C in a worker: the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def next_part(loader, encoder, amp):
    """Encode the next batch."""
    try:
        numbers, pictures, small, broken = next(loader)
        rows = (
            encode(encoder, pictures, amp).numpy()
            if numbers
            else np.empty((0, *encoder.row_shape), np.float32)
        )
        return Part(numbers, rows, small, broken)
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the device's memory does not hold this many photos at once: take a smaller "
            "--batch_size; called again, it goes on where it stopped"
        ) from error
    except RuntimeError as error:  # a dead worker may surface at any call
        if "DataLoader worker (pid" not in str(error):
            raise
        raise InputError(
            f"a process that decodes photos has ended ({str(error).splitlines()[0]}): if memory "
            "is short, take fewer --workers or a smaller --batch_size; called again, it goes on "
            "where it stopped"
        ) from error


def write_block(block, parts, args, photos):
    """Store a block's features; InputError if they are not finite in the chosen dtype."""
    numbers = [number for part in parts for number in part.numbers]
    with np.errstate(over="ignore"):
        rows = np.concatenate([part.rows for part in parts]).astype(args.dtype)
    finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if not finite.all():
        raise InputError(
            f"photo {photos[numbers[finite.argmin()]].name}: {args.encoder} gives features that "
            f"are not finite in {args.dtype}: choose --dtype float32 and --amp off, or other "
            "weights"
        )
    broken = {number: reason for part in parts for number, reason in part.broken.items()}
    notes = json.dumps({"broken": broken, "small": sum(part.small for part in parts)}).encode()
    with replacing(block.path) as file:
        np.savez(
            file,
            rows=rows,
            numbers=np.array(numbers, np.int64),
            notes=np.frombuffer(notes, np.uint8),
        )


class Notes(NamedTuple):
    """What a block's file holds beside the features."""

    numbers: list  # of the photos, one for each row of features
    broken: dict  # {number: what is wrong with the photo}
    small: int  # photos smaller than what the encoder resizes to


def read_notes(block):
    """A block's Notes; None if its file is missing or torn."""
    check_regular(block.path)
    try:
        with np.load(block.path, allow_pickle=False) as content:
            notes = json.loads(content["notes"].tobytes())
            return Notes(
                content["numbers"].tolist(),
                {int(n): why for n, why in notes["broken"].items()},
                notes["small"],
            )
    except Exception:  # a torn file may raise anything; the block is made again
        return None


def read_rows(block):
    """A block's features; InputError if the file is torn."""
    try:
        with np.load(block.path, allow_pickle=False) as content:
            return content["rows"]
    except Exception as error:
        raise InputError(
            f"{block.path} is torn ({error}): delete it, and call again to go on"
        ) from error


@contextmanager
def the_only_one(output, blocks=BLOCKS):
    """Lock the output folder during the block; a killed run's lock ends with the process.

    blocks: the folder below it that holds the finished blocks, and the lock
    """
    path, was_there = os.path.join(output, blocks), os.path.exists(output)
    held = lock(path, "--output") if distributed.is_first() else None
    try:
        distributed.sync()
        yield
    finally:
        if held is not None:
            with suppress(FileNotFoundError):
                os.unlink(held.name)
            held.close()
            for made in [path] if was_there else [path, output]:
                # Only an empty folder is removed: the run has written nothing.
                with suppress(OSError):
                    os.rmdir(made)
