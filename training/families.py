"""The released codes' defaults, which --model_family takes, and their own flags."""

import argparse
from typing import NamedTuple

from loss import LOSSES, loss_kind
from runtime.errors import InputError, number


class Family(NamedTuple):
    """What a released code trains by default, in this code's flags: a value of --model_family.

    defaults: {flag: value}, for flags that are not given.
    loss: for a run that names none.
    renamed: {flag: {the released code's value: ours}}.
    vocabularies: {the released code's data name: the name of its vocabulary}.
    """

    title: str
    loss: str
    defaults: dict
    renamed: dict = {}
    vocabularies: dict = {}


THIRTY_EPOCHS = {"num_epochs": 30, "lr_update": 15}
FAMILIES = {
    "hal": Family("HAL", "hal", {"num_epochs": 15, "lr_update": 8}),
    "vsepp": Family("VSE++", "sum", THIRTY_EPOCHS),
    "scan": Family("SCAN", "sum", {**THIRTY_EPOCHS, "cross_attn": "t2i"}),
    "vse_infty": Family(
        "VSE-infinity",
        "max",
        {
            **THIRTY_EPOCHS,
            "precomp_enc_type": "mlp",
            "image_pooling": "gpo",
            "text_pooling": "gpo",
            "bi_gru": True,
            "drop_words": 0.2,
            "drop_regions": 0.2,
            "weight_decay": 0.01,
        },
        # Its encoder of regions is the one that it calls basic. Its data sets' features lie in
        # `<data_path>/precomp`, and the vocabulary is SCAN's for that data set.
        renamed={
            "precomp_enc_type": {"basic": "mlp"},
            "data_name": {"coco": "precomp", "f30k": "precomp"},
        },
        vocabularies={"coco": "coco_precomp", "f30k": "f30k_precomp"},
    ),
}

# VSE-infinity's flags that have no meaning here, and what there is instead.
WITH_PHOTOS = (
    "is for VSE-infinity's training on photos: make features of the photos with "
    "extract_features.py, and train on them with --model_family vse_infty"
)
ELSEWHERE = {
    "backbone_path": WITH_PHOTOS,
    "backbone_source": WITH_PHOTOS,
    "backbone_warmup_epochs": WITH_PHOTOS,
    "backbone_lr_factor": WITH_PHOTOS,
    "embedding_warmup_epochs": WITH_PHOTOS,
    "input_scale_factor": WITH_PHOTOS,
    "reset_start_epoch": "starts a new run from a checkpoint's weights: here that is --init_from "
    "CHECKPOINT, without --resume",
    "drop": "does nothing in VSE-infinity: leave it out; --drop_words and --drop_regions say how "
    "much is dropped",
}


class Elsewhere(argparse.Action):
    """A released flag that has no meaning here: says what to do instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} {ELSEWHERE[self.dest]}")


def add_family_flags(group):
    """The released code whose defaults are taken, and VSE-infinity's own flags."""
    group.add_argument(
        "--model_family",
        choices=[*FAMILIES],
        help="take this released code's defaults: vsepp sum-margin, 30 epochs; scan the same with "
        "cross attention; vse_infty its encoders, augmentation, AdamW and max-margin; flags that "
        "are given win (default: HAL's)",
    )
    group.add_argument(
        "--vse_mean_warmup_epochs",
        type=number(int, 0),
        metavar="N",
        help="with --model_family vse_infty: its name of --warmup_epochs",
    )
    group.add_argument(
        "--optim",
        choices=["adam"],
        help="with --model_family vse_infty: accepted as there; the optimizer is AdamW",
    )
    for name in ELSEWHERE:
        group.add_argument(
            f"--{name}", nargs="?", action=Elsewhere, default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )  # fmt: skip


def take_family(opt):
    """Complete the options with the family's loss, names and epochs.

    Raises InputError for VSE-infinity's own flags with another family's defaults.
    """
    family = FAMILIES.get(opt.model_family)
    for name in ("vse_mean_warmup_epochs", "optim"):
        if getattr(opt, name) is not None and opt.model_family != "vse_infty":
            raise InputError(
                f"--{name} is VSE-infinity's, and its other defaults differ from those here: add "
                "--model_family vse_infty to its command, or leave it out"
            )
    warmup, _ = vars(opt).pop("vse_mean_warmup_epochs"), vars(opt).pop("optim")
    if warmup is not None and opt.warmup_epochs not in (0, warmup):
        raise InputError(
            "--vse_mean_warmup_epochs and --warmup_epochs are the same: leave one of them out"
        )
    opt.warmup_epochs = opt.warmup_epochs if warmup is None else warmup
    for name, value in FAMILIES["scan" if opt.cross_attn else "hal"].defaults.items():
        if getattr(opt, name) is None:
            setattr(opt, name, value)
    opt.vocab_name = None
    if not family:
        return
    if not (opt.loss or opt.max_violation or opt.sum_violation):
        opt.loss = family.loss
    opt.vocab_name = family.vocabularies.get(opt.data_name)
    for name, ours in family.renamed.items():
        setattr(opt, name, ours.get(getattr(opt, name), getattr(opt, name)))


def model_in_words(opt):
    """The model and its loss, for people: "VSE, GRU, HAL (alpha 30, epsilon 0.3)".

    opt: train.py's, or those of any checkpoint that `checkpoint.load` has completed.
    """
    encoders = FAMILIES["vse_infty"].defaults
    same = ("precomp_enc_type", "image_pooling", "text_pooling", "bi_gru")
    if opt.cross_attn:
        model = f"SCAN {opt.cross_attn}"
    elif all(getattr(opt, name) == encoders[name] for name in same):
        model = "VSE-infinity"
    else:
        model = "VSE"
    readers = {"gru": "bidirectional GRU" if opt.bi_gru else "GRU", "features": "text vectors"}
    reader = readers.get(opt.text_encoder, opt.text_encoder)
    return ", ".join(filter(None, (model, reader, loss_in_words(opt))))


def loss_in_words(opt):
    """The loss with its numbers, bank and warm-up; empty if the options lack its numbers.

    A loss of the user's own is named, but not imported: a stranger's checkpoint may name any.
    """
    kind, epochs = loss_kind(opt), getattr(opt, "warmup_epochs", 0)
    try:
        loss = LOSSES[kind].title.format(**vars(opt)) if kind in LOSSES else str(kind)
    except (KeyError, TypeError, ValueError):
        return ""
    warmup = f" after {epochs} epoch{'s' * (epochs != 1)} of sum-margin" if epochs else ""
    return f"{loss}{' with the bank' if opt.memory_bank else ''}{warmup}"
