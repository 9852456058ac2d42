"""A folder of small photos and the script extract_features.py on it, for tests."""

import functools

import numpy as np
from PIL import Image

from extract_features import main
from features.encoders import build_encoder

SMALL = [
    "--encoder",
    "shufflenet_v2_x0_5",
    "--encoder_weights",
    "none",
    "--device",
    "cpu",
    "--workers",
    "0",
]

SAMPLE = ["--encoder", "sample", "--workers", "0"]


def draw_photo(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@functools.cache
def build_once(*flags):
    return build_encoder(*flags)


def extract(*flags, output="out", encoder=SMALL):
    main(["--images", "photos", "--output", output, *encoder, *flags])


def lines(path):
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
