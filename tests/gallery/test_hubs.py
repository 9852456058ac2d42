"""The correction that a gallery carries: against loops, chosen on dev, or none."""

import argparse
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from evaluation import embed
from gallery import build as build_gallery
from gallery import hubs as gallery_hubs
from gallery import store
from retrieval import corrections
from runtime.errors import InputError
from tests.helpers.galleries import PHOTOS, TEST, ask, results
from tests.helpers.made import write_image


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


# Alarm ------------------------------------------------------------------------------------------


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture
def crowd():
    """300 photos, 2,000 questions near one each, and 200 further photos: rows of length 1.

    All have a part in common, as embeddings of one model do.
    """
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(500, 32, generator=generator) + 1
    near = made[torch.randint(0, 500, (2000,), generator=generator)]
    questions = near + 0.8 * torch.randn(2000, 32, generator=generator)
    return unit(made[:300]), unit(questions), unit(made[300:])


def gallery_of(photos, captions=None):
    """What `watched` asks of a store.Gallery."""

    def search_rows(queries, top):
        return (queries @ photos.t()).topk(top, 1)

    return argparse.Namespace(search=search_rows, count=len(photos), own_captions=captions)


def names_in(note):
    return re.findall(r"(\w+) \(\d+%\)", note)


def loop_counts(photos, questions, new):
    """How many questions have each of the new photos among the ten nearest, with the photos."""
    counts = [0] * len(new)
    for question in questions.double().numpy():
        scores = sorted(float(np.dot(photo, question)) for photo in photos.double().numpy())
        for place, one in enumerate(new.double().numpy()):
            counts[place] += float(np.dot(one, question)) > scores[-10]
    return counts


def adversary(questions, steps=100):
    """An embedding pulled towards all questions at once by gradient steps on their mean score."""
    row = torch.randn(1, questions.shape[1], generator=torch.Generator().manual_seed(8))
    row.requires_grad_()
    optimizer = torch.optim.Adam([row], lr=0.05)
    for _ in range(steps):
        loss = -(questions @ unit(row).t()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unit(row.detach())


@pytest.mark.parametrize("own", [False, True])
def test_planted_photos_are_named_and_no_other(crowd, capsys, own):
    photos, questions, new = crowd
    planted = torch.cat([adversary(questions), unit(questions.mean(0, keepdim=True))])
    blocks = [new[:150], torch.cat([new[150:], planted])]
    names = [f"new{number}" for number in range(len(new))] + ["adversary", "mean"]
    found = gallery_of(photos, questions if own else None)
    bank = None if own else questions
    passed = list(gallery_hubs.watched(iter(blocks), names, found, bank, "warn"))
    assert all(one is other for one, other in zip(passed, blocks)) and len(passed) == 2
    note = capsys.readouterr().err
    assert note.startswith("note: 2 of 202 new photos would be among the ten nearest")
    assert set(names_in(note)) == {"adversary", "mean"}
    counts = dict(zip(["adversary", "mean"], loop_counts(photos, questions, planted)))
    assert all(f"{name} ({count / 2000:.0%})" in note for name, count in counts.items())
    with pytest.raises(InputError, match=r"^2 of 202 new .* take them out .*--hub_alarm warn$"):
        list(gallery_hubs.watched(iter(blocks), names, found, bank, "refuse"))
    assert list(gallery_hubs.watched(iter([new]), names, found, bank, "refuse")) == [new]
    assert capsys.readouterr().err == ""


def test_copies_of_a_planted_photo_do_not_hide_one_another(crowd, capsys):
    photos, questions, _ = crowd
    copies = unit(questions.mean(0, keepdim=True)).expand(30, -1)
    names = [f"copy{number}" for number in range(30)]
    list(gallery_hubs.watched(iter([copies]), names, gallery_of(photos), questions, "warn"))
    note = capsys.readouterr().err
    assert note.startswith("note: 30 of 30 new") and len(names_in(note)) == 5 and "), ..." in note


def test_without_questions_a_note_says_that_nothing_was_checked(crowd, capsys):
    photos, _, new = crowd
    assert list(gallery_hubs.watched(iter([new]), [], gallery_of(photos), None, "warn")) == [new]
    assert "were not checked for hubs, because there are no captions" in capsys.readouterr().err


def test_alarm_scores_are_deviations_above_the_median():
    usual = np.array([0, 10, 20, 30, 100])  # median 20, median absolute deviation 10
    below = gallery_hubs.POISSON_MAD * math.sqrt(32)
    assert below < 10
    assert gallery_hubs.alarm_scores(np.array([20, 170, 171]), usual) == pytest.approx(
        [0, 15, 15.1]
    )
    assert gallery_hubs.is_alarming(np.array([20, 170, 171]), usual, 1000).tolist() == [0, 0, 1]
    assert not gallery_hubs.is_alarming(np.array([171]), usual, 17_200).any()  # under 1 %
    alike = np.full(50, 400)  # of which none deviates: chance is 0.6745 * 20
    assert gallery_hubs.alarm_scores(np.array([413.49]), alike) == pytest.approx([1], abs=1e-3)


@pytest.mark.parametrize("alarm", ["warn", "refuse", "off", None])
def test_adding_raises_the_alarm_as_asked(photos, monkeypatch, capsys, alarm):
    ask(*PHOTOS, "--captions", "captions.csv", "--correction", "nnn")
    write_image(Path("photos/more/20.png"), 20)
    monkeypatch.setattr(gallery_hubs, "ALARM_Z", -1e9)
    monkeypatch.setattr(gallery_hubs, "ALARM_SHARE", -1)
    before, count = Path("g/gallery.json").read_bytes(), store.Gallery("g").count
    capsys.readouterr()
    flags = ["--index", "g", "--workers", "0", "--add", "photos/more"]
    flags += ["--hub_alarm", alarm] if alarm else []
    if alarm == "refuse":
        with pytest.raises(InputError, match=r"1 of 1 new photos .* more/20.png \(\d+%\): take"):
            ask(*flags)
        assert Path("g/gallery.json").read_bytes() == before
        assert len(list(Path("g").glob("gallery-files-*"))) == 1
        return
    ask(*flags)
    said = capsys.readouterr().err
    assert ("more/20.png (" in said) == (alarm != "off")
    assert store.Gallery("g").count == count + 1


def test_adding_while_the_index_is_built_again_asks_all_photos(
    crowd, tmp_path, monkeypatch, capsys
):
    """A damaged index is no reason to leave the alarm out, and none to fail."""
    photos, questions, _ = crowd
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "g"
    np.save("photos.npy", photos)
    np.save("bank.npy", questions)
    flags = ["--embeddings", "photos.npy", "--index", str(folder), "--index_type", "ivf_sq8"]
    ask(*flags, "--bank", "bank.npy", "--correction", "none")
    (index_file,) = folder.glob("gallery-files-*/index.faiss")
    index_file.write_bytes(b"damaged")
    with pytest.raises(InputError, match="make it again|index.faiss"):
        store.Gallery(str(folder))
    found = store.Gallery(str(folder), with_index=False)
    planted = [unit(questions.mean(0, keepdim=True))]
    list(gallery_hubs.watched(iter(planted), ["mean"], found, questions, "warn"))
    assert names_in(capsys.readouterr().err) == ["mean"]


def test_the_alarm_without_adding_is_refused():
    with pytest.raises(InputError, match="--hub_alarm does nothing without --add"):
        search.parse_args(["--index", "g", "--hub_alarm", "off"])
