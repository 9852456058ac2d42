"""Hubs of a gallery: the correction that its index carries, and which photos are hubs.

Shifts are those of `compute_results.py --correction`: same bank, same parameters.
"""

import itertools
import sys
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation import bank_stride, embed_texts
from features.text_description import hash_captions
from gallery import index
from gallery.other_models import OtherModel
from gallery.store import shown
from retrieval import corrections
from retrieval.hubness import k_occurrence
from retrieval.metrics import recall_of
from retrieval.ranking import rank_shifted
from runtime.errors import InputError

HUB_QUERIES, HUB_DEPTH = 10_000, 10  # hubs are counted by N_10 over at most 10,000 questions
# A photo raises the hub alarm if its N_10 lies so many median deviations above the median, and if
# it is among the ten nearest of so large a share of the questions.
ALARM_Z, ALARM_SHARE = 15, 0.01
POISSON_MAD = 0.6745  # median absolute deviation of counts by chance, in their standard deviations


class Correction(NamedTuple):
    """A hub correction for questions in words, with its bank."""

    method: str = "none"
    parameters: dict = {}
    bank: Any = None  # (B, D) embeddings of captions, or None if they are not available
    bank_split: str = "train"
    bank_images: int | None = None  # as --correction_bank_images
    bank_sha256: str | None = None  # of the bank's captions, if they are a checkpoint's data

    def shift(self, loaded, rows):
        """(m,): what is subtracted from the scores of photos with embeddings `rows` (m, D)."""
        if self.method == "none" or not len(rows):
            return rows.new_zeros(len(rows))
        source = loaded.similarities(rows.to(self.bank), self.bank)
        return corrections.corrections_of("t2i", source, [(self.method, self.parameters)])[0].shift


def load_bank(loaded, split, limit, captions=None):
    """A Correction's bank: a split's captions, of at most `limit` images (see `bank_stride`).

    Returns {"bank": their embeddings (B, D), "bank_sha256": of the captions, or None}.

    captions: the gallery's own embeddings of them, which serve an OtherModel without another bank
    """
    if isinstance(loaded, OtherModel):
        return {"bank": loaded.bank(captions), "bank_sha256": None}
    dataset = loaded.loader(split).dataset
    chosen = dataset.image_of % bank_stride(loaded.opt, dataset.n_images, limit) == 0
    texts = list(itertools.compress(dataset.captions, chosen.tolist()))
    return {
        "bank": embed_texts(loaded.model, dataset.word_ids, loaded.opt.batch_size, chosen),
        "bank_sha256": hash_captions(texts),
    }


def choose_correction(options, loaded, captions=None):
    """The Correction that the options name, or else the best on dev, if its data is available.

    captions: see `load_bank`
    """
    if options.correction == "none":
        return Correction()
    given = corrections.given_by(options)
    found = Correction(
        "none", {}, None, options.correction_bank or "train", options.correction_bank_images
    )
    try:
        found = found._replace(**load_bank(loaded, found.bank_split, found.bank_images, captions))
        if options.correction is None or options.tune_correction:
            names = corrections.SHIFTS if options.correction is None else [options.correction]
            return found._replace(
                **best_on_dev(loaded, names, given, found.bank, options.correction is None)
            )
    except InputError as error:
        if options.correction is not None:
            raise
        print(
            "Hubs are not corrected, because the data to choose a correction by is not available: "
            f"{error}",
            file=sys.stderr,
        )
        return found
    return found._replace(
        method=options.correction, parameters=corrections.parameters_of(options.correction, **given)
    )


def best_on_dev(loaded, names, given, bank, may_be_none):
    """{"method", "parameters"} with the best sum of text-to-image recalls on dev; prints it."""
    loader = loaded.loader("dev")
    source = loaded.similarities(*loaded.embed(loader))
    wanted = corrections.candidates(names, given)
    shifts = corrections.corrections_of("t2i", loaded.similarities(source.images, bank), wanted)
    nothing = shifts[0].shift.new_zeros(source.n_captions)
    rankings = rank_shifted(
        source, [None, *((nothing, one.shift) for one in shifts)], 0, loader.dataset.image_of
    )
    sums = [sum(recall_of(t2i.ranks)[:3]) for _, t2i in rankings]
    best = max(range(0 if may_be_none else 1, len(sums)), key=sums.__getitem__)
    method, parameters = [("none", {}), *wanted][best]
    words = " ".join([method, *(f"{name}={value}" for name, value in parameters.items())])
    print(
        f"Correction of hubs, the best on dev: {words} (text to image R@1 + R@5 + R@10: "
        f"{sums[0]:.1f} without, {sums[best]:.1f} with it)",
        file=sys.stderr,
    )
    return {"method": method, "parameters": parameters}


def correction_of(found, loaded):
    """A Gallery's Correction, with its bank; without one, the bank is None if not available."""
    said = found.description["correction"]
    own = Correction(
        said["method"], said["parameters"], None, said["bank_split"], said["bank_images"]
    )
    try:
        return own._replace(
            **load_bank(loaded, own.bank_split, own.bank_images, found.own_captions)
        )
    except InputError as error:
        if own.method == "none":
            return own
        raise InputError(
            f"the bank of the gallery's correction is not available ({error}): name its folder "
            "with --data_path, or build without a correction with --rebuild_index --correction "
            "none"
        ) from error


def count_hubs(search, captions, bank, n):
    """N_10 of n photos (n,), and in words which questions it is counted over; or (None, None).

    search: of an index
    captions, bank: (q, D) embeddings or None; the gallery's own captions are preferred
    """
    if captions is None and bank is None:
        return None, None
    queries, words = (
        (bank, "captions of the correction's bank")
        if captions is None
        else (captions, "its own captions")
    )
    queries = index.spread(queries, HUB_QUERIES).float().cpu()
    numbers = search(torch.cat([queries, queries.new_zeros(len(queries), 1)], 1), HUB_DEPTH)[1]
    return k_occurrence(numbers[numbers >= 0], n).numpy(), f"{len(queries)} of {words}"


# Alarm ------------------------------------------------------------------------------------------


def alarm_scores(counts, usual):
    """How far N_10 counts (m,) lie above the usual: z = (count - median) / MAD, (m,) float64.

    The deviation is at least that of counts by chance, so that a gallery whose photos are all
    alike, or so large that most are never found, does not take every count for unusual.

    usual: (n,) N_10 of a gallery's photos, over the same questions
    """
    median = np.median(usual)
    chance = POISSON_MAD * np.sqrt(max(usual.mean(), 1))
    return (counts - median) / max(np.median(np.abs(usual - median)), chance)


def is_alarming(counts, usual, n_queries):
    """Which photos raise the alarm, (m,) bool; see `alarm_scores`, `ALARM_Z` and `ALARM_SHARE`."""
    return (alarm_scores(counts, usual) > ALARM_Z) & (counts > ALARM_SHARE * n_queries)


def watched(rows, names, found, bank, alarm):
    """Yield the blocks (m, D) of new photos' embeddings, and raise the hub alarm after the last.

    Each new photo is compared with the gallery as it is, so that many planted photos do not hide
    one another, and without the gallery's correction, which would hide a hub.
    Raises InputError, with `alarm` "refuse", if a photo raises the alarm.

    names: of the new photos; found: the Gallery; bank: (q, D) questions of its correction or None
    alarm: "warn" or "refuse"
    """
    queries = bank if bank is not None else found.own_captions
    if queries is None:
        print(
            "note: new photos were not checked for hubs, because there are no captions to ask with",
            file=sys.stderr,
        )
        yield from rows
        return
    queries = index.spread(queries, HUB_QUERIES).float().cpu()
    scores, numbers = found.search(queries, HUB_DEPTH)
    usual = k_occurrence(numbers[numbers >= 0], found.count).numpy()
    counts = [np.zeros(0, np.int64)]
    for block in rows:
        ahead = queries @ block.float().cpu().t() > scores[:, -1:]
        counts.append(ahead.sum(0).numpy())
        yield block
    counts = np.concatenate(counts)
    alarming = is_alarming(counts, usual, len(queries))
    if not alarming.any():
        return
    order = (-counts * alarming).argsort(kind="stable")[: alarming.sum()]
    shares = (f"{shown(names[place])} ({counts[place] / len(queries):.0%})" for place in order[:5])
    what = (
        f"{len(order)} of {len(names)} new photos would be among the ten nearest of far more "
        f"questions than usual (the median photo: {np.median(usual) / len(queries):.1%}), as a photo "
        f"made to come first would: {', '.join(shares)}{', ...' if len(order) > 5 else ''}"
    )
    if alarm == "refuse":
        raise InputError(f"{what}: take them out of the folder, or add --hub_alarm warn")
    print(f"note: {what}", file=sys.stderr)
