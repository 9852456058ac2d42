"""Reranking by SCAN what VSE found."""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import load_for_evaluation
from gallery import store
from runtime.errors import InputError
from tests.helpers.galleries import QUESTION, SCAN_RUN, VSE_RUN, ask, results
from tests.helpers.made import load


@pytest.mark.parametrize(
    "k, top, method", [(5, 3, "none"), (20, 20, "none"), (2, 4, "none"), (6, 6, "csls")]
)
def test_scan_orders_what_vse_finds(three_models, tmp_path, monkeypatch, capsys, k, top, method):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    vse, scan = (
        load_for_evaluation(
            argparse.Namespace(model_path=f"runs/{name}/model_best.pth.tar", device="cpu")
        )
        for name in (VSE_RUN, SCAN_RUN)
    )
    texts = vse.loader("test").dataset.captions[:7]
    Path("questions.txt").write_text("".join(f"{text}\n" for text in texts))
    ask(
        "--model_path",
        vse.path,
        "--precomp",
        "data/vectors_precomp",
        "--index",
        "g",
        "--correction",
        method,
        "--batch",
        "questions.txt",
        "--json",
        "--top",
        str(top),
        "--rerank_model",
        scan.path,
        "--rerank",
        str(k),
        "--rerank_precomp",
        "data/regions_precomp",
    )
    answers = results(capsys)
    images, captions = vse.embed(vse.loader("test"))
    shift = -store.Gallery("g").embeddings[:, -1]
    slow = scan.similarities(*scan.embed(scan.loader("test")))
    for number, answer in enumerate(answers):
        nearest = (
            (images @ captions[number] - shift).argsort(descending=True)[: max(k, top)].tolist()
        )
        scores = {
            str(image): float(slow.pairs(torch.tensor([image]), torch.tensor([number])))
            for image in nearest
        }
        best = sorted(scores.values(), reverse=True)[:top]
        assert [hit["score"] for hit in answer["results"]] == pytest.approx(best, abs=1e-5)
        assert all(
            scores[hit["item"]] == pytest.approx(hit["score"], abs=1e-5)
            for hit in answer["results"]
        )


def test_a_scan_model_without_words_takes_its_vocabulary_from_a_folder(
    three_models, tmp_path, monkeypatch, capsys
):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path, answers = f"runs/{SCAN_RUN}/model_best.pth.tar", []
    flags = [
        "--model_path",
        f"runs/{VSE_RUN}/model_best.pth.tar",
        "--precomp",
        "data/vectors_precomp",
        "--index",
        "g",
        "--correction",
        "none",
        "--json",
        "--rerank_model",
        path,
        "--rerank_precomp",
        "data/regions_precomp",
        QUESTION,
    ]
    ask(*flags)
    answers.append(results(capsys))
    content = load(path)
    assert content.pop("vocabulary")
    torch.save(content, path)
    os.rename("vocab", "words")
    with pytest.raises(InputError, match="carries no vocabulary.* by --rerank_vocab_path"):
        ask(*flags)
    ask(*flags, "--rerank_vocab_path", "words")
    answers.append(results(capsys))
    assert answers[0] == answers[1]


def test_regions_of_other_photos_are_told_of(three_models, tmp_path, monkeypatch, capsys):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    count = len(np.load("data/vectors_precomp/test_ims.npy"))
    Path("data/vectors_precomp/test_ids.txt").write_text(
        "".join(f"{number}.jpg\n" for number in range(count))
    )
    said = []
    for first in ("0", "7"):  # with any ending
        Path("data/regions_precomp/test_ids.txt").write_text(
            "".join(f"x/{name}.png\n" for name in [first, *range(1, count)] for _ in range(5))
        )
        ask(
            "--model_path",
            f"runs/{VSE_RUN}/model_best.pth.tar",
            "--precomp",
            "data/vectors_precomp",
            "--index",
            "g",
            "--correction",
            "none",
            "--rerank_model",
            f"runs/{SCAN_RUN}/model_best.pth.tar",
            "--rerank_precomp",
            "data/regions_precomp",
            QUESTION,
        )
        said.append(capsys.readouterr().err)
    assert "same photo" not in said[0] and "has x/7.png where the gallery has 0.jpg" in said[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rerank_model", "VSE"], ["not SCAN"]),
        (["--rerank_model", "SCAN"], ["over regions"]),
        (["--rerank", "5"], ["--rerank", "--rerank_model"]),
        (["--rerank_vocab_path", "vocab"], ["--rerank_vocab_path", "--rerank_model"]),
        (["--rerank_model", "SCAN", "--rerank_precomp", "nowhere"], ["nowhere"]),
    ],
)
def test_what_cannot_be_reranked_is_said(three_models, tmp_path, monkeypatch, flags, words):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = {
        "VSE": f"runs/{VSE_RUN}/model_best.pth.tar",
        "SCAN": f"runs/{SCAN_RUN}/model_best.pth.tar",
    }
    with pytest.raises(InputError) as error:
        ask(
            "--model_path",
            path["VSE"],
            "--precomp",
            "data/vectors_precomp",
            "--index",
            "g",
            "--correction",
            "none",
            *(path.get(flag, flag) for flag in flags),
            QUESTION,
        )
    assert all(word in str(error.value) for word in words), str(error.value)
