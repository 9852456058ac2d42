"""compute_results.py's flags for files of embeddings or of similarities, and the models they name."""

import os
from typing import NamedTuple

from embeddings.as_model import Embeddings, Files, Similarities
from runtime.device import choose_device, choose_products
from runtime.errors import InputError, path_type, refuse_useless

OF_CHECKPOINTS = (
    "vocab_path",
    "caption_reading",
    "data_path",
    "data_name",
    "rerank",
    "batch_size",
    "skip_broken_images",
    "save_embeddings",
    "correction_bank",
    "export",
)


class Flag(NamedTuple):
    """A flag that takes names of files."""

    name: str
    text: str  # its help
    how: dict  # what else argparse is told


PAIR = {"nargs": "+", "metavar": "FILE"}  # one, which has both sides, or two
IDS = {"nargs": "+", "metavar": "IDS"}
PATHS = (
    Flag(
        "embeddings",
        "image and caption embeddings that any model made, in two files or in one: .npy, .npz, "
        ".pt, .safetensors, .parquet (FILE:NAME names an array in a file of several) or a folder "
        "of clip-retrieval's; see docs/embeddings.md",
        PAIR,
    ),
    Flag("sims", "similarities that any model gave, (images, captions)", {"metavar": "FILE"}),
    Flag(
        "ids",
        "the image's id for each caption, one a line (default: five captions an image in turn, or "
        "equal rows are one image); a second file may name the rows of images",
        IDS,
    ),
    Flag("captions", "the captions' texts, one a line, for --report", {"metavar": "FILE"}),
    Flag(
        "against",
        "embeddings (with --sims: similarities) of another model, which is compared with the "
        "first, without corrections; may be repeated",
        {**PAIR, "action": "append"},
    ),
    Flag("bank", "with --correction: embeddings of the bank, such as the training split", PAIR),
    Flag("bank_ids", "as --ids, for --bank", IDS),
    Flag("dev", "with --tune_correction: embeddings of the dev split", PAIR),
    Flag("dev_ids", "as --ids, for --dev", IDS),
    Flag(
        "bank_sims",
        "with --sims and --correction: similarities of bank images with the captions, and of the "
        "images with bank captions",
        {"nargs": 2, "metavar": ("I2T", "T2I")},
    ),
)


def add_flags(group):
    """Add the flags to an argparse group."""
    for name, text, how in PATHS:
        group.add_argument(f"--{name}", type=path_type, help=text, **how)
    group.add_argument(
        "--measure",
        choices=["cosine", "dot", "order"],
        help="how embeddings are compared (default: cosine, which makes rows length 1; dot and "
        "order take them as they are)",
    )


def given(options):
    """The flag that names the files: "embeddings", "sims", or None for a checkpoint."""
    return next((name for name in ("embeddings", "sims") if getattr(options, name)), None)


def check(options, defaults):
    """Raise InputError for flags that do not go together; without a checkpoint, forget its name.

    defaults: {name: default} of model_path and split
    """
    kind = given(options)
    if kind is None:
        own = [name for name, *_ in PATHS] + ["measure"]
        refuse_useless(options, [(True, own, "without --embeddings or --sims")])
        return
    if options.embeddings and options.sims:
        raise InputError("--embeddings and --sims are two things to evaluate: give one of them")
    case = f"with --{kind}"
    changed = [name for name, default in defaults.items() if getattr(options, name) != default]
    no_correction, no_bank = not options.correction, not options.bank
    rules = (
        (True, [*changed, *OF_CHECKPOINTS], case),
        (kind == "sims", ["bank", "dev", "bank_ids", "dev_ids", "measure"], case),
        (kind == "embeddings", ["bank_sims"], case),
        (no_correction, ["bank", "bank_sims"], "without --correction"),
        (options.transductive, ["bank", "bank_sims"], "with --transductive"),
        (not options.tune_correction, ["dev"], "without --tune_correction"),
        (no_bank, ["bank_ids"], "without --bank"),
        (not options.dev, ["dev_ids"], "without --dev"),
        (options.report is None, ["captions"], "without --report"),
    )
    refuse_useless(options, rules)
    _check_counts(options, kind)
    _check_corrections(options, kind)
    options.model_path = None


def _check_counts(options, kind):
    """Raise InputError unless each flag has as many files as it takes."""
    most = 1 if kind == "sims" else 2
    pairs = [("embeddings", options.embeddings), ("bank", options.bank), ("dev", options.dev)]
    pairs += [(name, getattr(options, name)) for name in ("ids", "bank_ids", "dev_ids")]
    for name, files in pairs:
        if files and len(files) > 2:
            raise InputError(f"--{name} has {len(files)} files: give one or two")
    for files in options.against or ():
        if len(files) > most:
            raise InputError(
                f"--against has {len(files)} files, and a model of --{kind} has "
                f"{'one' if most == 1 else 'one or two'}: repeat the flag for each further model"
            )


def _check_corrections(options, kind):
    """Raise InputError for a correction without what it needs."""
    bank = {"embeddings": "--bank IMAGES CAPTIONS", "sims": "--bank_sims I2T T2I"}[kind]
    if options.correction and not (options.bank or options.bank_sims or options.transductive):
        raise InputError(
            f"--correction needs a bank of other queries: give {bank}, or say --transductive if "
            "the queries themselves are meant to be the bank"
        )
    for name, other in (("bank", "embeddings"), ("dev", "embeddings"), ("dev", "bank")):
        if getattr(options, name) and getattr(options, name) == getattr(options, other):
            raise InputError(
                f"--{name} names the files of --{other}, so it would be judged by what it has seen: "
                "name those of another split"
                + (", or say --transductive" if name == "bank" else "")
            )
    if options.tune_correction and kind == "sims":
        raise InputError(
            "--tune_correction needs similarities of a dev split with the bank, which --sims does "
            "not take: set the parameters by flags, or give --embeddings"
        )
    if options.tune_correction and not options.dev:
        raise InputError("--tune_correction chooses on a dev split: give --dev IMAGES CAPTIONS")


def as_dict(options):
    """What was evaluated, for JSON."""
    names = ("embeddings", "sims", "ids", "measure", "bank", "bank_sims", "dev")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def opened(options):
    """The models that the flags name, {label: model}, the first of them to be evaluated."""
    device = choose_device(options.device)
    choose_products(device)
    named = [options.embeddings or [options.sims], *(options.against or [])]
    labels = labels_of(named)
    return {
        label: _model(options, paths, device, is_first=place == 0)
        for place, (label, paths) in enumerate(zip(labels, named))
    }


def _model(options, paths, device, is_first):
    """The model of these files; only the first one has a bank and a dev split."""
    flag = f"--{given(options)}" if is_first else "--against"
    if options.sims:
        bank = options.bank_sims if is_first else None
        return Similarities(paths[0], device, options.ids, options.captions, bank, flag)
    splits = {"test": Files(paths, options.ids, options.captions, flag)}
    if is_first and options.bank:
        splits["train"] = Files(options.bank, options.bank_ids)
    if is_first and options.dev:
        splits["dev"] = Files(options.dev, options.dev_ids)
    return Embeddings(splits, device, options.measure or "cosine")


def labels_of(named):
    """A label for each model's files: as short as still differs. InputError for a model named twice.

    named: lists of paths
    """
    whole = [" ".join(files) for files in named]
    for place, label in enumerate(whole):
        if label in whole[:place]:
            raise InputError(f"--against {label} is named twice: name each model once")
    if len(named) == 1:
        return whole
    folder = os.path.commonprefix([path for files in named for path in files])
    cut = folder.rfind("/") + 1
    shared = set.intersection(*map(set, named))
    return [
        " ".join(path[cut:] for path in files if path not in shared) or label
        for files, label in zip(named, whole)
    ]
