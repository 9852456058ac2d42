"""Runs that are stopped, killed, or meet a full disk, and go on."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_results
import train
from loss import ContrastiveLoss
from runtime import device
from runtime.errors import InputError
from runtime.files import lock
from tests.helpers.made import RAW, ROOT, TINY, in_shell, load, run_script, scalars, states_equal
from training import checkpoint, run
from training.run import save

FLAGS = [
    *TINY,
    "--num_epochs",
    "3",
    "--log_step",
    "1",
    "--val_step",
    "3",
    "--memory_bank",
    "--mb_rate",
    "0.5",
    "--mb_k",
    "5",
]  # 4 steps an epoch

RUN = "runs/runX/checkpoint.pth.tar"


def log_of(folder="runs/runX"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    true_step = train.train_step

    def step_with_signal(run, batch, criterion):
        if run.steps + 1 == step:
            os.kill(os.getpid(), number)
        return true_step(run, batch, criterion)

    monkeypatch.setattr(train, "train_step", step_with_signal)


def stopped(monkeypatch, flags, step, number=signal.SIGTERM):
    """Run until the signal; the exit code."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        stop_at(patch, step, number)
        train.main(flags)
    return caught.value.code


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, drawn_data):
    """The checkpoint and log of an undisturbed run."""
    folder, here = tmp_path_factory.mktemp("whole"), os.getcwd()
    (folder / "data").symlink_to(drawn_data)
    os.chdir(folder)
    try:
        train.main(FLAGS)
        return load(RUN), log_of()
    finally:
        os.chdir(here)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 8, 11, 12])
def test_a_stopped_run_goes_on_to_the_same_end(step, workdir, monkeypatch, whole_run):
    assert stopped(monkeypatch, FLAGS, step) == 128 + signal.SIGTERM
    assert load(RUN)["Eiters"] == step
    train.main([*FLAGS, "--resume", "auto"])
    content, log = whole_run
    assert states_equal(load(RUN)["model"], content["model"])
    assert (
        load(RUN)["best_rsum"] == content["best_rsum"] and load(RUN)["Eiters"] == content["Eiters"]
    )
    assert log_of() == log


def test_a_run_stopped_twice_in_an_epoch_goes_on_to_the_same_end(workdir, monkeypatch, whole_run):
    stopped(monkeypatch, FLAGS, 5)
    stopped(monkeypatch, [*FLAGS, "--resume", RUN], 7, signal.SIGINT)
    train.main([*FLAGS, "--resume", RUN])
    assert states_equal(load(RUN)["model"], whole_run[0]["model"]) and log_of() == whole_run[1]


def test_a_resumed_raw_image_run_ends_the_same_whatever_the_workers(workdir, monkeypatch):
    flags = [*RAW, "--data_name", "f8k", "--finetune", "--log_step", "1"]
    train.main([*flags, "--logger_name", "runs/whole"])
    stopped(monkeypatch, flags, 2)
    train.main([*flags, "--resume", RUN, "--workers", "1"])
    assert states_equal(load(RUN)["model"], load("runs/whole/checkpoint.pth.tar")["model"])


@pytest.mark.parametrize("then, now", [(False, True), (True, False)])
def test_a_run_goes_on_where_adam_is_fused_and_where_it_is_not(
    workdir, monkeypatch, whole_run, then, now
):
    def adam(fused):
        return lambda parameters, **options: true_adam(parameters, **{**options, "fused": fused})

    true_adam = torch.optim.Adam  # fused on a CPU and on CUDA, not on MPS
    monkeypatch.setattr(torch.optim, "Adam", adam(then))
    stopped(monkeypatch, FLAGS, 6)
    assert load(RUN)["optimizer"]["param_groups"][0]["fused"] is then
    monkeypatch.setattr(torch.optim, "Adam", adam(now))
    train.main([*FLAGS, "--resume", RUN])
    assert load(RUN)["optimizer"]["param_groups"][0]["fused"] is now
    for found, expected in zip(load(RUN)["model"], whole_run[0]["model"]):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_save_step_writes_checkpoints_within_an_epoch(workdir, monkeypatch):
    seen = []
    true_save = save
    for module in (run, train):  # each calls it by its own name
        monkeypatch.setattr(
            module,
            "save",
            lambda run, must_succeed: (seen.append(run.steps), true_save(run, must_succeed)),
        )
    train.main([*FLAGS, "--num_epochs", "1", "--save_step", "2"])
    assert seen == [2, 4]


def test_resume_auto_starts_where_there_is_nothing_and_passes_over_what_is_broken(workdir, capsys):
    train.main([*FLAGS, "--num_epochs", "1", "--resume", "auto"])
    assert "starting from scratch" in capsys.readouterr().err
    train.main([*FLAGS, "--num_epochs", "2", "--save_all", "--resume", "auto"])
    Path(RUN).write_bytes(Path(RUN).read_bytes()[:1000])
    train.main([*FLAGS, "--resume", "auto"])
    said = capsys.readouterr().err
    assert "Passed over" in said and "Epoch-2-model.pth.tar" in said
    assert load(RUN)["epoch"] == 3


def test_resume_auto_goes_on_with_the_run_that_wrote_last(workdir, monkeypatch):
    train.main([*FLAGS, "--save_all"])
    stopped(monkeypatch, FLAGS, 2)  # another run in the same folder
    train.main([*FLAGS, "--num_epochs", "1", "--resume", "auto"])
    assert load(RUN)["Eiters"] == 4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_between_an_epoch_s_files_it_writes_them_all_again(at, workdir, monkeypatch):
    flags = [*FLAGS, "--val_step", "1000", "--save_all"]
    monkeypatch.setattr(
        train, "validate", lambda run: ((10.0, 30.0, 20.0)[run.epoch], [])
    )  # the second is the best
    train.main([*flags, "--logger_name", "runs/whole"])
    ends, true_save = [], checkpoint.save

    def killed(path, content):
        ends.append(content["epoch"])
        if ends.count(2) == at + 1:
            raise KeyboardInterrupt
        true_save(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        train.main(flags)
    assert load(RUN)["epoch"] == 1
    train.main([*flags, "--resume", "auto"])
    for name in ("model_best", "checkpoint", *(f"Epoch-{epoch}-model" for epoch in (1, 2, 3))):
        found, expected = (load(f"runs/{run}/{name}.pth.tar") for run in ("runX", "whole"))
        assert (
            states_equal(found["model"], expected["model"]) and found["epoch"] == expected["epoch"]
        )
    assert load("runs/runX/model_best.pth.tar")["epoch"] == 2


def test_a_best_model_that_could_not_be_written_is_not_the_one_to_beat(workdir, monkeypatch):
    rsums, true_save = iter([10.0, 50.0, 40.0]), checkpoint.save

    def full_in_the_second_epoch(path, content):
        if content["epoch"] == 2 and path.endswith("model_best.pth.tar"):
            raise InputError("no space")
        true_save(path, content)

    monkeypatch.setattr(checkpoint, "save", full_in_the_second_epoch)
    monkeypatch.setattr(train, "validate", lambda run: (next(rsums), []))
    train.main([*FLAGS, "--val_step", "1000"])
    assert load("runs/runX/model_best.pth.tar")["epoch"] == 3 and load(RUN)["best_rsum"] == 40


def test_other_training_data_are_told_of_and_too_few_refused(workdir, monkeypatch, capsys):
    stopped(monkeypatch, FLAGS, 7)  # step 3 of 4 of the second epoch
    folder = Path("data/tiny_precomp")
    lines, rows = (
        (folder / "train_caps.txt").read_text().splitlines(),
        np.load(folder / "train_ims.npy"),
    )
    (folder / "train_caps.txt").write_text("\n".join(lines[:20]) + "\n")
    np.save(folder / "train_ims.npy", rows[:4])
    with pytest.raises(
        InputError, match="step 3 of its epoch, and the training data make 2: give the data"
    ):
        train.main([*FLAGS, "--resume", "auto"])
    (folder / "train_caps.txt").write_text("\n".join(["a dog", *lines[1:]]) + "\n")
    np.save(folder / "train_ims.npy", rows)
    train.main([*FLAGS, "--resume", "auto"])
    assert (
        "Warning: the training data are not those that this run was trained on"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flag, value", [("local_alpha", "10.0"), ("seed", "5"), ("batch_size", "8"), ("margin", "0.1")]
)
def test_a_flag_that_makes_another_model_is_refused_with_both_values(flag, value, workdir):
    train.main([*FLAGS, "--num_epochs", "1"])
    before = getattr(load(RUN)["opt"], flag)
    with pytest.raises(InputError, match=f"--{flag} was {before} there and is {value}"):
        train.main([*FLAGS, "--resume", RUN, f"--{flag}", value])


def test_a_flag_of_the_schedule_may_change_and_is_reported(workdir, capsys):
    train.main([*FLAGS, "--num_epochs", "1"])
    train.main(
        [
            *FLAGS,
            "--num_epochs",
            "2",
            "--lr_update",
            "1",
            "--logger_name",
            "runs/other",
            "--resume",
            RUN,
        ]
    )
    said = capsys.readouterr().err
    assert all(
        text in said
        for text in ("--num_epochs was 1", "--lr_update was 8", "--logger_name was runs/runX")
    )
    assert load("runs/other/checkpoint.pth.tar")["epoch"] == 2


def test_a_folder_of_a_living_run_is_refused(workdir):
    held = lock("runs/runX")
    with pytest.raises(InputError, match="another run"):
        train.main(FLAGS)
    held.close()


def test_what_another_run_wrote_since_the_checkpoint_was_looked_for_is_not_overwritten(
    workdir, monkeypatch
):
    lock = train.lock

    def lock_after_the_other(folder):
        monkeypatch.setattr(train, "lock", lock)
        train.main(FLAGS)  # it held the folder while this one loaded, and is done now
        return lock(folder)

    monkeypatch.setattr(train, "lock", lock_after_the_other)
    with pytest.raises(
        InputError, match="--resume auto: another run has written .*checkpoint.pth.tar"
    ):
        train.main([*FLAGS, "--resume", "auto"])
    assert (
        '"step": 12' in Path("runs/runX/log.jsonl").read_text().splitlines()[-1]
        and load(RUN)["epoch"] == 3
    )


def test_keep_bounds_the_epoch_files(workdir):
    older = Path("runs/runX/Epoch-13-model.pth.tar")
    older.parent.mkdir(parents=True)
    older.touch()
    train.main([*FLAGS, "--save_all", "--keep", "2"])
    assert sorted(path.name for path in Path("runs/runX").glob("Epoch-*")) == [
        "Epoch-2-model.pth.tar",
        "Epoch-3-model.pth.tar",
    ]


def test_the_record_tells_what_ran_and_what_came_out(workdir):
    train.main(FLAGS)
    record = json.loads(Path("runs/runX/run.json").read_text())
    assert record["options"]["mb_k"] == 5 and record["packages"]["torch"] and record["python"]
    assert record["data"]["train_captions"] == 60 and len(record["data"]["train_fingerprint"]) == 16
    assert record["start"] <= record["end"]
    assert record["result"]["outcome"] == "finished" and record["result"]["steps"] == 12
    assert record["result"]["best_rsum"] == load(RUN)["best_rsum"]


def test_the_learning_rate_warms_up_linearly(workdir):
    train.main([*FLAGS, "--lr_warmup_steps", "5", "--lr_update", "2"])
    rates = [line["lr"] for line in log_of() if line["kind"] == "step"]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008] + [0.01] * 4 + [0.001] * 4)


def test_warm_up_epochs_train_with_the_sum_of_hinges(workdir):
    train.main([*TINY, "--num_epochs", "1", "--sum_violation", "--logger_name", "runs/sum"])
    train.main([*TINY, "--num_epochs", "1", "--warmup_epochs", "1"])
    assert states_equal(load(RUN)["model"], load("runs/sum/checkpoint.pth.tar")["model"])
    train.main([*TINY, "--num_epochs", "1", "--logger_name", "runs/hal"])
    assert not states_equal(load(RUN)["model"], load("runs/hal/checkpoint.pth.tar")["model"])


def test_a_step_that_is_not_finite_changes_no_weight_and_stops_the_run(workdir, monkeypatch):
    true_forward, weights = ContrastiveLoss.of_similarities, {}

    def spoiled(criterion, similarities, *others):
        loss = true_forward(criterion, similarities, *others)
        return loss * float("nan") if len(weights) == 2 else loss

    true_step = train.train_step

    def watched(run, *others):
        weights[run.steps] = [p.detach().clone() for p in run.parameters]
        figures = true_step(run, *others)
        if run.steps == 2:
            assert not figures[1]
            assert all((a == b).all() for a, b in zip(weights[1], run.parameters))
        return figures

    monkeypatch.setattr(ContrastiveLoss, "of_similarities", spoiled)
    monkeypatch.setattr(train, "train_step", watched)
    with pytest.raises(InputError, match="step 2.*not finite.*0.01.*Start again") as caught:
        train.main(FLAGS)
    with open("runs/runX/run.json") as file:
        result = json.load(file)["result"]
    assert (result["outcome"], result["why"]) == ("gave up", str(caught.value))
    assert sorted(weights) == [0, 1]
    assert all(math.isfinite(value) for p in weights[1] for value in p.flatten().tolist())


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(workdir):
    train.main([*TINY, "--num_epochs", "1"])
    before = load(RUN)["epoch"]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, "--num_epochs", "60", "--resume", RUN],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=small_files,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = ""
    for line in process.stderr:
        said += line
        if "could not be written" in line and load(RUN)["epoch"] == before:
            resource.prlimit(
                process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
            )  # there is room again
            break
    said += process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "Training goes on" in said and before == 1
    assert load(RUN)["epoch"] == 60
    assert not list(Path("runs/runX").glob("*.tmp"))


# Which features a model was trained on ----------------------------------------------------------

FEATURES = Path("data/tiny_precomp/features.json")

DESCRIPTION = {
    "format": 1,
    "encoder": "resnet18",
    "weights": "none",
    "weights_sha256": "0" * 64,
    "pooling": "pooled",
    "regions": None,
    "normalised": False,
    "resize": 256,
    "size": 224,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "width": 8,
    "dtype": "float32",
    "amp": "off",
    "versions": {"torch": "2.6"},
}


def test_a_checkpoint_says_what_its_features_are_by_and_a_resumed_one_still_does(workdir):
    FEATURES.write_text(json.dumps(DESCRIPTION))
    train.main([*FLAGS, "--num_epochs", "1"])
    assert load(RUN)["features"] == load("runs/runX/model_best.pth.tar")["features"] == DESCRIPTION
    FEATURES.unlink()  # data without it are taken, as the released data are
    train.main([*FLAGS, "--num_epochs", "2", "--resume", RUN])
    assert load(RUN)["features"] == DESCRIPTION and load(RUN)["epoch"] == 2
    compute_results.main(["--model_path", RUN, "--device", "cpu"])
    train.main([*FLAGS, "--num_epochs", "1", "--init_from", RUN, "--logger_name", "runs/other"])
    assert (
        load("runs/other/checkpoint.pth.tar")["features"] is None
    )  # nobody knows whether these are the same


def test_a_second_stage_may_be_stopped_and_goes_on(workdir, capsys):
    train.main([*FLAGS, "--num_epochs", "1"])
    second = [*FLAGS, "--init_from", RUN, "--resume", "auto", "--logger_name", "runs/second"]
    train.main([*second, "--learning_rate", "1e-12", "--num_epochs", "1"])
    assert f"No checkpoint in runs/second: starting from {RUN}" in capsys.readouterr().err
    for found, expected in zip(load("runs/second/checkpoint.pth.tar")["model"], load(RUN)["model"]):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    train.main([*second, "--num_epochs", "2"])
    assert "Resuming runs/second/checkpoint.pth.tar" in capsys.readouterr().err
    assert load("runs/second/checkpoint.pth.tar")["epoch"] == 2


@pytest.mark.parametrize("found", ["its own", "none", "a later one"])
def test_a_run_that_goes_on_elsewhere_has_a_best_model_there(workdir, monkeypatch, found):
    monkeypatch.setattr(train, "validate", lambda run: ((30.0, 10.0, 20.0)[run.epoch], []))
    train.main([*FLAGS, "--num_epochs", "1"])
    is_there = found == "its own"
    if found == "none":
        os.unlink("runs/runX/model_best.pth.tar")
    if found == "a later one":
        content = load("runs/runX/model_best.pth.tar")
        torch.save({**content, "epoch": 2, "best_rsum": 40.0}, "runs/runX/model_best.pth.tar")
    train.main([*FLAGS, "--num_epochs", "3", "--resume", RUN, "--logger_name", "runs/other"])
    best = load("runs/other/model_best.pth.tar")
    assert (best["epoch"], best["best_rsum"]) == ((1, 30.0) if is_there else (3, 20.0))
    assert load("runs/other/checkpoint.pth.tar")["best_rsum"] == (30.0 if is_there else 20.0)


def test_a_bank_that_never_comes_is_told_of(workdir, capsys):
    train.main([*FLAGS, "--memory_bank", "--num_epochs", "1"])
    assert "trains without it" in capsys.readouterr().err
    train.main([*FLAGS, "--memory_bank", "--num_epochs", "2"])
    assert "trains without it" not in capsys.readouterr().err


def test_a_run_that_did_not_know_its_features_learns_them(workdir):
    train.main([*FLAGS, "--num_epochs", "1"])
    assert load(RUN)["features"] is None
    FEATURES.write_text(json.dumps(DESCRIPTION))
    train.main([*FLAGS, "--num_epochs", "2", "--resume", RUN])
    assert load(RUN)["features"] == DESCRIPTION


@pytest.mark.parametrize("change", [{"encoder": "resnet152"}, {"weights_sha256": "1" * 64}])
def test_features_by_another_encoder_are_refused_and_cost_nothing(workdir, change):
    FEATURES.write_text(json.dumps(DESCRIPTION))
    train.main([*FLAGS, "--num_epochs", "1"])
    FEATURES.write_text(json.dumps({**DESCRIPTION, **change}))
    before = Path(RUN).read_bytes()
    says = "data/tiny_precomp has features by .*, but checkpoint runs/runX/.* has them by .*: extract them again"
    for script, flags in (
        (train, [*FLAGS, "--resume", RUN]),
        (train, [*FLAGS, "--resume", "auto"]),
        (train, [*FLAGS, "--init_from", RUN]),
        (compute_results, ["--model_path", RUN]),
    ):
        with pytest.raises(InputError, match=says):
            script.main([*flags, "--device", "cpu"])
    assert Path(RUN).read_bytes() == before and not Path("ranks.pth.tar").exists()


# Output that fails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirection, stdout, last_line",
    [
        (">/dev/full", 0, "output.*No space left"),
        ("2>/dev/full", 6, None),
        ("1>&-", 0, "output.*closed"),
        ("2>&-", 6, None),
        ("| head -1", 1, "output.*Broken pipe"),
    ],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_figures_that_cannot_be_printed_cost_no_epoch(
    workdir, whole_run, redirection, stdout, last_line
):
    found = in_shell(" ".join([str(ROOT / "train.py"), *FLAGS, redirection]), workdir)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert len(re.findall(r"^rsum: \d", found.stdout, re.M)) == stdout
    assert (
        re.search(f"error: standard {last_line}", found.stderr.splitlines()[-1])
        if last_line
        else not found.stderr
    )
    content, log = whole_run
    assert states_equal(load(RUN)["model"], content["model"]) and load(RUN)["epoch"] == 3
    assert [line["step"] for line in log_of()] == [line["step"] for line in log]
    assert json.loads(Path("runs/runX/run.json").read_text())["result"]["outcome"] == "finished"


def test_the_files_are_written_before_the_figures_are_printed(workdir, monkeypatch):
    def unprintable(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "log", lambda message: message.startswith("Dev:") and unprintable())
    with pytest.raises(OSError, match="No space"):
        train.main([*FLAGS, "--val_step", "100", "--num_epochs", "1"])
    assert load(RUN)["epoch"] == load("runs/runX/model_best.pth.tar")["epoch"] == 1
    assert log_of()[-1]["kind"] == "validation" and ("rsum", 4) in [
        event[:2] for event in scalars("runs/runX")
    ]


# Disks that fill up -----------------------------------------------------------------------------

BIG = [
    *TINY,
    "--embed_size",
    "64",
    "--word_dim",
    "32",
    "--batch_size",
    "4",
    "--save_all",
    "--record_val",
    "--log_step",
    "1",
]  # checkpoints of 260 kB; an epoch takes up more than one block of the logs' files


@pytest.mark.parametrize("kilobytes", [500, 700])
def test_a_disk_that_stays_full_ends_the_run_with_one_sentence_and_whole_files(
    workdir, small_disk, kilobytes
):
    disk = small_disk(kilobytes)
    found = run_script(
        "train.py", *BIG, "--num_epochs", "4", "--logger_name", str(disk), cwd=workdir
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert "Training goes on" in found.stderr and found.stdout.count("rsum") == 4
    assert re.search(
        r"error: .*\.pth\.tar could not be written \(No space left on device\): free some space",
        found.stderr.splitlines()[-1],
    )
    written = list(disk.glob("*.pth.tar"))
    assert written and not list(disk.glob("*.tmp"))
    assert all(load(str(path))["epoch"] >= 1 for path in written)


def test_a_disk_that_is_full_for_a_while_costs_no_step(workdir, small_disk, monkeypatch, capsys):
    train.main([*BIG, "--num_epochs", "5", "--logger_name", "runs/whole"])
    disk, true_validate = small_disk(3000), train.validate

    def validate(run):
        filler = disk / "filler"
        if run.epoch == 1:
            filler.write_bytes(bytes(4096 * (shutil.disk_usage(disk).free // 4096)))
            assert shutil.disk_usage(disk).free == 0
        if run.epoch == 3:
            filler.unlink()
        return true_validate(run)

    monkeypatch.setattr(train, "validate", validate)
    train.main([*BIG, "--num_epochs", "5", "--logger_name", str(disk)])
    assert (
        capsys.readouterr().err.count(
            "checkpoint.pth.tar could not be written (No space left on device)"
        )
        == 2
    )
    assert sorted(path.name for path in disk.glob("Epoch-*")) == [
        f"Epoch-{n}-model.pth.tar" for n in (1, 4, 5)
    ]
    assert states_equal(
        load(str(disk / "checkpoint.pth.tar"))["model"],
        load("runs/whole/checkpoint.pth.tar")["model"],
    )
    events, expected = ([event[:2] for event in scalars(folder)] for folder in (disk, "runs/whole"))
    rest = iter(expected)
    assert all(event in rest for event in events)  # whole, in order, some left out
    assert len(events) < len(expected) and events[-11:] == expected[-11:]


RSUMS = ["Epoch: 0 ; rsum: 10.0", "Epoch: 1 ; rsum: 20.0", "Epoch: 2 ; rsum: 30.0"]


def rsums_of(folder="runs/runX"):
    (path,) = Path(folder).glob("rst_val_*")
    return path.read_text().splitlines()


@pytest.fixture
def better_every_epoch(monkeypatch):
    """Two checkpoints an epoch, the best one's and then the run's."""
    monkeypatch.setattr(train, "validate", lambda run: (10.0 * (run.epoch + 1), []))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("file", [1, 2, 3, 4])
def test_a_run_killed_at_an_epoch_s_end_records_each_rsum_once(
    file, when, workdir, monkeypatch, better_every_epoch
):
    flags, calls, true_save = [*FLAGS, "--val_step", "1000", "--record_val"], [], checkpoint.save

    def killed(path, content):
        calls.append(path)
        if when == "after":
            true_save(path, content)
        if len(calls) == file:
            raise KeyboardInterrupt
        if when == "before":
            true_save(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        train.main(flags)
    train.main([*flags, "--resume", "auto"])
    assert rsums_of() == RSUMS


@pytest.mark.parametrize("killed", [1, 2])
def test_a_full_disk_and_a_kill_leave_each_rsum_once(
    killed, workdir, small_disk, monkeypatch, better_every_epoch
):
    """The disk is full at the second epoch's end.

    The run is killed at the end of this epoch or of the next.
    """
    disk, true_end = small_disk(3000), run.end_epoch

    def end_epoch(run, rsum):
        epoch, filler = run.epoch, disk / "filler"
        filler.unlink(missing_ok=True)
        if epoch == 1:
            filler.write_bytes(bytes(4096 * (shutil.disk_usage(disk).free // 4096)))
        true_end(run, rsum)
        if epoch == killed:
            raise KeyboardInterrupt

    flags = [*BIG, "--num_epochs", "3", "--logger_name", str(disk)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "end_epoch", end_epoch)
        train.main(flags)
    (disk / "filler").unlink(missing_ok=True)
    train.main([*flags, "--resume", "auto"])
    assert rsums_of(disk) == RSUMS
    steps = [line["step"] for line in log_of(disk) if line["kind"] == "step"]
    assert steps == list(range(1, load(str(disk / "checkpoint.pth.tar"))["Eiters"] + 1))


def test_a_run_whose_folder_is_deleted_says_so_at_its_next_save(workdir, monkeypatch):
    true_validate = train.validate

    def validate(run):
        if run.epoch == 1:
            shutil.rmtree("runs/runX")
        return true_validate(run)

    monkeypatch.setattr(train, "validate", validate)
    with pytest.raises(
        InputError, match="runs/runX was deleted or moved while this run wrote to it"
    ):
        train.main([*FLAGS, "--val_step", "1000"])
    assert not Path("runs/runX").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_products(
    workdir, monkeypatch
):
    def killed(run, batch, criterion):
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "_is_exact", lambda kind: True)
    before = torch.get_float32_matmul_precision()
    for slow, expected in (("highest", "medium"), ("medium", "medium")):  # the second time by noise
        monkeypatch.setattr(
            device,
            "_timed",
            lambda kinds, *_, slow=slow: {kind: 2.0 if kind == slow else 1.0 for kind in kinds},
        )
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "train_step", killed)
            train.main([*FLAGS, "--resume", "auto"])
        assert torch.get_float32_matmul_precision() == expected
    train.main(FLAGS)  # a new run chooses anew
    assert load(RUN)["float32_products"] == "highest"
    torch.set_float32_matmul_precision(before)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(workdir):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); "
        f"sys.path.insert(0, {str(ROOT)!r}); import train; from runtime.errors import run_script; "
        "run_script(train.main)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *TINY, "--num_epochs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 2 and ".pth.tar could not be written" in found.stderr
    assert "Traceback" not in found.stderr and not list(Path("runs/runX").glob("*.pth.tar*"))
