"""The correction that a gallery carries: against loops, chosen on dev, or none."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from evaluation import embed
from gallery import build as build_gallery
from gallery import store
from retrieval import corrections
from tests.helpers.galleries import TEST, ask, results


def loop_shift(method, image, bank):
    """What a correction takes off the scores of one image embedding, bank: caption embeddings."""
    scores = sorted((float(np.dot(image, caption)) for caption in bank), reverse=True)
    if method == "nnn":
        return 0.6 * sum(scores[:4]) / 4
    if method == "csls":
        return sum(scores[:4]) / 4 / 2
    if method == "inverted_softmax":
        return 0.1 * math.log(sum(math.exp(score / 0.1) for score in scores) / len(scores))
    return 0.0


CORRECTIONS = {
    "none": [],
    "nnn": ["--correction_k", "4", "--correction_alpha", "0.6"],
    "csls": ["--correction_k", "4"],
    "inverted_softmax": ["--correction_temperature", "0.1"],
}


@pytest.mark.parametrize("method", CORRECTIONS)
def test_answers_are_those_of_a_loop_corrected_and_plain(evaluated, loaded, capsys, method):
    images, captions = (
        part.double().numpy() for part in embed(loaded.model, loaded.loader("test"))
    )
    bank = embed(loaded.model, loaded.loader("train"))[1].double().numpy()
    texts = loaded.loader("test").dataset.captions
    Path("questions.txt").write_text("".join(f"{text}\n" for text in texts))
    ask(
        *TEST,
        "--correction",
        method,
        *CORRECTIONS[method],
        "--batch",
        "questions.txt",
        "--json",
        "--top",
        "6",
    )
    shifts = [loop_shift(method, image, bank) for image in images]
    check_answers(results(capsys), texts, captions, images, shifts)
    ask("--index", "g", "--batch", "questions.txt", "--json", "--top", "6", "--correction", "none")
    check_answers(results(capsys), texts, captions, images, [0.0] * len(images))


def check_answers(answers, texts, captions, images, shifts):
    """Check that answers hold all images, ordered by their scores, which equal a loop's."""
    assert [answer["query"] for answer in answers] == texts
    for answer, caption in zip(answers, captions):
        expected = {
            str(number): float(np.dot(image, caption)) - shift
            for number, (image, shift) in enumerate(zip(images, shifts))
        }
        scores = [hit["score"] for hit in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        assert {hit["item"]: hit["score"] for hit in answer["results"]} == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize("flags", [["--correction_alpha", "0.5"], ["--tune_correction"]], ids=str)
def test_another_correction_needs_nothing_but_entries_of_its_module(
    evaluated, loaded, monkeypatch, capsys, flags
):
    """Half the mean similarity to the bank: a function, a grid of one value, and a shift's name."""
    shifts = [*corrections.SHIFTS, "mean"]
    monkeypatch.setitem(
        corrections.METHODS, "mean", lambda scores, alpha=1.0: alpha * scores.mean(1)
    )
    monkeypatch.setitem(corrections.GRIDS, "mean", {"alpha": (0.5,)})
    monkeypatch.setattr(corrections, "SHIFTS", shifts)
    monkeypatch.setattr(search, "SHIFTS", shifts)  # imported from there
    images, captions = (
        part.double().numpy() for part in embed(loaded.model, loaded.loader("test"))
    )
    bank = embed(loaded.model, loaded.loader("train"))[1].double().numpy()
    texts = loaded.loader("test").dataset.captions
    Path("questions.txt").write_text("".join(f"{text}\n" for text in texts))
    ask(*TEST, "--correction", "mean", *flags)
    assert store.describe("g")["correction"]["parameters"] == {"alpha": 0.5}
    capsys.readouterr()
    ask("--index", "g", "--batch", "questions.txt", "--json", "--top", "6")
    expected = [sum(np.dot(image, one) for one in bank) / len(bank) / 2 for image in images]
    check_answers(results(capsys), texts, captions, images, expected)


def test_the_default_correction_is_the_best_on_dev(evaluated, loaded, capsys):
    ask(*TEST)
    said = store.describe("g")["correction"]
    images, captions = (part.double().numpy() for part in embed(loaded.model, loaded.loader("dev")))
    bank = embed(loaded.model, loaded.loader("train"))[1]

    def recalls(shift):
        scores = captions @ images.T - shift
        ranks = [(row >= row[number // 5] - 1e-9).sum() - 1 for number, row in enumerate(scores)]
        return sum(np.mean([rank < k for rank in ranks]) for k in (1, 5, 10))

    shift_of = {"none": lambda _: 0, **build_gallery.gallery_hubs.corrections.METHODS}
    scores = {}
    for method, parameters in [
        ("none", {}),
        *build_gallery.gallery_hubs.corrections.candidates(("nnn", "csls", "inverted_softmax"), {}),
    ]:
        similarities = torch.from_numpy(images).float() @ bank.T
        shift = torch.as_tensor(shift_of[method](similarities, **parameters)).numpy()
        scores[json.dumps([method, parameters])] = recalls(shift)
    assert scores[json.dumps([said["method"], said["parameters"]])] == pytest.approx(
        max(scores.values())
    )
    assert "the best on dev" in capsys.readouterr().err


def test_without_data_to_choose_by_hubs_are_not_corrected(evaluated, capsys):
    shutil.move("data/tiny_precomp", "features")
    ask("--precomp", "features", "--index", "g", "--device", "cpu")
    assert "Hubs are not corrected" in capsys.readouterr().err
    assert store.Gallery("g").correction == "none"
