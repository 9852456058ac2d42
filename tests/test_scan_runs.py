"""SCAN from the command line.

Training with every loss, evaluation, the released code's checkpoints.
"""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import compute_results
import train
from evaluation import embed, encode_data, load_for_evaluation
from layers.cross_attention import shard_xattn_i2t, shard_xattn_t2i
from retrieval.ranking import rank_shifted
from retrieval.similarity import CrossAttention
from tests.helpers.made import REFERENCE, TINY, load, states_equal
from tests.test_regions import refused, write_regions

RELEASED = REFERENCE / "scan" / "checkpoints"

EXPECTED = json.loads((RELEASED / "expected.json").read_text())

T2I, I2T = (
    ["--cross_attn", "t2i", "--bi_gru"],
    ["--cross_attn", "i2t", "--agg_func", "Mean", "--lambda_softmax", "4"],
)


@pytest.fixture
def regions(tmp_path, monkeypatch):
    """A current folder with data of regions."""
    write_regions(tmp_path / "data" / "tiny_precomp")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        T2I,
        I2T,
        [*T2I, "--max_violation"],
        [*I2T, "--sum_violation", "--precomp_enc_type", "weight_norm", "--num_layers", "2"],
        [*T2I, "--amp", "bf16", "--no_imgnorm", "--raw_feature_norm", "softmax"],
        [
            *I2T,
            "--drop_words",
            "0.2",
            "--drop_regions",
            "0.2",
            "--warmup_epochs",
            "1",
            "--max_violation",
        ],
    ],
    ids=" ".join,
)
def test_every_loss_trains_and_its_checkpoint_evaluates(regions, capsys, flags):
    train.main([*TINY, *flags])
    best = f"rsum: {load('runs/runX/model_best.pth.tar')['best_rsum']:.1f}"
    assert best in capsys.readouterr().out.splitlines()
    compute_results.main(["--split", "dev"])
    assert capsys.readouterr().out.startswith(best)


def test_a_run_goes_on_to_the_same_weights(regions):
    train.main([*TINY, *I2T, "--logger_name", "runs/whole"])
    train.main([*TINY, *I2T, "--num_epochs", "1"])
    train.main([*TINY, *I2T, "--resume", "auto"])
    assert states_equal(
        load("runs/whole/checkpoint.pth.tar")["model"],
        load("runs/runX/checkpoint.pth.tar")["model"],
    )


# The released code's checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize("run", EXPECTED)
def test_a_released_checkpoint_prints_its_lines_and_has_its_ranks(released, capsys, run):
    compute_results.main(["--model_path", f"runs/{run}/model_best.pth.tar"])
    output = capsys.readouterr()
    assert (
        output.out.splitlines() == EXPECTED[run]["printed"][3:]
        and EXPECTED[run]["printed"][2] in output.err
    )
    ranks, arrays = (
        torch.load("ranks.pth.tar", weights_only=True),
        dict(np.load(RELEASED / f"expected_{run}.npz")),
    )
    for side, name in (("rt", "i2t"), ("rti", "t2i")):
        assert np.array_equal(ranks[side][0], arrays[f"{name}_ranks"])
        assert np.array_equal(ranks[side][1], arrays[f"{name}_top1"])


@pytest.mark.parametrize("run", EXPECTED)
def test_a_released_checkpoint_s_folds_have_the_right_means(released, capsys, run):
    compute_results.main(["--model_path", f"runs/{run}/model_best.pth.tar", "--fold5"])
    lines, expected = capsys.readouterr().out.splitlines(), EXPECTED[run]["fold5"]
    assert (
        lines[:17] == expected["printed"][3:20]
    )  # each fold's lines, the dashes, and what stands above the means
    assert [line for line in lines[17:] if line.startswith(("Image", "Text"))] == [
        line for line in expected["printed"][20:] if line.startswith(("Image", "Text"))
    ]
    assert lines[17] == f"rsum: {expected['right_means']['rsum']:.1f}"


@pytest.mark.parametrize("run", EXPECTED)
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_scores_in_tiles_are_the_released_ones(released, monkeypatch, run, tile):
    monkeypatch.setattr(CrossAttention, "tile_images", tile)
    loaded = load_for_evaluation(
        Namespace(model_path=f"runs/{run}/model_best.pth.tar", device="cpu")
    )
    loader = loaded.loader("test")
    source = loaded.similarities(*embed(loaded.model, loader))
    arrays = dict(np.load(RELEASED / f"expected_{run}.npz"))
    scores = arrays["scores"]
    found = source.tile(slice(3, 20), slice(11, 90), (17, 79))
    assert np.abs(found.numpy() - scores[3:20, 11:90]).max() < 1e-6
    for side, matrix in (("i2t", scores.T), ("t2i", scores)):
        assert np.abs(source.across(side, slice(5, 9)).numpy() - matrix[5:9]).max() < 1e-6
    images, captions = torch.tensor([0, 24, 7, 0]), torch.tensor([124, 0, 36, 124])
    assert np.abs(source.pairs(images, captions).numpy() - scores[images, captions]).max() < 1e-6
    (rankings,) = rank_shifted(source, image_of=loader.dataset.image_of)
    assert np.array_equal(rankings[0].ranks, arrays["i2t_ranks"]) and np.array_equal(
        rankings[1].ranks, arrays["t2i_ranks"]
    )


@pytest.mark.parametrize("run, shard", [("t2i", shard_xattn_t2i), ("i2t", shard_xattn_i2t)])
def test_the_family_s_calls_go_together(released, run, shard):
    loaded = load_for_evaluation(
        Namespace(model_path=f"runs/{run}/model_best.pth.tar", device="cpu")
    )
    images, captions, lengths = encode_data(
        loaded.model, loaded.loader("test"), logging=lambda line: None
    )
    scores = shard(images[::5], captions, lengths, loaded.opt, shard_size=9)
    assert np.abs(scores - np.load(RELEASED / f"expected_{run}.npz")["scores"]).max() < 1e-6


def test_hubs_corrections_and_the_page_take_cross_attention(released, capsys):
    compute_results.main(
        [
            "--model_path",
            "runs/i2t/model_best.pth.tar",
            "--hubness",
            "--correction",
            "all",
            "--tune_correction",
            "--correction_bank_images",
            "9",
            "--report",
            "report",
        ]
    )
    output = capsys.readouterr().out
    assert "bank: train, 9 images, 45 captions" in output and "sinkhorn" in output
    assert (
        "Cross attention" not in output
        and "i2t" in (released / "report" / "report.html").read_text()
    )


def test_a_checkpoint_of_pytorch_0_3_has_its_scalar_in_a_list(regions, capsys):
    train.main([*TINY, *T2I, "--precomp_enc_type", "weight_norm"])
    content, path = load("runs/runX/model_best.pth.tar"), "runs/runX/old.pth.tar"
    content["model"][0]["fc.weight_g"] = content["model"][0]["fc.weight_g"].reshape(1)
    torch.save(content, path)
    capsys.readouterr()
    compute_results.main([])
    plain = capsys.readouterr().out
    compute_results.main(["--model_path", path])
    assert capsys.readouterr().out == plain


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--measure", "order", "--max_violation"],
        ["--image_pooling", "max"],
        ["--memory_bank"],
        ["--text_pooling", "mean"],
        ["--use_abs"],
        ["--precomp_enc_type", "mlp"],
    ],
    ids=" ".join,
)
def test_what_does_not_go_with_cross_attention_is_refused(regions, flags):
    refused(train.main, [*TINY, *T2I, *flags], flags[0], "--cross_attn")


def test_vectors_are_refused(workdir):
    refused(train.main, [*TINY, *T2I], "over regions", "(12, 8)")
    refused(train.main, [*TINY, "--precomp_enc_type", "weight_norm"], "weight_norm", "--cross_attn")


def test_embeddings_of_regions_and_words_are_not_saved(released):
    refused(
        compute_results.main,
        ["--model_path", "runs/t2i/model_best.pth.tar", "--save_embeddings"],
        "SCAN",
    )


def test_a_resumed_run_keeps_its_attention(regions):
    train.main([*TINY, *I2T, "--num_epochs", "1"])
    for flags in ([*T2I], [*I2T, "--lambda_softmax", "5"], [*I2T, "--agg_func", "Max"], []):
        refused(train.main, [*TINY, *flags, "--resume", "auto"], "was")
