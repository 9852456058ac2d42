"""A gallery's files: texts, paths that must stay inside, what is published and what is cleared away."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import gallery
from errors import InputError

TEXTS = ["plain", "", "quotes '\"", "line\nbreak", "zwei Wörter", os.fsdecode(b"odd \xff"), "../up", "<script>"]


@pytest.mark.parametrize("texts", [TEXTS, [], ["", ""]])
def test_texts_come_back_as_they_were(tmp_path, texts):
    gallery.write_texts(str(tmp_path / "t"), texts)
    found = gallery.Texts(str(tmp_path / "t"))
    assert list(found) == texts and len(found) == len(texts)
    for number in range(-len(texts), len(texts)):
        assert found[number] == texts[number]
    for number in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            found[number]


@pytest.mark.parametrize("ends", [np.array([3, 99]), np.array([3, 2]), np.array([[4]]), np.array([4.0]),
                                  np.array([-1, 4])])
def test_ends_that_are_not_those_of_the_texts_are_said(tmp_path, ends):
    gallery.write_texts(str(tmp_path / "t"), ["ab", "cd"])
    np.save(tmp_path / "t.npy", ends)
    with pytest.raises(InputError, match="build it again"):
        list(gallery.Texts(str(tmp_path / "t")))


def test_texts_that_are_gone_are_said(tmp_path):
    gallery.write_texts(str(tmp_path / "t"), ["ab", "cd"])
    os.unlink(tmp_path / "t.bin")
    with pytest.raises(InputError, match="build it again"):
        gallery.Texts(str(tmp_path / "t"))


def test_arrays_of_objects_are_not_read(tmp_path):
    gallery.write_texts(str(tmp_path / "t"), ["ab"])
    np.save(tmp_path / "t.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="t.npy cannot be read"):
        gallery.Texts(str(tmp_path / "t"))


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, a folder in it, one beside it, and links of every kind."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "photos2").mkdir()
    for path in ("photos/a.png", "photos/deep/b.png", "secret.png", "photos2/c.png"):
        (tmp_path / path).write_bytes(b"x")
    os.symlink("../secret.png", root / "out.png")
    os.symlink("..", root / "up")
    os.symlink("deep/b.png", root / "in.png")
    os.symlink("loop.png", root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("name", ["a.png", "deep/b.png", "in.png", "./a.png", "deep/../a.png"])
def test_what_lies_inside_has_a_path(folder, name):
    assert gallery.inside(str(folder), name) == os.path.realpath(folder / name)


@pytest.mark.parametrize("name", ["out.png", "up/secret.png", "../secret.png", "../photos2/c.png", "/etc/hostname",
                                  "loop.png", "pipe.png", "deep", "", ".", "gone.png", "nul\0.png", "a.png/x",
                                  "x" * 5000])
def test_what_does_not_has_none(folder, name):
    assert gallery.inside(str(folder), name) is None


def test_only_what_a_build_made_is_cleared_away(tmp_path):
    for name in ("gallery-files-abcd1234", "gallery-files-mine", "files-2020", "gallery-files-ABCD1234"):
        (tmp_path / name).mkdir()
    gallery.clear(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files-2020", "gallery-files-ABCD1234",
                                                                "gallery-files-mine"]
    with pytest.raises(InputError, match="other files"):
        gallery.refuse_foreign(str(tmp_path))


def test_a_gallery_that_another_replaces_while_it_is_opened_is_the_other(tmp_path, monkeypatch):
    def build(count):
        with gallery.new_files(tmp_path) as files:
            gallery.save_rows(os.path.join(files, "embeddings.npy"), [np.ones((count, 3))], (count, 3))
            gallery.write_items(files, list(map(str, range(count))), [[]] * count, None, None)
            gallery.publish(tmp_path, files, {
                "count": count, "width": 2, "captions": 0, "model": {"path": "m", "sha256": ""}, "source": "",
                "precomp": None, "folder": None, "features": None, "index": "exact", "hubs": None, "correction": {
                    "method": "none", "parameters": {}, "bank_split": "train", "bank_images": None}})

    def describe(folder):
        found = own(folder)
        if found["count"] == 4:
            build(5)
        return found

    build(4)
    own = gallery.describe
    monkeypatch.setattr(gallery, "describe", describe)
    found = gallery.Gallery(tmp_path)
    assert found.count == len(found.items) == 5
    os.unlink(os.path.join(found.files, "embeddings.npy"))
    with pytest.raises(InputError, match="embeddings.npy is not there"):
        gallery.Gallery(tmp_path)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="not finite"), gallery.new_files(str(tmp_path)) as files:
        gallery.save_rows(os.path.join(files, "rows.npy"), [torch.tensor([[1.0]]), torch.tensor([[float("nan")]])],
                          (2, 1))
    assert not list(tmp_path.iterdir())


def test_rows_come_back_as_one_array(tmp_path):
    blocks = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 8).view(1, 2).half()]
    gallery.save_rows(str(tmp_path / "rows.npy"), blocks, (4, 2))
    assert np.array_equal(np.load(tmp_path / "rows.npy"), np.arange(8, dtype=np.float32).reshape(4, 2))


@pytest.mark.parametrize("text, shown", [("plain é", "plain é"), ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
                                         (os.fsdecode(b"\xff"), "\\udcff"), ("\u202egpj", "\\u202egpj")])
def test_what_is_shown_can_be_printed(text, shown):
    assert gallery.shown(text) == shown
    gallery.shown(text).encode()


def test_a_gallery_s_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no whole gallery"):
        gallery.Gallery(str(tmp_path / "nowhere"))
    assert not Path(tmp_path / "nowhere").exists()
