"""Hubs of a gallery: the correction that its index carries, and which photos are hubs.

Shifts are those of `compute_results.py --correction`: same bank, same parameters.
"""

import sys
from typing import Any, NamedTuple

import torch

from evaluation import bank_stride, embed_texts
from gallery import index
from gallery.other_models import OtherModel
from retrieval import corrections
from retrieval.hubness import k_occurrence
from retrieval.metrics import recall_of
from retrieval.ranking import rank_shifted
from runtime.errors import InputError

HUB_QUERIES, HUB_DEPTH = 10_000, 10  # hubs are counted by N_10 over at most 10,000 questions


class Correction(NamedTuple):
    """A hub correction for questions in words, with its bank."""

    method: str = "none"
    parameters: dict = {}
    bank: Any = None  # (B, D) embeddings of captions, or None if they are not available
    bank_split: str = "train"
    bank_images: int | None = None  # as --correction_bank_images

    def shift(self, loaded, rows):
        """(m,): what is subtracted from the scores of photos with embeddings `rows` (m, D)."""
        if self.method == "none" or not len(rows):
            return rows.new_zeros(len(rows))
        source = loaded.similarities(rows.to(self.bank), self.bank)
        return corrections.corrections_of("t2i", source, [(self.method, self.parameters)])[0].shift


def load_bank(loaded, split, limit, captions=None):
    """(B, D) embeddings of a split's captions, of at most `limit` images (see `bank_stride`).

    captions: the gallery's own embeddings of them, which serve an OtherModel without another bank
    """
    if isinstance(loaded, OtherModel):
        return loaded.bank(captions)
    dataset = loaded.loader(split).dataset
    chosen = dataset.image_of % bank_stride(loaded.opt, dataset.n_images, limit) == 0
    return embed_texts(loaded.model, dataset.word_ids, loaded.opt.batch_size, chosen)


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
        found = found._replace(
            bank=load_bank(loaded, found.bank_split, found.bank_images, captions)
        )
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
            bank=load_bank(loaded, own.bank_split, own.bank_images, found.own_captions)
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
