"""The sample data set.

The same on every machine, complete or absent, in the layout that loaders read.
"""

import errno
import hashlib
import json
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.description import read_features_json
from features.encoders import encode_photo, encoder_from
from inputs import sample_data
from runtime.errors import InputError

CAPTIONS_PER_IMAGE = 5

SPLITS = {"train": 500, "dev": 200, "test": 200}

# of all captions, features and pixels; if it changes, so do the results that README.md gives
DIGEST = "9ea5fdd4c1a10b07128b804cf2bc3ff6b29b185fd0629e2b46da84bdac81b0d5"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sample_data.draw(folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """Few pictures, for what does not depend on how many there are."""
    monkeypatch.setattr(sample_data, "SPLIT_IMAGES", {"train": 8, "dev": 2, "test": 2})


def read_split(folder, split):
    features = np.load(folder / "sample_precomp" / f"{split}_ims.npy")
    captions = (
        (folder / "sample_precomp" / f"{split}_caps.txt")
        .read_bytes()
        .decode("utf-8")
        .split("\n")[:-1]
    )
    names = (folder / "sample_precomp" / f"{split}_ids.txt").read_text().splitlines()
    return features, captions, names


def file_bytes(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_two_draws_have_the_same_bytes(drawn, tmp_path):
    sample_data.draw(tmp_path)
    assert file_bytes(tmp_path) == file_bytes(drawn)


def test_another_seed_draws_something_else(few, tmp_path):
    sample_data.draw(tmp_path / "0", seed=0)
    sample_data.draw(tmp_path / "1", seed=1)
    first, second = file_bytes(tmp_path / "0"), file_bytes(tmp_path / "1")
    assert first.keys() == second.keys()
    assert [
        path for path in first if first[path] == second[path] and not path.stem.endswith("_ids")
    ] == []


def test_all_machines_draw_the_same(drawn):
    digest = hashlib.sha256()
    for split in SPLITS:
        features, captions, names = read_split(drawn, split)
        digest.update(features.astype("<f4").tobytes() + "\n".join(captions).encode())
        for name in names:
            digest.update(
                np.asarray(Image.open(drawn / "sample_precomp" / "images" / name)).tobytes()
            )
    assert digest.hexdigest() == DIGEST


@pytest.mark.parametrize("split", SPLITS)
def test_precomp_layout(drawn, split):
    features, captions, names = read_split(drawn, split)
    assert features.dtype == np.float32
    assert features.shape == (SPLITS[split], read_split(drawn, "train")[0].shape[1])
    assert np.isfinite(features).all()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert len(captions) == CAPTIONS_PER_IMAGE * SPLITS[split]
    assert len(names) == SPLITS[split]


def test_images_are_all_there_and_in_one_split_each(drawn):
    names = [name for split in SPLITS for name in read_split(drawn, split)[2]]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(
        path.name for path in (drawn / "sample_precomp" / "images").iterdir()
    )


def test_no_two_images_have_equal_features(drawn):
    features = np.concatenate([read_split(drawn, split)[0] for split in SPLITS])
    assert len(np.unique(features, axis=0)) == len(features)


@pytest.mark.parametrize("split", SPLITS)
def test_five_captions_of_different_wording(drawn, split):
    captions = read_split(drawn, split)[1]
    for start in range(0, len(captions), CAPTIONS_PER_IMAGE):
        assert len(set(captions[start : start + CAPTIONS_PER_IMAGE])) == CAPTIONS_PER_IMAGE


def test_captions_are_sentences(drawn):
    captions = [caption for split in SPLITS for caption in read_split(drawn, split)[1]]
    badly_put = [c for c in captions if not re.fullmatch(r"([A-Z][a-z ,']*[a-z][.!] ?)+(?<! )", c)]
    wrong_article = [c for c in captions if re.search(r"\b(a [aeiou]|an [^aeiou])", c.lower())]
    assert badly_put == []
    assert wrong_article == []


def test_json_layout(drawn):
    data = json.loads((drawn / "sample" / "dataset_sample.json").read_text())
    assert data["dataset"] == "sample"
    splits = [image["split"] for image in data["images"]]
    assert {split: splits.count(split) for split in set(splits)} == {
        "train": 60,
        "val": 20,
        "test": 20,
    }
    assert [image["imgid"] for image in data["images"]] == list(range(100))
    sentences = [sentence for image in data["images"] for sentence in image["sentences"]]
    assert [sentence["sentid"] for sentence in sentences] == list(range(CAPTIONS_PER_IMAGE * 100))
    for image in data["images"]:
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        assert {sentence["imgid"] for sentence in image["sentences"]} == {image["imgid"]}
    for sentence in sentences:
        letters = sentence["raw"].lower().replace("'", "")
        assert sentence["tokens"] == "".join(c if c.isalpha() else " " for c in letters).split()


def test_raw_images_and_captions_are_those_of_the_precomp_set(drawn):
    data = json.loads((drawn / "sample" / "dataset_sample.json").read_text())
    raw = {image["filename"]: image for image in data["images"]}
    assert sorted(raw) == sorted(path.name for path in (drawn / "sample" / "images").iterdir())
    for split, karpathy in (("train", "train"), ("dev", "val"), ("test", "test")):
        _, captions, names = read_split(drawn, split)
        own = [name for name in raw if raw[name]["split"] == karpathy]
        assert own == names[: len(own)]
        told = [sentence["raw"] for name in own for sentence in raw[name]["sentences"]]
        assert told == captions[: CAPTIONS_PER_IMAGE * len(own)]
    for name in raw:
        image = Image.open(drawn / "sample" / "images" / name)
        assert image.mode == "RGB" and image.size == (96, 96)
        same = drawn / "sample_precomp" / "images" / name
        assert (drawn / "sample" / "images" / name).read_bytes() == same.read_bytes()


def test_size_is_modest(drawn):
    assert sum(map(len, file_bytes(drawn).values())) < 5e6


@pytest.mark.parametrize(
    "present, absent", [("sample_precomp", "sample"), ("sample", "sample_precomp")]
)
def test_existing_folder_is_left_alone(few, tmp_path, present, absent):
    (tmp_path / present).mkdir()
    (tmp_path / present / "mine.txt").write_text("keep")
    assert sample_data.draw(tmp_path) == [tmp_path / absent]
    assert file_bytes(tmp_path / present) == {Path("mine.txt"): b"keep"}
    assert sample_data.draw(tmp_path) == []


@pytest.mark.parametrize("step", ["compute_features", "write_lines", "save_images"])
def test_interrupted_draw_leaves_nothing(few, tmp_path, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_data, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample_data.draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_processes_wins(few, tmp_path, monkeypatch):
    def write_while_another_finishes(folder, examples):
        (folder / "ours").touch()
        (tmp_path / "sample").mkdir()
        (tmp_path / "sample" / "theirs").touch()

    monkeypatch.setattr(sample_data, "WRITERS", {"sample": write_while_another_finishes})
    sample_data.draw(tmp_path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "sample", tmp_path / "sample" / "theirs"]


def test_a_file_in_the_way_is_an_error(few, tmp_path, monkeypatch):
    def put_a_file_there(folder, examples):
        (tmp_path / "sample").touch()

    monkeypatch.setattr(sample_data, "WRITERS", {"sample": put_a_file_there})
    with pytest.raises(InputError, match=f"--data_path {tmp_path}"):
        sample_data.draw(tmp_path)


@pytest.mark.parametrize("name", ["taken", "taken/data"], ids=["a file", "below a file"])
def test_a_data_folder_that_cannot_be_made_is_refused_by_its_flag(few, tmp_path, name):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InputError, match=f"--data_path {tmp_path / name} ") as caught:
        sample_data.draw(tmp_path / name)
    assert "\n" not in str(caught.value) and file_bytes(tmp_path) == {Path("taken"): b"x"}


@pytest.mark.parametrize(
    "step, number", [("mkdtemp", errno.EROFS), ("mkdtemp", errno.EACCES), ("save", errno.ENOSPC)]
)
def test_a_data_folder_that_cannot_be_written_is_refused_by_its_flag(
    few, tmp_path, monkeypatch, step, number
):
    """Read-only, another user's, full."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*{"mkdtemp": (tempfile, "mkdtemp"), "save": (np, "save")}[step], fail)
    with pytest.raises(InputError, match=rf"--data_path {tmp_path} \({os.strerror(number)}\)"):
        sample_data.draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drawn_data_is_not_drawn_again_where_nothing_can_be_written(few, tmp_path, monkeypatch):
    sample_data.draw(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    assert sample_data.draw(tmp_path) == []


@pytest.mark.parametrize("side", [14, 20, 28])
def test_disc_stencil(side):
    middle = (side - 1) / 2
    offsets = [position - middle for position in range(side)]
    expected = [[x**2 + y**2 <= (side / 2) ** 2 for x in offsets] for y in offsets]
    np.testing.assert_array_equal(sample_data.stencil("ball", side), expected)


def test_polygon_stencil_has_a_hole():
    house = sample_data.stencil("house", 24)
    assert not house[0, 0] and house[20, 4] and house[20, 20]  # sky, and the walls
    assert not house[20, 12]  # the door
    assert [int(row.sum()) for row in house[16:18]] == [12, 12]  # 18 wide less a door of 6


@pytest.mark.parametrize("kind", sample_data.KINDS)
def test_shapes_fill_their_square(kind):
    inside = sample_data.stencil(kind, min(sizes[0] for sizes in sample_data.SIZES.values()))
    assert 0.2 < inside.mean() < 0.95
    assert inside.any(axis=0).mean() > 0.6 and inside.any(axis=1).mean() > 0.6


def test_descriptions_against_plain_loops():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    pixels[32:64, 10:70] = (200, 20, 120)
    areas, edges = np.zeros((9, 27)), np.zeros((27, 16))
    levels = (pixels.astype(int) * 3 // 256).tolist()
    colours = [[9 * red + 3 * green + blue for red, green, blue in row] for row in levels]
    for y in range(96):
        for x in range(96):
            areas[y // 32 * 3 + x // 32, colours[y][x]] += 1
            if y < 95 and x < 95:
                patch = (colours[y][x], colours[y][x + 1], colours[y + 1][x], colours[y + 1][x + 1])
                for colour in set(patch):
                    edges[
                        colour,
                        sum(2**place for place, other in enumerate(patch) if other == colour),
                    ] += 1
    shares = edges[:, 1:15] / edges[:, 1:15].sum(axis=1, keepdims=True)
    described = sample_data.describe_pixels(pixels)
    np.testing.assert_array_equal(described[: 9 * 27], np.round(100 * np.sqrt(areas)).ravel())
    np.testing.assert_array_equal(described[9 * 27 :], np.floor(1000 * shares + 1e-9).ravel())


def test_features_depend_on_training_statistics_alone(few):
    examples = sample_data.draw_examples(seed=0)
    features, _ = sample_data.compute_features(examples)
    training = [example for example in examples if example.split == "train"]
    np.testing.assert_array_equal(
        sample_data.compute_features(training)[0], features[: len(training)]
    )


def test_features_json_is_enough_to_see_a_drawn_picture(drawn):
    found = read_features_json(drawn / "sample_precomp")
    assert (found["encoder"], found["size"], found["dtype"]) == ("sample", 96, "float32")
    encoder = encoder_from(found)
    features, _, names = read_split(drawn, "test")
    row = encode_photo(encoder, drawn / "sample_precomp" / "images" / names[-1])
    np.testing.assert_array_equal(row.numpy(), features[-1])
    assert not (drawn / "sample" / "features.json").exists()


def test_another_seed_s_features_are_not_taken_for_these(few, tmp_path):
    sample_data.draw(tmp_path, seed=1)
    with pytest.raises(
        InputError, match="the encoder that can be built here has features by sample"
    ):
        encoder_from(read_features_json(tmp_path / "sample_precomp"))


@pytest.mark.parametrize(
    "cells, other, expected",
    [
        ([(0, 0)], [(2, 1)], "left of"),
        ([(2, 2)], [(0, 0), (0, 1)], "right of"),
        ([(0, 0), (0, 1)], [(1, 1)], "above|over"),
        ([(2, 0), (2, 1)], [(1, 0)], "below|beneath"),
        ([(0, 0), (2, 2)], [(1, 1)], "near|not far from"),
    ],
)
def test_relation(cells, other, expected):
    groups = [sample_data.Group("star", "red", "small", tuple(c), ()) for c in (cells, other)]
    for seed in range(4):
        assert re.search(expected, sample_data.relation(*groups, random.Random(seed)))
