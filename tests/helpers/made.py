"""Tiny data sets of every layout, and functions that run scripts and read their output."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from features.text_description import hash_captions
from inputs.captions import read_captions

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = ROOT / "tests" / "reference"

RELEASED = REFERENCE / "released_checkpoints"

ANIMALS, COLOURS = ("dog", "cat", "horse", "bird"), ("red", "blue", "green")

PLACES = ("on the grass", "near a river", "in the snow")

TEXT_WIDTH = 6

SPLITS = {"train": 12, "dev": 5, "test": 6, "testall": 10}

IMG_DIM = 8

TINY = [
    "--data_name",
    "tiny_precomp",
    "--vocab_path",
    "vocab",
    "--word_dim",
    "6",
    "--embed_size",
    "8",
    "--batch_size",
    "16",
    "--learning_rate",
    "0.01",
    "--device",
    "cpu",
    "--num_epochs",
    "2",
]

RAW = [
    "--word_dim",
    "6",
    "--embed_size",
    "8",
    "--batch_size",
    "8",
    "--num_epochs",
    "1",
    "--vocab_path",
    "vocab",
    "--cnn_type",
    "resnet18",
    "--cnn_weights",
    "none",
    "--crop_size",
    "32",
    "--device",
    "cpu",
    "--workers",
    "0",
]

# benchmark.py on data so small that it takes no time.
BENCHMARK = [
    "--images",
    "12",
    "--img_dim",
    "8",
    "--embed_size",
    "8",
    "--batch_size",
    "10",
    "--step_batch",
    "10",
    "--eval_images",
    "10",
    "--repeats",
    "1",
    "--device",
    "cpu",
]

MODELS = {
    "vse": ["--data_name", "vectors_precomp"],
    "t2i": ["--data_name", "regions_precomp", "--cross_attn", "t2i"],
    "i2t": [
        "--data_name",
        "regions_precomp",
        "--cross_attn",
        "i2t",
        "--agg_func",
        "Mean",
        "--bi_gru",
    ],
}

# The released code's flags that train.py keeps, and their defaults.
DEFAULTS = {
    "vocab_path": "./vocab/",
    "margin": 0.2,
    "num_epochs": 15,
    "batch_size": 128,
    "word_dim": 300,
    "embed_size": 1024,
    "grad_clip": 2.0,
    "crop_size": 224,
    "num_layers": 1,
    "learning_rate": 0.0002,
    "lr_update": 8,
    "workers": 10,
    "log_step": 10,
    "val_step": 500,
    "logger_name": "runs/runX",
    "resume": "",
    "max_violation": False,
    "sum_violation": False,
    "finetune": False,
    "cnn_type": "vgg19",
    "use_restval": False,
    "measure": "cosine",
    "use_abs": False,
    "no_imgnorm": False,
    "reset_train": False,
    "save_all": False,
    "memory_bank": False,
    "record_val": False,
    "local_alpha": 30.0,
    "local_ep": 0.3,
    "global_alpha": 40.0,
    "global_beta": 40.0,
    "global_ep_posi": 0.2,
    "global_ep_nega": 0.1,
    "mb_k": 250,
    "mb_rate": 0.05,
    "seed": 0,
    "data_path": "data",
    "data_name": "sample_precomp",
}


def captions_of(image):
    """Five captions of image number `image`."""
    animal, colour = ANIMALS[image % 4], COLOURS[image % 3]
    place = PLACES[image // 4 % 3]
    return [
        f"A {colour} {animal} {place}.",
        f"The {animal} is {colour}.",
        f"{place}, there is a {animal}.",
        f"One {colour} {animal}",
        f"A {animal} {place}, and it is {colour} all over.",
    ]


def write_precomp(folder, splits=None, width=IMG_DIM, dtype=np.float32):
    """A precomputed data set with random features."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for split, images in (splits or SPLITS).items():
        np.save(folder / f"{split}_ims.npy", rng.standard_normal((images, width)).astype(dtype))
        lines = [caption for image in range(images) for caption in captions_of(image)]
        (folder / f"{split}_caps.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )


def write_vectors(data, folder=None, described=False):
    """{split}_txts.npy of a data set, in its folder or another: random, alike for equal captions."""
    rng, known, hashes, folder = np.random.default_rng(3), {}, {}, Path(folder or data)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(data).glob("*_caps.txt")):
        split, captions = path.name.removesuffix("_caps.txt"), read_captions(str(path))
        rows = [known.setdefault(one, rng.standard_normal(TEXT_WIDTH)) for one in captions]
        np.save(folder / f"{split}_txts.npy", np.array(rows, np.float16))
        hashes[split] = hash_captions(captions)
    if described:
        content = {
            "format": 1,
            "encoder": "sentence_transformers/some",
            "weights_sha256": "0" * 64,
            "width": TEXT_WIDTH,
            "normalised": False,
            "captions_sha256": hashes,
        }
        (folder / "texts.json").write_text(json.dumps(content))


def write_image(path, number):
    """A PNG of odd size, in one of four modes."""
    rng = np.random.default_rng(number)
    height, width, mode = 33 + number, 47 - number, ("RGB", "L", "RGBA", "P")[number % 4]
    pixels = rng.integers(
        0, 256, (height, width, {"RGB": 3, "RGBA": 4}.get(mode, 1)), dtype=np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels.squeeze())
    if mode == "P":
        picture = picture.convert("P")
    picture.save(path)


def write_flickr(folder, name="flickr8k", splits=(("train", 4), ("val", 2), ("test", 5))):
    """A raw-image data set in the Karpathy layout."""
    images = []
    for split, count in splits:
        for _ in range(count):
            number = len(images)
            write_image(folder / "images" / f"{number}.png", number)
            images.append(
                {
                    "filename": f"{number}.png",
                    "split": split,
                    "sentences": [{"raw": caption} for caption in captions_of(number)],
                }
            )
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images}), encoding="utf-8")


def write_coco(folder):
    """A raw-image data set in COCO's layout.

    Four train images, and two each of dev, test and restval.
    """
    annotations = folder / "annotations"
    annotations.mkdir(parents=True)
    for source, numbers in {"train": range(4), "val": range(4, 10)}.items():
        images, captions = [], []
        for number in numbers:
            name = f"COCO_{source}2014_{number:012d}.png"
            write_image(folder / "images" / f"{source}2014" / name, number)
            images.append({"id": 1000 + number, "file_name": name})
            captions += [
                {"id": 10 * number + place, "image_id": 1000 + number, "caption": caption}
                for place, caption in enumerate(captions_of(number))
            ]
        content = {"images": images, "annotations": captions}
        (annotations / f"captions_{source}2014.json").write_text(
            json.dumps(content), encoding="utf-8"
        )
    for split, numbers in {
        "train": (2, 0, 3, 1),
        "dev": (4, 5),
        "test": (7, 6),
        "restval": (8, 9),
    }.items():
        ids = [10 * number + place for number in numbers for place in range(5)]
        np.save(annotations / f"coco_{split}_ids.npy", np.array(ids))


def run_script(name, *flags, cwd, **environment):
    """A script's run as a subprocess, with its output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def in_shell(command, cwd, **environment):
    """Run a Python command line in a shell, with redirections such as 2>&-.

    Exits with Python's code.
    """
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} {command}; exit ${{PIPESTATUS[0]}}"],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def tree(folder):
    """{relative path: content} of every file, and None for every folder, below `folder`.

    The cache of tokenized captions is left out: its name depends on its content, and it is always whole.
    """
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
        if ".cache" not in path.parts
    }


def load(path):
    """A checkpoint opened by PyTorch alone, without this project's reader."""
    return torch.load(path, map_location="cpu", weights_only=False)


def states_equal(one, other):
    """Whether two lists of states are the same to the bit."""
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other)
    )


def scalars(folder):
    """[(tag, step, value)] of the TensorBoard event files in a folder, read without TensorBoard."""
    found = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            length = struct.unpack_from("<Q", content, place)[0]
            event = dict(_fields(content[place + 12 : place + 12 + length]))
            for number, value in _fields(event.get(5, b"")):
                if number == 1:
                    value = dict(_fields(value))
                    found.append(
                        (value[1].decode(), event.get(2, 0), struct.unpack("<f", value[2])[0])
                    )
            place += 16 + length
    return found


def _fields(message):
    """(number, value) of a protocol buffer message's fields."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
        else:
            if kind == 2:
                length, place = _varint(message, place)
            else:
                length = {1: 8, 5: 4}[kind]
            value, place = message[place : place + length], place + length
        yield key >> 3, value


def _varint(message, place):
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def write(path, content):
    """Write text or bytes to a Path; its name as text."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)
