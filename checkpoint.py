"""Checkpoints: written whole, read without running code, exchanged with the released scripts.

A checkpoint is a dict: `epoch` (finished epochs), `model` = [image state, text state],
`best_rsum`, `opt` (argparse.Namespace), `Eiters` (steps), as the released code writes it. Ours
add `vocabulary` (words), `caption_reading`, `optimizer`, `random_states`, `progress` (within an epoch),
`float32_products` (their kind on a CPU, see `device`) and `features` (what the data set's features.json says, see
`features`; None where it has none).
"""

import argparse
import glob
import math
import os
import re
import zipfile

import numpy as np
import torch

from caption_files import is_precomputed
from errors import InputError, check_regular, replacing
from features import check_description
from vocab import MASK, READINGS, find_vocabulary, vocabulary_of, vocabulary_path

# What an older checkpoint (VSE++'s) may lack, with the released defaults.
OPTION_DEFAULTS = {
    "measure": "cosine", "use_abs": False, "no_imgnorm": False, "finetune": False, "cnn_type": "vgg19",
    "num_layers": 1, "word_dim": 300, "embed_size": 1024, "img_dim": 4096, "crop_size": 224, "batch_size": 128,
    "workers": 10, "use_restval": False, "data_path": "data", "data_name": "precomp", "vocab_path": "./vocab/",
    "logger_name": "runs/runX", "margin": 0.2, "max_violation": False, "sum_violation": False, "memory_bank": False,
    "text_pooling": "last", "bi_gru": False, "no_txtnorm": False, "precomp_enc_type": "basic", "drop_words": 0.0,
    "drop_regions": 0.0, "weight_decay": 0.0, "raw_feature_norm": "clipped_l2norm", "agg_func": "LogSumExp",
    "lambda_lse": 6.0, "lambda_softmax": 9.0,
}
# Those that may be None: what pools regions, how many there are, a vocabulary's own name, and SCAN's direction.
REGION_OPTIONS = ("image_pooling", "regions", "vocab_name", "cross_attn")
# What a resumed run may change; whatever else differs would make another model of it.
FREE_OPTIONS = {
    "data_path", "vocab_path", "cache_dir", "features_on_device", "logger_name", "resume", "init_from", "cnn_weights",
    "num_epochs", "learning_rate", "lr_update", "workers", "device", "amp", "log_step", "val_step", "save_step",
    "save_all", "keep", "record_val", "reset_train", "model_name", "skip_bad_steps", "collapse_patience", "on_collapse",
    "micro_batch", "dist_timeout"}
# What the weights of one model share with another's.
MODEL_OPTIONS = ("img_dim", "embed_size", "word_dim", "num_layers", "vocab_size", "measure", "use_abs", "no_imgnorm",
                 "cnn_type", "image_pooling", "text_pooling", "bi_gru", "precomp_enc_type", "no_txtnorm", "cross_attn")
WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What a checkpoint may hold beside tensors and plain containers.
ADMITTED = [argparse.Namespace, np.dtype, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
            np._core.multiarray.scalar, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]


def save(path, content):
    """Write a checkpoint dict in one step: a reader or a crash sees the old file or the new one, whole."""
    with replacing(path) as file:
        torch.save(content, file)


def content_of(model, optimizer, opt, vocabulary, epoch, steps, best_rsum, progress, features=None, data=None):
    """The checkpoint dict of a run after `epoch` epochs and `steps` steps; progress: its place within the epoch;
    features: what describes those that it is trained on, or None; data: the training data's fingerprint."""
    return {
        "epoch": epoch,
        "model": [model.img_enc.state_dict(), model.txt_enc.state_dict()],
        "best_rsum": float(best_rsum),
        "opt": opt,
        "Eiters": steps,
        "vocabulary": vocabulary.words,
        "caption_reading": opt.caption_reading,
        "optimizer": optimizer.state_dict(),
        "progress": progress,
        "features": features,
        "train_fingerprint": data,
        "float32_products": torch.get_float32_matmul_precision() if model.device.type == "cpu" else None,
        "random_states": {"cpu": torch.get_rng_state(),
                          "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []},
    }


def load(path):
    """Read a checkpoint file and check its shape; options it lacks take the released defaults.

    Nothing but tensors, plain containers, NumPy scalars and argparse.Namespace is admitted.
    Raises InputError if the file is missing, torn, of another kind, or asks for anything else.
    """
    content = _read(path)
    _check(content, path)
    _adopt_vse_infinity(content)
    _complete(content["opt"], _sizes(content["model"]), path)
    return content


def _read(path):
    """What the file holds, whatever that is."""
    check_regular(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise InputError(f"checkpoint {path} is refused: it is compressed, which torch.save never does, "
                                     "and could fill the memory")
        with torch.serialization.safe_globals(ADMITTED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read ({error.strerror or error}): check the path") from error
    except Exception as error:  # torn files raise many kinds
        reason = str(error) or repr(error)
        if "can't allocate memory" in reason:
            raise
        asked = re.search(r"GLOBAL ([\w.]+)", reason)
        if asked:
            raise InputError(f"checkpoint {path} is refused: it asks to load {asked[1]}, which could run code"
                             ) from error
        detail = re.search(r"WeightsUnpickler error: (.+)", reason) or re.search(r"(.+)", reason)
        raise InputError(f"{path} is not a checkpoint, or is cut short ({detail[1]}): fetch or make it again"
                         ) from error


def _adopt_vse_infinity(content):
    """Give a checkpoint of VSE-infinity's region and BiGRU code the options that describe its model here.

    Its states' names tell it. Its data lie in `<data_path>/precomp`, and its vocabulary is SCAN's with <mask>.
    """
    opt = content["opt"]
    if hasattr(opt, "text_pooling") or "gpool.linear.weight" not in content["model"][1]:
        return
    opt.image_pooling = opt.text_pooling = "gpo"
    opt.precomp_enc_type, opt.bi_gru = "mlp", True
    opt.vocab_name = "coco_precomp" if "coco" in str(getattr(opt, "data_name", "")) else "f30k_precomp"
    opt.data_name = "precomp"


def _complete(opt, sizes, path):
    """Give the options what they lack; raises InputError where they are of another kind or deny the weights' sizes."""
    for name, value in {**OPTION_DEFAULTS, **sizes, **dict.fromkeys(REGION_OPTIONS)}.items():
        if not hasattr(opt, name):
            setattr(opt, name, value)
    for name, value in OPTION_DEFAULTS.items():
        if type(getattr(opt, name)) is not type(value) and not (
                isinstance(value, float) and isinstance(getattr(opt, name), int)):
            raise InputError(f"checkpoint {path} has a {type(getattr(opt, name)).__name__} for the option {name}, "
                             f"which should be like {value!r}")
    if not all(getattr(opt, name) is None or type(getattr(opt, name)) is kind
               for name, kind in zip(REGION_OPTIONS, (str, int, str, str))):
        raise InputError(f"checkpoint {path} has options of another kind: {', '.join(REGION_OPTIONS)}")
    for name, value in sizes.items():
        own = getattr(opt, name)
        if (type(own) is not int or own != value) and not (name == "img_dim" and not is_precomputed(opt.data_name)):
            given = own if type(own) is int else "something else"
            raise InputError(f"checkpoint {path} contradicts itself: its options give {name} as {given}, its weights "
                             f"have {value}")
    if opt.measure not in ("cosine", "order") or not all(
            1 <= size < 2**31 for size in (opt.batch_size, opt.crop_size, opt.workers + 1)):
        raise InputError(f"checkpoint {path} has options out of range: measure {opt.measure}, batch_size "
                         f"{opt.batch_size}, crop_size {opt.crop_size}, workers {opt.workers}")


def _check(content, path):
    """Raise InputError unless `content` has a checkpoint's parts."""
    lacking = [name for name in ("model", "opt") if not isinstance(content, dict) or name not in content]
    if lacking:
        raise InputError(f"{path} is not a checkpoint of this family: it lacks {' and '.join(lacking)}")
    states = content["model"]
    if not (isinstance(states, (list, tuple)) and len(states) == 2 and all(isinstance(s, dict) for s in states)):
        raise InputError(f"checkpoint {path}: 'model' is not [image state, text state]")
    for name, tensor in [item for state in states for item in state.items()]:
        if not _whole(tensor) or not isinstance(name, str):
            raise InputError(f"checkpoint {path}: {name} is not a whole tensor")
        if tensor.dtype not in WEIGHT_TYPES and not str(name).endswith("num_batches_tracked"):  # batch norm's counter
            raise InputError(f"checkpoint {path}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}, where "
                             "weights are float32 or the like: it is not of this family")
        if not tensor.float().isfinite().all():
            raise InputError(f"checkpoint {path}: {name} has NaN or infinity, so its model is broken: take an earlier "
                             "checkpoint")
    content["model"] = states = [_bare_names(state) for state in states]
    needed = {(_image_weight(states[0]), 0): 2, ("embed.weight", 1): 2, ("rnn.weight_hh_l0", 1): 2}
    for (name, part), dimensions in needed.items():
        if name not in states[part] or states[part][name].dim() != dimensions:
            raise InputError(f"checkpoint {path} has no {name} of {dimensions} dimensions: it is not of this family")
    sizes = _sizes(states)
    if min(sizes.values()) < 1 or len(states[0][_image_weight(states[0])]) != sizes["embed_size"]:
        raise InputError(f"checkpoint {path}: its weights do not fit each other ({sizes})")
    if not isinstance(content["opt"], argparse.Namespace):
        raise InputError(f"checkpoint {path}: 'opt' is not an argparse.Namespace")
    if content.get("caption_reading", "text") not in READINGS:
        raise InputError(f"checkpoint {path}: unknown caption reading")
    if content.get("features") is not None:
        check_description(content["features"], f"checkpoint {path}")


def _bare_names(state):
    """A state without the `module.` that DataParallel puts before every name."""
    if not all(str(name).startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): value for name, value in state.items()}


def _whole(tensor):
    """Whether it is a dense tensor with a number in memory for each of its entries, as saved ones are."""
    return (type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and not tensor.is_quantized
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def _sizes(states):
    """The model's sizes as its weights show them."""
    image_state, text_state = states
    vocab_size, word_dim = text_state["embed.weight"].shape
    return {"vocab_size": vocab_size, "word_dim": word_dim, "embed_size": text_state["rnn.weight_hh_l0"].shape[1],
            "num_layers": sum(bool(re.fullmatch(r"rnn\.weight_ih_l\d+", str(name))) for name in text_state),
            "img_dim": image_state[_image_weight(image_state)].shape[1]}


def _image_weight(state):
    """The name of the image encoder's linear weight: SCAN may have it in two parts."""
    return "fc.weight_v" if "fc.weight_v" in state else "fc.weight"


def load_weights(model, content, path):
    """Load a checkpoint's weights; raises InputError where they are another model's.

    The image encoder leaves out names that it does not have, as in the released code: a CNN's, where features are
    computed already. Others would be parts of a model of another family, whose figures would be wrong without them.
    """
    own = model.img_enc.state_dict()
    unknown = [name for name in content["model"][0] if name not in own and not str(name).startswith("cnn.")]
    if unknown:
        raise InputError(f"{path} is not a checkpoint of this family, or its options describe another model: its image "
                         f"encoder has {len(unknown)} parts that are unknown here, such as {unknown[0]}")
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3]) or error
        raise InputError(f"the weights in {path} do not fit the model that the options describe: {detail}") from error


def caption_reading(content):
    """How the captions were read in training: "text", or "released" (see `vocab.tokenize`).

    A checkpoint without our marker is HAL's released one if it has HAL's options, and was trained in the
    released reading if its features were precomputed.
    """
    opt = content["opt"]
    released = hasattr(opt, "local_alpha") and is_precomputed(opt.data_name)
    return content.get("caption_reading", "released" if released else "text")


def vocabulary(content, path, vocab_path=None):
    """The Vocabulary that a checkpoint was trained with: its own words, else the file of its data set.

    vocab_path: the folder of the file, which is then taken even if the checkpoint carries words. Raises InputError
    where there is none, or none that fits the weights.
    """
    opt, words = content["opt"], content.get("vocabulary")
    if words is not None and not vocab_path:
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"checkpoint {path}: 'vocabulary' is not a list of words")
        found = vocabulary_of(words, f"the vocabulary in {path}")
    else:
        vocab_path, name = vocab_path or opt.vocab_path, opt.vocab_name or opt.data_name
        found = find_vocabulary(vocab_path, name)
        if found is None:
            raise InputError(f"{path} carries no vocabulary, and there is none in {vocabulary_path(vocab_path, name)} "
                             "(or .pkl): name the folder of the one it was trained with by --vocab_path")
        if (opt.drop_words or opt.vocab_name) and len(found) < opt.vocab_size:
            found.add_word(MASK)
    if len(found) != opt.vocab_size:
        raise InputError(f"the vocabulary for {opt.data_name} in {vocab_path or path} has {len(found)} words, the "
                         f"checkpoint {path} was trained with {opt.vocab_size}: name the right one with --vocab_path")
    return found


def written(path):
    """When a file was last written, in nanoseconds; None where there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def newest(folder, log):
    """(content, path) of a run folder's checkpoint.pth.tar, or, where there is none that is whole and of ours, of the
    furthest of the others; (None, "") where there is none at all.

    Raises InputError where a file cannot be read at present, and where checkpoint.pth.tar is whole but of a code that
    keeps no optimizer: a run from scratch would replace it.
    """
    usual = os.path.join(folder, "checkpoint.pth.tar")
    others = set(glob.glob(os.path.join(glob.escape(folder), "*.pth.tar"))) - {usual}
    furthest, found, foreign = (), (None, ""), False
    for path in [usual, *others] if os.path.exists(usual) else others:
        try:
            content = load(path)
        except InputError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            log(f"Passed over: {error}")
            continue
        if "optimizer" not in content or type(content.get("Eiters")) is not int:
            log(f"Passed over: {path} has no optimizer state and number of steps, so it cannot be continued")
            foreign = foreign or path == usual
        elif (place := (content["Eiters"], os.path.getmtime(path), path)) > furthest:
            furthest, found = place, (content, path)
        if found[1] == usual:
            break
    if foreign and not found[1]:
        raise InputError(f"--resume auto: {usual} has no optimizer state, so it cannot be continued, and a run from "
                         "scratch would replace it: name another --logger_name, with --init_from its weights")
    return found


def restore(content, path, model, optimizer, opt, log):
    """Take up a run where a checkpoint of ours left it: weights, optimizer, random states.

    Returns (epoch, steps, best_rsum, progress). Raises InputError for a checkpoint that lacks the optimizer (the
    released code's) and for options that make another model; says which others have changed.
    """
    if "optimizer" not in content or "random_states" not in content:
        raise InputError(f"--resume {path}: this checkpoint has no optimizer state, so it cannot be continued; start "
                         f"from its weights with --init_from {path}")
    for name, now in vars(opt).items():
        then = getattr(content["opt"], name, now)
        if now != then and name == "regions":
            raise InputError(f"--resume {path}: it was trained on data with {then} regions an image, and these have "
                             f"{now}: give the same data, or start another run with --init_from")
        if now != then and name not in FREE_OPTIONS:
            raise InputError(f"--resume {path}: --{name} was {then} there and is {now} here; give it as it was, or "
                             "start another run with --init_from")
        if now != then and name not in ("resume", "init_from"):
            log(f"--{name} was {then} before, and is {now} from here on")
    load_weights(model, content, path)
    try:
        optimizer.load_state_dict(_settings_as_here(content["optimizer"], optimizer))
        for parameter, state in optimizer.state.items():
            if not all(_whole(state[name].cpu()) and state[name].shape == parameter.shape for name in
                       ("exp_avg", "exp_avg_sq")) or state["step"].numel() != 1:
                raise ValueError("Adam's moments are not those of these weights")
        torch.set_rng_state(content["random_states"]["cpu"])
        if torch.cuda.is_initialized() and len(content["random_states"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["random_states"]["cuda"])
        elif torch.cuda.is_initialized():
            log("The checkpoint's random states are of another number of GPUs: dropout, if any, draws anew")
        _check_progress(content.get("progress"), opt.embed_size)
        epoch, steps, best = content["epoch"], content["Eiters"], float(content["best_rsum"])
        if not (type(epoch) is type(steps) is int and min(epoch, steps) >= 0 and math.isfinite(best)):
            raise ValueError("epoch, steps or best rsum are out of range")
        return epoch, steps, best, content.get("progress")
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"--resume {path}: its optimizer or random states are damaged ({error!r}); start from its "
                         f"weights with --init_from {path}") from error


def _settings_as_here(state, optimizer):
    """An optimizer's saved state with this run's settings: whether it is fused, by which torch places each `step`."""
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": saved["params"]} for own, saved in groups]}


def _check_progress(progress, embed_size):
    """Raise ValueError unless a run's place within its epoch has the form that train.py gives it."""
    if progress is None:
        return
    bank, meters, watch = progress["bank"], progress["meters"], progress["watch"]
    numbers = [meter[part] for meter in meters.values() for part in ("val", "avg", "sum", "count")]
    numbers += [watch["bad"], watch["collapsed"], watch["warned"], progress["step_in_epoch"]]
    if watch["last_good"] is not None:
        numbers.append(watch["last_good"])
    if not all(isinstance(value, (int, float)) for value in numbers) or (
            type(progress["step_in_epoch"]) is not int or progress["step_in_epoch"] < 0):
        raise ValueError("what it knows of its place in the epoch is no number")
    if bank is not None:
        images, captions, indices = bank
        if not (all(map(_whole, bank)) and images.shape == captions.shape == (len(indices), embed_size)
                and indices.dtype == torch.int64 and indices.dim() == 1 and 0 <= indices.min()
                and indices.max() < 2**31):
            raise ValueError("its memory bank is damaged")
