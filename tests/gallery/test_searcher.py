"""A searcher against loops: words, photos, more like one, and hubs."""

import numpy as np
import pytest
import torch

import search
from evaluation import embed, embed_texts
from gallery import store
from gallery.searcher import Hit
from inputs.word_ids import number_words
from runtime.errors import InputError
from tests.helpers.galleries import (
    MODEL,
    PHOTOS,
    QUESTION,
    TEST,
    ask,
    results,
    searcher_of,
    without_normalisation,
)
from tests.helpers.made import load


def test_more_like_one_and_the_hubs_are_those_of_loops(evaluated, loaded):
    found = searcher_of(*TEST, "--correction", "nnn")
    images, captions = (
        part.double().numpy() for part in embed(loaded.model, loaded.loader("test"))
    )
    for number in (0, 5):
        hits = found.like(number, 3)
        others = sorted(
            set(range(6)) - {number}, key=lambda other: -np.dot(images[other], images[number])
        )
        assert [hit.number for hit in hits] == others[:3]
        assert [hit.item for hit in hits] == [str(other) for other in others[:3]]
    counts = dict.fromkeys(range(6), 0)
    for caption in captions:  # of six photos all are among the ten best
        for number in sorted(counts, key=lambda number: -np.dot(images[number], caption))[:10]:
            counts[number] += 1
    assert {number: count for number, count, _ in found.hubs(6)} == counts
    assert found.hubs(2) == [(0, 30, False), (1, 30, False)]


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8", "opq_ivf_pq64"])
def test_embeddings_of_any_length_are_alike_by_cosine(evaluated, kind):
    without_normalisation()
    rng = np.random.default_rng(2)
    lengths = rng.uniform(0.1, 30, (600, 1))
    np.save(
        "data/tiny_precomp/many_ims.npy",
        (lengths * rng.standard_normal((600, 8))).astype(np.float32),
    )
    found = searcher_of(
        "--precomp",
        "data/tiny_precomp",
        "--split",
        "many",
        "--index",
        "g",
        "--correction",
        "csls",
        "--index_type",
        kind,
    )
    rows = found.gallery.embeddings[:, :-1].double().numpy()
    assert np.linalg.norm(rows, axis=1).max() > 2 * np.linalg.norm(rows, axis=1).min()
    for number in (0, 17, 599):
        cosines = [
            row @ rows[number] / np.linalg.norm(row) / np.linalg.norm(rows[number]) for row in rows
        ]
        best = sorted(set(range(600)) - {number}, key=lambda other: -cosines[other])[:4]
        hits = found.like(number, 4)
        assert [hit.number for hit in hits] == best
        assert [hit.score for hit in hits] == pytest.approx(
            [cosines[other] for other in best], abs=1e-5
        )
    (words,) = found.by_words([QUESTION], 4, corrected=False)  # these stay products
    query = embed_texts(
        found.loaded.model, number_words([QUESTION], found.loaded.vocabulary, "clean"), 1
    )
    assert [hit.score for hit in words] == pytest.approx(
        sorted(rows @ query[0].double().numpy())[::-1][:4], abs=1e-4
    )


def test_corrected_or_not_is_the_caller_s_choice(evaluated):
    found = searcher_of(*TEST, "--correction", "nnn")
    plain, corrected = (found.by_words([QUESTION], 6, corrected=flag)[0] for flag in (False, True))
    shift = -store.Gallery("g").embeddings[:, -1]
    assert (shift != 0).all()
    by_number = {hit.number: hit.score for hit in plain}
    for hit in corrected:
        assert hit.score == pytest.approx(
            by_number[hit.number] - float(shift[hit.number]), abs=1e-5
        )


def test_a_photo_finds_what_its_embedding_finds(photos, capsys):
    ask(
        *PHOTOS,
        "--captions",
        "captions.csv",
        "--image",
        "photos/deep/5.png",
        "--json",
        "--top",
        "12",
    )
    (answer,) = results(capsys)
    assert answer["query"] == "photos/deep/5.png"
    found = store.Gallery("g")
    query = found.embeddings[found.items.index("deep/5.png"), :-1]
    alike = {item: float(row[:-1] @ query) for item, row in zip(found.items, found.embeddings)}
    assert {hit["item"]: hit["score"] for hit in answer["results"]} == pytest.approx(
        alike, abs=1e-4
    )
    scores = [float(row @ query) for row in found.caption_embeddings]
    best = sorted(scores, reverse=True)[:12]
    assert [hit["score"] for hit in answer["captions"]] == pytest.approx(best, abs=1e-4)
    for hit in answer["captions"]:
        assert hit["caption"] in found.captions(found.items.index(hit["item"]))


def test_each_photo_finds_itself_without_normalisation_too(photos):
    without_normalisation()
    content = load(MODEL)
    mean = torch.from_numpy(np.load("data/mine_precomp/train_ims.npy").mean(0))
    content["model"][0]["fc.bias"] = (
        -content["model"][0]["fc.weight"] @ mean
    )  # random features are nearly alike
    torch.save(content, MODEL)
    found = searcher_of(*PHOTOS, "--correction", "none")
    rows = found.gallery.embeddings[:, :-1]
    assert (rows @ rows.T).argmax(1).unique().numel() < 12  # by products not all would
    for number in range(12):
        hits, _ = found.by_photo(found.gallery.photo(number), 2)
        assert hits[0].number == number and hits[0].score == pytest.approx(1, abs=1e-4)


def test_a_score_that_is_no_number_is_said(evaluated, monkeypatch):
    found = searcher_of(*TEST, "--correction", "none")
    found.gallery.embeddings[2, 1] = float("nan")
    for act in (lambda: found.by_words([QUESTION], 3), lambda: found.like(0, 3)):
        with pytest.raises(InputError, match="score is not finite.*--check"):
            act()
    found.gallery.embeddings[2, 1] = 0
    found.gallery.caption_embeddings[3] = float("inf")
    found.embed_photo = lambda file: found.gallery.embeddings[0, :-1]
    with pytest.raises(InputError, match="score is not finite"):
        found.by_photo("x.png", 3)
    with pytest.raises(ValueError):
        search.as_json("x", [Hit(0, "a", float("nan"))])


@pytest.mark.parametrize(
    "question, words",
    [
        ("", ["empty"]),
        (" \t", ["empty"]),
        ("dog " * 10_000, ["10000", "1000"]),
        ("dog " + "(" * 1000, ["1001 words"]),
        ("x" * 30_000, ["30000"]),
        ("zyxwv qqq", ["zyxwv qqq", "known"]),
        ("!?. ,", ["known"]),
        ("\x1b[2J \udcff", ["known"]),
    ],
)
def test_a_question_that_has_no_answer_is_said(evaluated, capsys, question, words):
    found = searcher_of(*TEST, "--correction", "none")
    for act in (lambda: found.check(question), lambda: found.by_words([QUESTION, question], 3)):
        with pytest.raises(InputError) as error:
            act()
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\x1b" not in str(error.value)
