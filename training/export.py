"""Write an evaluated model for another code's reader, or as a folder to be published.

`compute_results.py --export FOLDER --export_for CODE`; docs/other-codes.md lists what goes where.
A model that a code cannot express, or whose captions it would read otherwise, is refused.
"""

import argparse
import os
from typing import NamedTuple

import torch

from inputs.captions import is_precomputed
from loss import LOSSES, loss_kind
from runtime.errors import InputError
from runtime.files import new_folder, replacing
from training import checkpoint, model_folder
from training.families import FAMILIES, model_in_words
from vocab import MASK, vocabulary_of, vocabulary_path, write_vocabulary


class Code(NamedTuple):
    """What a released code reads.

    file: the checkpoint's name.
    options: {option: its default} of all that the code's options hold; a model's own come first.
    takes: {option: the values with which the code has the same model}.
    vocabulary: the ending of the vocabulary's file.
    reading: how it reads captions of features (see inputs/tokenizer.py).
    first_epoch: the number in `epoch` after one finished epoch.
    """

    file: str
    options: dict
    takes: dict
    vocabulary: str
    reading: str = "text"
    first_epoch: int = 1


SHARED = {
    "data_path": "data", "data_name": "precomp", "vocab_path": "./vocab/", "margin": 0.2,
    "batch_size": 128, "word_dim": 300, "embed_size": 1024, "grad_clip": 2.0, "num_layers": 1,
    "learning_rate": 0.0002, "workers": 10, "log_step": 10, "val_step": 500,
    "logger_name": "runs/runX", "resume": "", "max_violation": False, "img_dim": 2048,
    "no_imgnorm": False,
}  # fmt: skip
THIRTY_EPOCHS = {"num_epochs": 30, "lr_update": 15}
OF_REGIONS = {"model_name": "runs/runX", "no_txtnorm": False, "precomp_enc_type": "basic"}
VSEPP = {
    **SHARED, **THIRTY_EPOCHS, "crop_size": 224, "finetune": False, "cnn_type": "vgg19",
    "use_restval": False, "measure": "cosine", "use_abs": False, "reset_train": False,
}  # fmt: skip
HAL = {
    **VSEPP, **FAMILIES["hal"].defaults, "sum_violation": False, "save_all": False,
    "memory_bank": False, "record_val": False, "global_alpha": 40.0, "global_beta": 40.0,
    "global_ep_posi": 0.2, "global_ep_nega": 0.1, "mb_k": 250, "mb_rate": 0.05,
    **{flag.name: flag.default for flag in LOSSES["hal"].flags},
}  # fmt: skip
SCAN = {
    **SHARED, **THIRTY_EPOCHS, **OF_REGIONS, "raw_feature_norm": "clipped_l2norm",
    "agg_func": "LogSumExp", "cross_attn": "t2i", "bi_gru": False, "lambda_lse": 6.0,
    "lambda_softmax": 9.0,
}  # fmt: skip
VSE_INFTY = {
    **SHARED, **THIRTY_EPOCHS, **OF_REGIONS, "optim": "adam", "backbone_path": "",
    "backbone_source": "detector", "vse_mean_warmup_epochs": 0, "reset_start_epoch": False,
    "backbone_warmup_epochs": 5, "embedding_warmup_epochs": 2, "backbone_lr_factor": 0.01,
    "input_scale_factor": 1, "drop": True,
}  # fmt: skip

VECTORS = {
    "cross_attn": (None,), "regions": (None,), "image_pooling": (None,),
    "precomp_enc_type": ("basic",), "img_layers": (1,), "text_encoder": ("gru",),
    "text_pooling": ("last",), "bi_gru": (False,), "no_txtnorm": (False,),
}  # fmt: skip
CODES = {
    "hal": Code("model_best.pth.tar", HAL, VECTORS, "pkl", reading="released"),
    "vsepp": Code("model_best.pth.tar", VSEPP, VECTORS, "pkl"),
    "scan": Code(
        "model_best.pth.tar",
        SCAN,
        {
            "cross_attn": ("t2i", "i2t"),
            # The released code crashes for the two l1 norms.
            "raw_feature_norm": ("clipped_l2norm", "l2norm", "clipped", "no_norm", "softmax"),
            "image_pooling": (None,), "img_layers": (1,), "text_encoder": ("gru",),
            "text_pooling": ("last",), "measure": ("cosine",), "use_abs": (False,),
        },
        "json",
        first_epoch=0,
    ),
    "vse_infty": Code(
        "model_best.pth",
        VSE_INFTY,
        {
            "cross_attn": (None,), "image_pooling": ("gpo",), "precomp_enc_type": ("mlp",),
            "img_layers": (1,),
            "text_encoder": ("gru",), "text_pooling": ("gpo",), "bi_gru": (True,),
            "use_abs": (False,), "measure": ("cosine",),
        },
        "json",
    ),
}  # fmt: skip
PHOTO_SETS = ("coco", "f8k", "f30k")  # data sets of photos that VSE++ and HAL know
FOLDER = "safetensors"
KINDS = (*CODES, FOLDER)


# What a code can express ------------------------------------------------------------------------


def check(kind, member):
    """Raise InputError if the model cannot be written for this code; member: a Checkpoint."""
    if kind == FOLDER:
        model_folder.package()
        return
    code, title, opt = CODES[kind], FAMILIES[kind].title, member.opt
    if reason := _misfit(code, opt):
        others = [name for name in CODES if not _misfit(CODES[name], opt)]
        raise InputError(
            f"--export_for {kind}: {title}'s code has no such model, whose {reason}: say "
            f"--export_for {' or '.join([*others, FOLDER])}"
        )
    theirs = code.reading if is_precomputed(opt.data_name) else "text"
    if opt.caption_reading != theirs:
        how = "as clean text" if theirs == "text" else "as Python 3's str of bytes"
        raise InputError(
            f"--export_for {kind}: {title}'s code reads captions {how}, and this model was "
            "evaluated in another reading, so its figures would be others there: add "
            f"--caption_reading {theirs} to measure and export it so, or train with that"
        )


def _misfit(code, opt):
    """Why the code cannot have this model, in words; empty if it can."""
    for name, values in code.takes.items():
        if getattr(opt, name) not in values:
            return f"{name} is {getattr(opt, name)}, not {' or '.join(map(str, values))}"
    if "cnn_type" in code.options and not is_precomputed(opt.data_name):
        if opt.data_name not in PHOTO_SETS:
            return f"data_name is {opt.data_name}, not {' or '.join(PHOTO_SETS)}"
    return ""


# Writing ----------------------------------------------------------------------------------------


def write(folder, kind, member, figures):
    """Write the model to a new folder, whole or not at all; returns what was written, in words.

    member: a Checkpoint of evaluation.py, from whose file the weights are taken
    figures: {name: value} of the evaluation, for the folder's card and config.json
    """
    content = checkpoint.load(member.path)
    content["epoch"] = _finished(content)
    content["caption_reading"] = checkpoint.caption_reading(content)
    with new_folder(folder, "--export") as new:
        if kind == FOLDER:
            name = os.path.basename(os.path.abspath(folder))
            card = _card(name, content, figures)
            model_folder.write(new, content, member.vocabulary, figures, card)
            return f"{folder}: the model, its vocabulary, its options and figures, and a model card"
        names = _write_for(CODES[kind], new, folder, content, member)
    return f"{folder}: {' and '.join(names)}, for {FAMILIES[kind].title}'s code"


def _finished(content):
    """The number of finished epochs. SCAN's own files, which carry no words, count from 0."""
    epoch = content.get("epoch")
    if type(epoch) is not int:
        return 0
    return epoch + bool(content["opt"].cross_attn and "vocabulary" not in content)


def _write_for(code, new, folder, content, member):
    """Write checkpoint and vocabulary to the folder `new`, to be named `folder`; their names.

    The data set that the options name is the evaluated one. The format is that of PyTorch before
    1.6, which later versions read, too.
    """
    opt, states, words = content["opt"], content["model"], member.vocabulary.words
    name = member.opt.data_name
    own = {
        **vars(opt),
        "data_path": member.opt.data_path,
        "data_name": name,
        "vocab_path": folder,
        "resume": "",
        "max_violation": loss_kind(opt) == "max",
        "sum_violation": loss_kind(opt) == "sum",
        "model_name": getattr(opt, "model_name", None) or opt.logger_name,
    }
    if code is CODES["vse_infty"]:
        states, words = _with_mask(states, words)
        data_name = "coco" if "coco" in (opt.vocab_name or name) else "f30k"
        name = f"{data_name}_precomp"
        own |= {"data_name": data_name, "precomp_enc_type": "basic"}
        if "warmup_epochs" in own:
            own["vse_mean_warmup_epochs"] = own["warmup_epochs"]
    target = vocabulary_path(new, name, code.vocabulary)
    write_vocabulary(vocabulary_of(words), target)
    options = {option: own.get(option, default) for option, default in code.options.items()}
    theirs = {
        "epoch": content["epoch"] - 1 + code.first_epoch,
        "model": states,
        "best_rsum": float(content.get("best_rsum", 0)),
        "opt": argparse.Namespace(**options, vocab_size=len(states[1]["embed.weight"])),
        "Eiters": content.get("Eiters", 0),
    }
    with replacing(os.path.join(new, code.file)) as file:
        torch.save(theirs, file, _use_new_zipfile_serialization=False)
    return code.file, os.path.basename(target)


def _with_mask(states, words):
    """(States, words of the vocabulary's file) as VSE-infinity has them.

    Its code appends <mask> to the words of the file. A model without this word gets a row of zeros
    for it, which no caption uses.
    """
    image, text = states
    if MASK not in words:
        rows = text["embed.weight"]
        text = {**text, "embed.weight": torch.cat([rows, torch.zeros_like(rows[:1])])}
    return [image, text], words[:-1] if words[-1] == MASK else words


# The model card ---------------------------------------------------------------------------------

CARD = """---
library_name: vse-hal
tags:
- image-text-retrieval
---

# {name}

Finds photos by a sentence, and sentences by a photo: {model}, {embed_size:,} dimensions, trained on
{trained_on} (epochs: {epochs}).

## Figures

Measured with these weights on {data_name}, split {split}, {images:,} images and {captions:,} captions, read as
"{caption_reading}"{folds}:

| | R@1 | R@5 | R@10 | median rank | mean rank |
|---|---|---|---|---|---|
| image to text | {i2t} |
| text to image | {t2i} |

The six recalls sum up to {rsum:.1f}.

## Use

With the scripts of VSE-HAL, on data of the kind that it was trained on ({features}):

```sh
{commands}
```

`train.py --init_from {name}` starts a new run from these weights. `model.safetensors` has the weights,
`vocab.json` the words and their numbers, `config.json` the options and figures.
"""


def _card(name, content, figures):
    """The text of README.md."""
    opt, features = content["opt"], content.get("features")
    rows = {
        side: " | ".join(f"{value:.1f}" for value in figures[side].values())
        for side in ("i2t", "t2i")
    }
    is_features = is_precomputed(opt.data_name)
    kind = f"photos, through {opt.cnn_type}"
    if is_features:
        each = f" for each of {opt.regions} regions" if opt.regions else ""
        kind = f"features of {opt.img_dim:,} numbers{each}"
    commands = [
        f"python3 compute_results.py --model_path {name} --data_path data --data_name "
        f"{opt.data_name}",
        f"python3 search.py --model_path {name} "
        + (f"--precomp data/{opt.data_name}" if is_features else "--images photos"),
    ]
    return CARD.format(
        **{**figures, **rows},
        name=name,
        model=model_in_words(opt),
        embed_size=opt.embed_size,
        trained_on=opt.data_name,
        epochs=content["epoch"],
        folds=", the mean of five folds" if figures["fold5"] else "",
        features=f"{kind}, by {features['encoder']}" if features else kind,
        commands="\n".join(commands[:1] if opt.cross_attn else commands),
    )
