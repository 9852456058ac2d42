"""A run that is killed, or whose disk fills up, again and again ends as if that had never been.

python -m pytest -m soak -s  # minutes
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from inputs import sample_data
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent

ROUNDS, DISK_ROUNDS, KILLS = 30, 5, 20

FLAGS = [
    "--data_name",
    "sample_precomp",
    "--embed_size",
    "48",
    "--word_dim",
    "24",
    "--batch_size",
    "32",
    "--learning_rate",
    "0.001",
    "--num_epochs",
    "12",
    "--log_step",
    "1",
    "--save_step",
    "1",
    "--val_step",
    "25",
    "--memory_bank",
    "--mb_k",
    "20",
    "--device",
    "cpu",
]


def start(folder, *flags):
    """A train.py process in `folder`."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *FLAGS, *flags],
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """The process's exit code, with its output if that is not 0."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


@pytest.fixture
def undisturbed(tmp_path):
    """A folder with the data and an undisturbed run, runs/whole."""
    sample_data.draw(tmp_path / "data")
    finish(start(tmp_path, "--logger_name", "runs/whole"))
    return tmp_path


def differing(one, other):
    """How many tensors of two checkpoints' models differ."""
    return sum(
        not torch.equal(value, theirs[key])
        for state, theirs in zip(one["model"], other["model"])
        for key, value in state.items()
    )


@pytest.mark.soak
def test_killed_runs_resume_exactly(undisturbed):
    tmp_path = undisturbed
    run, rng = tmp_path / "runs" / "killed", random.Random(7)
    kills = kills_in_save = 0
    while kills < ROUNDS:
        process = start(tmp_path, "--logger_name", "runs/killed", "--resume", "auto")
        for line in process.stderr:  # the start takes seconds of imports: kill some time after it
            if line.startswith(("Resumed", "Epoch")):
                break
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is not None:
            break  # it has come to its end
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        kills_in_save += bool(list(run.glob("*.tmp")))
    finish(start(tmp_path, "--logger_name", "runs/killed", "--resume", "auto"))

    whole, killed = (
        checkpoint.load(str(tmp_path / "runs" / name / "checkpoint.pth.tar"))
        for name in ("whole", "killed")
    )
    mismatches = differing(whole, killed)
    logs = [
        [
            json.loads(line)
            for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    steps, expected = (
        [line["step"] for line in log if line["kind"] == "step"] for log in reversed(logs)
    )
    lost, doubled = len(set(expected) - set(steps)), len(steps) - len(set(steps))
    print(
        f"\n{kills} kills, {kills_in_save} during a save; {mismatches} tensors differ; "
        f"{lost} log lines lost, {doubled} doubled"
    )
    assert kills >= ROUNDS and mismatches == lost == doubled == 0 and steps == expected
    assert logs[0] == logs[1]
    assert whole["best_rsum"] == killed["best_rsum"] and whole["Eiters"] == killed["Eiters"]
    assert not list(run.glob("*.tmp"))
    assert not [name for name in os.listdir(run) if "tmp" in name]


def fill(disk):
    """Leave no room on it."""
    # The run may take the room in the meantime: then the disk is full as well.
    with suppress(OSError), open(disk / "filler", "ab", buffering=0) as filler:
        while free := shutil.disk_usage(disk).free:
            filler.write(bytes(free))


def said_until(process, wanted, disk=None):
    """Read a process's output up to a line with one of the words, keeping the disk full meanwhile, if one is given."""
    for line in process.stderr:
        if disk:
            fill(disk)
        if any(word in line for word in wanted):
            return line
    raise AssertionError(f"it ended with {process.wait()} and never said {wanted}")


@pytest.mark.soak
def test_runs_whose_disk_fills_up_resume_exactly(undisturbed, small_disk):
    disk, rng, rounds = small_disk(4000), random.Random(11), []
    last, flags = str(disk / "checkpoint.pth.tar"), ["--logger_name", str(disk), "--resume", "auto"]
    for number in range(DISK_ROUNDS):
        process = start(undisturbed, *flags)
        said_until(process, ["Resumed", "Epoch"])
        time.sleep(rng.uniform(0.2, 0.8))
        said_until(process, ["could not be written (No space left on device)"], disk)
        kept = checkpoint.load(last)["Eiters"]
        if number % 2:  # stopped while it is full
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
            assert (
                process.returncode == 2
                and "error: " in said.splitlines()[-1]
                and "Traceback" not in said
            )
            assert checkpoint.load(last)["Eiters"] == kept
            (disk / "filler").unlink()
        else:  # killed when there was room again, and it had gone on
            (disk / "filler").unlink()
            while checkpoint.load(last)["Eiters"] == kept:
                assert said_until(process, ["Epoch"])
            process.kill()
            process.communicate()
        rounds.append((kept, checkpoint.load(last)["Eiters"]))
    finish(start(undisturbed, *flags))

    whole, filled = (
        checkpoint.load(path) for path in (str(undisturbed / "runs/whole/checkpoint.pth.tar"), last)
    )
    print(
        f"\nsteps of the checkpoint when the disk was full, and at the round's end: {rounds}; "
        f"{differing(whole, filled)} tensors differ"
    )
    assert differing(whole, filled) == 0 and len(rounds) == DISK_ROUNDS
    assert whole["best_rsum"] == filled["best_rsum"] and whole["Eiters"] == filled["Eiters"]
    assert not list(disk.glob("*.tmp"))


@pytest.mark.soak
def test_killed_at_epoch_ends_and_on_a_full_disk_each_rsum_is_recorded_once(
    undisturbed, small_disk
):
    """Half of the kills come as a validation is logged, half while the disk is full at such a moment."""
    disk, rng, kills, recorded = (
        small_disk(4000),
        random.Random(13),
        0,
        ["--record_val", "--save_step", "5"],
    )
    finish(start(undisturbed, "--logger_name", "runs/recorded", *recorded))
    flags, log = ["--logger_name", str(disk), "--resume", "auto", *recorded], disk / "log.jsonl"
    while kills < KILLS:
        process = start(undisturbed, *flags)
        said_until(process, ["Resumed", "Epoch"])
        before = log.read_bytes().count(b'"validation"')
        while process.poll() is None and log.read_bytes().count(b'"validation"') == before:
            time.sleep(0.002)
        if process.poll() is not None:
            break  # it has come to its end
        if kills % 2:
            fill(disk)
            time.sleep(rng.uniform(0, 0.5))
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        (disk / "filler").unlink(missing_ok=True)
        kills += 1
    finish(start(undisturbed, *flags))
    (expected,) = (undisturbed / "runs/recorded").glob("rst_val_*")
    (found,) = disk.glob("rst_val_*")
    print(f"\n{kills} kills, {len(expected.read_text().splitlines())} lines")
    assert kills >= KILLS / 2 and found.read_text() == expected.read_text()
    steps, wanted = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (disk, undisturbed / "runs/recorded")
    )
    assert steps == wanted
