"""Opening a gallery: moved files, other settings, damaged files."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gallery import store
from runtime.errors import InputError
from tests.helpers.galleries import MODEL, PHOTOS, QUESTION, TEST, ask, files_of, results


def test_another_correction_needs_rebuilding(evaluated):
    ask(*TEST, "--correction", "nnn")
    with pytest.raises(InputError, match="--rebuild_index"):
        ask("--index", "g", "--correction", "csls", QUESTION)
    before = files_of("g")
    ask("--index", "g", "--correction", "csls", "--rebuild_index", QUESTION)
    after = store.Gallery("g")
    assert after.correction == "csls"
    width = after.width + 1
    old = np.frombuffer(before["embeddings.npy"][-4 * 6 * width :], np.float32).reshape(6, width)
    assert np.array_equal(old[:, :-1], after.embeddings[:, :-1]) and not np.allclose(
        old[:, -1], after.embeddings[:, -1]
    )


def test_another_parameter_of_the_correction_is_not_passed_over(evaluated, capsys):
    own = ["--correction", "nnn", "--correction_k", "4", "--correction_alpha", "0.6"]
    ask(*TEST, *own)
    capsys.readouterr()
    ask(*TEST, *own, QUESTION)
    assert "g is there, and is asked as it is" in capsys.readouterr().err
    with pytest.raises(InputError, match="nnn .*: add --rebuild_index"):
        ask("--index", "g", "--correction_temperature", "0.5", QUESTION)
    for others in (
        ["--correction_k", "5"],
        ["--correction_bank", "dev"],
        ["--correction_bank_images", "1"],
        ["--tune_correction"],
    ):
        with pytest.raises(
            InputError, match="nnn --correction_k 4 --correction_alpha 0.6 .*: add --rebuild_index"
        ):
            ask("--index", "g", "--correction", "nnn", *others, QUESTION)
    with pytest.raises(
        InputError,
        match="keeps the gallery's correction nnn, and --correction_k .* --correction, too",
    ):
        ask("--index", "g", "--rebuild_index", "--correction_k", "5", QUESTION)


def test_the_command_that_built_and_tuned_asks_again(evaluated, capsys):
    tuned = [*TEST, "--correction", "csls", "--tune_correction", QUESTION, "--json"]
    ask(*tuned)
    before = store.describe("g")
    ask(*tuned)
    first, again = results(capsys)
    assert first == again and store.describe("g") == before


def test_gallery_features_and_model_can_move_together(evaluated):
    ask(*TEST, "--correction", "none")
    os.makedirs("moved")
    for name in ("g", "data", "runs"):
        shutil.move(name, f"moved/{name}")
    ask(
        "--precomp",
        "moved/data/tiny_precomp",
        "--index",
        "moved/g",
        "--model_path",
        f"moved/{MODEL}",
        QUESTION,
    )
    with pytest.raises(InputError, match="tiny_precomp, test, not of .*tiny_precomp, dev"):
        ask(
            "--precomp",
            "moved/data/tiny_precomp",
            "--split",
            "dev",
            "--index",
            "moved/g",
            "--model_path",
            f"moved/{MODEL}",
            QUESTION,
        )


def edit(**changes):
    """A function that changes what gallery.json says."""

    def change():
        path = Path("g/gallery.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut(name):
    """A function that cuts a file of the gallery short."""

    def change():
        path = Path("g") / store.describe("g")["files"] / name
        path.write_bytes(path.read_bytes()[:-5])

    return change


def other_model():
    content = Path(MODEL).read_bytes()
    Path(MODEL).write_bytes(content)
    state = torch.load(MODEL, weights_only=False)
    state["epoch"] += 1
    torch.save(state, MODEL)


BAD_GALLERIES = {
    "of another model": (other_model, ["another model", "--index"]),
    "from a newer version": (edit(format=99), ["newer", "99"]),
    "without a count": (edit(count="many"), ["'count'", "build"]),
    "of other files": (edit(files="../elsewhere"), ["outside"]),
    "of an unknown index": (edit(index="hnsw"), ["hnsw", "build"]),
    "of an unknown correction": (
        edit(
            correction={
                "method": "magic",
                "parameters": {},
                "bank_split": "train",
                "bank_images": None,
            }
        ),
        ["magic", "build"],
    ),
    "of a correction in short": (edit(correction={"method": "nnn"}), ["'parameters'", "build"]),
    "cut description": (
        lambda: Path("g/gallery.json").write_text('{"format": 1'),
        ["gallery.json", "JSON"],
    ),
    "cut embeddings": (cut("embeddings.npy"), ["embeddings.npy", "build"]),
    "cut names": (cut("items.bin"), ["items.bin", "build"]),
    "cut captions": (cut("captions.npy"), ["captions.npy", "build"]),
    "of other sizes": (edit(count=5, checksums=None), ["embeddings.npy", "build"]),
    "of another count": (edit(count=5), ["gallery.json", "not as it was written", "build"]),
    "without its description": (
        lambda: os.unlink("g/gallery.json"),
        ["no whole gallery", "--images"],
    ),
}


@pytest.mark.parametrize("case", BAD_GALLERIES)
def test_a_bad_gallery_is_said(evaluated, case):
    damage, words = BAD_GALLERIES[case]
    ask(*TEST, "--correction", "none")
    damage()
    with pytest.raises(InputError) as error:
        ask("--index", "g", "--model_path", MODEL, QUESTION)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_gallery_of_other_photos_is_not_taken_for_these(photos):
    ask(*PHOTOS)
    shutil.copytree("photos", "other")
    with pytest.raises(InputError, match="other: name another --index"):
        ask("--images", "other", "--index", "g", QUESTION)
    with pytest.raises(InputError, match="--add other does not lie in"):
        ask("--index", "g", "--add", "other")
