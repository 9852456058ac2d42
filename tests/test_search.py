"""The script search.py: its flags, questions in words and by photo, and how it ends."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import train
from gallery import build as build_gallery
from gallery import store
from gallery.searcher import Searcher
from runtime.errors import InputError
from tests.helpers.galleries import MODEL, PHOTOS, QUESTION, TEST, ask, results
from tests.helpers.made import run_script

# Features, against loops --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf_sq8", "opq_ivf_pq64"])
def test_another_type_of_index_gives_nearly_the_same(evaluated, capsys, kind):
    rng = np.random.default_rng(2)
    np.save("data/tiny_precomp/many_ims.npy", rng.standard_normal((600, 8)).astype(np.float32))
    flags = ["--precomp", "data/tiny_precomp", "--split", "many", "--index", "g"]
    ask(*flags, "--json", "--correction", "csls", QUESTION)
    exact = results(capsys)[0]["results"]
    ask("--index", "g", "--index_type", kind, "--json", "--recall_check", QUESTION)
    recall, line = capsys.readouterr().out.splitlines()
    assert store.describe("g")["index"] == kind and store.Gallery("g").correction == "csls"
    found = json.loads(line)["results"]
    assert {hit["item"] for hit in found} == {hit["item"] for hit in exact}
    assert recall.startswith(f"recall@10 of the {kind} index: 0.9") or ": 1.0000" in recall
    ask("--index", "g", "--rebuild_index", "--json", QUESTION)
    assert store.describe("g")["index"] == kind
    assert results(capsys)[-1]["results"][0]["item"] == exact[0]["item"]


def test_text_and_json_say_the_same(evaluated, capsys):
    ask(*TEST, "--correction", "none", "--json", "--top", "2", QUESTION)
    (answer,) = results(capsys)
    ask("--index", "g", "--top", "2", QUESTION)
    assert capsys.readouterr().out.splitlines() == [
        QUESTION,
        *(f"  {hit['score']:.3f}  {hit['item']}" for hit in answer["results"]),
    ]


def test_the_first_command_s_model_finds_the_sample_s_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--word_dim", "6", "--embed_size", "8", "--num_epochs", "1", "--device", "cpu"]
    train.main(flags)
    ask("a red star in the snow")
    lines = capsys.readouterr().out.splitlines()
    found = store.Gallery("runs/runX/gallery")
    assert len(lines[-10:]) == 10 and found.count == 200 and lines[-11] == "a red star in the snow"
    assert found.photo(0) == os.path.realpath(f"data/sample_precomp/images/{found.items[0]}")
    ask(
        "--image", found.photo(7), "--json", "--top", "1"
    )  # the checkpoint knows what saw the pictures
    (answer,) = results(capsys)
    assert answer["results"][0]["item"] == found.items[7]
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    train.main([*flags, "--seed", "5", "--learning_rate", "0.01"])
    ask("a red star in the snow")  # the gallery of the older model is built again
    assert store.describe("runs/runX/gallery")["model"]["sha256"] == build_gallery.hash_file(MODEL)


# What goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, unknown",
    [
        (QUESTION, []),
        ("a RED quokka, a red dog and a Quokka!", ["quokka"]),
        ("a zebra-dog sees 7 dogs", ["zebra-dog", "sees", "7", "dogs"]),
    ],
)
def test_words_that_the_model_does_not_know_are_named(evaluated, capsys, question, unknown):
    ask(*TEST, "--correction", "none", "--json", "--top", "2", question)
    (answer,) = results(capsys)
    assert answer["unknown_words"] == unknown
    ask("--index", "g", "--top", "2", question)
    printed = capsys.readouterr()
    notes = [line for line in printed.err.splitlines() if "does not know" in line]
    assert notes == [f"note: {question}: the model does not know {', '.join(unknown)}"] * bool(
        unknown
    )
    assert len(printed.out.splitlines()) == 3


def test_a_batch_with_a_bad_line_answers_nothing(evaluated, capsys):
    Path("questions.txt").write_text(f"{QUESTION}\nzyxwv\n")
    with pytest.raises(InputError, match="questions.txt, line 2: none of"):
        ask(*TEST, "--correction", "none", "--batch", "questions.txt")
    assert capsys.readouterr().out == ""


BAD_FLAGS = {
    "no questions": ([*TEST, "--batch", "nowhere.txt"], ["--batch nowhere.txt", "not there"]),
    "no gallery": ([QUESTION], ["no whole gallery", "--images"]),
    "a gallery to change that is not there": (["--add", "photos"], ["no whole gallery", "build"]),
    "no folder": (["--images", "nowhere"], ["--images", "nowhere"]),
    "a folder without photos": (["--images", "vocab"], ["no photo", "vocab"]),
    "no features": (["--precomp", "nowhere"], ["nowhere"]),
    "no such split": (["--precomp", "data/mine_precomp", "--split", "other"], ["other_ims.npy"]),
    "a split of no features": (["--images", "photos", "--split", "dev"], ["--split", "--precomp"]),
    "captions of nothing": (["--captions", "captions.csv", QUESTION], ["--captions", "--images"]),
    "a port without a page": (["--port", "0", QUESTION], ["--port", "--serve"]),
    "a parameter of another correction": (
        ["--correction", "csls", "--correction_alpha", "1"],
        ["--correction_alpha"],
    ),
    "a bank of no correction": (
        ["--correction", "none", "--correction_bank_images", "0"],
        ["correction_bank_images"],
    ),
    "dev as bank and to choose by": (["--correction_bank", "dev"], ["--correction_bank", "dev"]),
    "another encoder": (
        ["--images", "photos", "--encoder", "squeezenet1_1", "--encoder_weights", "none"],
        ["squeezenet1_1", "shufflenet_v2_x0_5"],
    ),
    "an encoder's pooling alone": (
        ["--images", "photos", "--pooling", "grid"],
        ["--pooling", "--encoder"],
    ),
    "a folder of other files": (
        ["--images", "photos", "--index", "data"],
        ["--index data", "other files"],
    ),
    "a gallery in a file": (["--images", "photos", "--index", "captions.csv/g"], ["--index"]),
    "too few photos for a quantizer": (
        ["--images", "photos", "--index_type", "ivf_sq8"],
        ["ivf_sq8", "256"],
    ),
    "an order of what is found by words, for a photo": (
        ["--image", "x.png", "--rerank_model", MODEL],
        ["--rerank_model", "--image"],
    ),
    "no checkpoint": (["--model_path", "nowhere.tar", QUESTION], ["nowhere.tar"]),
    "a question twice": (["--batch", "captions.csv", QUESTION], ["--batch"]),
    "too many hits": (["--top", "0", QUESTION], ["--top"]),
    "captions of other photos": (
        ["--images", "photos", "--captions", "nowhere.csv"],
        ["nowhere.csv"],
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_said_and_leave_nothing(photos, case):
    flags, words = BAD_FLAGS[case]
    before = {path for path in Path(".").rglob("*") if ".cache" not in path.parts}
    with pytest.raises(InputError) as error:
        ask("--workers", "0", *flags)
    assert all(word in str(error.value) for word in words), str(error.value)
    left = {path for path in Path(".").rglob("*") if ".cache" not in path.parts} - before
    assert not [path for path in left if path.is_file() and path.name != ".lock"], left


@pytest.mark.parametrize("content", [b"", b"no photo", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_query_that_is_no_photo_is_said(photos, content):
    ask(*PHOTOS, "--correction", "none")
    Path("query.png").write_bytes(content)
    with pytest.raises(InputError, match="query.png cannot be read"):
        ask("--index", "g", "--image", "query.png")


def test_as_a_script_it_answers_and_says_what_is_wrong(evaluated):
    run = run_script("search.py", *TEST, "--correction", "none", QUESTION, cwd=evaluated)
    assert run.returncode == 0 and run.stdout.startswith(f"{QUESTION}\n  ")
    run = run_script("search.py", "--index", "g", "zyxwv", cwd=evaluated)
    assert (
        run.returncode == 2
        and run.stderr.startswith("error: none of the question's words")
        and not run.stdout
    )


def test_serve_is_given_what_the_flags_say(evaluated, monkeypatch):
    from pages import serve

    served = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))
    ask(*TEST, "--correction", "none", "--serve")
    ask(
        "--index",
        "g",
        "--serve",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--allow_host",
        "a.example",
        "b.example",
    )
    (found, *first), (_, *second) = served
    assert isinstance(found, Searcher) and found.gallery.count == 6
    assert first == ["127.0.0.1", 8000, ()] and second == ["0.0.0.0", 0, ["a.example", "b.example"]]
