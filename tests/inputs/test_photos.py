"""Photos found in folders, and the transform that models see them through."""

import os

import numpy as np
import pytest
from PIL import Image

from inputs.photos import image_transform, photo_names
from runtime.errors import InputError


def test_photos_are_found_at_any_depth_in_the_order_of_their_bytes(tmp_path):
    for name in (
        "b.jpg",
        "a.JPEG",
        "sub/c.png",
        "sub/deep/d.webp",
        "notes.txt",
        ".hidden.jpg",
        ".trash/e.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    odd = os.fsdecode(b"\xff.jpg")
    (tmp_path / odd).touch()
    assert photo_names(tmp_path) == ["a.JPEG", "b.jpg", "sub/c.png", "sub/deep/d.webp", odd]


def test_a_folder_that_is_not_there_or_none_is_said(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            photo_names(tmp_path / name)


def test_photos_that_are_not_read_and_linked_folders_are_told_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("inputs.photos.reads_heic", lambda: False)
    for name in (
        "photos/a.jpg",
        "photos/b.HEIC",
        "photos/c.nef",
        "photos/notes.txt",
        "photos/d.jfif",
        "real/e.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("../real", tmp_path / "photos/linked")
    assert photo_names(tmp_path / "photos") == ["a.jpg", "d.jfif"]
    heic, kinds, links = capsys.readouterr().err.splitlines()
    assert heic == (
        "note: 1 HEIC photos are skipped, such as 'b.HEIC': pip install pillow-heif, or save them as "
        "JPEGs"
    )
    assert kinds.startswith(
        "note: 1 photos of a kind that cannot be read are skipped, such as 'c.nef'"
    )
    assert links.startswith("note: 1 links to folders are skipped") and "linked" in links


@pytest.mark.parametrize("train, size", [(True, 32), (False, 224)])
def test_pixels_are_normalised_by_imagenet_s_numbers(train, size):
    image = image_transform(train, 32)(Image.new("RGB", (300, 270), (51, 102, 255)))
    expected = [(51 / 255 - 0.485) / 0.229, (102 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert image.shape == (3, size, size)
    np.testing.assert_allclose(
        image, np.broadcast_to(np.reshape(expected, (3, 1, 1)), image.shape), atol=1e-5
    )


def test_the_evaluation_crop_is_the_centre_of_256():
    """A bright square on the middle of a wide image fills the crop's middle."""
    picture = Image.new("L", (512, 256))
    picture.paste(255, (144, 16, 368, 240))
    image = image_transform(False, 32)(picture.convert("RGB"))
    assert image[0].min() == image[0].max() > 0
