"""Galleries of embeddings that another model made, against plain loops."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from features.text_models import TextModel
from gallery import build, other_models, store
from runtime.errors import InputError
from tests.helpers.galleries import MODEL, QUESTION, TEST, ask, results, searcher_of

WIDTH, N = 6, 40
GIVEN = ["--embeddings", "im.npy", "--index", "g", "--device", "cpu"]
WITH_CAPTIONS = [*GIVEN, "--captions_embeddings", "cap.npy", "--captions", "caps.txt"]
TEXTS = "open_clip/tiny"


def lines(path, texts):
    Path(path).write_text("".join(f"{text}\n" for text in texts))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with embeddings of 40 images of any length, five captions each, and questions."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    images = rng.standard_normal((N, WIDTH)) * rng.uniform(0.5, 4, (N, 1))
    captions = np.repeat(images, 5, 0) + rng.standard_normal((5 * N, WIDTH))
    np.save("im.npy", images.astype(np.float16))
    np.save("cap.npy", captions.astype(np.float32))
    np.save("bank.npy", rng.standard_normal((30, WIDTH)))
    np.save("q.npy", rng.standard_normal((4, WIDTH)).astype(np.float32))
    lines("names.txt", [f"photo {n}.jpg" for n in range(N)])
    lines("caps.txt", [f"caption {n}" for n in range(5 * N)])
    return tmp_path


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_vectors_find_what_a_loop_finds(files, capsys, measure):
    asked = ["--query_embeddings", "q.npy", "--json", "--top", "3"]
    ask(*GIVEN, "--items", "names.txt", "--measure", measure, *asked)
    answers = results(capsys)
    ask("--index", "g", *asked)
    assert results(capsys) == answers
    images, questions = np.load("im.npy").astype(float), np.load("q.npy").astype(float)
    if measure == "cosine":
        images, questions = unit(images), unit(questions)
    assert len(answers) == len(questions)
    for number, (question, answer) in enumerate(zip(questions, answers)):
        scores = [sum(a * b for a, b in zip(image, question)) for image in images]
        best = sorted(range(N), key=lambda place: -scores[place])[:3]
        assert answer["query"] == f"q.npy, row {number}"
        assert [hit["item"] for hit in answer["results"]] == [f"photo {n}.jpg" for n in best]
        assert [hit["score"] for hit in answer["results"]] == pytest.approx(
            [scores[n] for n in best], abs=1e-5
        )


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_photos_are_alike_by_cosine(files, measure):
    found = searcher_of(*GIVEN, "--measure", measure)
    images = unit(np.load("im.npy"))
    best = sorted(set(range(N)) - {7}, key=lambda other: -images[other] @ images[7])[:3]
    assert [hit.item for hit in found.like(7, 3)] == [str(number) for number in best]


def test_a_checkpoint_s_gallery_is_asked_by_vectors_too(evaluated, capsys):
    found = searcher_of(*TEST, "--correction", "none")
    np.save("q.npy", found.loaded.embed_questions([QUESTION]).numpy())
    ask("--index", "g", "--json", "--query_embeddings", "q.npy", QUESTION)
    words, vectors = results(capsys)
    assert words["results"] == vectors["results"]


def test_a_checkpoint_s_saved_embeddings_make_its_own_gallery(evaluated, loaded):
    """Rows, shifts, captions and index are those that the checkpoint itself gives."""
    for split in ("train", "test"):
        images, captions = loaded.embed(loaded.loader(split))
        np.savez(f"{split}.npz", img_embs=images.numpy(), cap_embs=captions.numpy())
    ask(*TEST, "--correction", "csls")
    texts = "data/tiny_precomp/test_caps.txt"
    flags = ["--captions_embeddings", "test.npz", "--captions", texts, "--bank", "train.npz"]
    ask("--embeddings", "test.npz", "--index", "other", *flags, "--correction", "csls")
    own, other = store.Gallery("g"), store.Gallery("other")
    assert torch.equal(own.embeddings, other.embeddings)
    assert torch.equal(own.caption_embeddings, other.caption_embeddings)
    assert [own.captions(n) for n in range(6)] == [other.captions(n) for n in range(6)]
    assert own.hub_counts.tolist() == other.hub_counts.tolist()


def test_numbers_from_a_stranger_are_checked(files):
    found = searcher_of(*GIVEN)
    assert (
        found.by_numbers([1, 0, 0, 0, 0, 0.5], 2)
        == found.by_vectors(torch.tensor([[1, 0, 0, 0, 0, 0.5]]), 2)[0]
    )
    for numbers, words in (
        ([1.0] * 5, "5 numbers each.* 6"),
        ([], "zeros"),
        ([0] * WIDTH, "zeros"),
        ([1.0] * 5 + ["1"], "else than numbers"),
        ([True] * WIDTH, "else than numbers"),
        ([float("nan")] * WIDTH, "else than numbers"),
        ([10**400] * WIDTH, "else than numbers"),
        ([[1]] * WIDTH, "else than numbers"),
    ):
        with pytest.raises(InputError, match=words):
            found.by_numbers(numbers, 2)


# Captions ---------------------------------------------------------------------------------------


def test_captions_stand_with_the_photos_that_their_ids_name(files):
    rng = np.random.default_rng(1)
    image_of = rng.permutation(np.repeat(np.arange(1, N), rng.integers(1, 5, N - 1)))
    captions = rng.standard_normal((len(image_of), WIDTH))
    np.save("cap.npy", captions)
    lines("caps.txt", [f"caption {line}" for line in range(len(image_of))])
    lines("ids.txt", [f"photo {image}.jpg" for image in image_of])
    ask(*WITH_CAPTIONS, "--items", "names.txt", "--ids", "ids.txt")
    found = store.Gallery("g")
    assert list(found.items) == [f"photo {number}.jpg" for number in range(N)]
    place = 0
    for number in range(N):  # photo 0 has none
        own = [line for line, image in enumerate(image_of) if image == number]
        assert found.captions(number) == [f"caption {line}" for line in own]
        for line in own:
            assert found.photo_of(place) == number
            row = found.caption_embeddings[place].numpy()
            assert np.allclose(row, unit(captions)[line], atol=1e-6)
            place += 1


def test_five_captions_in_turn_need_no_ids(files):
    ask(*WITH_CAPTIONS)
    found = store.Gallery("g")
    assert found.count == N and found.n_captions == 5 * N
    assert found.captions(3) == [f"caption {line}" for line in range(15, 20)]


def test_rows_that_come_once_a_caption_are_one_photo(files):
    images = np.load("im.npy")
    np.save("im.npy", np.repeat(images, 5, 0))
    ask(*WITH_CAPTIONS)
    found = store.Gallery("g")
    assert list(found.items) == [str(5 * number) for number in range(N)]
    assert found.captions(1) == [f"caption {line}" for line in range(5, 10)]
    assert np.allclose(found.embeddings[:, :-1], unit(images), atol=1e-6)


def test_rows_of_one_name_are_one_photo(files, capsys):
    np.save("im.npy", np.load("im.npy")[[0, 1, 0, 2]])
    lines("names.txt", "abac")
    ask(*GIVEN, "--items", "names.txt")
    assert list(store.Gallery("g").items) == ["a", "b", "c"]
    assert "3 names for 4 rows" in capsys.readouterr().err


def test_a_folder_of_clip_retrieval_names_photos_and_captions_itself(files):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("img_emb", "text_emb", "metadata"):
        os.makedirs(f"clip/{name}")
    rows = np.load("im.npy")
    names = [f"set/{number}.jpg" for number in range(N)]
    captions = [f"caption of {name}" for name in names]
    for part, own in enumerate((slice(0, 25), slice(25, N))):
        np.save(f"clip/img_emb/img_emb_{part}.npy", rows[own])
        np.save(f"clip/text_emb/text_emb_{part}.npy", rows[own] + 1)
        table = pyarrow.table({"image_path": names[own], "caption": captions[own]})
        parquet.write_table(table, f"clip/metadata/metadata_{part}.parquet")
    ask("--embeddings", "clip", "--captions_embeddings", "clip", "--index", "g")
    found = store.Gallery("g")
    assert list(found.items) == names
    assert [found.captions(number) for number in range(N)] == [[text] for text in captions]
    assert np.allclose(found.caption_embeddings, unit(rows + 1), atol=1e-6)


# Hubs -------------------------------------------------------------------------------------------


def nnn_shift(image, bank, k=3, alpha=0.5):
    cosines = sorted((float(unit([image])[0] @ row) for row in unit(bank)), reverse=True)
    return alpha * sum(cosines[:k]) / k


NNN = ["--correction", "nnn", "--correction_k", "3", "--correction_alpha", "0.5"]


@pytest.mark.parametrize(
    "flags, bank", [(WITH_CAPTIONS, "cap.npy"), ([*GIVEN, "--bank", "bank.npy"], "bank.npy")]
)
def test_hubs_are_corrected_by_the_bank_or_the_captions(files, flags, bank):
    ask(*flags, *NNN)
    images, found = np.load("im.npy"), store.Gallery("g")
    expected = [-nnn_shift(image, np.load(bank)) for image in images]
    assert found.embeddings[:, -1].tolist() == pytest.approx(expected, abs=1e-5)
    plain, corrected = (
        searcher_of("--index", "g").by_vectors(torch.ones(1, WIDTH), N, corrected=flag)[0]
        for flag in (False, True)
    )
    scores = {hit.number: hit.score for hit in plain}
    for hit in corrected:
        assert hit.score == pytest.approx(scores[hit.number] + expected[hit.number], abs=1e-5)


def test_a_correction_is_made_anew_from_the_bank_that_the_gallery_names(files):
    ask(*GIVEN, "--bank", "bank.npy", "--correction", "csls")
    ask("--index", "g", "--rebuild_index", *NNN)
    images, bank = np.load("im.npy"), np.load("bank.npy")
    found = store.Gallery("g")
    assert found.embeddings[:, -1].tolist() == pytest.approx(
        [-nnn_shift(image, bank) for image in images], abs=1e-5
    )
    os.unlink("bank.npy")
    with pytest.raises(InputError, match="bank.npy"):
        ask("--index", "g", "--rebuild_index", "--correction", "csls")
    ask("--index", "g", "--rebuild_index", *NNN, "--bank", "cap.npy")
    assert store.Gallery("g").embeddings[:, -1].tolist() == pytest.approx(
        [-nnn_shift(image, np.load("cap.npy")) for image in images], abs=1e-5
    )


def test_the_best_on_dev_is_chosen(files, capsys):
    images = np.load("im.npy").astype(np.float32)
    images[0] = images[1:].mean(0)  # a hub
    np.save("dev.npy", images)
    ask(*WITH_CAPTIONS, "--dev", "dev.npy", "cap.npy")
    said, found = capsys.readouterr().err, store.Gallery("g")
    assert f"the best on dev: {found.correction}" in said and found.correction != "none"
    ask(*GIVEN[:2], "--index", "plain", "--bank", "cap.npy")
    assert "give --dev" in capsys.readouterr().err
    plain = store.Gallery("plain")
    assert plain.correction == "none" and plain.description["hubs"].startswith("200 of captions")


# The text model ---------------------------------------------------------------------------------


def letters(texts):
    """A text model for tests: counts of six letters, weighted."""
    return torch.tensor(
        [[(1 + n) * text.count(c) for n, c in enumerate("aeiost")] for text in texts]
    )


def fake_model(name, weights=None, device="cpu"):
    assert name.endswith("tiny") and weights in (None, "none", "other")
    description = {"encoder": name, "weights": weights, "weights_sha256": str(weights)}
    return TextModel(
        lambda texts: letters(texts).float(),
        {**description, "width": WIDTH, "normalised": False, "format": 1},
    )


@pytest.fixture
def fake_texts(files, monkeypatch):
    monkeypatch.setattr("features.text_models.text_model", fake_model)
    monkeypatch.setattr(other_models, "text_model", fake_model)


def test_words_are_read_by_the_model_that_the_gallery_names(fake_texts, capsys):
    np.save("q.npy", letters([QUESTION]).double().numpy())
    ask(*GIVEN, "--text_model", TEXTS, "--text_weights", "none", "--json", QUESTION)
    ask("--index", "g", "--json", QUESTION, "--query_embeddings", "q.npy")
    first, words, vectors = results(capsys)
    assert first == words and len(words["results"]) == 10
    for hit, other in zip(words["results"], vectors["results"]):
        assert hit["item"] == other["item"]
        assert hit["score"] == pytest.approx(other["score"], abs=1e-6)
    assert words["unknown_words"] == []
    said = store.describe("g")["embeddings"]["text_model"]
    assert (said["encoder"], said["weights"], said["weights_sha256"]) == (TEXTS, "none", "none")
    with pytest.raises(InputError, match="the gallery's vectors were made by .* weights"):
        ask("--index", "g", "--text_model", TEXTS, "--text_weights", "other", QUESTION)


def test_a_text_model_can_be_named_later_and_is_kept_by_a_change(fake_texts, capsys):
    named = ["--text_model", TEXTS, "--text_weights", "none"]
    ask(*GIVEN)
    with pytest.raises(InputError, match="no text model.*--query_embeddings.*--text_model"):
        ask("--index", "g", QUESTION)
    ask("--index", "g", *named, QUESTION)
    assert store.describe("g")["embeddings"]["text_model"] is None
    ask("--index", "g", *named, "--rebuild_index")
    ask("--index", "g", QUESTION)
    with pytest.raises(InputError, match="the question is empty"):
        ask("--index", "g", "")


def test_a_text_model_s_folder_may_have_moved(fake_texts, capsys):
    ask(*GIVEN, "--text_model", "sentence_transformers/tiny", "--json", QUESTION)
    ask("--index", "g", "--text_model", "sentence_transformers/moved/tiny", "--json", QUESTION)
    first, again = results(capsys)
    assert first == again
    with pytest.raises(InputError, match="the gallery's vectors were made by"):
        ask("--index", "g", "--text_model", TEXTS, QUESTION)


def test_a_text_model_that_is_not_installed_is_said(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="^--text_model .* not installed: pip install"):
        ask(*GIVEN, "--text_model", "sentence_transformers/x", QUESTION)
    assert not os.path.exists("g")


def test_a_text_model_of_another_width_is_refused(fake_texts):
    np.save("im.npy", np.load("cap.npy")[:, :5])
    with pytest.raises(InputError, match="vectors of width 6, and im.npy has rows of width 5"):
        ask(*GIVEN, "--text_model", TEXTS, "--text_weights", "none")


# Photos -----------------------------------------------------------------------------------------


def test_photos_are_asked_if_features_json_says_what_saw_them(photos, capsys):
    shutil.copy("data/mine_precomp/test_ims.npy", "rows.npy")
    flags = ["--device", "cpu", "--items", "data/mine_precomp/test_ids.txt", "--images", "photos"]
    asked = ["--image", "photos/deep/9.png", "--json", "--top", "1"]
    ids = [f"deep/{number}.png" for number in range(8, 12)]
    lines("data/mine_precomp/test_ids.txt", ids)
    ask("--embeddings", "data/mine_precomp/test_ims.npy", "--index", "g", *flags, *asked)
    (answer,) = results(capsys)
    (hit,) = answer["results"]
    assert hit["item"] == "deep/9.png" and hit["score"] == pytest.approx(1, abs=1e-4)
    assert store.Gallery("g").photo(1) == os.path.realpath("photos/deep/9.png")
    ask("--embeddings", "rows.npy", "--index", "other", *flags)
    with pytest.raises(InputError, match="does not know which network saw its photos"):
        ask("--index", "other", *asked)
    ask("--index", "other", "--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none", *asked)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == [hit]
    with pytest.raises(InputError, match="has its photos in .*photos, not in data"):
        ask("--index", "other", "--images", "data")


# Files ------------------------------------------------------------------------------------------


def test_a_gallery_moves_with_its_embeddings(files, capsys):
    ask(*GIVEN, "--bank", "bank.npy", "--correction", "csls")
    Path("moved").mkdir()
    for name in ("g", "im.npy", "bank.npy", "q.npy"):
        shutil.move(name, f"moved/{name}")
    capsys.readouterr()
    ask("--embeddings", "moved/im.npy", "--index", "moved/g")
    assert "is there, and is asked as it is" in capsys.readouterr().err
    ask("--index", "moved/g", "--rebuild_index", *NNN)
    with pytest.raises(InputError, match="im.npy, not of .*q.npy: name another --index"):
        ask("--embeddings", "moved/q.npy", "--index", "moved/g")
    with pytest.raises(InputError, match="built with --measure cosine"):
        ask("--embeddings", "moved/im.npy", "--index", "moved/g", "--measure", "dot")


def test_rows_are_converted_block_by_block(files, monkeypatch):
    monkeypatch.setattr(build, "BLOCK_ROWS", 7)
    monkeypatch.setattr(store, "BLOCK_ROWS", 7)
    sizes, placed = [], other_models.OtherModel.placed
    monkeypatch.setattr(
        other_models.OtherModel,
        "placed",
        lambda self, rows, numbers: (sizes.append(len(numbers)), placed(self, rows, numbers))[1],
    )
    ask(*GIVEN, "--correction", "none")
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_a_checkpoint_and_embeddings_are_not_taken_for_each_other(evaluated):
    np.save("im.npy", np.ones((3, 4)) + np.eye(3, 4))
    ask(*TEST, "--correction", "none")
    with pytest.raises(InputError, match="of the checkpoint .*not of embeddings"):
        ask(*GIVEN)
    with pytest.raises(InputError, match="--text_model is for galleries of embeddings"):
        ask("--index", "g", "--text_model", TEXTS, QUESTION)
    assert store.describe("g")["format"] == 1
    ask("--embeddings", "im.npy", "--index", "other")
    assert store.describe("other")["format"] == 2
    with pytest.raises(InputError, match="leave --model_path out"):
        ask("--index", "other", "--model_path", MODEL, QUESTION)


@pytest.mark.parametrize("name", ["images", "measure", "bank", "text_model"])
def test_what_gallery_json_says_of_embeddings_is_checked(files, name):
    ask(*GIVEN)
    path = Path("g/gallery.json")
    content = json.loads(path.read_text())
    content["embeddings"][name] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"lacks '{name}'|lacks 'encoder'"):
        ask("--index", "g", "--query_embeddings", "q.npy")


# Bad input --------------------------------------------------------------------------------------


def with_rows(path, rows):
    """A function that saves rows, or lines of text, in a file."""
    return lambda: np.save(path, rows) if path.endswith(".npy") else lines(path, rows)


NAN = np.ones((N, WIDTH))
NAN[[3, 20]] = np.nan
Q = ["--query_embeddings", "q.npy"]
BAD = {
    "too few names": (
        with_rows("names.txt", "abc"),
        [*GIVEN, "--items", "names.txt"],
        ["--items names.txt has 3 lines for the 40 rows"],
    ),
    "different photos of one name": (
        with_rows("names.txt", ["x"] * N),
        [*GIVEN, "--items", "names.txt"],
        ["rows 0 and 1", "'x'", "differ"],
    ),
    "rows of NaN": (with_rows("im.npy", NAN), GIVEN, ["im.npy", "rows 3, 20"]),
    "captions of another width": (
        with_rows("cap.npy", np.ones((5 * N, 4))),
        WITH_CAPTIONS,
        ["cap.npy", "width 4", "width 6"],
    ),
    "captions that do not fit": (
        with_rows("cap.npy", np.ones((70, WIDTH))),
        [*WITH_CAPTIONS[:-1], "names.txt"],
        ["--captions names.txt has 40 lines for 70 captions"],
    ),
    "captions of unknown number": (
        lambda: (np.save("cap.npy", np.ones((70, WIDTH))), lines("caps.txt", "c" * 70)),
        WITH_CAPTIONS,
        ["40 rows for the 70", "--ids"],
    ),
    "captions without texts": (lambda: None, WITH_CAPTIONS[:-2], ["no texts", "--captions"]),
    "an unknown id": (
        with_rows("ids.txt", ["nobody"] * 5 * N),
        [*WITH_CAPTIONS, "--items", "names.txt", "--ids", "ids.txt"],
        ["--ids ids.txt, line 1: 'nobody'", "names.txt"],
    ),
    "too few ids": (
        with_rows("ids.txt", ["photo 1.jpg"] * 7),
        [*WITH_CAPTIONS, "--items", "names.txt", "--ids", "ids.txt"],
        ["7 lines for 200 captions"],
    ),
    "questions of another width": (
        with_rows("q.npy", np.ones((2, 9))),
        [*GIVEN, *Q],
        ["--query_embeddings q.npy have 9 numbers each", "6"],
    ),
    "questions of NaN": (with_rows("q.npy", NAN), [*GIVEN, *Q], ["q.npy", "rows 3, 20"]),
    "a bank of another width": (
        with_rows("bank.npy", np.ones((9, 3))),
        [*GIVEN, "--bank", "bank.npy", "--correction", "nnn"],
        ["--bank bank.npy", "width 3", "width 6"],
    ),
    "a correction without a bank": (
        lambda: None,
        [*GIVEN, "--correction", "nnn"],
        ["--bank", "--captions_embeddings"],
    ),
    "words without a text model": (lambda: None, [*GIVEN, QUESTION], ["no text model"]),
    "an unknown text model": (
        lambda: None,
        [*GIVEN, "--text_model", "bert"],
        ["--text_model bert", "open_clip/<name>"],
    ),
    "no folder to build in": (lambda: None, GIVEN[:2], ["--embeddings needs --index"]),
    "no such file": (lambda: os.unlink("im.npy"), GIVEN, ["--embeddings im.npy"]),
    "a checkpoint, too": (lambda: None, [*GIVEN, "--model_path", "x"], ["--model_path"]),
    "names of nothing": (lambda: None, ["--index", "g", "--items", "names.txt"], ["--items"]),
    "ids of nothing": (lambda: None, [*GIVEN, "--ids", "names.txt"], ["--captions_embeddings"]),
    "features, too": (lambda: None, [*GIVEN, "--precomp", "x"], ["--precomp", "embeddings"]),
    "a vocabulary": (lambda: None, [*GIVEN, "--vocab_path", "x"], ["--vocab_path", "embeddings"]),
    "weights of nothing": (lambda: None, [*GIVEN, "--text_weights", "none"], ["--text_model"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_in_a_sentence(files, capsys, case):
    damage, flags, words = BAD[case]
    damage()
    with pytest.raises(InputError) as error:
        ask(*flags)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert capsys.readouterr().out == ""
