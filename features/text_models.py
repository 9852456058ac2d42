"""Named text models that turn captions into vectors: open_clip's and sentence-transformers'.

Both packages are imported only when a model is asked for.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from features.clip_models import OPEN_CLIP, clip_tokenizer, load_clip, told_once
from features.encoders import _hash_state
from features.text_description import (
    FORMAT,
    SENTENCES,
    hash_captions,
    read_texts_json,
    refuse_other,
)
from inputs.captions import read_captions
from runtime.errors import InputError
from runtime.files import check_regular, replacing

BLOCKS = ".texts"  # folder below the output, for finished blocks until all are finished
BLOCK_CAPTIONS = 4096
SPLITS = ("train", "dev", "test", "testall")


class TextModel(NamedTuple):
    """A frozen text model."""

    # (a list of n texts, how many at a time) -> (n, width) float32 on the CPU
    encode: Callable
    description: dict  # what texts.json says of it, but for the captions


def text_model(name, weights=None, device="cpu"):
    """The TextModel `open_clip/<name>` or `sentence_transformers/<name or folder>`.

    weights: open_clip's pretrained tag, a file, or none (random, the same every time).
    Raises InputError if the package is not installed, or the model or its weights cannot be had.
    """
    if os.path.isdir(name.removeprefix(SENTENCES)):  # so that it is found from any folder
        name = SENTENCES + os.path.realpath(name.removeprefix(SENTENCES))
    if weights is not None and os.path.isfile(weights):
        weights = os.path.realpath(weights)
    if name.startswith(OPEN_CLIP):
        net, encode = _open_clip(name, weights, device)
    elif name.startswith(SENTENCES):
        net, encode = _sentence_transformers(name, device)
    else:
        raise InputError(
            f"--text_encoder {name} is not known: give open_clip/<name> or "
            "sentence_transformers/<name or folder>"
        )
    digest = _hash_state(net)  # while it is on the CPU
    net.to(device)
    sample = encode(["a photo"])
    description = {
        "format": FORMAT,
        "encoder": name,
        "weights": weights,
        "weights_sha256": digest,
        "width": sample.shape[1],
        "normalised": bool((sample.norm(dim=1) - 1).abs().max() < 1e-3),
    }
    return TextModel(encode, description)


def text_model_from(description, device="cpu", named=None):
    """The TextModel that a texts.json describes; raises InputError if its weights are others.

    named: (name, weights) as they are called here, if its folder or file was moved.
    """
    found = text_model(*(named or (description["encoder"], description.get("weights"))), device)
    where = "the text model that is here is", "the vectors in training were made by"
    refuse_other(found.description, description, *where, "bring back the weights of then")
    return found


def _sentence_transformers(name, device):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"--text_encoder {name} needs sentence-transformers, which is not installed: pip "
            "install sentence-transformers"
        ) from error
    with suppress(ImportError):  # else it draws a bar, even for the file of a folder
        from transformers.utils import logging

        logging.disable_progress_bar()
    with told_once(name):
        net = SentenceTransformer(name.removeprefix(SENTENCES), device="cpu").eval()

    def encode(texts, batch_size=32):
        how = {"convert_to_tensor": True, "show_progress_bar": False}
        found = net.encode(texts, batch_size=batch_size, device=str(device), **how)
        return found.float().cpu()

    return net, encode


def _open_clip(name, weights, device):
    net = load_clip(name, weights, ("--text_encoder", "--text_weights"))
    tokenizer = clip_tokenizer(name)

    @torch.no_grad()
    def encode(texts, batch_size=32):
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        rows = [net.encode_text(tokenizer(batch).to(device)).float().cpu() for batch in batches]
        return torch.cat(rows)

    return net, encode


# A data set's captions --------------------------------------------------------------------------


def write_texts(folder, output, model, batch_size=32, dtype="float16", say=print):
    """Write `{split}_txts.npy` for every `{split}_caps.txt` of a folder, and texts.json.

    A split whose vectors are there already, of the same model and captions, is left as it is; those
    of a split that the folder no longer has are removed. Finished blocks are kept below the output
    until all are done, so a killed run goes on.
    Raises InputError if there are no captions, or the output has vectors of another model.
    """
    found = read_texts_json(output)
    if found:
        where = f"--output {output} has text vectors by", "this run makes them by"
        refuse_other(found, model.description, *where, "name another --output")
    names = {split: os.path.join(folder, f"{split}_caps.txt") for split in SPLITS}
    splits = {split: read_captions(name) for split, name in names.items() if os.path.exists(name)}
    if not splits:
        raise InputError(
            f"{folder} has no captions ({', '.join(f'{split}_caps.txt' for split in SPLITS)}): "
            "name the folder of a data set"
        )
    hashes = {split: hash_captions(captions) for split, captions in splits.items()}
    wanted = {**model.description, "dtype": dtype, "captions_sha256": hashes}
    for split, captions in splits.items():
        path = os.path.join(output, f"{split}_txts.npy")
        if _is_done(path, split, (len(captions), model.description["width"]), found, wanted):
            say(f"{path}: {len(captions)} captions, already there")
            continue
        with np.errstate(over="ignore"):  # it is refused in the next line
            rows = _rows(captions, output, model, batch_size, split).astype(dtype)
        _check_rows(rows, captions, split)
        with replacing(path) as file:
            np.save(file, rows)
        say(f"{path}: {len(captions)} captions")
    # Written before a split is removed: a run that is killed between leaves a stray file at most.
    with replacing(os.path.join(output, "texts.json"), "w", encoding="utf-8") as file:
        json.dump(wanted, file, indent=1)
    for split in set(found["captions_sha256"] if found else ()) & set(SPLITS) - set(splits):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(output, f"{split}_txts.npy"))
            say(f"{output}/{split}_txts.npy: removed, since {folder} has no {split}_caps.txt")
    _remove_blocks(output)


def _is_done(path, split, shape, found, wanted):
    """Whether the vectors of a split, (captions, width), are at `path` as this run would make them.

    found, wanted: texts.json as it is, or None, and as it is to be
    """
    same = found and found.get("dtype") == wanted["dtype"]
    if not same or found["captions_sha256"].get(split) != wanted["captions_sha256"][split]:
        return False
    rows = _read_array(path, "r")
    return rows is not None and rows.shape == shape and rows.dtype == wanted["dtype"]


def _check_rows(rows, captions, split):
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        line = int(broken.argmax())
        raise InputError(
            f"the text model gives NaN or infinity, as {rows.dtype}, for line {line + 1} of "
            f"{split}_caps.txt ({captions[line][:60]!r}): check its weights"
        )


def _rows(captions, output, model, batch_size, split):
    """The vectors (n, width) of captions, block by block; those of finished blocks are read."""
    made_by = json.dumps(model.description, sort_keys=True)
    parts = []
    starts = range(0, len(captions), BLOCK_CAPTIONS)
    for start in tqdm(starts, f"Encoding {split}", unit="block", leave=False, disable=None):
        part = captions[start : start + BLOCK_CAPTIONS]
        digest = hashlib.sha256(f"{made_by}\n{hash_captions(part)}".encode()).hexdigest()[:32]
        path = os.path.join(output, BLOCKS, f"{digest}.npy")
        rows = _read_array(path)
        if rows is None or rows.shape != (len(part), model.description["width"]):
            rows = model.encode(part, batch_size).numpy()
            with replacing(path) as file:
                np.save(file, rows)
        parts.append(rows)
    return np.concatenate(parts)


def _read_array(path, mmap_mode=None):
    """A finished file's rows; None if it is not there or not whole."""
    check_regular(path)
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _remove_blocks(output):
    folder = os.path.join(output, BLOCKS)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.endswith(".npy"):
            os.unlink(os.path.join(folder, name))
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
