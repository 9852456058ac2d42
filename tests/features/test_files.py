"""Feature files and their ids: which are accepted, and features that carry no information."""

import io
import pickle
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import compute_results
import train
from features.files import NEARLY_ALIKE, mean_cosine, open_features, read_ids
from runtime.errors import InputError
from tests.helpers.made import (
    TINY,
    write,
)
from tests.training.test_watch import COLLAPSED, feed, watch_with
from training.watch import Watch


def rows(n, *shape, dtype=np.float32):
    return np.random.default_rng(n).standard_normal((n, *shape)).astype(dtype)


def warned(tmp_path, capsys, features):
    """What is printed when features that are accepted are opened."""
    np.save(tmp_path / "f.npy", features)
    opened = open_features(str(tmp_path / "f.npy"))
    assert opened.shape == features.shape
    return capsys.readouterr().err


@pytest.mark.parametrize("shape", [(7, 4), (1, 4), (7, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_a_file_of_zeros_is_refused(tmp_path, shape, dtype):
    np.save(tmp_path / "f.npy", np.zeros(shape, dtype))
    with pytest.raises(
        InputError, match="f.npy holds nothing but zeros: .*make the features again"
    ):
        open_features(str(tmp_path / "f.npy"))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (7,)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_that_say_nothing_are_counted_in_one_line(tmp_path, capsys, monkeypatch, shape, dtype):
    monkeypatch.setattr("features.files.CHECKED_BYTES", 3000)  # a few rows at a time
    features = rows(100, *shape, dtype=dtype)
    features[[0, 7, 99]] = 0
    features[[5, 6]] = [[[2]], [[3]]] if len(shape) > 1 else [[2], [3]]
    features[20:60] = features[3]
    said = warned(tmp_path, capsys, features)
    same = sum(bool((row == features[3]).all()) for row in features)
    assert re.fullmatch(
        r"Warning: \S+f.npy has 100 rows, of which 3 all zero and 2 of one number throughout and "
        rf"{same} equal to row 3: .*\n",
        said,
    )


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-3])
@pytest.mark.parametrize("shape", [(40, 16), (40, 3, 16)], ids=str)
def test_rows_that_are_all_alike_are_said_also_within_rounding(tmp_path, capsys, shape, noise):
    features = rows(1, *shape[1:]).repeat(40, 0) + np.float32(noise) * rows(*shape)
    said = warned(tmp_path, capsys, features)
    assert ("40 equal to row 0" if not noise else "nearly all in one direction") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "features",
    [
        rows(50, 8),
        rows(50, 3, 8),
        rows(50, 8, dtype=np.float16),
        rows(20, 8).repeat(5, 0),
        rows(3, 8).repeat(5, 0),
        rows(1, 8).repeat(5, 0),
        np.maximum(rows(50, 64), 0) + np.float32(0.5),
    ],
    ids=["vectors", "regions", "halves", "a row a caption", "three images", "one image", "offset"],
)
def test_features_that_say_something_bring_no_word(tmp_path, capsys, features):
    assert warned(tmp_path, capsys, features) == ""


@pytest.mark.parametrize("regions", [(), (3,)], ids=["vectors", "regions"])
def test_the_mean_cosine_is_a_plain_loops(regions):
    features = rows(30, *regions, 6) + 0.7
    features[4] = 0
    kept = [row.ravel().tolist() for place, row in enumerate(features) if place != 4]
    cosines = [
        sum(a * b for a, b in zip(one, other))
        / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5
        for i, one in enumerate(kept)
        for j, other in enumerate(kept)
        if i != j
    ]
    assert mean_cosine(features) == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert mean_cosine(torch.from_numpy(features)) == mean_cosine(features)
    assert mean_cosine(features[:1]) == 0 and mean_cosine(features[4:6]) == 0


def test_swapped_rows_and_columns_are_called_that(workdir):
    path = workdir / "data/tiny_precomp/train_ims.npy"
    np.save(path, np.load(path).T)
    with pytest.raises(
        InputError, match="rows and columns were swapped: save the array transposed"
    ):
        train.main(TINY)


@pytest.mark.parametrize("kind", ["no positives", "trivial"])
def test_a_collapse_on_features_that_are_alike_does_not_blame_the_learning_rate(kind):
    figures = COLLAPSED if kind == "no positives" else COLLAPSED._replace(loss=51.2)
    alike, others = (
        torch.ones(40, 6) + 1e-3 * torch.from_numpy(rows(40, 6)),
        torch.from_numpy(rows(40, 6)),
    )
    assert mean_cosine(alike) > NEARLY_ALIKE > mean_cosine(others)
    for features, blamed, spared in (
        (alike, "the features are the reason", "learning_rate"),
        (others, "learning_rate", "features"),
    ):
        watch = Watch(watch_with(on_collapse="stop").opt, print, features)
        with pytest.raises(InputError) as caught:
            feed(watch, figures, 5, kind)
        assert blamed in str(caught.value) and spared not in str(caught.value)


def test_every_script_says_it(evaluated, capsys):
    for split in ("train", "test"):
        path = evaluated / f"data/tiny_precomp/{split}_ims.npy"
        np.save(path, np.load(path)[:1].repeat(len(np.load(path)), 0))
    train.main([*TINY, "--num_epochs", "0"])
    assert "train_ims.npy has 12 rows, of which 12 equal to row 0" in capsys.readouterr().err
    compute_results.main([])
    assert "test_ims.npy has 6 rows, of which 6 equal to row 0" in capsys.readouterr().err


# Files of other kinds ---------------------------------------------------------------------------


def objects():
    file = io.BytesIO()
    np.save(file, np.array([np.ones((2, 4)), np.ones((3, 4))], object), allow_pickle=True)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    np.savez(file, a=np.ones((3, 4)))
    return file.getvalue()


@pytest.mark.parametrize(
    "content, parts",
    [
        (objects(), ["Python objects", "rows of zeros at the end"]),
        (archive(), ["is a zip archive, such as .npz", "np.save"]),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), ["is an HDF5 file", "extract_features.py --from"]),
        (
            b"7\t640\t480\t36\tAAAA\tAAAA\n",
            ["is a tab-separated table", "extract_features.py --from"],
        ),
        (b"7\t640\t480\t36\t" + b"A" * 9000, ["is text"]),
        (b"\x1f\x8b\x08", ["is compressed by gzip", "unpack"]),
        (b"<!DOCTYPE html>", ["is a web page", "fetch it again"]),
        (b"version https://git-lfs.github.com/spec/v1", ["is a Git LFS pointer", "git lfs pull"]),
        (pickle.dumps([1.0]), ["is a pickle", "load it where it was made"]),
        (b"", ["is empty"]),
        (bytes(300), ["zero bytes"]),
        (b"0.5 0.25\n", ["is text"]),
        (b"\x01\x02\xff" * 30, ["is of an unknown kind"]),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", ["is not a whole .npy array"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, parts):
    (tmp_path / "f.npy").write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_features(str(tmp_path / "f.npy"))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    "content, ids",
    [
        ("a.jpg \n\tb.jpg\n", ["a.jpg", "b.jpg"]),
        ("a\r\nb\r\n\r\n", ["a", "b"]),
        ("a\nb\n \n\t\n", ["a", "b"]),
        ("\ufeffa\nb", ["a", "b"]),
    ],
    ids=str,
)
def test_ids_lose_white_space_at_their_ends_and_the_file_s(tmp_path, content, ids):
    assert read_ids(write(tmp_path / "test_ids.txt", content)) == ids


@pytest.mark.parametrize("content, line", [("a\n \nb\n", 2), ("", 1), ("\na\n", 1)], ids=str)
def test_a_blank_id_is_refused(tmp_path, content, line):
    with pytest.raises(InputError, match=rf"test_ids.txt, line {line} is blank"):
        read_ids(write(tmp_path / "test_ids.txt", content))


@pytest.mark.parametrize(
    "dtype, number, fits",
    [
        (np.float32, 1e20, False),
        (np.float32, 1e14, True),
        (np.float16, 65504, True),
        (np.float16, np.inf, False),
    ],
)
def test_features_whose_lengths_would_overflow_are_refused(tmp_path, dtype, number, fits):
    np.save(tmp_path / "f.npy", np.array([[1, 2], [-number, 1]], dtype))
    with (
        nullcontext()
        if fits
        else pytest.raises(InputError, match="infinity or a number beyond 1e.15 in row 1")
    ):
        open_features(str(tmp_path / "f.npy"))
