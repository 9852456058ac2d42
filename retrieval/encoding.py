"""Embed a split with anybody's model and anybody's loader, batch by batch.

`encode` needs a model with `forward_emb(images, captions, lengths)` and a loader of batches. VSE++
and the codes derived from it hand over different batches: four parts (VSE++, SCAN), five with the
captions' indices (HAL) or with the images' lengths in second place (VSE-infinity), or more. What a
part is, its name or its content says.
"""

import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from runtime.errors import InputError

NAMES = {
    "images": ("images", "image", "imgs", "img"),
    "captions": ("captions", "caption", "caps", "targets", "input_ids"),
    "lengths": ("lengths", "cap_lens", "caplens", "caption_lengths", "cap_lengths"),
    "ids": ("ids", "indices", "index", "idx"),
    "image_lengths": ("image_lengths", "img_lengths", "img_lens"),
}


class Places(NamedTuple):
    """Where a batch keeps each of its parts: places in a tuple, or keys; None if it has none."""

    images: object
    captions: object
    lengths: object
    ids: object
    image_lengths: object


def encode(model, loader, log_step=10, logging=print):
    """(images, captions) of all captions as arrays (C, ...), one row per caption, in their order.

    With a vector for each word, captions are (C, longest, D), zero behind their batch's longest,
    and the captions' lengths (C,) come third. Rows stand where the batches' ids say, which are the
    captions' positions.
    Raises InputError if the model has no `forward_emb`, or a batch lacks a part.
    """
    model, where = _ready(model), None
    images, captions, lengths, ids = [], [], [], []
    with torch.no_grad():
        for number, batch in enumerate(loader):
            batch = batch._asdict() if hasattr(batch, "_asdict") else batch
            where = where or places_in(batch)
            for part, own in zip((images, captions), _embedded(model, batch, where, lengths)):
                part.append(own)
            ids += [] if where.ids is None else _whole_numbers(batch[where.ids]) or []
            if number % log_step == 0:
                logging(f"Test: [{number}{_of_all(loader)}]")
    if not captions:
        raise InputError("the loader gives no batch: check its data set")
    order = _order(loader, ids, sum(map(len, captions)))
    images, captions = _joined(images, order), _joined(captions, order)
    if captions.ndim == 2:
        return images, captions
    placed = np.empty(len(order), np.int64)
    placed[order] = lengths
    return images, captions, placed


def _ready(model):
    """The model in eval mode, taken out of DataParallel or its like."""
    model = model if hasattr(model, "forward_emb") else getattr(model, "module", model)
    if not hasattr(model, "forward_emb"):
        raise InputError(
            f"encode_data needs a model with forward_emb(images, captions, lengths), and "
            f"{type(model).__name__} has none: give it that method"
        )
    getattr(model, "val_start", getattr(model, "eval", lambda: None))()
    return model


def _embedded(model, batch, where, all_lengths):
    """A batch's (images, captions) as arrays; its captions' lengths are added to `all_lengths`."""
    lengths, more = batch[where.lengths], {}
    if where.image_lengths is not None:
        if "image_lengths" in inspect.signature(model.forward_emb).parameters:
            more["image_lengths"] = batch[where.image_lengths]
    images, captions, *rest = model.forward_emb(
        batch[where.images], batch[where.captions], lengths, **more
    )
    own = _whole_numbers(rest[0]) if rest else None  # SCAN gives the lengths back, perhaps others
    all_lengths += own or _whole_numbers(lengths) or []
    return _array(images), _array(captions)


def _array(embeddings):
    """Embeddings as an array; half precision, which NumPy lacks in part, becomes float32."""
    embeddings = torch.as_tensor(embeddings).detach().cpu()
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).numpy()


def _of_all(loader):
    try:
        return f"/{len(loader)}"
    except TypeError:  # a generator, or a loader of an iterable data set
        return ""


def _joined(parts, order):
    """Batches (B, ...) as one array whose row order[n] is the n-th; sets are padded with zeros.

    The list of batches is emptied on the way, so that memory holds the embeddings once.
    """
    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
    joined, end = np.zeros((len(order), *longest), parts[0].dtype), len(order)
    while parts:
        part = parts.pop()
        rows = order[end - len(part) : end]
        joined[(rows, *map(slice, part.shape[1:]))] = part
        end -= len(part)
    return joined


def _order(loader, ids, n):
    """The row (n,) of each caption as it was loaded: its id, if ids are positions 0 to n - 1."""
    if sorted(ids) == list(range(n)):
        return np.array(ids)
    shuffled = getattr(loader, "shuffle", False) or isinstance(
        getattr(loader, "sampler", None), torch.utils.data.RandomSampler
    )
    if shuffled:
        raise InputError(
            f"the {n} captions of a shuffled loader come without their positions 0 to {n - 1}: let "
            "its batches have them as ids, or load without shuffling"
        )
    if ids:
        print(
            f"note: the batches' ids are not the {n} captions' positions, so rows are in the order "
            "of loading",
            file=sys.stderr,
        )
    return np.arange(n)


# What a batch's parts are -----------------------------------------------------------------------


def places_in(batch):
    """The Places of a batch's parts; a line on stderr says what is taken for what, if unusual.

    batch: a tuple, a list or a dict. Raises InputError if images, captions or lengths are missing.
    """
    if isinstance(batch, Mapping):
        places = Places(
            *(next((one for one in names if one in batch), None) for names in NAMES.values())
        )
    else:
        places = _by_content(batch)
    lacking = [name for name in Places._fields[:3] if getattr(places, name) is None]
    if lacking:
        had = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"{len(batch)} parts"
        raise InputError(
            f"a batch of {had} has no {' and no '.join(lacking)}: encode_data takes images, "
            "captions, their lengths and, if there are any, their positions as ids"
        )
    usual = {Places(0, 1, 2, 3, None), Places(0, 2, 3, 4, 1)}
    if places not in usual or len(batch) > 5:
        _tell(batch, places)
    return places


def _tell(batch, places):
    taken = ", ".join(
        f"{name} {place + 1 if isinstance(place, int) else repr(place)}"
        for name, place in places._asdict().items()
        if place is not None
    )
    order = "" if places.ids is not None else "; without ids, rows are in the order of loading"
    print(f"note: of a batch's {len(batch)} parts are taken: {taken}{order}", file=sys.stderr)


def _by_content(parts):
    """The Places of a tuple's parts.

    Images come first, and captions are the first integers (B, T). Lengths count the words of each
    caption, and the first other part of B different numbers are the ids.
    """
    n = len(parts[0])
    words = next((i for i in range(1, len(parts)) if _is_words(parts[i], n)), None)
    captions = words or (1 if len(parts) > 1 else None)
    numbers = {i: _whole_numbers(part) for i, part in enumerate(parts) if i}
    numbers = {i: own for i, own in numbers.items() if own and len(own) == n and i != captions}
    after = [i for i in numbers if i > (captions or 0)]
    counted = torch.as_tensor(parts[words]).count_nonzero(1).tolist() if words else None
    lengths = next((i for i in after if numbers[i] == counted), None)
    if lengths is None:
        longest = parts[words].shape[1] if words else np.inf
        fitting = (i for i in after if all(1 <= one <= longest for one in numbers[i]))
        lengths = next(fitting, None)
    others = (i for i in after if i != lengths and len(set(numbers[i])) == n)
    before = next((i for i in range(1, captions or 1) if i in numbers), None)
    return Places(
        0, captions, lengths, next((i for i in others if min(numbers[i]) >= 0), None), before
    )


def _is_words(part, n):
    """Whether a part is (n, T) word ids."""
    if not isinstance(part, (torch.Tensor, np.ndarray)) or part.ndim != 2 or len(part) != n:
        return False
    part = torch.as_tensor(part)
    return not part.is_floating_point() and part.dtype != torch.bool


def _whole_numbers(part):
    """A part's numbers as a list of int; None unless it is a row of whole numbers."""
    if isinstance(part, (torch.Tensor, np.ndarray)):
        part = part.tolist() if part.ndim == 1 else None
    if not isinstance(part, (list, tuple)):
        return None
    with suppress(TypeError, ValueError, OverflowError):  # of text, tensors, infinity
        numbers = [int(one) for one in part]
        if numbers == list(part):
            return numbers
    return None


# Similarities -----------------------------------------------------------------------------------


def compute_sim(images, captions):
    """Products (N, C), an array, of (N, D) images and (C, D) captions: VSE-infinity's call."""
    images, captions = _array(images), _array(captions)
    return images @ captions.T


@torch.no_grad()
def shard_attn_scores(model, img_embs, cap_embs, cap_lens, opt=None, shard_size=100):
    """Similarities (N, C), an array, by a model's `forward_sim(images, captions, lengths)`.

    SGRAF's call, which computes them in shards of images and captions. opt is ignored.
    """
    images, captions = (torch.as_tensor(one) for one in (img_embs, cap_embs))
    device = next((one.device for one in model.parameters()), images.device)
    lengths = [int(length) for length in cap_lens]
    rows = []
    for some in images.to(device).split(shard_size):
        scores = [
            model.forward_sim(some, part.to(device), lengths[start : start + shard_size])
            for start, part in zip(range(0, len(lengths), shard_size), captions.split(shard_size))
        ]
        rows.append(torch.cat(scores, 1).cpu())
    return _array(torch.cat(rows))
