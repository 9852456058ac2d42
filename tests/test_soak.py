"""A run that is killed again and again ends as if it had never been: `python -m pytest -m soak -s` (minutes)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import sample_data

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 30
FLAGS = ["--data_name", "sample_precomp", "--embed_size", "48", "--word_dim", "24", "--batch_size", "32",
         "--learning_rate", "0.001", "--num_epochs", "12", "--log_step", "1", "--save_step", "1", "--val_step", "25",
         "--memory_bank", "--mb_k", "20", "--device", "cpu"]


def start(folder, *flags):
    """A train.py process in `folder`."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *FLAGS, *flags], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    """Its exit code, with what it said where that is not 0."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


@pytest.mark.soak
def test_killed_runs_resume_exactly(tmp_path):
    sample_data.draw(tmp_path / "data")
    finish(start(tmp_path, "--logger_name", "runs/whole"))
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

    whole, killed = (checkpoint.load(str(tmp_path / "runs" / name / "checkpoint.pth.tar")) for name in
                     ("whole", "killed"))
    mismatches = sum(not torch.equal(value, other[key]) for state, other in zip(whole["model"], killed["model"])
                     for key, value in state.items())
    logs = [[json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "killed")]
    steps, expected = ([line["step"] for line in log if line["kind"] == "step"] for log in reversed(logs))
    lost, doubled = len(set(expected) - set(steps)), len(steps) - len(set(steps))
    print(f"\n{kills} kills, {kills_in_save} during a save; {mismatches} tensors differ; "
          f"{lost} log lines lost, {doubled} doubled")
    assert kills >= ROUNDS and mismatches == lost == doubled == 0 and steps == expected
    assert logs[0] == logs[1]
    assert whole["best_rsum"] == killed["best_rsum"] and whole["Eiters"] == killed["Eiters"]
    assert not list(run.glob("*.tmp"))
    assert not [name for name in os.listdir(run) if "tmp" in name]
