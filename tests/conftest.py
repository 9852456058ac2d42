"""Shared fixtures: tiny data sets of every layout, working folders, and both scripts' runs."""

import os
import shutil
import subprocess

import pytest
import torch

from runtime import device
from tests.helpers.comparisons import drawn, rates, scripts  # noqa: F401 (fixtures)
from tests.helpers.galleries import loaded, photo_run, photos  # noqa: F401 (fixtures)
from tests.helpers.made import MODELS, TINY, write_coco, write_flickr, write_precomp


def pytest_configure(config):
    """One thread: the tensors are tiny, and threads that wait for each other take most of a busy machine's time.

    The TensorBoard writer is older than the protobuf and SciPy it works with.
    """
    torch.set_num_threads(1)
    # Nothing is chosen by the clock here, nor is each run's time spent on it: oneDNN's products
    # where they are exact.
    device._timed = lambda kinds, rows, width: {
        kind: 1.0 if kind == "medium" else 2.0 for kind in kinds
    }
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:tensorboard_logger.*")


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
    """A function that makes a folder with room for that many kilobytes.

    Skips the test without the right to mount.
    """
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
    """A current folder with a copy of the data, vocabulary and runs in the test module's RELEASED."""
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
    """A folder with vectors and regions of the same twenty test images, and a run of each kind.

    Not to be changed.
    """
    import train
    from tests.test_regions import write_regions

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
