"""Shared fixtures: tiny data sets of every layout, working folders, and both scripts' runs."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import device

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).resolve().parent / "reference"
RELEASED = REFERENCE / "released_checkpoints"
ANIMALS, COLOURS = ("dog", "cat", "horse", "bird"), ("red", "blue", "green")
PLACES = ("on the grass", "near a river", "in the snow")
SPLITS = {"train": 12, "dev": 5, "test": 6, "testall": 10}
IMG_DIM = 8
TINY = ["--data_name", "tiny_precomp", "--vocab_path", "vocab", "--word_dim", "6", "--embed_size", "8",
        "--batch_size", "16", "--learning_rate", "0.01", "--device", "cpu", "--num_epochs", "2"]
RAW = ["--word_dim", "6", "--embed_size", "8", "--batch_size", "8", "--num_epochs", "1", "--vocab_path", "vocab",
       "--cnn_type", "resnet18", "--cnn_weights", "none", "--crop_size", "32", "--device", "cpu", "--workers", "0"]

MODELS = {"vse": ["--data_name", "vectors_precomp"], "t2i": ["--data_name", "regions_precomp", "--cross_attn", "t2i"],
          "i2t": ["--data_name", "regions_precomp", "--cross_attn", "i2t", "--agg_func", "Mean", "--bi_gru"]}


def pytest_configure(config):
    """One thread: the tensors are tiny, and threads that wait for each other take most of a busy machine's time.

    The TensorBoard writer is older than the protobuf and SciPy it works with.
    """
    torch.set_num_threads(1)
    # Nothing is chosen by the clock here, nor is each run's time spent on it: oneDNN's products where they are exact.
    device._timed = lambda kinds, rows, width: {kind: 1.0 if kind == "medium" else 2.0 for kind in kinds}
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:tensorboard_logger.*")


def captions_of(image):
    """Five captions of image number `image`."""
    animal, colour = ANIMALS[image % 4], COLOURS[image % 3]
    place = PLACES[image // 4 % 3]
    return [f"A {colour} {animal} {place}.", f"The {animal} is {colour}.", f"{place}, there is a {animal}.",
            f"One {colour} {animal}", f"A {animal} {place}, and it is {colour} all over."]


def write_precomp(folder, splits=None, width=IMG_DIM, dtype=np.float32):
    """A precomputed data set with random features."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for split, images in (splits or SPLITS).items():
        np.save(folder / f"{split}_ims.npy", rng.standard_normal((images, width)).astype(dtype))
        lines = [caption for image in range(images) for caption in captions_of(image)]
        (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_image(path, number):
    """A PNG of odd size, in one of four modes."""
    rng = np.random.default_rng(number)
    height, width, mode = 33 + number, 47 - number, ("RGB", "L", "RGBA", "P")[number % 4]
    pixels = rng.integers(0, 256, (height, width, {"RGB": 3, "RGBA": 4}.get(mode, 1)), dtype=np.uint8)
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
            images.append({"filename": f"{number}.png", "split": split,
                           "sentences": [{"raw": caption} for caption in captions_of(number)]})
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images}), encoding="utf-8")


def write_coco(folder):
    """A raw-image data set in COCO's layout: four train images, and two each of dev, test and restval."""
    annotations = folder / "annotations"
    annotations.mkdir(parents=True)
    for source, numbers in {"train": range(4), "val": range(4, 10)}.items():
        images, captions = [], []
        for number in numbers:
            name = f"COCO_{source}2014_{number:012d}.png"
            write_image(folder / "images" / f"{source}2014" / name, number)
            images.append({"id": 1000 + number, "file_name": name})
            captions += [{"id": 10 * number + place, "image_id": 1000 + number, "caption": caption}
                         for place, caption in enumerate(captions_of(number))]
        content = {"images": images, "annotations": captions}
        (annotations / f"captions_{source}2014.json").write_text(json.dumps(content), encoding="utf-8")
    for split, numbers in {"train": (2, 0, 3, 1), "dev": (4, 5), "test": (7, 6), "restval": (8, 9)}.items():
        ids = [10 * number + place for number in numbers for place in range(5)]
        np.save(annotations / f"coco_{split}_ids.npy", np.array(ids))


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory):
    """A data folder with every layout; not to be changed."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_precomp(folder / "tiny_precomp")
    write_flickr(folder / "f8k")
    write_coco(folder / "coco")
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch, drawn_data):
    """An empty current folder but for `data`, a copy that a test may break."""
    shutil.copytree(drawn_data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder with room for so many kilobytes; needs the right to mount."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here: that takes root on Linux")
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def released(request, tmp_path, monkeypatch):
    """A current folder with the released code's data, vocabulary and runs, from where the test's module says."""
    for name in ("data", "vocab", "runs"):
        shutil.copytree(request.module.RELEASED / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, drawn_data):
    """A folder in which two epochs with the bank were trained; not to be changed."""
    import train
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(drawn_data, folder / "data")
    here = os.getcwd()
    os.chdir(folder)
    try:
        train.main([*TINY, "--memory_bank", "--mb_rate", "0.5", "--mb_k", "5"])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def evaluated(tmp_path, monkeypatch, trained):
    """A current folder with a copy of the trained run and its data."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def three_models(tmp_path_factory):
    """A folder with vectors and regions of the same twenty test images, and a run of each kind; not to be changed."""
    from test_regions import write_regions

    import train
    folder = tmp_path_factory.mktemp("models")
    splits = {"train": 12, "dev": 5, "test": 20}
    write_precomp(folder / "data" / "vectors_precomp", splits)
    write_regions(folder / "data" / "regions_precomp", splits.items())
    here = os.getcwd()
    os.chdir(folder)
    try:
        for name, flags in MODELS.items():
            train.main([*TINY, "--num_epochs", "1", "--logger_name", f"runs/{name}", *flags])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch, three_models):
    """A current folder with a copy of the three runs and their data."""
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(name, *flags, cwd, **environment):
    """A script's run as a subprocess, with its output as text."""
    return subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=False)


def in_shell(command, cwd, **environment):
    """A Python command line with what a shell understands after it, such as 2>&-; ends with Python's exit code."""
    return subprocess.run(["bash", "-c", f"{sys.executable} {command}; exit ${{PIPESTATUS[0]}}"], cwd=cwd, text=True,
                          capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                          check=False)


def tree(folder):
    """{relative path: content} of every file, and None for every folder, below `folder`.

    Without the cache of tokenized captions, which goes by content and is whole at any time.
    """
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*")) if ".cache" not in path.parts}


def load(path):
    """A checkpoint as anyone's code opens it, without this project's reader."""
    return torch.load(path, map_location="cpu", weights_only=False)


def states_equal(one, other):
    """Whether two lists of states are the same to the bit."""
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other))


def scalars(folder):
    """[(tag, step, value)] of the TensorBoard event files in a folder, read without TensorBoard."""
    found = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            length = struct.unpack_from("<Q", content, place)[0]
            event = dict(_fields(content[place + 12:place + 12 + length]))
            for number, value in _fields(event.get(5, b"")):
                if number == 1:
                    value = dict(_fields(value))
                    found.append((value[1].decode(), event.get(2, 0), struct.unpack("<f", value[2])[0]))
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
            value, place = message[place:place + length], place + length
        yield key >> 3, value


def _varint(message, place):
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
