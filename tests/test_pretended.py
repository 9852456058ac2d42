"""The whole scripts on pretended CUDA and MPS devices (see tests/helpers/pretended.py)."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.made import RAW, ROOT, TINY, write_vectors
from tests.test_regions import write_regions


def flags(these):
    """Without their --device."""
    place = these.index("--device")
    return these[:place] + these[place + 2 :]


TINY, RAW = flags(TINY), flags(RAW)

REGIONS = ["--data_name", "regions_precomp"]

BANK = ["--memory_bank", "--mb_rate", "0.5", "--mb_k", "5"]

COMMANDS = {
    "hal with the bank, features on the device": ["train.py", *TINY, *BANK, "--features_on_device"],
    "bf16, features beside it": [
        "train.py",
        *TINY,
        *BANK,
        "--amp",
        "bf16",
        "--no-features_on_device",
        "--logger_name",
        "runs/bf16",
        "--warmup_epochs",
        "1",
        "--lr_warmup_steps",
        "3",
    ],
    "max-margin, order": [
        "train.py",
        *TINY,
        "--max_violation",
        "--measure",
        "order",
        "--use_abs",
        "--num_layers",
        "2",
        "--logger_name",
        "runs/order",
        "--save_step",
        "2",
    ],
    "resumed": [
        "train.py",
        *TINY,
        "--max_violation",
        "--measure",
        "order",
        "--use_abs",
        "--num_layers",
        "2",
        "--logger_name",
        "runs/order",
        "--num_epochs",
        "3",
        "--resume",
        "auto",
    ],
    "bf16 in pieces": [
        "train.py",
        *TINY,
        *BANK,
        "--amp",
        "bf16",
        "--micro_batch",
        "5",
        "--logger_name",
        "runs/pieces",
    ],
    "photos in pieces": [
        "train.py",
        *RAW,
        "--data_name",
        "f8k",
        "--finetune",
        "--micro_batch",
        "3",
        "--loss",
        "hal+infonce",
        "--logger_name",
        "runs/photos",
    ],
    "sum-margin, photos and a CNN": [
        "train.py",
        *RAW,
        "--data_name",
        "f8k",
        "--finetune",
        "--sum_violation",
        "--logger_name",
        "runs/raw",
    ],
    "regions, every pooling": [
        "train.py",
        *TINY,
        *REGIONS,
        "--logger_name",
        "runs/regions",
        *BANK,
        "--image_pooling",
        "gpo",
        "--precomp_enc_type",
        "mlp",
        "--text_pooling",
        "gpo",
        "--bi_gru",
        "--drop_regions",
        "0.2",
        "--drop_words",
        "0.2",
        "--weight_decay",
        "0.01",
    ],
    "cross attention": [
        "train.py",
        *TINY,
        *REGIONS,
        "--logger_name",
        "runs/scan",
        "--cross_attn",
        "i2t",
        "--bi_gru",
        "--features_on_device",
    ],
    "max-margin on cross attention": [
        "train.py",
        *TINY,
        *REGIONS,
        "--logger_name",
        "runs/scan2",
        "--cross_attn",
        "t2i",
        "--max_violation",
        "--amp",
        "bf16",
        "--no-features_on_device",
    ],
    "cross attention in pieces": [
        "train.py",
        *TINY,
        *REGIONS,
        "--logger_name",
        "runs/scan3",
        "--cross_attn",
        "t2i",
        "--amp",
        "bf16",
        "--micro_batch",
        "5",
        "--drop_regions",
        "0.2",
    ],
    "text vectors": [
        "train.py",
        *TINY,
        "--text_features",
        "--loss",
        "hal+infonce",
        "--micro_batch",
        "5",
        "--logger_name",
        "runs/texts",
    ],
    "text vectors evaluated": [
        "compute_results.py",
        "--model_path",
        "runs/texts/model_best.pth.tar",
    ],
    "hubs and corrections": [
        "compute_results.py",
        "--hubness",
        "--correction",
        "all",
        "--tune_correction",
        "--report",
        "report",
        "--save_embeddings",
        "--save_json",
        "figures.json",
    ],
    "folds": [
        "compute_results.py",
        "--split",
        "testall",
        "--fold5",
        "--correction",
        "nnn",
        "--save_csv",
        "it.csv",
    ],
    "order": [
        "compute_results.py",
        "--model_path",
        "runs/order/model_best.pth.tar",
        "--hubness",
        "--correction",
        "qbnorm",
        "--transductive",
    ],
    "photos": ["compute_results.py", "--model_path", "runs/raw/model_best.pth.tar"],
    "regions": [
        "compute_results.py",
        "--model_path",
        "runs/regions/model_best.pth.tar",
        "--hubness",
    ],
    "cross attention evaluated": [
        "compute_results.py",
        "--model_path",
        "runs/scan/model_best.pth.tar",
        "--hubness",
        "--correction",
        "csls",
    ],
    "an ensemble": [
        "compute_results.py",
        "--model_path",
        "runs/regions/model_best.pth.tar",
        "runs/scan2/model_best.pth.tar",
        "--hubness",
        "--correction",
        "all",
        "--report",
        "page",
    ],
    "a gallery and its correction": [
        "search.py",
        "--precomp",
        "data/tiny_precomp",
        "--split",
        "test",
        "--index",
        "gallery",
        "--recall_check",
        "a dog",
    ],
    "a gallery asked": [
        "search.py",
        "--index",
        "gallery",
        "--rebuild_index",
        "--correction",
        "nnn",
        "--tune_correction",
        "a dog",
    ],
    "embeddings": [
        "compute_results.py",
        "--embeddings",
        "runX_img_and_cap_embeddings.npz",
        "--hubness",
        "--correction",
        "all",
        "--transductive",
        "--report",
        "embeddings",
    ],
    "a gallery of embeddings": [
        "search.py",
        "--embeddings",
        "runX_img_and_cap_embeddings.npz",
        "--captions_embeddings",
        "runX_img_and_cap_embeddings.npz",
        "--captions",
        "data/tiny_precomp/test_caps.txt",
        "--correction",
        "nnn",
        "--index",
        "given",
        "--query_embeddings",
        "runX_img_and_cap_embeddings.npz",
    ],
    "similarities": [
        "compute_results.py",
        "--sims",
        "sims.npy",
        "--correction",
        "all",
        "--transductive",
        "--report",
        "similarities",
    ],
    "reranked": [
        "compute_results.py",
        "--model_path",
        "runs/scan/model_best.pth.tar",
        "runs/regions/model_best.pth.tar",
        "--rerank",
        "3",
    ],
}

# What a training step goes through. It may wait where figures are logged, and on MPS, where the
# fused Adam passes over found_inf, for whether they are finite; and in the scores of listed pairs,
# which no step asks for.
STEP = {
    "train.py",
    "training/run.py",
    "data.py",
    "inputs/photos.py",
    "inputs/word_ids.py",
    "features/texts.py",
    "inputs/augmentation.py",
    "model.py",
    "layers/gru.py",
    "loss.py",
    "memory_bank.py",
    "training/watch.py",
    "training/meters.py",
    "training/shares.py",
    "runtime/distributed.py",
    "runtime/seeds.py",
    "layers/pooling.py",
    "layers/batch_norm.py",
    "layers/cross_attention.py",
}

MAY_WAIT = {"cuda": {"record", "pairs"}, "mps": {"record", "train_step", "pairs"}}


@pytest.fixture(scope="module", params=["cuda", "mps"])
def outcome(request, tmp_path_factory, drawn_data):
    """(kind, {command: exit code}, findings) of all commands, one after the other in one process."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(drawn_data, folder / "data")
    write_regions(folder / "data" / "regions_precomp")
    write_vectors(folder / "data" / "tiny_precomp")
    np.save(folder / "sims.npy", np.random.default_rng(0).random((6, 30), np.float32))
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "helpers" / "pretended.py"),
            request.param,
            json.dumps(list(COMMANDS.values())),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes, found = json.loads(run.stdout.splitlines()[-1])
    return request.param, dict(zip(COMMANDS, codes)), found, run.stderr


def of(outcome, what):
    """The findings of one kind in the project, without those in backward passes."""
    return [
        finding
        for finding in outcome[2]
        if finding[0] == what
        and finding[1] != "embedding_dense_backward"
        and (what != "mixed" or tuple(finding[2:4]) != ("train.py", "backward"))
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(outcome, command):
    assert outcome[1][command] == 0, outcome[3][-3000:]


@pytest.mark.parametrize("what", ["crash", "mixed", "wide"])
def test_nothing_that_the_device_would_refuse(outcome, what):
    assert of(outcome, what) == []


def test_no_step_waits_for_the_device(outcome):
    assert {file for file in STEP if not (ROOT / file).exists()} == set()
    assert {
        (file, function, line)
        for _, _, file, function, line, _ in of(outcome, "wait")
        if file in STEP and function not in MAY_WAIT[outcome[0]]
    } == set()


def test_a_split_s_loss_waits_once_a_validation(outcome):
    waits = [times for *_, function, _, times in of(outcome, "wait") if function == "split_loss"]
    assert waits == [
        2 + 2 + 2 + 1 + 2 + 1 + 1 + 2 + 2 + 2 + 2 + 2
    ]  # one an epoch of the first twelve commands


@pytest.mark.parametrize("folder", [".", "layers", "layers/deeper"])
def test_a_tensor_on_the_wrong_device_is_found_wherever_the_file_lies(tmp_path, folder):
    """If it were not, every test above would pass whatever happens."""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "product.py").write_text("""
def product(here, there):
    return here @ there
""")
    (tmp_path / "script.py").write_text(f"""
import sys
import torch
sys.path.insert(0, {str(tmp_path / folder)!r})
from product import product
product(torch.ones(2, 2), torch.ones(2, 2).to(sys.argv[-1]))
""")
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "helpers" / "pretended.py"),
            "cuda",
            '[["script.py"]]',
        ],
        env={**os.environ, "PRETENDED_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    _, found = json.loads(run.stdout.splitlines()[-1])
    where = f"{folder}/product.py".removeprefix("./")
    assert [finding for finding in found if finding[0] == "mixed"] == [
        ["mixed", "mm", where, "product", 3, 1]
    ]
