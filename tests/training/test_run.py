"""A run: its loss in each epoch, what it logs, and which checkpoints it keeps."""

import json
import os
from argparse import Namespace

import pytest

import train
from loss import loss_kind
from model import VSE
from tests.helpers.made import (
    REFERENCE,
    TINY,
    load,
    scalars,
    states_equal,
)
from training.options import parse_args
from training.run import Run, epoch_criterion

BEST = "runs/runX/model_best.pth.tar"


@pytest.mark.parametrize(
    "schedule",
    json.loads((REFERENCE / "vse_infty" / "schedule.json").read_text()),
    ids=lambda schedule: f"warm-up {schedule['options']['vse_mean_warmup_epochs']}",
)
def test_the_warm_up_is_vse_infinity_s(schedule):
    flags = [
        "--max_violation",
        "--warmup_epochs",
        str(schedule["options"]["vse_mean_warmup_epochs"]),
    ]
    opt = Namespace(
        **{**vars(parse_args(flags)), "img_dim": 5, "embed_size": 4, "vocab_size": 9, "word_dim": 3}
    )
    run = Run(opt, VSE(opt), (None, None), None)
    for place in schedule["epochs"]:
        run.epoch = place["epoch"]
        assert loss_kind(epoch_criterion(run).opt) == ("max" if place["max_violation"] else "sum")


def test_checkpoints_are_kept_as_the_flags_say(workdir):
    train.main([*TINY, "--save_all", "--record_val", "--logger_name", "runs/deep/name"])
    names = sorted(name for name in os.listdir("runs/deep/name") if "tfevents" not in name)
    assert names == [
        ".lock",
        "Epoch-1-model.pth.tar",
        "Epoch-2-model.pth.tar",
        "checkpoint.pth.tar",
        "log.jsonl",
        "model_best.pth.tar",
        "rst_val_deep_name",
        "run.json",
    ]
    assert [load(f"runs/deep/name/Epoch-{n}-model.pth.tar")["epoch"] for n in (1, 2)] == [1, 2]
    assert states_equal(
        load("runs/deep/name/Epoch-2-model.pth.tar")["model"],
        load("runs/deep/name/checkpoint.pth.tar")["model"],
    )


def test_the_best_checkpoint_is_that_of_the_best_epoch(workdir, capsys):
    train.main([*TINY, "--save_all", "--num_epochs", "6", "--learning_rate", "0.1"])
    rsums = [float(line.partition(": ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(rsums) == 6
    best = rsums.index(max(rsums))  # the first of equals
    content = load(BEST)
    assert content["epoch"] == best + 1
    assert content["best_rsum"] == pytest.approx(max(rsums), abs=0.05)
    assert states_equal(
        content["model"], load(f"runs/runX/Epoch-{best + 1}-model.pth.tar")["model"]
    )


def test_tensorboard_has_every_tag_with_its_values(workdir, capsys):
    train.main([*TINY, "--lr_update", "1", "--log_step", "3"])
    printed = [float(line.partition(": ")[2]) for line in capsys.readouterr().out.splitlines()]
    found = scalars("runs/runX")
    steps = {tag: [step for name, step, _ in found if name == tag] for tag, _, _ in found}
    values = {tag: [value for name, _, value in found if name == tag] for tag in steps}
    per_step = [
        "epoch",
        "step",
        "batch_time",
        "data_time",
        "Eit",
        "lr",
        "Loss",
        "positive_share",
        "positive_similarity",
        "negative_similarity",
    ]
    per_validation = [
        "r1",
        "r5",
        "r10",
        "medr",
        "meanr",
        "r1i",
        "r5i",
        "r10i",
        "medri",
        "meanri",
        "rsum",
        "i2t_n10_skewness",
        "i2t_n10_anti_hubs",
        "t2i_n10_skewness",
        "t2i_n10_anti_hubs",
    ]
    assert set(steps) == {*per_step, *per_validation}
    assert {tag: steps[tag] for tag in per_step} == {tag: list(range(1, 9)) for tag in per_step}
    assert {tag: steps[tag] for tag in per_validation} == {tag: [4, 8] for tag in per_validation}
    assert values["epoch"] == [0] * 4 + [1] * 4 and values["Eit"] == list(range(1, 9))
    assert values["lr"] == pytest.approx([0.01] * 4 + [0.001] * 4)
    assert values["rsum"] == pytest.approx(printed, abs=0.051)
    assert values["rsum"] == pytest.approx(
        [
            sum(values[tag][place] for tag in ("r1", "r5", "r10", "r1i", "r5i", "r10i"))
            for place in (0, 1)
        ],
        rel=1e-5,
    )
