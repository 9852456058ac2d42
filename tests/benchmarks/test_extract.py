"""The extraction benchmark on a few small photos: it runs as a command and records its figures."""

import json

import pytest
from PIL import Image

import benchmark
from benchmarks import extract
from runtime.errors import InputError

TINY = ["--parts", "extract", "--repeats", "1", "--device", "cpu"]


def test_the_part_is_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "PHOTOS", 40)
    monkeypatch.setattr(extract, "SIZE", (80, 64))
    benchmark.main([*TINY, "--json", str(tmp_path / "b.json")])
    pace, start, whole = json.loads((tmp_path / "b.json").read_text())["parts"].items()
    assert all(
        title.startswith("extraction by resnet18, 40 photos") for title, _ in (pace, start, whole)
    )
    assert pace[1]["ratio"]["median"] == pytest.approx(
        pace[1]["reference"]["median"] / pace[1]["ours"]["median"]
    )
    seconds = (
        start[1]["ours"]["median"] + 8 * pace[1]["ours"]["median"] / 1000
    )  # the first batch, then eight photos
    assert 0 < seconds < whole[1]["ours"]["median"]


def test_made_up_photos_are_as_said_and_no_two_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "PHOTOS", 3)
    extract.make_photos(tmp_path)
    photos = [Image.open(path) for path in sorted(tmp_path.iterdir())]
    assert [(photo.format, photo.size) for photo in photos] == [("JPEG", (500, 375))] * 3
    assert len({photo.tobytes() for photo in photos}) == 3


def test_photos_of_one_batch_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--photos .* no more than a batch of 32"):
        benchmark.main([*TINY, "--photos", str(tmp_path)])


def test_photos_that_cannot_be_encoded_are_told(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_text("no photo")
    with pytest.raises(InputError, match="could not be encoded.*none of 40 photos can be read"):
        extract.extract(str(tmp_path), str(tmp_path / "out"), "cpu")
