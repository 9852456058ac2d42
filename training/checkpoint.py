"""Checkpoints: written whole, read without running code, exchanged with the released scripts.

A checkpoint is a dict. As in the released code it has `epoch` (finished epochs), `model` = [image
state, text state], `best_rsum`, `opt` (argparse.Namespace) and `Eiters` (steps). Ours add:
    vocabulary: its words; texts: what made the text vectors, see features/texts.py
    caption_reading: see inputs/tokenizer.py
    optimizer, random_states, and loss, if the loss has weights
    progress: the place within an epoch, None between epochs
    float32_products: their kind on a CPU, see runtime/device.py
    features: what the data set's features.json says, see features/description.py; else None
    train_fingerprint: a hash of the training data, see training/run_record.py
"""

import argparse
import glob
import math
import os

import numpy as np
import torch

from features.description import check_description
from features.text_description import check_texts_json
from features.texts import FrozenTexts
from inputs.captions import is_precomputed
from inputs.tokenizer import READINGS
from layers.training_calls import both_states
from model import TEXT_ENCODERS
from runtime import torch_files
from runtime.errors import InputError
from runtime.files import replacing
from runtime.torch_files import check_weights, is_whole
from training import model_folder
from vocab import MASK, find_vocabulary, vocabulary_of, vocabulary_path

# What an older checkpoint, such as VSE++'s, may lack, with the released defaults.
OPTION_DEFAULTS = {
    "measure": "cosine",
    "use_abs": False,
    "no_imgnorm": False,
    "finetune": False,
    "cnn_type": "vgg19",
    "num_layers": 1,
    "word_dim": 300,
    "embed_size": 1024,
    "img_dim": 4096,
    "crop_size": 224,
    "batch_size": 128,
    "workers": 10,
    "use_restval": False,
    "data_path": "data",
    "data_name": "precomp",
    "vocab_path": "./vocab/",
    "logger_name": "runs/runX",
    "margin": 0.2,
    "max_violation": False,
    "sum_violation": False,
    "memory_bank": False,
    "text_encoder": "gru",
    "img_layers": 1,
    "text_features": False,
    "text_pooling": "last",
    "bi_gru": False,
    "no_txtnorm": False,
    "precomp_enc_type": "basic",
    "drop_words": 0.0,
    "drop_regions": 0.0,
    "weight_decay": 0.0,
    "raw_feature_norm": "clipped_l2norm",
    "agg_func": "LogSumExp",
    "lambda_lse": 6.0,
    "lambda_softmax": 9.0,
}

# Those that may be None: the pooling of regions and their number, the vocabulary's name if it is
# not the data set's, and SCAN's direction.
REGION_OPTIONS = ("image_pooling", "regions", "vocab_name", "cross_attn", "texts_path")

# What a resumed run may change; any other option would make it another model.
FREE_OPTIONS = {
    "data_path",
    "texts_path",
    "word_vectors",
    "vocab_path",
    "cache_dir",
    "features_on_device",
    "logger_name",
    "resume",
    "init_from",
    "cnn_weights",
    "num_epochs",
    "learning_rate",
    "lr_update",
    "workers",
    "device",
    "amp",
    "log_step",
    "val_step",
    "save_step",
    "save_all",
    "keep",
    "record_val",
    "reset_train",
    "model_name",
    "skip_bad_steps",
    "collapse_patience",
    "on_collapse",
    "micro_batch",
    "dist_timeout",
}

# What must be equal for one model to load another's weights.
MODEL_OPTIONS = (
    "img_dim",
    "embed_size",
    "word_dim",
    "num_layers",
    "vocab_size",
    "measure",
    "use_abs",
    "no_imgnorm",
    "cnn_type",
    "image_pooling",
    "text_encoder",
    "img_layers",
    "text_pooling",
    "bi_gru",
    "precomp_enc_type",
    "no_txtnorm",
    "cross_attn",
)

# What a checkpoint may hold beside tensors and plain containers.
ADMITTED = [
    argparse.Namespace,
    np.dtype,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
]


def save(path, content):
    """Write a checkpoint dict in one step: readers find the old file or the new one, both whole."""
    with replacing(path) as file:
        torch.save(content, file)


def content_of(
    model,
    optimizer,
    opt,
    vocabulary,
    epoch,
    steps,
    best_rsum,
    progress,
    features=None,
    data=None,
    criterion=None,
):
    """The checkpoint dict of a run after `epoch` epochs and `steps` steps.

    progress: the place within the epoch; features: their description, or None.
    data: the training data's fingerprint; criterion: the loss, which may have weights.
    """
    return {
        "epoch": epoch,
        "model": [model.img_enc.state_dict(), model.txt_enc.state_dict()],
        "best_rsum": float(best_rsum),
        "opt": opt,
        "Eiters": steps,
        "vocabulary": list(vocabulary.words),
        "texts": getattr(vocabulary, "description", None),
        "caption_reading": opt.caption_reading,
        "optimizer": optimizer.state_dict(),
        **(
            {"loss": criterion.state_dict()}
            if criterion is not None and criterion.state_dict()
            else {}
        ),
        "progress": progress,
        "features": features,
        "train_fingerprint": data,
        "float32_products": torch.get_float32_matmul_precision()
        if model.device.type == "cpu"
        else None,
        "random_states": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
    }


def load(path):
    """The dict of a checkpoint, checked; options that it lacks get the released defaults.

    path: the file, or a folder that compute_results.py --export wrote (see training/model_folder.py).
    Only tensors, plain containers, NumPy scalars and argparse.Namespace are admitted. Raises
    InputError if the file is missing, torn, of another kind, or holds anything else.
    """
    path = model_folder.file_of(path)
    if os.path.isdir(path):
        raise InputError(
            f"{path} is a folder, not a regular file, and has no {model_folder.WEIGHTS}: name a "
            "checkpoint, or a folder that compute_results.py --export wrote"
        )
    if path.endswith(".safetensors"):
        content = model_folder.read(path)
    else:
        content = torch_files.read(path, "checkpoint", ADMITTED)
    _check(content, path)
    _adopt_vse_infinity(content)
    _complete(
        content["opt"],
        _sizes(content["model"], getattr(content["opt"], "text_encoder", "gru")),
        path,
    )
    return content


def _adopt_vse_infinity(content):
    """Set the options that describe the model of a VSE-infinity checkpoint (regions and BiGRU).

    It is recognised by its states' names. Its data lie in `<data_path>/precomp`, and its vocabulary
    is SCAN's with <mask>.
    """
    opt = content["opt"]
    if hasattr(opt, "text_pooling") or "gpool.linear.weight" not in content["model"][1]:
        return
    opt.image_pooling = opt.text_pooling = "gpo"
    opt.precomp_enc_type, opt.bi_gru = "mlp", True
    opt.vocab_name = (
        "coco_precomp" if "coco" in str(getattr(opt, "data_name", "")) else "f30k_precomp"
    )
    opt.data_name = "precomp"


def _complete(opt, sizes, path):
    """Complete the options with defaults and sizes.

    Raises InputError if an option has the wrong type or range, or contradicts the weights' sizes.
    """
    for name, value in {**OPTION_DEFAULTS, **sizes, **dict.fromkeys(REGION_OPTIONS)}.items():
        if not hasattr(opt, name):
            setattr(opt, name, value)
    for name, value in OPTION_DEFAULTS.items():
        if type(getattr(opt, name)) is not type(value) and not (
            isinstance(value, float) and isinstance(getattr(opt, name), int)
        ):
            raise InputError(
                f"checkpoint {path} has a {type(getattr(opt, name)).__name__} for the option "
                f"{name}, which should be like {value!r}"
            )
    if not all(
        getattr(opt, name) is None or type(getattr(opt, name)) is kind
        for name, kind in zip(REGION_OPTIONS, (str, int, str, str, str))
    ):
        raise InputError(
            f"checkpoint {path} has options of the wrong type: {', '.join(REGION_OPTIONS)}"
        )
    for name, value in sizes.items():
        own = getattr(opt, name)
        if (type(own) is not int or own != value) and not (
            name == "img_dim" and not is_precomputed(opt.data_name)
        ):
            given = own if type(own) is int else "something else"
            raise InputError(
                f"checkpoint {path} contradicts itself: its options give {name} as {given}, its "
                f"weights have {value}"
            )
    if opt.measure not in ("cosine", "order") or not all(
        1 <= size < 2**31 for size in (opt.batch_size, opt.crop_size, opt.workers + 1)
    ):
        raise InputError(
            f"checkpoint {path} has options out of range: measure {opt.measure}, batch_size "
            f"{opt.batch_size}, crop_size {opt.crop_size}, workers {opt.workers}"
        )


def _check(content, path):
    """Raise InputError unless `content` has a checkpoint's parts."""
    lacking = [
        name for name in ("model", "opt") if not isinstance(content, dict) or name not in content
    ]
    if lacking:
        raise InputError(
            f"{path} is not a checkpoint of VSE++ or of code derived from it: it lacks "
            f"{' and '.join(lacking)}"
        )
    _check_states(content, path)
    if not isinstance(content["opt"], argparse.Namespace):
        raise InputError(f"checkpoint {path}: 'opt' is not an argparse.Namespace")
    kind = getattr(content["opt"], "text_encoder", "gru")
    # Something else than a string may not hash, and may print without end.
    if not isinstance(kind, str) or kind not in TEXT_ENCODERS:
        shown = repr(kind[:40]) if isinstance(kind, str) else f"of type {type(kind).__name__}"
        raise InputError(
            f"checkpoint {path} has the text encoder {shown}, which is not one of "
            f"{', '.join(TEXT_ENCODERS)}: update this code, or name another checkpoint"
        )
    try:
        states = content["model"]
        sizes = _sizes(states, kind)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"checkpoint {path} is not of VSE++ or of code derived from it: its weights are not "
            f"those of an image encoder and the text encoder {kind} ({type(error).__name__}: "
            f"{error})"
        ) from error
    if min(sizes.values()) < 1 or len(states[0][_image_weight(states[0])]) != sizes["embed_size"]:
        raise InputError(f"checkpoint {path}: its weights do not fit each other ({sizes})")
    if content.get("caption_reading", "text") not in READINGS:
        raise InputError(f"checkpoint {path}: unknown caption reading")
    if content.get("features") is not None:
        check_description(content["features"], f"checkpoint {path}")


def _check_states(content, path):
    """Make [image state, text state] of `model`, in any form; raise InputError if it has none."""
    given = content["model"]
    states = both_states(given) if isinstance(given, (list, tuple, dict)) else None
    if states is None or not all(isinstance(state, dict) for state in states):
        raise InputError(
            f"checkpoint {path}: 'model' is neither [image state, text state] nor the state of a "
            "whole model, whose names begin with img_enc. and txt_enc."
        )
    for state in states:
        check_weights(state, f"checkpoint {path}")
    content["model"] = [_bare_names(state) for state in states]
    if isinstance(given, dict):
        # Another code's train.py has saved this project's model, whose loaders read clean text.
        reading = getattr(content["opt"], "caption_reading", None) or "text"
        content.setdefault("caption_reading", reading)


def _bare_names(state):
    """The state without the `module.` that DataParallel puts before every name."""
    if not all(str(name).startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): value for name, value in state.items()}


def _sizes(states, text_encoder):
    """The model's sizes as its weights show them.

    Raises KeyError, ValueError or IndexError if they are not those of such a model.
    """
    first = "hidden.0.weight" if "hidden.0.weight" in states[0] else _image_weight(states[0])
    _, img_dim = states[0][first].shape
    return {**TEXT_ENCODERS[text_encoder].sizes(states[1]), "img_dim": img_dim}


def _image_weight(state):
    """The name of the image encoder's linear weight, which SCAN may keep in two parts."""
    return "fc.weight_v" if "fc.weight_v" in state else "fc.weight"


def load_weights(model, content, path):
    """Load a checkpoint's weights; raises InputError if they are another model's.

    As in the released code, an encoder of precomputed features ignores a CNN's weights. Any other
    unknown weight is an error: without it, the model's figures would be wrong.
    """
    own = model.img_enc.state_dict()
    unknown = [
        name for name in content["model"][0] if name not in own and not str(name).startswith("cnn.")
    ]
    if unknown:
        raise InputError(
            f"{path} is not a checkpoint of VSE++ or of code derived from it, or its options "
            f"describe another model: its image encoder has {len(unknown)} parts that are unknown "
            f"here, such as {unknown[0]}"
        )
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3]) or error
        raise InputError(
            f"the weights in {path} do not fit the model that the options describe: {detail}"
        ) from error


def caption_reading(content):
    """How the captions were read in training: "text" or "released" (see inputs/tokenizer.py).

    A checkpoint that does not say so, but has HAL's options and precomputed features, comes from
    the released code, which read them as "released".
    """
    opt = content["opt"]
    released = hasattr(opt, "local_alpha") and is_precomputed(opt.data_name)
    return content.get("caption_reading", "released" if released else "text")


def vocabulary(content, path, vocab_path=None):
    """The Vocabulary that a checkpoint was trained with: its own, else its data set's file.

    vocab_path: the folder of a file to use even if the checkpoint has words.
    Raises InputError if there is none, or if it does not fit the weights.
    """
    opt, words = content["opt"], content.get("vocabulary")
    if getattr(opt, "text_encoder", "gru") == "features":
        texts = content.get("texts")
        return FrozenTexts(opt.texts_path, texts and check_texts_json(texts, path))
    if words is not None and not vocab_path:
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"checkpoint {path}: 'vocabulary' is not a list of words")
        found = vocabulary_of(words, f"the vocabulary in {path}")
    else:
        vocab_path, name = vocab_path or opt.vocab_path, opt.vocab_name or opt.data_name
        found = find_vocabulary(vocab_path, name)
        if found is None:
            raise InputError(
                f"{path} carries no vocabulary, and there is none in "
                f"{vocabulary_path(vocab_path, name)} (or .pkl): name the folder of the one it was "
                "trained with by --vocab_path"
            )
        if (opt.drop_words or opt.vocab_name) and len(found) < opt.vocab_size:
            found.add_word(MASK)
    if len(found) != opt.vocab_size:
        raise InputError(
            f"the vocabulary for {opt.data_name} in {vocab_path or path} has {len(found)} words, "
            f"the checkpoint {path} was trained with {opt.vocab_size}: name the right one with "
            "--vocab_path"
        )
    return found


def written(path):
    """When a file was last written, in nanoseconds; None if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def newest(folder, log):
    """(content, path) of the checkpoint with which a run folder is resumed; (None, "") without one.

    It is checkpoint.pth.tar, or, if that is missing or damaged, the other one with the most steps.
    Raises InputError if a file cannot be read at present, and if checkpoint.pth.tar is whole but
    has no optimizer state: a run from scratch would replace it.
    """
    usual = os.path.join(folder, "checkpoint.pth.tar")
    others = set(glob.glob(os.path.join(glob.escape(folder), "*.pth.tar"))) - {usual}
    furthest, found, foreign = (), (None, ""), False
    for path in [usual, *others] if os.path.exists(usual) else others:
        try:
            content = load(path)
        except InputError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(
                error.__cause__, FileNotFoundError
            ):
                raise  # the disk failed, perhaps only for now
            log(f"Passed over: {error}")
            continue
        if "optimizer" not in content or type(content.get("Eiters")) is not int:
            log(
                f"Passed over: {path} has no optimizer state and number of steps, so it cannot be "
                "continued"
            )
            foreign = foreign or path == usual
        elif (place := (content["Eiters"], os.path.getmtime(path), path)) > furthest:
            furthest, found = place, (content, path)
        if found[1] == usual:
            break
    if foreign and not found[1]:
        raise InputError(
            f"--resume auto: {usual} has no optimizer state, so it cannot be continued, and a run "
            "from scratch would replace it: name another --logger_name, with --init_from its "
            "weights"
        )
    return found


def restore(content, path, model, optimizer, opt, log, criterion=None):
    """Load weights, optimizer and random states; returns (epoch, steps, best_rsum, progress).

    criterion: the loss, whose weights, if any, are loaded too.
    Logs the options that have changed. Raises InputError if one of them would make another model,
    and for a checkpoint without an optimizer state (the released code's).
    """
    if "optimizer" not in content or "random_states" not in content:
        raise InputError(
            f"--resume {path}: this checkpoint has no optimizer state, so it cannot be continued; "
            f"start from its weights with --init_from {path}"
        )
    _check_options(content["opt"], path, opt, log)
    load_weights(model, content, path)
    try:
        if criterion is not None:
            criterion.load_state_dict(content.get("loss", {}))
        _restore_optimizer(optimizer, content["optimizer"])
        _restore_random_states(content["random_states"], log)
        _check_progress(content.get("progress"), opt.embed_size)
        epoch, steps, best = content["epoch"], content["Eiters"], float(content["best_rsum"])
        if not (
            type(epoch) is type(steps) is int and min(epoch, steps) >= 0 and math.isfinite(best)
        ):
            raise ValueError("epoch, steps or best rsum are out of range")
        return epoch, steps, best, content.get("progress")
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(
            f"--resume {path}: its optimizer or random states are damaged ({error!r}); start from "
            f"its weights with --init_from {path}"
        ) from error


def _check_options(saved, path, opt, log):
    """Log the options that are not those saved; raise InputError if one makes another model."""
    for name, now in vars(opt).items():
        then = getattr(saved, name, now)
        if now != then and name == "regions":
            raise InputError(
                f"--resume {path}: it was trained on data with {then} regions an image, and these "
                f"have {now}: give the same data, or start another run with --init_from"
            )
        if now != then and name not in FREE_OPTIONS:
            raise InputError(
                f"--resume {path}: --{name} was {then} there and is {now} here; give it as it was, "
                "or start another run with --init_from"
            )
        if now != then and name not in ("resume", "init_from"):
            log(f"--{name} was {then} before, and is {now} from here on")


def _restore_optimizer(optimizer, saved):
    """Load an optimizer's state; raises ValueError if its moments do not fit the weights."""
    optimizer.load_state_dict(_settings_as_here(saved, optimizer))
    for parameter, state in optimizer.state.items():
        if (
            not all(
                is_whole(state[name].cpu()) and state[name].shape == parameter.shape
                for name in ("exp_avg", "exp_avg_sq")
            )
            or state["step"].numel() != 1
        ):
            raise ValueError("Adam's moments are not those of these weights")


def _restore_random_states(states, log):
    """Set the CPU's random state, and those of the GPUs if their number is the same."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    elif torch.cuda.is_initialized():
        log(
            "The checkpoint's random states are of another number of GPUs: dropout, if any, "
            "draws anew"
        )


def _settings_as_here(state, optimizer):
    """An optimizer's saved state with this run's settings.

    One of them says whether the optimizer is fused, which decides where torch puts each `step`.
    """
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": saved["params"]} for own, saved in groups]}


def _check_progress(progress, embed_size):
    """Raise ValueError unless `progress` has the form that `Run.progress` gives it."""
    if progress is None:
        return
    bank, meters, watch = progress["bank"], progress["meters"], progress["watch"]
    numbers = [meter[part] for meter in meters.values() for part in ("val", "avg", "sum", "count")]
    numbers += [watch["bad"], watch["collapsed"], watch["warned"], progress["step_in_epoch"]]
    if watch["last_good"] is not None:
        numbers.append(watch["last_good"])
    if not all(isinstance(value, (int, float)) for value in numbers) or (
        type(progress["step_in_epoch"]) is not int or progress["step_in_epoch"] < 0
    ):
        raise ValueError("what it knows of its place in the epoch is no number")
    if bank is not None:
        images, captions, indices = bank
        if not (
            all(map(is_whole, bank))
            and images.shape == captions.shape == (len(indices), embed_size)
            and indices.dtype == torch.int64
            and indices.dim() == 1
            and 0 <= indices.min()
            and indices.max() < 2**31
        ):
            raise ValueError("its memory bank is damaged")
