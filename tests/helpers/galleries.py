"""Galleries for tests: models to build them with, and the script search.py."""

import argparse
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import extract_features
import search
import train
from evaluation import load_for_evaluation
from features import blocks, encoders
from gallery import store
from gallery.open import open_searcher
from tests.helpers.made import TINY, captions_of, load, write_image

MODEL = "runs/runX/model_best.pth.tar"

VSE_RUN, SCAN_RUN = "vse", "t2i"

TEST = ["--precomp", "data/tiny_precomp", "--index", "g", "--device", "cpu"]

PHOTOS = [
    "--images",
    "photos",
    "--index",
    "g",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--batch_size",
    "3",
]

ODD = os.fsdecode(b"odd \xff'\".png")

QUESTION = "a red dog in the snow"


def results(capsys):
    """The answers that were printed with --json."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def ask(*flags):
    search.main([*flags])


def files_of(folder):
    """{name: content} of a gallery's arrays."""
    found = Path(folder) / store.describe(str(folder))["files"]
    return {path.name: path.read_bytes() for path in found.iterdir()}


@pytest.fixture
def loaded(evaluated):
    """The trained checkpoint."""
    return load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))


def searcher_of(*flags):
    return open_searcher(search.parse_args([*flags]))


def without_normalisation(path=MODEL):
    """Make a checkpoint one of a model trained with --no_imgnorm."""
    content = load(path)
    content["opt"].no_imgnorm = True
    torch.save(content, path)


encoder_once = functools.cache(encoders.build_encoder)


@pytest.fixture(scope="session")
def photo_run(tmp_path_factory):
    """A folder with twelve captioned photos and a model of them; not to be changed."""
    folder = tmp_path_factory.mktemp("photo_run")
    here = os.getcwd()
    os.chdir(folder)
    try:
        rows = ["image,caption,split"]
        for number in range(12):
            write_image(folder / "photos" / "deep" / f"{number}.png", number)
            rows += [
                f'deep/{number}.png,"{caption}",{("train", "dev", "test")[number // 4]}'
                for caption in captions_of(number)
            ]
        (folder / "captions.csv").write_text("".join(f"{row}\n" for row in rows))
        extract_features.main(
            [
                "--images",
                "photos",
                "--captions",
                "captions.csv",
                "--output",
                "data/mine_precomp",
                "--encoder",
                "shufflenet_v2_x0_5",
                "--encoder_weights",
                "none",
                "--workers",
                "0",
            ]
        )
        train.main([*TINY, "--data_name", "mine_precomp", "--num_epochs", "1"])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch, photo_run):
    """A current folder with a copy of it; small blocks, and encoders built once."""
    shutil.copytree(photo_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoders, "build_encoder", encoder_once)
    monkeypatch.setattr(blocks, "BLOCK_PHOTOS", 4)
    return tmp_path
