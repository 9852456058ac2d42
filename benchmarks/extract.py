"""benchmark.py's part "extract": does decoding keep up, so that the encoder never waits?

extract_features.py is run as a command on photos, and prints how long its first batch took and how
fast the others were. The reference is the encoder alone, in this process, on one batch of pictures
in memory, over and over.
"""

import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import row, spread, watched
from features.encoders import build_encoder, encode
from inputs.photos import photo_names
from runtime.errors import InputError

ENCODER, BATCH = "resnet18", 32
PHOTOS, SIZE, QUALITY = 512, (500, 375), 90  # of the made-up photos; SIZE is Flickr's
BLURRED = 8  # side, in pixels, of the smooth spots of a made-up photo
GRAIN = 6  # standard deviation of its noise, on a scale of 0 to 255
SAID = re.compile(
    r"(\d+) photos encoded: the first batch took ([\d.]+) s, then ([\d.]+) photos a second"
)


def make_photos(folder):
    """Write PHOTOS JPEG files of smooth noise with grain, about as slow to decode as photos."""
    rng = np.random.default_rng(6)
    for number in range(PHOTOS):
        small = rng.integers(0, 256, (SIZE[1] // BLURRED, SIZE[0] // BLURRED, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC))
        grainy = smooth + GRAIN * rng.standard_normal(smooth.shape)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(
            os.path.join(folder, f"{number:04d}.jpg"), quality=QUALITY
        )


def extract(photos, output, device):
    """(Photos encoded, seconds to the first batch, seconds a photo after it, seconds in all)."""
    script = os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "extract_features.py"
    )
    start = time.perf_counter()
    child = subprocess.run(
        [
            sys.executable,
            script,
            "--images",
            photos,
            "--captions",
            "none",
            "--output",
            output,
            "--encoder",
            ENCODER,
            "--encoder_weights",
            "none",
            "--batch_size",
            str(BATCH),
            "--device",
            str(device),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    seconds, said = time.perf_counter() - start, SAID.search(child.stderr)
    if child.returncode or not said:
        raise InputError(
            f"the photos could not be encoded, or are of one batch: {child.stderr.strip()[-300:]}"
        )
    return int(said[1]), float(said[2]), 1 / float(said[3]), seconds


def encoder_alone(encoder, pictures, batches, timer):
    """Seconds a picture, over `batches` batches, with extract_features.py's float32 products."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    seconds = timer.seconds(lambda: [encode(encoder, pictures) for _ in range(batches)])
    torch.set_float32_matmul_precision(chosen)
    return seconds / batches / len(pictures)


def bench_extract(options, timer):
    """Yield the part's lines, {title: line}."""
    encoder = build_encoder(ENCODER, "none", device=timer.device)
    pictures = torch.randint(
        0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(6)
    )
    encode(encoder, pictures)
    rounds, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        photos = options.photos or os.path.join(folder, "photos")
        if not options.photos:
            os.makedirs(photos)
            make_photos(photos)
        if len(photo_names(photos)) <= BATCH:
            raise InputError(
                f"--photos {photos} has no more than a batch of {BATCH}: name a folder with more"
            )
        for number in watched(range(timer.repeats)):
            rounds.append(extract(photos, os.path.join(folder, str(number)), timer.device))
            alone.append(encoder_alone(encoder, pictures, -(-rounds[-1][0] // BATCH), timer))
    _, starts, paces, totals = zip(*rounds)
    name = f"extraction by {ENCODER}, {rounds[0][0]} photos"
    yield {
        f"{name}: a photo between first and last batch (ms; reference: the encoder alone)": row(
            paces, alone, 1e-3
        ),
        f"{name}: start, until the first batch is encoded (s)": {"ours": spread(starts)},
        f"{name}: in all, as a command (s)": {"ours": spread(totals)},
    }
