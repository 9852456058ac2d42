"""Several processes against one, on this machine.

Gradients, whole runs, faults. Each launch of torchrun takes seconds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compute_results
import extract_features
import reproduce
import train
from runtime.device import choose_device
from runtime.errors import InputError
from tests.helpers import together
from tests.helpers.made import (
    RAW,
    REFERENCE,
    RELEASED,
    ROOT,
    TINY,
    load,
    tree,
    write_flickr,
    write_image,
    write_precomp,
    write_vectors,
)
from tests.helpers.together import check_same_gradients, whole
from tests.test_regions import write_regions

TOGETHER = str(ROOT / "tests" / "helpers" / "together.py")

TRAIN = [
    "--data_name",
    "f8k_precomp",
    "--embed_size",
    "32",
    "--word_dim",
    "16",
    "--batch_size",
    "60",
    "--learning_rate",
    "0.002",
    "--num_epochs",
    "3",
    "--log_step",
    "1",
    "--val_step",
    "50",
    "--device",
    "cpu",
    "--caption_reading",
    "text",
]  # 20 steps an epoch

BANK = ["--memory_bank", "--mb_rate", "0.3", "--mb_k", "40"]

SCAN_RELEASED = REFERENCE / "scan" / "checkpoints"

RUN = "runs/runX/checkpoint.pth.tar"


def torchrun(n, script, *flags, restarts=0):
    """A running torchrun of n processes on this machine."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            "--max-restarts",
            str(restarts),
            str(ROOT / script),
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def ended(process):
    """(exit code of torchrun, stdout, stderr)."""
    said = process.communicate(timeout=300)
    return process.returncode, *said


def workers(process):
    """The process ids of torchrun's workers, in the order of their ranks."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    return sorted(
        int(pid) for pid in found if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()
    )


def read_until(process, words):
    """What torchrun's stderr says up to a line with these words."""
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"never said {words!r}:\n{said}")


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def furthest(one, other):
    """The largest difference of two checkpoints' weights, relative to the largest weight of each tensor."""
    return max(
        float((value - theirs[name]).abs().max() / value.abs().max())
        for state, theirs in zip(one["model"], other["model"])
        for name, value in state.items()
    )


def check_same_run(one, other, weights, losses):
    """Check that two run folders record the same run, up to rounding."""
    contents = [load(Path(folder, "checkpoint.pth.tar")) for folder in (one, other)]
    assert furthest(*contents) <= weights
    logs = [log_of(folder) for folder in (one, other)]
    assert [(line["kind"], line["step"], line["epoch"]) for line in logs[0]] == [
        (line["kind"], line["step"], line["epoch"]) for line in logs[1]
    ]
    recalls = ["r1", "r5", "r10", "r1i", "r5i", "r10i", "rsum"]
    for mine, theirs in zip(*logs):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=losses)
        assert [mine.get(name) for name in recalls] == [theirs.get(name) for name in recalls]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the released code's data, vocabulary and runs."""
    for name in ("data", "vocab", "runs"):
        shutil.copytree(RELEASED / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Gradients --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """What four processes found for each of together.CASES, and of RANKINGS."""
    out = tmp_path_factory.mktemp("computed") / "found"
    code, _, said = ended(torchrun(4, TOGETHER, "compute", str(out)))
    assert code == 0, said
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("name", together.CASES)
def test_four_processes_have_one_s_gradients(name, of_four):
    check_same_gradients(of_four[name], whole(name), 1e-10 if "cnn" in name else 1e-12)


def test_all_processes_have_the_same_to_the_bit(of_four):
    assert of_four["equal"]


@pytest.mark.parametrize("number", range(len(together.RANKINGS)))
def test_four_processes_rank_as_one_to_the_bit(number, of_four):
    expected = together.rankings_of(*together.RANKINGS[number])
    for mine, theirs in zip(of_four["rankings"][number], expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.ranks, other.ranks) and torch.equal(one.items, other.items)


# Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A folder with runs of one process: the bank, in float32; max-margin by order, in float64."""
    folder, here = tmp_path_factory.mktemp("one"), os.getcwd()
    shutil.copytree(RELEASED / "data", folder / "data")
    os.chdir(folder)
    try:
        train.main([*TRAIN, *BANK, "--logger_name", "bank"])
    finally:
        os.chdir(here)
    return folder


def test_two_processes_train_as_one_with_the_bank(folder, one_process):
    code, out, said = ended(torchrun(2, "train.py", *TRAIN, *BANK))
    assert code == 0, said
    check_same_run(one_process / "bank", "runs/runX", 3e-5, 1e-6)
    assert out.count("rsum") == 4 and said.count("Memory bank: ") == 2  # one process speaks
    record = json.loads(Path("runs/runX/run.json").read_text())
    assert (record["processes"], record["backend"], record["result"]["outcome"]) == (
        2,
        "gloo",
        "finished",
    )


def test_two_processes_train_as_one_in_bf16(folder):
    flags = [*TRAIN, "--amp", "bf16", "--learning_rate", "0.0002", "--num_epochs", "1"]
    code, _, said = ended(torchrun(2, "train.py", *flags))
    assert code == 0, said
    train.main([*flags, "--logger_name", "runs/one"])
    assert (
        furthest(*(load(Path(run, "checkpoint.pth.tar")) for run in ("runs/one", "runs/runX")))
        <= 1e-2
    )


def test_text_vectors_train_on_two_processes_in_pieces_as_on_one(folder):
    write_precomp(Path("data/tiny_precomp"))
    write_vectors("data/tiny_precomp")
    flags = ["--text_features", "--data_name", "tiny_precomp", "--embed_size", "8", "--log_step"]
    flags += ["1", "--batch_size", "16", "--loss", "hal+infonce", "--num_epochs", "2"]
    flags += ["--device", "cpu", "--txt_layers", "2"]
    code, _, said = ended(torchrun(2, "train.py", *flags, "--micro_batch", "3"))
    assert code == 0, said
    train.main([*flags, "--logger_name", "runs/one"])
    # The loss is about 6, where float32 has steps of 5e-7.
    check_same_run("runs/one", "runs/runX", 3e-5, 1e-5)


@pytest.fixture
def in_double(monkeypatch):
    """train.py in this process computes in float64, as `together.py double` does."""
    for where, name in (
        (train, "build_model"),
        (together.data.PrecompDataset, "_rows"),
        (together.data.ImageDataset, "image"),
    ):
        monkeypatch.setattr(where, name, getattr(where, name))  # put back at the end
    together.in_double()


def test_four_processes_train_as_one_in_double(folder, in_double):
    flags = [
        *TRAIN,
        "--num_epochs",
        "1",
        "--max_violation",
        "--measure",
        "order",
        "--use_abs",
        "--batch_size",
        "109",
    ]
    code, _, said = ended(
        torchrun(4, TOGETHER, "double", *flags)
    )  # 1200 pairs: the last batch has one
    assert code == 0, said
    train.main([*flags, "--logger_name", "runs/one"])
    check_same_run("runs/one", "runs/runX", 1e-10, 1e-12)
    assert load(RUN)["model"][0]["fc.weight"].dtype == torch.float64


def test_regions_and_words_train_on_three_processes_and_in_pieces_as_on_one(folder, in_double):
    write_regions(folder / "data" / "tiny_precomp")
    flags = [
        *TINY,
        "--cross_attn",
        "t2i",
        "--bi_gru",
        "--drop_words",
        "0.2",
        "--drop_regions",
        "0.4",
        "--log_step",
        "1",
    ]  # 60 captions: 16, 16, 16, 12
    code, _, said = ended(torchrun(3, TOGETHER, "double", *flags, "--micro_batch", "3"))
    assert code == 0, said
    train.main([*flags, "--logger_name", "runs/one"])
    check_same_run("runs/one", "runs/runX", 1e-10, 1e-12)
    train.main([*flags, "--logger_name", "runs/pieces", "--micro_batch", "5"])
    check_same_run("runs/one", "runs/pieces", 1e-10, 1e-12)


def test_photos_train_on_three_processes_as_on_one(folder, in_double):
    write_flickr(Path("data/f8k"))
    flags = [
        *RAW,
        "--data_name",
        "f8k",
        "--finetune",
        "--crop_size",
        "64",
        "--batch_size",
        "9",
    ]  # 20 captions: 9, 9, 2
    code, _, said = ended(torchrun(3, TOGETHER, "double", *flags))
    assert code == 0, said
    train.main([*flags, "--logger_name", "runs/one"])
    assert (
        furthest(*(load(Path(run, "checkpoint.pth.tar")) for run in ("runs/one", "runs/runX")))
        <= 1e-7
    )
    Path("data/f8k/images/2.png").write_bytes(b"broken")
    code, _, said = ended(torchrun(3, "train.py", *flags, "--logger_name", "runs/broken"))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code and len(errors) == 1 and "2.png cannot be read" in errors[0], said
    assert set(re.findall(r"exitcode +: (-?\d+)", said)) == {"2"}, said


def test_a_signal_to_one_process_stops_all_and_other_numbers_of_processes_go_on(
    folder, one_process
):
    process = torchrun(3, "train.py", *TRAIN, *BANK)
    read_until(process, "Epoch: [1][3/20]")
    os.kill(workers(process)[1], signal.SIGTERM)
    code, _, said = ended(process)
    assert code == 0 and said.count("Stopped. Go on with") == 1, said
    stopped_at = load(RUN)["Eiters"]
    assert 23 < stopped_at < 60 and log_of("runs/runX")[-1]["step"] == stopped_at
    train.main([*TRAIN, *BANK, "--resume", "auto", "--num_epochs", "2", "--micro_batch", "25"])
    code, _, said = ended(
        torchrun(2, "train.py", *TRAIN, *BANK, "--resume", "auto", "--dist_timeout", "60")
    )
    assert code == 0, said
    check_same_run(one_process / "bank", "runs/runX", 3e-5, 1e-6)


def test_a_process_that_is_killed_is_started_again_and_the_run_ends_the_same(folder, one_process):
    process = torchrun(
        2, "train.py", *TRAIN, *BANK, "--resume", "auto", "--save_step", "1", restarts=1
    )
    read_until(process, "Epoch: [1][5/20]")
    os.kill(workers(process)[1], signal.SIGKILL)
    code, _, said = ended(process)
    assert code == 0 and "Resumed" in said, said
    assert re.search(r"error: process 0 of 2: another one is gone", said)
    check_same_run(one_process / "bank", "runs/runX", 3e-5, 1e-6)


@pytest.mark.parametrize("run", ["mb"])
def test_an_evaluation_by_three_processes_prints_the_released_lines_once(folder, run):
    code, out, said = ended(
        torchrun(
            3,
            "compute_results.py",
            "--model_path",
            f"runs/{run}/model_best.pth.tar",
            "--data_path",
            "data",
            "--vocab_path",
            "vocab",
            "--device",
            "cpu",
        )
    )
    assert code == 0, said
    assert out.splitlines() == json.loads((RELEASED / "expected.json").read_text())[run]["printed"]
    assert Path("ranks.pth.tar").exists()


@pytest.mark.parametrize("run", ["t2i"])
def test_an_evaluation_of_regions_by_two_processes_prints_what_one_does_once(
    tmp_path, monkeypatch, capsys, run
):
    for name in ("data", "vocab", "runs"):
        shutil.copytree(SCAN_RELEASED / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model_path",
        f"runs/{run}/model_best.pth.tar",
        "--device",
        "cpu",
        "--hubness",
        "--correction",
        "qbnorm",
        "--correction_bank_images",
        "9",
    ]
    code, out, said = ended(torchrun(2, "compute_results.py", *flags))
    assert code == 0, said
    expected = json.loads((SCAN_RELEASED / "expected.json").read_text())[run]["printed"][3:]
    assert out.splitlines()[: len(expected)] == expected
    compute_results.main(flags)
    assert out == capsys.readouterr().out


def test_photos_encoded_by_two_processes_are_those_of_one(
    tmp_path, monkeypatch
):  # one block of photos: one waits
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    flags = [
        "--images",
        "photos",
        "--encoder",
        "shufflenet_v2_x0_5",
        "--encoder_weights",
        "none",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    code, out, said = ended(torchrun(2, "extract_features.py", *flags, "--output", "together"))
    assert code == 0 and out.count("gallery photos") == 1 and said.count("photos a second") == 1, (
        said
    )
    extract_features.main([*flags, "--output", "alone"])
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, sentence",
    [
        ("train.py", [*TRAIN, "--batch_size", "1"], "--batch_size 1 is too small for 2 processes"),
        (TOGETHER, ["differing", "--no_such_flag", "1", *TRAIN], "--no_such_flag"),
        (
            TOGETHER,
            ["differing", "--margin", "0.3", *TRAIN],
            "the processes differ in --margin: give all of them the same",
        ),
    ],
)
def test_bad_input_ends_all_processes_with_one_sentence(folder, script, flags, sentence):
    code, out, said = ended(torchrun(2, script, *flags))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code and not out and len(errors) == 1 and sentence in errors[0], said
    # Older torchruns list the first failure alone.
    assert set(re.findall(r"exitcode +: (-?\d+)", said)) == {"2"}, said
    assert not Path("runs/runX").exists()


@pytest.mark.parametrize(
    "name, reason", [("cuda:3", "each process takes one GPU of its machine"), ("mps", "torchrun")]
)
def test_a_device_that_processes_cannot_share_is_refused(name, reason, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    with pytest.raises(InputError, match=reason):
        choose_device(name)
    assert choose_device("cpu") == torch.device("cpu")


def test_reproduce_is_refused_under_torchrun(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"TORCHELASTIC_RUN_ID": "some", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="starts its runs itself"):
        reproduce.main([])
    assert not list(tmp_path.iterdir())
