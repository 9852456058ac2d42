"""A model as a folder: model.safetensors, config.json, vocab.json and README.md, a model card.

`compute_results.py --export` writes it, to be published. It opens wherever a checkpoint does, and
nothing in it can run code. config.json has the options, the figures that were measured, and the
SHA-256 of the two other files, which a reader checks.
"""

import argparse
import json
import os

from inputs.captions import read_json
from runtime.errors import InputError, path_type
from runtime.files import check_regular, hash_file, replacing
from vocab import read_vocabulary, write_vocabulary

FORMAT = 1  # of config.json
WEIGHTS, CONFIG, VOCABULARY, CARD = "model.safetensors", "config.json", "vocab.json", "README.md"
PARTS = ("img_enc", "txt_enc")  # before each weight's name, as in VSE.state_dict()
# Of a checkpoint's entries, those that go into config.json as they are.
KEPT = ("epoch", "best_rsum", "Eiters", "caption_reading", "float32_products")
DESCRIPTIONS = ("features", "texts")  # what made the features and the text vectors
# Options that say where files lay on the machine of the training. They are left out.
PATHS = (
    "data_path", "vocab_path", "cache_dir", "logger_name", "model_name", "resume", "init_from",
    "cnn_weights", "backbone_path", "device", "texts_path", "word_vectors",
)  # fmt: skip


def file_of(path):
    """The file that stands for a model: of a folder that `write` made, its model.safetensors."""
    weights = os.path.join(path, WEIGHTS)
    return weights if os.path.isfile(weights) else path


def model_type(text):
    """An argparse type: a checkpoint, or a folder that `write` made."""
    return file_of(path_type(text))


def package():
    """The package safetensors with its torch; raises InputError if it is not there."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(
            "model.safetensors needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors


# Writing ----------------------------------------------------------------------------------------


def write(folder, content, vocabulary, figures, card):
    """Write a model to an existing folder.

    content: a checkpoint's dict, as `checkpoint.load` gives it
    figures: what was measured with it, for config.json
    card: the text of README.md
    """
    tensors = {
        f"{part}.{name}": value.detach().clone().contiguous()
        for part, state in zip(PARTS, content["model"])
        for name, value in state.items()
    }
    with replacing(os.path.join(folder, WEIGHTS)) as file:
        file.write(package().torch.save(tensors, {"format": "pt"}))
    names = [WEIGHTS]
    if len(vocabulary):  # a model over text vectors has no words
        write_vocabulary(vocabulary, os.path.join(folder, VOCABULARY))
        names.append(VOCABULARY)
    with replacing(os.path.join(folder, CARD), "w", encoding="utf-8") as file:
        file.write(card)
    config = {
        "format": FORMAT,
        "options": {
            name: value
            for name, value in vars(content["opt"]).items()
            if name not in PATHS and (value is None or type(value) in (bool, int, float, str))
        },
        **{name: content[name] for name in KEPT if name in content},
        **{name: _without_place(content.get(name)) for name in DESCRIPTIONS},
        "figures": figures,
        "sha256": {name: hash_file(os.path.join(folder, name)) for name in names},
    }
    with replacing(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def _without_place(description):
    """A description of features or text vectors, with the file of the weights by its bare name."""
    if not description or not description.get("weights"):
        return description
    return {**description, "weights": os.path.basename(description["weights"])}


# Reading ----------------------------------------------------------------------------------------


def read(path):
    """A checkpoint's dict from a folder, still to be checked; path: its model.safetensors.

    Raises InputError if a file is missing or broken, or is not the one that config.json describes.
    """
    folder = os.path.dirname(path)
    config = _read_config(os.path.join(folder, CONFIG))
    for name, expected in config["sha256"].items():
        _check_hash(os.path.join(folder, name), expected)
    opt = argparse.Namespace()
    vars(opt).update({"logger_name": os.path.basename(os.path.abspath(folder))})
    vars(opt).update(config["options"])
    content = {name: config[name] for name in (*KEPT, *DESCRIPTIONS) if name in config}
    if VOCABULARY in config["sha256"]:
        content["vocabulary"] = read_vocabulary(os.path.join(folder, VOCABULARY)).words
    return {**content, "model": _read_weights(path), "opt": opt}


def _read_config(path):
    config = read_json(path)
    parts = {"format": int, "options": dict, "sha256": dict}
    if not isinstance(config, dict) or not all(
        type(config.get(name)) is kind for name, kind in parts.items()
    ):
        raise InputError(
            f"{path} does not describe a model: make the folder again with compute_results.py "
            "--export"
        )
    if config["format"] > FORMAT:
        raise InputError(
            f"{path} is of format {config['format']}, newer than this program's {FORMAT}: update it"
        )
    if set(config["sha256"]) not in ({WEIGHTS, VOCABULARY}, {WEIGHTS}):
        raise InputError(
            f"{path} lacks the SHA-256 of {WEIGHTS} and {VOCABULARY}: fetch the folder again"
        )
    return config


def _check_hash(path, expected):
    try:
        same = hash_file(path) == expected
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): fetch the folder again"
        ) from error
    if not same:
        raise InputError(
            f"{path} is not the file that {CONFIG} describes, or is damaged: fetch the folder again"
        )


def _read_weights(path):
    """[image state, text state] of a model.safetensors."""
    safetensors = package()
    check_regular(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a file of safetensors, or is cut short ({error}): fetch it again"
        ) from error
    states = {part: {} for part in PARTS}
    for name, value in tensors.items():
        part, _, own = name.partition(".")
        if part not in states:
            raise InputError(
                f"{path} has the weight {name}, and a model's begin with {' or '.join(PARTS)}: "
                "name another file"
            )
        states[part][own] = value
    return [*states.values()]
