"""The script reproduce.py: its flags, its signals, and one run of the real scripts."""

import os
import signal
import subprocess
import sys
import time

import pytest

import reproduce
from experiments import runner
from runtime.errors import InputError
from runtime.files import lock
from tests.helpers.comparisons import FAST, results, smoke_with
from tests.helpers.made import ROOT


@pytest.mark.parametrize(
    "gpus, expected", [(0, ["auto"]), (1, ["cuda:0"]), (3, ["cuda:0", "cuda:1", "cuda:2"])]
)
def test_all_gpus_are_used_unless_devices_are_named(monkeypatch, gpus, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert reproduce.parse_args(["--preset", "coco"]).devices == expected
    assert reproduce.parse_args(["--preset", "coco", "--devices", "cpu", "cpu"]).devices == [
        "cpu",
        "cpu",
    ]


@pytest.mark.parametrize(
    "flag", ["--seed=3", "--logger_name", "--help", "--memory_bank", "--local_alpha"]
)
def test_what_this_script_decides_is_refused_after_the_dashes(scripts, flag):
    with pytest.raises(InputError, match=f"{flag.split('=')[0]} after --"):
        reproduce.main([*FAST, "--", flag])


def test_the_same_seed_or_rate_twice_counts_once():
    opt = reproduce.parse_args([*FAST, "--seeds", "2", "2", "--learning_rates", "0.1", "0.10"])
    assert opt.seeds == [2] and opt.models["HAL"].tried["learning_rate"] == (0.1,)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "mnist"],
        [*FAST, "--losses", "triplet"],
        [*FAST, "--seeds", "-1"],
        [*FAST, "--learning_rates", "0"],
        [*FAST, "--pilot_epochs", "3"],
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_sentence(scripts, flags):
    with pytest.raises(InputError):
        reproduce.main(flags)
    assert not scripts()


def test_a_signal_reaches_the_running_script_and_the_same_command_goes_on(scripts, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reproduce; "
        f"from experiments import runner; runner.SCRIPTS = {runner.SCRIPTS!r}; "
        f"reproduce.main({FAST!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "SLOW": "max"}, stderr=subprocess.PIPE
    )
    until = time.time() + 60
    while not any(call.startswith("train max") for call in scripts()) and time.time() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and b"The same command goes on" in errors
    before = scripts()
    reproduce.main(FAST)
    assert not any(call.startswith("train sum 0.0005 0 1") for call in scripts()[len(before) :])
    assert results()["summary"]["test"]["max-margin"]["rsum"] == [120, 124]


def test_the_real_scripts_end_to_end(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "reproduce.py"),
        "--preset",
        "smoke",
        "--losses",
        "HAL",
        "--seeds",
        "4",
        "--num_epochs",
        "1",
        "--trials",
        "1",
        "--devices",
        "cpu",
        "cpu",
        "--",
        "--batch_size",
        "256",
        "--embed_size",
        "16",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "runs/reproduce_smoke/results.json")
    figures = found["runs"]["HAL"]["4"]["test"]
    assert found["summary"]["test"]["HAL"]["rsum"] == [figures["rsum"]]
    assert figures["rsum"] == pytest.approx(
        sum(figures[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10))
    )
    assert figures["images"] == 200 and figures["hubness"]["i2t"]["10"]["largest"] >= 2
    assert found["corrected"]["test"]["HAL"]["rsum"][0] in {
        one["rsum"] for one in figures["corrections"].values()
    }
    assert done.stdout.count("\n| HAL |") == 4  # its trial, as it is, corrected, and its seed


def test_two_at_once_in_one_folder_are_refused(scripts):
    held = lock("out", "--output")
    with pytest.raises(InputError, match="--output .*out: another run is writing there"):
        reproduce.main([*FAST, "--output", "out"])
    held.close()


@pytest.mark.parametrize("output", ["plain", "plain/x", "/proc/x"])
def test_an_output_folder_that_cannot_be_written_is_one_sentence(scripts, output):
    open("plain", "w").close()
    with pytest.raises(InputError, match=f"--output .*{output} cannot be written"):
        reproduce.main([*FAST, "--output", output])


def test_an_ensemble_is_tested_with_its_models_or_where_it_is_named(scripts, rates, monkeypatch):
    models = reproduce.read_preset("smoke").models  # as `rates` has left it
    both = {"both": ("sum-margin", "max-margin")}
    preset = smoke_with(monkeypatch, models=models, ensembles=both)
    reproduce.main([*FAST, "--losses", "sum-margin", "max-margin", "both"])
    assert list(results()["runs"]) == ["sum-margin", "max-margin", "both"]
    members = [f"{loss}/lr0.001_seed1/model_best.pth.tar" for loss in preset.ensembles["both"]]
    assert any(
        all(member in call for member in members) for call in scripts() if call.startswith("test 1")
    )
    reproduce.main([*FAST, "--losses", "sum-margin", "max-margin"])
    assert list(results()["runs"]) == ["sum-margin", "max-margin"]
    with pytest.raises(
        InputError, match="--losses 'both' is the mean of 'sum-margin' and 'max-margin': name these"
    ):
        reproduce.main([*FAST, "--losses", "sum-margin", "both"])
    reproduce.main(FAST)
    assert list(results()["runs"]) == ["sum-margin", "max-margin", "HAL", "HAL+bank", "both"]
