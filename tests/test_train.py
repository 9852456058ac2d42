"""Training from the command line: runs on tiny data, what they write, and bad input."""

import json
import math
import os
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_results
import train
from inputs import sample_data
from inputs.tokenizer import tokenize
from model import VSE
from runtime.errors import InputError
from tests.helpers.made import (
    DEFAULTS,
    RAW,
    REFERENCE,
    RELEASED,
    TINY,
    load,
    run_script,
    states_equal,
    tree,
    write_precomp,
)
from training.options import parse_args
from training.run import Run
from training.watch import GaveUp
from vocab import vocabulary_of, write_vocabulary

BANK = ["--memory_bank", "--mb_rate", "0.5", "--mb_k", "5"]

LOSSES = {
    "local HAL": [],
    "global HAL": BANK,
    "max-margin": ["--max_violation"],
    "sum-margin": ["--sum_violation"],
    "max-margin order": ["--max_violation", "--measure", "order", "--use_abs"],
    "sum-margin order": ["--sum_violation", "--measure", "order", "--no_imgnorm"],
    "both": ["--max_violation", "--sum_violation"],
}

RUN = "runs/runX/checkpoint.pth.tar"

OWN_LOSS = """
import torch


def sum_of_hinges(S):
    others = ~torch.eye(len(S), dtype=torch.bool)
    pairs = S.diagonal()
    costs = (0.2 + S - pairs.unsqueeze(1)).clamp(min=0), (0.2 + S - pairs.unsqueeze(0)).clamp(min=0)
    return sum(cost.masked_fill(~others, 0).sum() for cost in costs)


class SumOfHinges(torch.nn.Module):
    def forward(self, S):
        return sum_of_hinges(S)


def rows(S):
    return S.sum(1)


def constant(S):
    return torch.zeros(())


def nan(S):
    return (S * float("nan")).sum()
"""

BEST = "runs/runX/model_best.pth.tar"


def ends(folder="runs/runX"):
    """(states, best rsum, epochs, steps) of a run's last checkpoint."""
    content = load(os.path.join(folder, "checkpoint.pth.tar"))
    return content["model"], content["best_rsum"], content["epoch"], content["Eiters"]


def same(one, other):
    """Whether two runs ended alike, to the bit."""
    return states_equal(one[0], other[0]) and one[1:] == other[1:]


# Flags ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "--data_name coco_precomp --batch_size 512 --learning_rate 0.001 --lr_update 8 --num_epochs 13 --img_dim 2048 "
        "--local_alpha 30.00 --local_ep 0.3",
        "--data_name coco_precomp --batch_size 512 --learning_rate 0.001 --lr_update 8 --num_epochs 13 --img_dim 2048 "
        "--local_alpha 30.00 --local_ep 0.3 --memory_bank --global_alpha 40.00 --global_beta 40.00 "
        "--global_ep_posi 0.20 "
        "--global_ep_nega 0.10 --mb_rate 0.05 --mb_k 250",
        "--data_name f30k_precomp --batch_size 128 --learning_rate 0.001 --lr_update 8 --num_epochs 13 "
        "--local_alpha 60.00 --local_ep 0.7",
    ],
    ids=["COCO local", "COCO global", "Flickr30k"],
)
def test_the_paper_s_recipes_run_as_written(workdir, recipe):
    """On data in that layout.

    Fewer and narrower, and one epoch on top of the recipe's own flags.
    """
    name = recipe.split()[1]
    write_precomp(workdir / "data" / name, {"train": 8, "dev": 5}, width=2048)
    train.main(
        [
            *recipe.split(),
            "--data_path",
            "data",
            "--vocab_path",
            "vocab",
            "--logger_name",
            "runs/paper",
            "--embed_size",
            "8",
            "--word_dim",
            "6",
            "--num_epochs",
            "2",
            "--device",
            "cpu",
        ]
    )
    opt = load("runs/paper/checkpoint.pth.tar")["opt"]
    assert (opt.img_dim, opt.data_name, opt.memory_bank) == (2048, name, "--memory_bank" in recipe)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0 and "--memory_bank" in capsys.readouterr().out


# A step and its path ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "local_order", "global", "max", "sum"])
def test_training_steps_walk_the_released_path(name):
    path = torch.load(REFERENCE / f"trajectory_{name}.pt", weights_only=True)
    flags = parse_args(["--max_violation"] if path["options"]["measure"] == "order" else [])
    opt = Namespace(**{**vars(flags), "loss": None, **path["options"]})
    torch.manual_seed(31)
    run = Run(opt, VSE(opt), (None, None), None)
    run.bank = path["bank"] and (
        path["bank"]["image_embeddings"],
        path["bank"]["caption_embeddings"],
        torch.as_tensor(path["bank"]["indices"]),
    )
    losses = []
    for batch in path["batches"]:
        run.model.train_start()
        indices = torch.as_tensor(batch["indices"])
        losses.append(
            float(
                train.train_step(
                    run,
                    (batch["images"], batch["captions"], batch["lengths"], indices, indices),
                    run.criterion,
                )[0]
            )
        )
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    mine = [run.model.img_enc.state_dict(), run.model.txt_enc.state_dict()]
    assert all(
        (one[key] - other[key]).abs().max() < 1e-4
        for one, other in zip(mine, path["final_state"])
        for key in other
    )
    assert run.steps == 25


@pytest.mark.parametrize(
    "epoch, lr_update, factor", [(0, 8, 1), (7, 8, 1), (8, 8, 0.1), (16, 8, 0.01), (3, 1, 0.001)]
)
def test_the_learning_rate_falls_to_a_tenth_every_lr_update_epochs(epoch, lr_update, factor):
    group = {"lr": 7.0}
    opt = Namespace(learning_rate=0.002, lr_update=lr_update, lr_warmup_steps=0)
    train.adjust_learning_rate(
        Namespace(epoch=epoch, steps=0, opt=opt, optimizer=Namespace(param_groups=[group]))
    )
    assert group["lr"] == pytest.approx(0.002 * factor)


# Runs on precomputed features -------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_two_runs_of_a_seed_end_alike(workdir, loss):
    ended = []
    for folder in ("runs/one", "runs/two"):
        torch.rand(7)  # whatever was drawn before
        train.main([*TINY, *LOSSES[loss], "--logger_name", folder])
        ended.append(ends(folder))
    assert same(*ended)
    states, best, epochs, steps = ended[0]
    assert (epochs, steps) == (2, 8) and 0 < best <= 600
    assert all(value.isfinite().all() for state in states for value in state.values())


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            [],
            "Training VSE, GRU, HAL (alpha 30, epsilon 0.3), 8 dimensions, on tiny_precomp (12 photos), cpu",
        ),
        (
            ["--max_violation", "--bi_gru"],
            "Training VSE, bidirectional GRU, max-margin (0.2), 8 dimensions, on",
        ),
        (
            ["--memory_bank", "--local_alpha", "60", "--local_ep", "0.7"],
            "HAL (alpha 60, epsilon 0.7) with the bank, 8",
        ),
        (
            ["--loss", "infonce", "--text_encoder", "transformer"],
            "VSE, transformer, InfoNCE (temperature 0.07 at first)",
        ),
        (["--agg_func", "Mean"], "Note: --agg_func would be SCAN's and has no effect here"),
        (
            ["--model_name", "runs/a", "--lambda_lse", "5"],
            "Note: --model_name, --lambda_lse would be SCAN's",
        ),
    ],
)
def test_the_first_line_says_what_is_trained(workdir, capsys, flags, expected):
    train.main([*TINY, *flags, "--num_epochs", "1"])
    said = capsys.readouterr().err
    assert expected in said and said.index("Training ") < said.index("Dev: Loss")
    assert ("Note:" in said) == expected.startswith("Note:")


@pytest.mark.parametrize(
    "named, old",
    [
        ("max", ["--max_violation"]),
        ("sum", ["--sum_violation"]),
        ("hal", []),
        ("mine:sum_of_hinges", ["--sum_violation"]),
        ("mine:SumOfHinges", ["--sum_violation"]),
    ],
)
def test_a_loss_is_chosen_by_name_also_from_a_file_of_one_s_own(workdir, monkeypatch, named, old):
    (workdir / "mine.py").write_text(OWN_LOSS)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(str(workdir))
    train.main([*TINY, "--loss", named, "--logger_name", "runs/named"])
    train.main([*TINY, *old, "--logger_name", "runs/old"])
    assert same(ends("runs/named"), ends("runs/old"))


def test_a_loss_s_own_weights_are_trained_and_saved(workdir):
    train.main([*TINY, "--loss", "infonce", "--temperature", "0.5"])
    learned = load(RUN)["loss"]["function.log_scale"]
    assert abs(float(learned) - math.log(2)) > 1e-3 and learned.dtype == torch.float32


@pytest.mark.parametrize(
    "loss, reason",
    [
        ("nothing", "there is no loss 'nothing'"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("mine:broken", "a missing comma"),
        ("mine:rows", "no scalar with a gradient"),
        ("mine:constant", "no scalar with a gradient"),
        ("mine:nan", "its gradient is not finite"),
    ],
)
def test_a_loss_that_cannot_be_trained_with_is_refused(workdir, monkeypatch, loss, reason):
    (workdir / "mine.py").write_text(
        OWN_LOSS if loss != "mine:broken" else "raise ValueError('a missing comma')"
    )
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(str(workdir))
    with pytest.raises(InputError, match=reason) as found:
        train.main([*TINY, "--loss", loss])
    assert "--loss" in str(found.value) and not Path("runs").exists()


@pytest.mark.parametrize("loss", ["--max_violation", "--sum_violation"])
def test_training_learns_the_pairs(workdir, loss):
    """A tiny training set evaluated on itself: far above the chance of about 240."""
    for kind in ("ims.npy", "caps.txt"):
        shutil.copy(f"data/tiny_precomp/train_{kind}", f"data/tiny_precomp/dev_{kind}")
    train.main(
        [
            *TINY,
            loss,
            "--num_epochs",
            "20",
            "--embed_size",
            "32",
            "--word_dim",
            "16",
            "--learning_rate",
            "0.02",
        ]
    )
    assert ends()[1] > 450


@pytest.mark.parametrize(
    "one, other",
    [
        (["--seed", "0"], ["--seed", "1"]),
        ([], ["--max_violation"]),
        ([], ["--local_alpha", "10"]),
        ([], ["--local_ep", "0.1"]),
        (["--max_violation"], ["--max_violation", "--margin", "0.6"]),
        ([], ["--grad_clip", "0.01"]),
        ([], BANK),
        (BANK, [*BANK, "--mb_k", "2"]),
        (BANK, [*BANK, "--global_alpha", "3"]),
        (BANK, [*BANK, "--global_beta", "3"]),
        (BANK, [*BANK, "--global_ep_nega", "9"]),
        ([], ["--use_abs"]),
        ([], ["--no_imgnorm"]),
        ([], ["--lr_update", "1"]),
        ([], ["--caption_reading", "released"]),
        ([], ["--amp", "bf16"]),
    ],
    ids=str,
)
def test_a_flag_has_its_effect(workdir, one, other):
    flags = [*TINY, "--learning_rate", "0.05"]
    train.main([*flags, *one, "--logger_name", "runs/one"])
    train.main([*flags, *other, "--logger_name", "runs/two"])
    assert not states_equal(ends("runs/one")[0], ends("runs/two")[0])


@pytest.mark.parametrize(
    "flags",
    [
        ["--workers", "3"],
        ["--val_step", "1"],
        ["--log_step", "1"],
        ["--global_ep_posi", "0.9"],
        ["--reset_train"],
        ["--save_all"],
        ["--record_val"],
        ["--img_dim", "8"],
        ["--crop_size", "32"],
        ["--cnn_type", "resnet18"],
        ["--cache_dir", "elsewhere"],
        ["--features_on_device"],
    ],
    ids=str,
)
def test_a_flag_leaves_the_weights_alone(workdir, flags):
    train.main([*TINY, *BANK, "--logger_name", "runs/one"])
    train.main([*TINY, *BANK, *flags, "--logger_name", "runs/two"])
    assert states_equal(ends("runs/one")[0], ends("runs/two")[0])


def test_no_clipping_is_not_the_same_as_clipping_to_nothing(workdir):
    train.main([*TINY, "--grad_clip", "0", "--logger_name", "runs/one"])
    train.main([*TINY, "--grad_clip", "1e9", "--logger_name", "runs/two"])
    assert states_equal(ends("runs/one")[0], ends("runs/two")[0])


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "bf16", *BANK]], ids=len)
def test_bf16_keeps_float32_weights_and_follows_the_seed(workdir, flags):
    train.main([*TINY, *flags, "--logger_name", "runs/one"])
    train.main([*TINY, *flags, "--logger_name", "runs/two"])
    assert same(ends("runs/one"), ends("runs/two"))
    values = [value for state in ends("runs/one")[0] for value in state.values()]
    assert {value.dtype for value in values} == {torch.float32} and all(
        value.isfinite().all() for value in values
    )


def test_a_damaged_cache_of_words_does_not_change_a_run(workdir):
    train.main([*TINY, "--logger_name", "runs/one"])
    for path in (workdir / "data" / ".cache").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    train.main([*TINY, "--logger_name", "runs/two"])
    assert same(ends("runs/one"), ends("runs/two"))


def test_the_bank_is_not_used_in_the_first_epoch(workdir):
    train.main([*TINY, "--num_epochs", "1", "--logger_name", "runs/one"])
    train.main([*TINY, *BANK, "--num_epochs", "1", "--logger_name", "runs/two"])
    assert states_equal(ends("runs/one")[0], ends("runs/two")[0])


def test_a_rate_that_keeps_next_to_nothing_still_trains(workdir):
    train.main([*TINY, "--memory_bank", "--mb_rate", "1e-9"])
    assert ends()[2] == 2


def test_a_batch_larger_than_the_data_and_a_last_batch_of_one_train(workdir):
    train.main([*TINY, "--batch_size", "1000", *BANK])
    assert ends()[3] == 2
    train.main([*TINY, "--batch_size", "59", "--num_epochs", "1", *BANK])
    assert ends()[3] == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_is_refused_with_every_loss(workdir, loss):
    with pytest.raises(InputError, match="--batch_size 1 .*without negatives.* 2 or more"):
        train.main([*TINY, *LOSSES[loss], "--batch_size", "1"])
    assert not os.path.exists("runs")


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=str)
def test_features_of_another_precision_train(workdir, dtype):
    for split in ("train", "dev"):
        path = workdir / "data" / "tiny_precomp" / f"{split}_ims.npy"
        np.save(path, np.load(path).astype(np.float16).astype(dtype))
    train.main([*TINY, "--logger_name", "runs/one"])
    for split in ("train", "dev"):
        path = workdir / "data" / "tiny_precomp" / f"{split}_ims.npy"
        np.save(path, np.load(path).astype(np.float32))
    train.main([*TINY, "--logger_name", "runs/two"])
    assert same(ends("runs/one"), ends("runs/two"))


def test_features_with_one_row_a_caption_train_alike(workdir):
    train.main([*TINY, "--logger_name", "runs/one"])
    for split in ("train", "dev"):
        path = workdir / "data" / "tiny_precomp" / f"{split}_ims.npy"
        np.save(path, np.repeat(np.load(path), 5, axis=0))
    train.main([*TINY, "--logger_name", "runs/two"])
    assert same(ends("runs/one"), ends("runs/two"))


def test_empty_captions_and_unknown_words_are_valid_input(workdir):
    for split, images in (("train", 12), ("dev", 5)):
        lines = ["", "zyzzyva", "a dog", " ", f"qwx{images}"] * images
        (workdir / "data" / "tiny_precomp" / f"{split}_caps.txt").write_text(
            "\n".join(lines) + "\n"
        )
    train.main([*TINY, *BANK])
    assert all(value.isfinite().all() for state in ends()[0] for value in state.values())


def test_captions_whose_words_are_too_rare_for_a_vocabulary_are_refused(workdir):
    lines = [f"{chr(97 + c % 26)}{chr(97 + c // 26)}x" for c in range(60)]
    (workdir / "data" / "tiny_precomp" / "train_caps.txt").write_text("\n".join(lines) + "\n")
    (workdir / "data" / "tiny_precomp" / "dev_caps.txt").write_text("\n".join(lines[:25]) + "\n")
    with pytest.raises(InputError, match="tiny_precomp.* no word but the special ones"):
        train.main(TINY)
    assert not os.path.exists("vocab") and not os.path.exists("runs")


def test_a_feature_row_of_zeros_does_not_end_learning(workdir):
    """Some extractors leave zeros for an image they could not read."""
    path = workdir / "data" / "tiny_precomp" / "train_ims.npy"
    features = np.load(path)
    features[::3] = 0
    np.save(path, features)
    torch.manual_seed(0)
    train.main([*TINY, "--batch_size", "60", "--num_epochs", "1", "--logger_name", "runs/one"])
    train.main([*TINY, "--batch_size", "60", "--num_epochs", "3", "--logger_name", "runs/two"])
    one, two = ends("runs/one")[0], ends("runs/two")[0]
    assert all(value.isfinite().all() for state in two for value in state.values())
    assert (one[1]["embed.weight"] - two[1]["embed.weight"]).abs().max() > 1e-3


def test_nothing_is_trained_in_no_epochs_and_that_is_said(workdir, capsys):
    train.main([*TINY, "--num_epochs", "0"])
    assert not os.path.exists(RUN)
    assert (
        "Warning: nothing is trained and no checkpoint written: --num_epochs is 0"
        in capsys.readouterr().err
    )


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(evaluated, capsys):
    train.main([*TINY, *BANK, "--resume", "auto"])
    assert "--num_epochs is 2, and this run has 2 epochs behind it" in capsys.readouterr().err


def test_the_loss_is_said_where_two_are_named(workdir, capsys):
    train.main([*TINY, "--max_violation", "--sum_violation", "--num_epochs", "1"])
    assert "--max_violation wins over --sum_violation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["1e30"],
        ["1e30", "--sum_violation"],
        ["1e18", "--no_imgnorm"],
        ["1e30", "--save_step", "1", "--save_all"],
        ["1e30", "--val_step", "1"],
    ],
    ids=str,
)
def test_weights_that_overflow_end_the_run_and_no_checkpoint_of_them_is_written(evaluated, flags):
    """What the run before has left stays: here one that these weights start from."""
    before = tree(evaluated / "runs")
    for folder in ("runs/runX", "runs/other"):
        with pytest.raises(
            GaveUp, match=r"step \d, learning rate 1e\+(30|18): .*weights beyond.* lower"
        ):
            train.main(
                [
                    *TINY,
                    "--batch_size",
                    "60",
                    "--num_epochs",
                    "3",
                    "--logger_name",
                    folder,
                    "--learning_rate",
                    *flags,
                ]
            )
        assert json.loads(Path(folder, "run.json").read_text())["result"]["outcome"] == "gave up"
        assert not list(Path(folder).glob("Epoch*"))
    assert not list(Path("runs/other").glob("*.tar"))
    after = tree(evaluated / "runs")
    assert {name: after[name] for name in before if name.endswith(".tar")} == {
        name: content for name, content in before.items() if name.endswith(".tar")
    }


@pytest.mark.parametrize(
    "flags, warned",
    [
        (["--max_violation"], True),
        (["--sum_violation"], False),
        (["--max_violation", "--warmup_epochs", "1"], False),
    ],
    ids=str,
)
def test_max_margin_that_learns_nothing_is_warned_of_by_its_recalls(
    workdir, capsys, monkeypatch, flags, warned
):
    """Random features, and steps too small to learn anything from them."""
    write_precomp(workdir / "data" / "tiny_precomp", {"train": 12, "dev": 150})
    monkeypatch.setattr("training.watch.FIRST_STEPS", 4)
    train.main([*TINY, *flags, "--num_epochs", "1", "--learning_rate", "1e-9"])
    assert capsys.readouterr().err.count("step 4: dev recalls are no better than chance") == warned


@pytest.mark.parametrize("fault", ["nan", "huge", "zero"])
def test_a_validation_of_broken_embeddings_ends_the_run(workdir, monkeypatch, fault):
    """Whatever the weights: here what the image encoder gives is broken where no gradient is asked for."""
    spoil = {"nan": lambda x: x * torch.nan, "huge": lambda x: x + 1e16, "zero": torch.zeros_like}[
        fault
    ]
    embed_images = VSE.embed_images
    monkeypatch.setattr(
        VSE, "embed_images", lambda model, images: spoil(embed_images(model, images))
    )
    with pytest.raises(
        GaveUp, match="step 4, learning rate 0.01: .* of images that are (not finite|zero .5 of 5)"
    ):
        train.main(TINY)
    assert not list(Path("runs/runX").glob("*.tar"))


# What a run writes ------------------------------------------------------------------------------


def test_the_checkpoint_has_the_released_layout(trained):
    content = load(trained / RUN)
    assert {"epoch", "model", "best_rsum", "opt", "Eiters"} <= set(content)
    assert (content["epoch"], content["Eiters"]) == (2, 8)
    assert type(content["opt"]) is Namespace and isinstance(content["best_rsum"], float)
    image_state, text_state = content["model"]
    assert list(image_state) == ["fc.weight", "fc.bias"]
    assert list(text_state) == [
        "embed.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    ]
    opt = vars(content["opt"])
    assert set(DEFAULTS) | {"img_dim", "vocab_size"} <= set(opt)
    assert {name: type(opt[name]) for name in DEFAULTS} == {
        name: type(value) for name, value in DEFAULTS.items()
    }
    assert (opt["img_dim"], opt["vocab_size"], opt["embed_size"], opt["mb_k"]) == (
        8,
        len(text_state["embed.weight"]),
        8,
        5,
    )


def test_the_checkpoint_opens_without_this_project(trained):
    """Nothing in it is an object of a class of ours."""
    with torch.serialization.safe_globals([Namespace]):
        assert torch.load(trained / RUN, weights_only=True)["epoch"] == 2
        assert torch.load(trained / BEST, weights_only=True)["vocabulary"][:4] == [
            "<pad>",
            "<start>",
            "<end>",
            "<unk>",
        ]


def test_record_val_writes_a_line_an_epoch_in_the_run_folder_and_a_new_run_begins_anew(
    workdir, capsys
):
    for epochs in (2, 1):
        capsys.readouterr()
        train.main(
            [*TINY, "--record_val", "--logger_name", "runs/mine", "--num_epochs", str(epochs)]
        )
        rsums = re.findall("^rsum: (.*)$", capsys.readouterr().out, re.M)
        lines = (workdir / "runs" / "mine" / "rst_val_mine").read_text().splitlines()
        assert (
            lines == [f"Epoch: {epoch} ; rsum: {rsum}" for epoch, rsum in enumerate(rsums)]
            and len(lines) == epochs
        )
    assert not (workdir / "rst_val_mine").exists()


def test_lines_go_where_they_belong(workdir, capsys):
    train.main([*TINY, *BANK, "--log_step", "3"])
    out, err = capsys.readouterr()
    assert [bool(re.fullmatch(r"rsum: \d+\.\d", line)) for line in out.splitlines()] == [True, True]
    number = r"\d+\.\d+(e-\d+)?"
    steps = [line for line in err.splitlines() if line.startswith("Epoch: [")]
    shape = (
        rf"Epoch: \[(\d)\]\[(\d)/4\]  Eit (\d)( \(\S+\))?  lr {number}( \(\S+\))?  "
        rf"Loss -?{number} \(-?{number}\)  Time {number} \({number}\)  Data {number} \({number}\)"
    )
    assert [re.fullmatch(shape, line).group(1, 2, 3) for line in steps] == [
        ("0", "2", "3"),
        ("1", "1", "6"),
    ]
    assert len(re.findall(r"^Image to text: (\d+\.\d, ){4}\d+\.\d$", err, re.M)) == 2
    assert len(re.findall(r"^Text to image: (\d+\.\d, ){4}\d+\.\d$", err, re.M)) == 2


def test_the_mean_times_are_not_zero(workdir, capsys):
    train.main([*TINY, "--log_step", "4"])
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Epoch: [1]")][
        -1
    ]
    now, mean = map(float, re.search(r"Time (\S+) \((\S+)\)", last).groups())
    assert now > 0 and mean > 0


def test_val_step_validates_within_an_epoch(workdir, capsys):
    train.main([*TINY, "--val_step", "2", "--num_epochs", "1"])
    assert (
        len(capsys.readouterr().out.splitlines()) == 2
    )  # after step 2 and after the epoch, not twice at its end


def test_a_missing_vocabulary_is_built_and_said_so(workdir, capsys):
    train.main([*TINY, "--num_epochs", "0"])
    assert "vocab/tiny_precomp_vocab.json" in capsys.readouterr().err
    before = tree(workdir / "vocab")
    train.main([*TINY, "--num_epochs", "0"])
    assert (
        "vocab/tiny_precomp_vocab.json" not in capsys.readouterr().err
        and tree(workdir / "vocab") == before
    )


def test_the_share_of_unknown_words_is_said_and_a_stale_vocabulary_warned_of(workdir, capsys):
    train.main(TINY)
    lines = [line for line in capsys.readouterr().err.splitlines() if "nknown" in line]
    counts = [
        [
            word
            for caption in open(f"data/tiny_precomp/{split}_caps.txt")
            for word in tokenize(caption)
        ]
        for split in ("train", "dev")
    ]
    known = {word for word in {*counts[0], *counts[1]} if (counts[0] + counts[1]).count(word) >= 4}
    shares = [sum(word not in known for word in words) / len(words) for words in counts]
    assert lines == [
        f"Unknown words in the captions of {split}: {share:.1%}"
        for split, share in zip(("train", "dev"), shares)
    ]
    write_vocabulary(
        vocabulary_of(["<pad>", "<start>", "<end>", "<unk>", "hund"]),
        "vocab/tiny_precomp_vocab.json",
    )
    train.main(TINY)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert [line.split(",")[0] for line in lines] == [
        f"Warning: 100.0% of the words in the captions of {split} are unknown to the model"
        for split in ("train", "dev")
    ]


@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_a_vocabulary_that_is_there_is_used(workdir, suffix):
    words = ["<pad>", "<start>", "<end>", "<unk>", "dog", "quokka"]
    write_vocabulary(vocabulary_of(words), f"vocab/tiny_precomp_vocab.{suffix}")
    train.main(TINY)
    content = load(RUN)
    assert content["vocabulary"] == words and content["opt"].vocab_size == 6


# Going on, and starting from weights ------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [],
        BANK,
        ["--lr_update", "1"],
        ["--max_violation", "--measure", "order"],
        ["--loss", "infonce", "--weight_decay", "0.1"],
    ],
    ids=str,
)
def test_one_epoch_and_one_more_equal_two(workdir, flags):
    train.main([*TINY, *flags, "--logger_name", "runs/two"])
    train.main([*TINY, *flags, "--num_epochs", "1", "--logger_name", "runs/one"])
    torch.manual_seed(99)  # another process
    train.main(
        [*TINY, *flags, "--logger_name", "runs/one", "--resume", "runs/one/checkpoint.pth.tar"]
    )
    assert same(ends("runs/one"), ends("runs/two"))
    assert tree("runs/one").keys() >= {"checkpoint.pth.tar", "model_best.pth.tar"}
    assert states_equal(
        load("runs/one/model_best.pth.tar")["model"], load("runs/two/model_best.pth.tar")["model"]
    )


def test_a_resumed_run_keeps_its_best(workdir):
    train.main([*TINY, "--num_epochs", "1"])
    content = load(RUN)
    content["best_rsum"] = 599.0
    torch.save(content, RUN)
    before = (workdir / BEST).read_bytes()
    train.main([*TINY, "--resume", RUN])
    assert load(RUN)["best_rsum"] == 599.0 and (workdir / BEST).read_bytes() == before


def test_a_resumed_run_keeps_its_caption_reading(workdir):
    train.main([*TINY, "--num_epochs", "1", "--caption_reading", "released"])
    train.main([*TINY, "--resume", RUN])
    assert load(RUN)["caption_reading"] == "released"


def test_a_finished_run_is_not_trained_further(workdir):
    train.main(TINY)
    before = ends()
    train.main([*TINY, "--resume", RUN])
    assert same(ends(), before)


@pytest.fixture
def released_data(workdir):
    """The tiny folder with the released code's data, vocabulary and runs."""
    shutil.copytree(RELEASED / "data" / "f8k_precomp", workdir / "data" / "f8k_precomp")
    shutil.copytree(RELEASED / "vocab", workdir / "vocab")
    shutil.copytree(RELEASED / "runs", workdir / "released")
    return workdir


RELEASED_FLAGS = [
    "--data_name",
    "f8k_precomp",
    "--vocab_path",
    "vocab",
    "--word_dim",
    "32",
    "--embed_size",
    "48",
    "--batch_size",
    "600",
    "--num_epochs",
    "1",
    "--learning_rate",
    "1e-9",
    "--device",
    "cpu",
]


def test_training_starts_from_a_released_checkpoint(released_data, capsys):
    """At next to no learning rate the run evaluates as the checkpoint itself, in its caption reading."""
    start = "released/local/model_best.pth.tar"
    train.main([*RELEASED_FLAGS, "--init_from", start])
    theirs, ours = load(start), load(RUN)
    assert all(
        (a[key] - b[key]).abs().max() < 1e-5
        for a, b in zip(theirs["model"], ours["model"])
        for key in a
    )
    assert (ours["caption_reading"], ours["epoch"]) == ("released", 1)
    compute_results.main(["--model_path", RUN, "--device", "cpu"])
    expected = json.loads((RELEASED / "expected.json").read_text())["local"]["printed"]
    assert capsys.readouterr().out.splitlines()[-5:] == expected


def test_starting_from_weights_starts_at_the_first_epoch(workdir):
    train.main(TINY)
    train.main(
        [
            *TINY,
            "--init_from",
            RUN,
            "--learning_rate",
            "1e-12",
            "--num_epochs",
            "1",
            "--logger_name",
            "runs/b",
        ]
    )
    one, other = load(RUN), load("runs/b/checkpoint.pth.tar")
    assert (other["epoch"], other["Eiters"]) == (1, 4)
    assert all(
        (a[key] - b[key]).abs().max() < 1e-6
        for a, b in zip(one["model"], other["model"])
        for key in a
    )


def test_two_stages_may_differ_in_loss(workdir):
    train.main([*TINY, "--max_violation"])
    train.main([*TINY, *BANK, "--init_from", RUN, "--logger_name", "runs/b"])
    assert load("runs/b/checkpoint.pth.tar")["opt"].memory_bank


@pytest.mark.parametrize(
    "name, value",
    [
        ("img_dim", 6),
        ("embed_size", 5),
        ("word_dim", 4),
        ("num_layers", 2),
        ("vocab_size", 8),
        ("measure", "order"),
        ("use_abs", True),
        ("no_imgnorm", True),
        ("cnn_type", "resnet152"),
        ("image_pooling", "mean"),
        ("text_pooling", "gpo"),
        ("bi_gru", True),
        ("precomp_enc_type", "mlp"),
        ("no_txtnorm", True),
        ("cross_attn", "t2i"),
    ],
)
def test_weights_of_another_model_are_not_started_from(name, value):
    """Options that do not change the weights' shapes count, too."""
    opt = Namespace(
        data_name="tiny_precomp",
        img_dim=5,
        embed_size=4,
        word_dim=3,
        num_layers=1,
        vocab_size=9,
        seed=0,
        measure="cosine",
        use_abs=False,
        no_imgnorm=False,
        cnn_type="vgg19",
        finetune=False,
        image_pooling=None,
        text_encoder="gru",
        img_layers=1,
        text_pooling="last",
        bi_gru=False,
        precomp_enc_type="basic",
        no_txtnorm=False,
        cross_attn=None,
        cnn_weights="none",
        init_from="start.pth.tar",
        resume="",
    )
    with pytest.raises(
        InputError, match=f"--init_from start.pth.tar has --{name} {value}, this run"
    ):
        train.build_model(
            opt,
            {"opt": Namespace(**{**vars(opt), name: value}), "model": None},
            torch.device("cpu"),
        )


# Raw images -------------------------------------------------------------------------------------


def test_a_photo_alone_has_no_variance(workdir):
    with pytest.raises(InputError, match="one photo of 32 pixels has no variance .* --crop_size"):
        train.main(
            [*RAW, "--data_name", "f8k", "--batch_size", "19", "--sum_violation"]
        )  # of 20 captions


@pytest.mark.parametrize(
    "flags, steps",
    [
        (["--data_name", "f8k"], 3),
        (["--data_name", "coco"], 3),
        (["--data_name", "coco", "--use_restval"], 4),
    ],
    ids=str,
)
def test_raw_images_train_and_evaluate(workdir, capsys, flags, steps):
    train.main([*RAW, *flags])
    content = load(RUN)
    assert content["Eiters"] == steps and "cnn.module.conv1.weight" in content["model"][0]
    rsum = capsys.readouterr().out.splitlines()[-1]
    compute_results.main(["--split", "dev", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[0] == rsum


def test_raw_images_end_alike_whatever_the_workers(workdir):
    train.main([*RAW, "--data_name", "f8k", "--logger_name", "runs/one"])
    train.main([*RAW, "--data_name", "f8k", "--workers", "2", "--logger_name", "runs/two"])
    assert same(ends("runs/one"), ends("runs/two"))


def test_finetuning_moves_the_cnn_and_freezing_does_not(workdir):
    train.main([*RAW, "--data_name", "f8k", "--logger_name", "runs/frozen"])
    train.main([*RAW, "--data_name", "f8k", "--finetune", "--logger_name", "runs/fine"])
    torch.manual_seed(0)
    first = VSE(load("runs/fine/checkpoint.pth.tar")["opt"]).img_enc.state_dict()
    frozen, fine = (ends(f"runs/{name}")[0][0] for name in ("frozen", "fine"))
    weights = [name for name in first if name.startswith("cnn.") and name.endswith("conv1.weight")]
    assert all(torch.equal(frozen[name], first[name]) for name in weights)
    assert not any(torch.equal(fine[name], first[name]) for name in weights)
    assert not torch.equal(
        frozen["cnn.module.bn1.running_mean"], first["cnn.module.bn1.running_mean"]
    )


def test_a_second_stage_finetunes_what_the_first_froze(workdir):
    train.main([*RAW, "--data_name", "f8k"])
    train.main(
        [
            *RAW,
            "--data_name",
            "f8k",
            "--finetune",
            "--init_from",
            RUN,
            "--learning_rate",
            "1e-12",
            "--logger_name",
            "runs/fine",
        ]
    )
    one, other = ends()[0][0], ends("runs/fine")[0][0]
    name = "cnn.module.layer4.1.conv2.weight"
    assert (
        load("runs/fine/checkpoint.pth.tar")["opt"].finetune
        and (one[name] - other[name]).abs().max() < 1e-6
    )


def test_raw_image_runs_resume_alike(workdir):
    flags = [*RAW, "--data_name", "f8k"]
    train.main([*flags, "--num_epochs", "2", "--logger_name", "runs/two"])
    train.main([*flags, "--logger_name", "runs/one"])
    torch.manual_seed(99)
    train.main(
        [
            *flags,
            "--num_epochs",
            "2",
            "--logger_name",
            "runs/one",
            "--resume",
            "runs/one/checkpoint.pth.tar",
        ]
    )
    assert same(ends("runs/one"), ends("runs/two"))


# Both scripts on the sample data, as commands ---------------------------------------------------


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """(folder, result) of the training command in an empty folder, in which it draws its data first."""
    folder = tmp_path_factory.mktemp("commanded")
    flags = ["--embed_size", "16", "--word_dim", "8", "--num_epochs", "1", "--device", "cpu"]
    return folder, run_script("train.py", *flags, cwd=folder)


def test_the_sample_data_trains_by_one_command(commanded):
    folder, result = commanded
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"rsum: \d+\.\d\n", result.stdout)
    assert not re.search("Traceback|Warning", result.stderr)
    assert (folder / "data" / "sample_precomp" / "train_ims.npy").exists()


def test_the_sample_data_evaluates_by_one_command(commanded):
    result = run_script("compute_results.py", "--device", "cpu", cwd=commanded[0])
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5


def test_the_small_raw_sample_set_trains(commanded, tmp_path, monkeypatch):
    shutil.copytree(commanded[0] / "data" / "sample", tmp_path / "data" / "sample")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_data, "draw", lambda folder: None)  # the other one is not needed
    train.main([*RAW, "--data_name", "sample", "--batch_size", "100"])
    assert ends()[2] == 1


def test_what_precomputed_features_do_not_need_is_not_imported(workdir):
    """Neither torchvision nor pycocotools."""
    (workdir / "torchvision.py").write_text("raise ImportError('not needed')")
    (workdir / "pycocotools.py").write_text("raise ImportError('not needed')")
    result = run_script("train.py", *TINY, *BANK, cwd=workdir, PYTHONPATH=str(workdir))
    assert result.returncode == 0, result.stderr
    assert ends()[2] == 2


# Bad input --------------------------------------------------------------------------------------


class Smuggled:
    def __reduce__(self):
        return os.system, ("touch smuggled",)


def caps(split, content):
    return lambda f: (f / "data" / "tiny_precomp" / f"{split}_caps.txt").write_bytes(content)


def ims(split, features):
    return lambda f: np.save(f / "data" / "tiny_precomp" / f"{split}_ims.npy", features)


def remove(name):
    return lambda f: shutil.rmtree(f / name) if (f / name).is_dir() else (f / name).unlink()


def cut(name, end):
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[:end])


def words(content, name="vocab/tiny_precomp_vocab.json"):
    def write(folder):
        (folder / "vocab").mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def start(content):
    return lambda f: torch.save(content, f / "start.pth.tar")


def nothing(folder):
    pass


def released_start(folder):
    shutil.copy(RELEASED / "runs" / "local" / "model_best.pth.tar", folder / "start.pth.tar")
    shutil.copytree(RELEASED / "data" / "f8k_precomp", folder / "data" / "f8k_precomp")
    shutil.copytree(RELEASED / "vocab", folder / "vocab")


def released_start_alone(folder):
    released_start(folder)
    shutil.rmtree(folder / "vocab")


def spoilt_start(folder):
    content = load(RELEASED / "runs" / "local" / "model_best.pth.tar")
    content["model"][0]["fc.bias"][3] = float("nan")
    torch.save(content, folder / "start.pth.tar")


BAD = {  # what is done to the folder, the flags, and what the sentence names
    "no data folder": (nothing, ["--data_path", "nowhere"], ["nowhere"]),
    "a file in place of the sample data": (
        nothing,
        ["--data_name", "sample_precomp", "--data_path", "data/tiny_precomp/dev_caps.txt"],
        ["--data_path data/tiny_precomp/dev_caps.txt"],
    ),
    "no such data": (nothing, ["--data_name", "potato_precomp"], ["potato_precomp"]),
    "no training captions": (remove("data/tiny_precomp/train_caps.txt"), [], ["train_caps.txt"]),
    "no dev captions": (remove("data/tiny_precomp/dev_caps.txt"), [], ["dev_caps.txt"]),
    "no training features": (remove("data/tiny_precomp/train_ims.npy"), [], ["train_ims.npy"]),
    "no dev features": (remove("data/tiny_precomp/dev_ims.npy"), [], ["dev_ims.npy"]),
    "captions of another number": (caps("train", b"a dog\n" * 59), [], ["59", "12"]),
    "dev captions of another number": (caps("dev", b"a dog\n" * 26), [], ["26", "5"]),
    "features in one dimension": (
        ims("train", np.ones(12, np.float32)),
        [],
        ["train_ims.npy", "(12,)"],
    ),
    "features in four dimensions": (
        ims("train", np.ones((12, 8, 2, 2), np.float32)),
        [],
        ["train_ims.npy"],
    ),
    "features of text": (ims("train", np.array([["x"] * 8] * 12)), [], ["train_ims.npy"]),
    "features of objects": (ims("train", np.array([[Smuggled()] * 8] * 12)), [], ["train_ims.npy"]),
    "features torn": (cut("data/tiny_precomp/train_ims.npy", -7), [], ["train_ims.npy"]),
    "features empty": (cut("data/tiny_precomp/train_ims.npy", 0), [], ["train_ims.npy"]),
    "features with nan": (
        ims("train", np.full((12, 8), np.nan, np.float32)),
        [],
        ["train_ims.npy", "NaN"],
    ),
    "features with inf": (
        ims("dev", np.full((5, 8), np.inf, np.float16)),
        [],
        ["dev_ims.npy", "row 0"],
    ),
    "features beyond float32": (ims("train", np.full((12, 8), 1e300)), [], ["train_ims.npy"]),
    "features of another width": (nothing, ["--img_dim", "2048"], ["2048", "8"]),
    "dev features of another width": (
        ims("dev", np.ones((5, 9), np.float32)),
        [],
        ["dev_ims.npy", "9", "8"],
    ),
    "an empty caption file": (caps("train", b""), [], ["train_caps.txt", "empty"]),
    "an empty dev caption file": (caps("dev", b""), [], ["dev_caps.txt", "empty"]),
    "captions not UTF-8": (
        caps("train", b"a dog\n" * 3 + b"caf\xe9\n" + b"a dog\n" * 56),
        [],
        ["train_caps.txt", "line 4"],
    ),
    "vocabulary without special words": (
        words(b'{"word2idx": {"dog": 0}}'),
        [],
        ["tiny_precomp_vocab.json", "special"],
    ),
    "vocabulary of nothing": (words(b"{}"), [], ["tiny_precomp_vocab.json"]),
    "vocabulary cut short": (words(b'{"word2idx": {"<pad>"'), [], ["tiny_precomp_vocab.json"]),
    "vocabulary with code": (
        words(b"cos\nsystem\n(S'touch smuggled'\ntR.", "vocab/tiny_precomp_vocab.pkl"),
        [],
        ["tiny_precomp_vocab.pkl", "os.system"],
    ),
    "vocabulary folder that is a file": (
        nothing,
        ["--vocab_path", "data/f8k/dataset_flickr8k.json"],
        ["--vocab_path data/f8k/dataset_flickr8k.json is not a folder"],
    ),
    "resume from nothing": (nothing, ["--resume", "nowhere.pth.tar"], ["nowhere.pth.tar"]),
    "init from nothing": (nothing, ["--init_from", "nowhere.pth.tar"], ["nowhere.pth.tar"]),
    "resume from a folder": (nothing, ["--resume", "data"], ["data"]),
    "resume from code": (
        start({"model": Smuggled()}),
        ["--resume", "start.pth.tar"],
        ["start.pth.tar"],
    ),
    "init from code": (start(Smuggled()), ["--init_from", "start.pth.tar"], ["start.pth.tar"]),
    "resume from a list": (start([1, 2]), ["--resume", "start.pth.tar"], ["start.pth.tar"]),
    "resume from a released run": (
        released_start,
        [*RELEASED_FLAGS, "--resume", "start.pth.tar"],
        ["--resume start.pth.tar", "--init_from"],
    ),
    "init from another model": (
        released_start,
        [*RELEASED_FLAGS, "--embed_size", "8", "--init_from", "start.pth.tar"],
        ["start.pth.tar", "embed_size"],
    ),
    "resume from nan": (
        spoilt_start,
        ["--resume", "start.pth.tar"],
        ["start.pth.tar", "fc.bias", "NaN"],
    ),
    "init from nan": (
        spoilt_start,
        ["--init_from", "start.pth.tar"],
        ["start.pth.tar", "fc.bias", "NaN"],
    ),
    "init without its vocabulary": (
        released_start_alone,
        ["--init_from", "start.pth.tar"],
        ["start.pth.tar", "--vocab_path"],
    ),
    "both starts": (nothing, ["--init_from", "a", "--resume", "b"], ["--init_from", "--resume"]),
    "epochs to keep that are not kept": (nothing, ["--keep", "1"], ["--keep", "--save_all"]),
    "rate of 0": (nothing, ["--mb_rate", "0"], ["--mb_rate"]),
    "rate above 1": (nothing, ["--mb_rate", "1.5"], ["--mb_rate"]),
    "rate below 0": (nothing, ["--mb_rate", "-0.1"], ["--mb_rate"]),
    "rate of nan": (nothing, ["--mb_rate", "nan"], ["--mb_rate"]),
    "a single image to train on": (
        lambda f: (ims("train", np.ones((1, 8), np.float32))(f), caps("train", b"a dog\n" * 5)(f)),
        [],
        ["the training split has one image, with 5 captions"],
    ),
    "no batch": (nothing, ["--batch_size", "0"], ["--batch_size"]),
    "a negative batch": (nothing, ["--batch_size", "-1"], ["--batch_size"]),
    "half a batch": (nothing, ["--batch_size", "1.5"], ["--batch_size"]),
    "one number an embedding": (nothing, ["--embed_size", "1"], ["--embed_size", "at least 2"]),
    "a width beyond reason": (
        nothing,
        ["--embed_size", "99999999999"],
        ["--embed_size", "at most 65536"],
    ),
    "words of a width beyond reason": (
        nothing,
        ["--word_dim", "99999999999"],
        ["--word_dim", "at most 65536"],
    ),
    "a million layers": (nothing, ["--num_layers", "1000000"], ["--num_layers", "at most 100"]),
    "a crop beyond reason": (nothing, ["--crop_size", "1000000"], ["--crop_size", "at most 4096"]),
    "a batch that no checkpoint holds": (
        nothing,
        ["--batch_size", str(2**31)],
        ["--batch_size", "at most"],
    ),
    "an infinite margin": (nothing, ["--margin", "inf"], ["--margin"]),
    "a clip of nan": (nothing, ["--grad_clip", "nan"], ["--grad_clip"]),
    "a scale beyond float32": (nothing, ["--local_alpha", "1e39"], ["--local_alpha", "at most"]),
    "a margin beyond float32": (nothing, ["--local_ep", "1e39"], ["--local_ep", "at most"]),
    "no width": (nothing, ["--embed_size", "0"], ["--embed_size"]),
    "no words' width": (nothing, ["--word_dim", "0"], ["--word_dim"]),
    "no layers": (nothing, ["--num_layers", "0"], ["--num_layers"]),
    "no features' width": (nothing, ["--img_dim", "0"], ["--img_dim"]),
    "no neighbours": (nothing, ["--mb_k", "0"], ["--mb_k"]),
    "no learning rate": (nothing, ["--learning_rate", "0"], ["--learning_rate"]),
    "an infinite learning rate": (nothing, ["--learning_rate", "inf"], ["--learning_rate"]),
    "a learning rate of nan": (nothing, ["--learning_rate", "nan"], ["--learning_rate"]),
    "a scale of 0": (nothing, ["--local_alpha", "0"], ["--local_alpha"]),
    "a margin of nan": (nothing, ["--local_ep", "nan"], ["--local_ep"]),
    "a bank's margin of nan": (nothing, ["--global_ep_nega", "nan"], ["--global_ep_nega"]),
    "a bank's infinite margin": (nothing, ["--global_ep_nega", "inf"], ["--global_ep_nega"]),
    "a negative margin": (nothing, ["--margin", "-1"], ["--margin"]),
    "a negative clip": (nothing, ["--grad_clip", "-1"], ["--grad_clip"]),
    "no steps between logs": (nothing, ["--log_step", "0"], ["--log_step"]),
    "no steps between validations": (nothing, ["--val_step", "0"], ["--val_step"]),
    "no epochs between rates": (nothing, ["--lr_update", "0"], ["--lr_update"]),
    "negative epochs": (nothing, ["--num_epochs", "-1"], ["--num_epochs"]),
    "negative workers": (nothing, ["--workers", "-1"], ["--workers"]),
    "no crop": (nothing, ["--crop_size", "0"], ["--crop_size"]),
    "a negative seed": (nothing, ["--seed", "-1"], ["--seed"]),
    "a seed beyond 64 bits": (nothing, ["--seed", str(2**64)], ["--seed"]),
    "an unknown cnn": (nothing, ["--cnn_type", "alexnet"], ["--cnn_type", "alexnet", "resnet152"]),
    "an unknown similarity": (nothing, ["--measure", "potato"], ["--measure"]),
    "HAL with order": (nothing, ["--measure", "order"], ["--measure order", "--max_violation"]),
    "HAL's bank with order": (
        nothing,
        ["--measure", "order", "--memory_bank"],
        ["--measure order"],
    ),
    "an unknown device": (nothing, ["--device", "potato"], ["--device potato"]),
    "a device that is not there": (nothing, ["--device", "cuda:99"], ["--device cuda:99"]),
    "an unknown flag": (nothing, ["--potato", "1"], ["--potato"]),
    "a shortened flag": (nothing, ["--num_epoch", "1"], ["--num_epoch"]),
    "a flag without its value": (nothing, ["--num_layers"], ["--num_layers"]),
    "a run folder that is a file": (
        nothing,
        ["--logger_name", "data/tiny_precomp/dev_caps.txt"],
        ["dev_caps.txt"],
    ),
    "no json of the raw set": (
        remove("data/f8k/dataset_flickr8k.json"),
        [*RAW, "--data_name", "f8k"],
        ["dataset_flickr8k.json"],
    ),
    "broken json of the raw set": (
        cut("data/f8k/dataset_flickr8k.json", 100),
        [*RAW, "--data_name", "f8k"],
        ["dataset_flickr8k.json"],
    ),
    "no raw set": (nothing, [*RAW, "--data_name", "f30k"], ["f30k"]),
    "no coco annotations": (
        remove("data/coco/annotations/captions_val2014.json"),
        [*RAW, "--data_name", "coco"],
        ["captions_val2014.json"],
    ),
    "no coco ids": (
        remove("data/coco/annotations/coco_dev_ids.npy"),
        [*RAW, "--data_name", "coco"],
        ["coco_dev_ids.npy"],
    ),
    "no restval ids": (
        remove("data/coco/annotations/coco_restval_ids.npy"),
        [*RAW, "--data_name", "coco", "--use_restval"],
        ["coco_restval_ids.npy"],
    ),
    "cnn weights that are not there": (
        nothing,
        [*RAW, "--data_name", "f8k", "--cnn_weights", "nowhere.pth"],
        ["--cnn_weights", "nowhere.pth"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(workdir, kind):
    prepare, flags, named = BAD[kind]
    prepare(workdir)
    before = tree(workdir)
    with pytest.raises(InputError) as caught:
        train.main([*TINY, *flags])
    message = str(caught.value)
    assert all(name in message for name in named) and "\n" not in message
    after = tree(workdir)
    assert {name: content for name, content in after.items() if not name.startswith("vocab")} == {
        name: content for name, content in before.items() if not name.startswith("vocab")
    }


@pytest.mark.parametrize(
    "kind",
    [
        "no dev features",
        "captions of another number",
        "dev captions of another number",
        "features torn",
    ],
)
def test_no_vocabulary_is_kept_of_data_that_is_refused(workdir, kind):
    """One built from captions that must be mended first would be taken for theirs in the next run."""
    prepare, flags, _ = BAD[kind]
    prepare(workdir)
    with pytest.raises(InputError):
        train.main([*TINY, *flags])
    assert not (workdir / "vocab").exists()


@pytest.mark.parametrize(
    "kind", ["captions not UTF-8", "resume from code", "HAL with order", "a device of no kind"]
)
def test_bad_input_ends_with_2_and_one_line(workdir, kind):
    prepare, flags, named = BAD.get(kind, (nothing, ["--device", "cuda:99"], ["--device cuda:99"]))
    prepare(workdir)
    before = tree(workdir)
    result = run_script("train.py", *TINY, *flags, cwd=workdir)
    assert (result.returncode, result.stdout) == (2, "")
    assert all(name in result.stderr for name in named)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert tree(workdir) == before


@pytest.mark.parametrize("flags", [[], ["--micro_batch", "4"]], ids=["whole", "in pieces"])
@pytest.mark.parametrize("content", [None, b"not an image"], ids=["missing", "broken"])
def test_an_image_that_cannot_be_read_is_named_and_no_checkpoint_written(workdir, content, flags):
    path = workdir / "data" / "f8k" / "images" / "2.png"
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"2\.png"):
        train.main([*RAW, "--data_name", "f8k", *flags])
    assert not any(name.endswith(".tar") for name in tree(workdir))


def test_a_broken_image_is_named_whichever_worker_met_it(workdir):
    (workdir / "data" / "f8k" / "images" / "2.png").write_bytes(b"not an image")
    result = run_script("train.py", *RAW, "--data_name", "f8k", "--workers", "2", cwd=workdir)
    assert result.returncode == 2 and "2.png" in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "name, value", [("embed_size", "12"), ("num_layers", "2"), ("word_dim", "7")]
)
def test_resuming_with_another_model_is_refused(evaluated, name, value):
    before = tree(evaluated)
    with pytest.raises(InputError, match=f"--{name}"):
        train.main([*TINY, "--resume", RUN, f"--{name}", value, "--logger_name", "runs/other"])
    assert tree(evaluated) == before


def test_resuming_on_features_of_another_width_is_refused(evaluated):
    write_precomp(evaluated / "data" / "tiny_precomp", width=9)
    with pytest.raises(InputError, match=r"(?s)9.*8|8.*9"):
        train.main([*TINY, "--resume", RUN])


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none(workdir):
    with pytest.raises(InputError, match="--device cuda"):
        train.main([*TINY, "--device", "cuda"])


# With a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_cuda_and_its_checkpoint_evaluates_on_the_cpu(workdir, capsys, loss):
    train.main([*TINY, *LOSSES[loss], "--device", "cuda"])
    assert ends()[2] == 2
    compute_results.main(["--model_path", RUN, "--split", "dev", "--device", "cpu"])
    rsums = [
        float(line.partition(": ")[2])
        for line in capsys.readouterr().out.splitlines()
        if "rsum" in line
    ]
    assert rsums[-1] == pytest.approx(rsums[-2], abs=25)
