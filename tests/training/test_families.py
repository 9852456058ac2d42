"""--model_family: the released codes' defaults, their published commands, and their own flags."""

import json
import os

import pytest

import compute_results
import train
from tests.helpers.made import DEFAULTS, REFERENCE, load, write_precomp
from tests.test_regions import refused, write_regions
from tests.training.test_options import COMMON, RECIPES
from training.families import FAMILIES
from training.options import parse_args

SHARED = {
    "margin": 0.2,
    "batch_size": 128,
    "word_dim": 300,
    "embed_size": 1024,
    "grad_clip": 2.0,
    "num_layers": 1,
    "learning_rate": 0.0002,
    "workers": 10,
    "log_step": 10,
    "val_step": 500,
    "resume": "",
    "no_imgnorm": False,
}

VSE_INFTY = json.loads((REFERENCE / "vse_infty" / "defaults.json").read_text())

# The released codes' defaults, but for places and the width of the features, in their own words.
RELEASED = {
    "hal": {
        name: value
        for name, value in DEFAULTS.items()
        if name not in ("logger_name", "data_path", "data_name")
    },
    "vsepp": {
        **SHARED,
        "num_epochs": 30,
        "lr_update": 15,
        "max_violation": False,
        "measure": "cosine",
        "use_abs": False,
        "crop_size": 224,
        "cnn_type": "vgg19",
        "finetune": False,
    },
    "scan": {
        **SHARED,
        "num_epochs": 30,
        "lr_update": 15,
        "max_violation": False,
        "no_txtnorm": False,
        "raw_feature_norm": "clipped_l2norm",
        "agg_func": "LogSumExp",
        "cross_attn": "t2i",
        "precomp_enc_type": "basic",
        "bi_gru": False,
        "lambda_lse": 6.0,
        "lambda_softmax": 9.0,
    },
    "vse_infty": {
        name: VSE_INFTY[name]
        for name in (*SHARED, "num_epochs", "lr_update", "max_violation", "no_txtnorm")
    },
}

# What each trains if no flag says otherwise, and what is fixed in its code.
FIXED = {
    "hal": {"loss": "hal", "cross_attn": None, "weight_decay": 0.0},
    "vsepp": {"loss": "sum", "cross_attn": None, "bi_gru": False, "text_pooling": "last"},
    "scan": {"loss": "sum", "drop_words": 0.0, "weight_decay": 0.0},
    "vse_infty": {
        "loss": "max",
        "warmup_epochs": VSE_INFTY["vse_mean_warmup_epochs"],
        "precomp_enc_type": "mlp",
        "image_pooling": "gpo",
        "text_pooling": "gpo",
        "bi_gru": True,
        "drop_regions": 0.2,
        "drop_words": 0.2,
        "weight_decay": 0.01,
        "cross_attn": None,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_released_defaults(family):
    found = vars(parse_args(["--model_family", family]))
    expected = RELEASED[family] | FIXED[family]
    assert len(expected) > 15
    assert {name: found[name] for name in expected} == expected


def test_hal_s_family_is_what_is_trained_without_one():
    plain, named = vars(parse_args([])), vars(parse_args(["--model_family", "hal"]))
    assert {**plain, "model_family": "hal"} == named


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--model_family vsepp --max_violation", {"loss": "max", "num_epochs": 30}),
        ("--model_family vsepp --loss hal --num_epochs 4", {"loss": "hal", "num_epochs": 4}),
        (
            "--model_family scan --cross_attn i2t --lr_update 3",
            {"cross_attn": "i2t", "lr_update": 3},
        ),
        ("--model_family scan --max_violation --bi_gru", {"loss": "max", "bi_gru": True}),
        ("--model_family hal --cross_attn t2i", {"num_epochs": 15, "loss": "hal"}),
        (
            "--model_family vse_infty --no-bi_gru --drop_words 0 --image_pooling max",
            {"bi_gru": False, "drop_words": 0, "image_pooling": "max", "text_pooling": "gpo"},
        ),
        ("--model_family vse_infty --sum_violation --weight_decay 0", {"loss": "sum"}),
        ("--model_family vse_infty --data_name mine_precomp", {"vocab_name": None}),
    ],
)
def test_flags_that_are_given_win_over_the_family(flags, expected):
    found = vars(parse_args(flags.split()))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--vse_mean_warmup_epochs", "1"], ["VSE-infinity's", "--model_family vse_infty"]),
        (["--optim", "adam", "--model_family", "scan"], ["--optim", "--model_family vse_infty"]),
        (["--optim", "sgd", "--model_family", "vse_infty"], ["--optim"]),
        (["--backbone_source", "wsl"], ["--backbone_source", "extract_features.py"]),
        (["--backbone_path=a.pth"], ["--backbone_path", "--model_family vse_infty"]),
        (["--reset_start_epoch"], ["--init_from"]),
        (["--drop"], ["--drop_words"]),
        (["--model_family", "clip"], ["hal", "vse_infty"]),
        (["--model_family", "vsepp", "--memory_bank"], ["--memory_bank", "HAL only"]),
        (
            ["--model_family=vse_infty", "--warmup_epochs=2", "--vse_mean_warmup_epochs=1"],
            ["--warmup_epochs"],
        ),
    ],
)
def test_a_flag_without_a_meaning_here_says_what_to_do(flags, named):
    refused(parse_args, flags, *named)


# Commands as the released codes publish them, made small by the last flags.
SMALL = "--word_dim 6 --batch_size 16 --num_epochs 1 --device cpu"
PUBLISHED = {
    **{
        f"SCAN {name}": (f"{COMMON} --data_name f30k_precomp {flags}", f"SCAN {name[:3]}")
        for name, flags in RECIPES.items()
    },
    "SCAN by its name": (
        f"--model_family scan {COMMON} --data_name f30k_precomp --agg_func=Mean",
        "SCAN t2i, bidirectional GRU, max-margin (0.2)",
    ),
    "VSE0": (
        "--model_family vsepp --data_path data --vocab_path vocab --data_name vectors_precomp "
        "--logger_name runs/x/log",
        "VSE, GRU, sum-margin (0.2)",
    ),
    "VSE++": (
        "--model_family vsepp --data_path data --vocab_path vocab --data_name vectors_precomp "
        "--logger_name runs/x/log --max_violation",
        "VSE, GRU, max-margin (0.2)",
    ),
    "VSE-infinity": (
        "--model_family vse_infty --data_path data/coco --data_name coco --vocab_path vocab "
        "--logger_name runs/x/log --model_name runs/x --num_epochs=25 --lr_update=15 "
        "--learning_rate=.0005 --precomp_enc_type basic --workers 10 --log_step 200 "
        "--embed_size 1024 --vse_mean_warmup_epochs 1",
        "VSE-infinity, bidirectional GRU, max-margin (0.2) after 1 epoch of sum-margin",
    ),
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A current folder with regions where SCAN and VSE-infinity expect them, and vectors."""
    write_regions(tmp_path / "data" / "f30k_precomp")
    write_regions(tmp_path / "data" / "coco" / "precomp")
    write_precomp(tmp_path / "data" / "vectors_precomp")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_command_trains_what_it_names(data, capsys, name):
    command, trained = PUBLISHED[name]
    train.main([*command.split(), *SMALL.split(), "--embed_size", "8"])
    said = capsys.readouterr().err
    assert f"Training {trained}" in said and "Note:" not in said
    assert load("runs/x/log/checkpoint.pth.tar")["Eiters"] == 4  # 60 captions in batches of 16


def test_vse_infinity_s_command_takes_its_vocabulary_and_its_encoder(data):
    command, _ = PUBLISHED["VSE-infinity"]
    train.main([*command.split(), *SMALL.split(), "--embed_size", "8"])
    content = load("runs/x/log/checkpoint.pth.tar")
    assert os.listdir("vocab") == ["coco_precomp_vocab.json"]
    words = json.loads((data / "vocab" / "coco_precomp_vocab.json").read_text())["word2idx"]
    assert content["vocabulary"] == [*words, "<mask>"]
    assert "mlp.layers.0.weight" in content["model"][0] and content["opt"].data_name == "precomp"
    flags = ["--model_path", "runs/x/log/model_best.pth.tar", "--export_for", "vse_infty"]
    compute_results.main([*flags, "--export", "out"])
    assert sorted(os.listdir("out")) == ["coco_precomp_vocab.json", "model_best.pth"]
    assert load("out/model_best.pth")["opt"].data_name == "coco"


def test_scan_s_flags_on_a_vse_point_to_the_family(data, capsys):
    flags = "--data_name vectors_precomp --agg_func=Mean --embed_size 8"
    train.main([*flags.split(), *SMALL.split()])
    assert "--agg_func would be SCAN's" in (said := capsys.readouterr().err)
    assert "--model_family scan" in said


@pytest.mark.parametrize(
    "flags, noted",
    [
        (["--max_violation"], True),
        (["--max_violation", "--num_epochs", "14"], False),
        (["--max_violation", "--model_family", "hal"], False),
        (["--loss", "hal"], False),
    ],
)
def test_vse_plus_plus_s_loss_with_hal_s_epochs_points_to_the_family(data, capsys, flags, noted):
    flags = ["--data_name", "vectors_precomp", "--embed_size", "8", *flags]
    train.main([*flags, "--word_dim", "6", "--batch_size", "16", "--device", "cpu"])
    found = "15 epochs and --lr_update 8 are HAL's code's: add --model_family vsepp"
    assert (found in capsys.readouterr().err) == noted


def test_a_resumed_run_keeps_its_family(data):
    flags = ["--data_name", "vectors_precomp", "--embed_size", "8", *SMALL.split()]
    train.main([*flags, "--model_family", "vsepp"])
    again = [*flags, "--resume", "auto", "--num_epochs", "2"]
    refused(train.main, again, "--model_family was vsepp there and is None here")
    refused(train.main, [*again, "--model_family", "hal"], "--model_family was vsepp")
    train.main([*again, "--model_family", "vsepp"])
    assert load("runs/runX/checkpoint.pth.tar")["epoch"] == 2
