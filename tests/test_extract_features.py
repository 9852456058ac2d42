"""From photos to a data set or a gallery: every layout of captions, broken photos, bad input."""

import contextlib
import fcntl
import json
import os

import numpy as np
import pytest
import torch

import extract_features
from features import blocks
from features.encoders import build_encoder, encode_photo
from runtime.errors import InputError
from tests.helpers.made import run_script, tree
from tests.helpers.photos import SAMPLE, SMALL, build_once, draw_photo, extract, lines

ODD = os.fsdecode(b"odd \xff'\".png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder but for photos/0.png to photos/9.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """`sample` describes 500 pictures whenever it is built."""
    monkeypatch.setattr(extract_features, "build_encoder", build_once)


def write_table(path, rows, header="image,caption"):
    path.write_text(
        "".join(f"{line}\n" for line in (header, *rows)), encoding="utf-8", errors="surrogateescape"
    )


def names_in(out, split):
    """A split's photos, one a row."""
    ids, rows = lines(out / f"{split}_ids.txt"), len(np.load(out / f"{split}_ims.npy"))
    return ids if len(ids) == rows else list(dict.fromkeys(ids))


# Data sets --------------------------------------------------------------------------------------


def test_a_table_with_splits(folder):
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    write_table(
        folder / "c.csv",
        [f"{n}.png,caption {n} {c},{split}" for n, split in enumerate(splits) for c in range(5)],
        "image,caption,split",
    )
    extract("--captions", "c.csv", "--batch_size", "4")
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json"} | {
        f"{split}_{part}"
        for split in ("train", "dev", "test")
        for part in ("ims.npy", "caps.txt", "ids.txt")
    }
    encoder = build_encoder("shufflenet_v2_x0_5", "none")
    for split, numbers in {"train": range(6), "dev": (6, 7), "test": (8, 9)}.items():
        rows = np.load(folder / "out" / f"{split}_ims.npy")
        assert rows.dtype == np.float32
        assert np.allclose(
            rows,
            [encode_photo(encoder, f"photos/{n}.png").numpy() for n in numbers],
            rtol=1e-3,
            atol=1e-8,
        )
        assert len({row.tobytes() for row in rows}) == len(rows)
        assert lines(folder / "out" / f"{split}_caps.txt") == [
            f"caption {n} {c}" for n in numbers for c in range(5)
        ]
        assert lines(folder / "out" / f"{split}_ids.txt") == [f"{n}.png" for n in numbers]


def test_any_number_of_captions_has_an_id_for_each(folder):
    write_table(
        folder / "c.csv", ["3.png,one", "1.png,two", "3.png,three", "2.png,four", "3.png,five"]
    )
    extract("--captions", "c.csv", "--dev", "0", "--test", "0", encoder=SAMPLE)
    assert lines(folder / "out/train_caps.txt") == ["one", "three", "five", "two", "four"]
    assert lines(folder / "out/train_ids.txt") == ["3.png", "3.png", "3.png", "1.png", "2.png"]
    encoder = build_once("sample")
    assert np.array_equal(
        np.load(folder / "out/train_ims.npy"),
        [encode_photo(encoder, f"photos/{n}.png").numpy() for n in (3, 1, 2)],
    )


def test_another_extraction_leaves_nothing_of_the_one_before(folder):
    rows = [
        f"{n}.png,caption {n},{split}" for n, split in enumerate(["train", "train", "dev", "test"])
    ]
    write_table(folder / "c.csv", rows, "image,caption,split")
    extract("--captions", "c.csv", encoder=SAMPLE)
    (folder / "out/notes.txt").write_text("mine")
    write_table(
        folder / "c.csv", [row.replace("test", "train") for row in rows], "image,caption,split"
    )
    extract("--captions", "c.csv", encoder=SAMPLE)
    assert names_in(folder / "out", "train") == ["0.png", "1.png", "3.png"]
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json", "notes.txt"} | {
        f"{split}_{part}"
        for split in ("train", "dev")
        for part in ("ims.npy", "caps.txt", "ids.txt")
    }


def test_karpathys_splits(folder):
    images = [
        {"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"caption {n}"}]}
        for n, split in enumerate(["test", "val", "restval", "train"])
    ]
    (folder / "c.json").write_text(json.dumps({"images": images}))
    extract("--captions", "c.json", encoder=SAMPLE)
    assert {split: names_in(folder / "out", split) for split in ("train", "dev", "test")} == {
        "train": ["2.png", "3.png"],
        "dev": ["1.png"],
        "test": ["0.png"],
    }


def test_restval_becomes_part_of_train_and_is_counted(folder, capsys):
    rows = [f"{n}.png,x,{split}" for n, split in enumerate(["train", "restval", " RestVal", "val"])]
    write_table(folder / "c.csv", rows, "image,caption,split")
    extract("--captions", "c.csv", encoder=SAMPLE, output="out_precomp")
    assert names_in(folder / "out_precomp", "train") == ["0.png", "1.png", "2.png"]
    assert capsys.readouterr().err.splitlines()[:2] == [
        "note: 2 photos of split restval become part of train",
        "note: 6 photos in photos are not named in c.csv and are left out, such as '4.png'",
    ]


def test_a_name_that_the_ids_would_lose_is_refused(folder):
    draw_photo(folder / "photos/ 1.png")
    with pytest.raises(InputError, match="photo ' 1.png' has white space at an end of its name"):
        extract(encoder=SAMPLE)


def test_names_as_people_write_them_lead_to_the_photos(folder, capsys):
    (folder / "photos/sub").mkdir()
    draw_photo(folder / "photos/sub/3.png", 3)
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": f"caption {name}"}], **more}
        for name, more in [
            (str(folder / "photos/0.png"), {}),
            ("photos/1.png", {}),
            ("2.png", {"filepath": "val2014"}),
            ("3.png", {"filepath": "sub"}),
            ("0.png", {}),
        ]
    ]
    (folder / "c.json").write_text(json.dumps({"images": images}))
    extract("--captions", "c.json", encoder=SAMPLE)
    assert names_in(folder / "out", "test") == ["0.png", "1.png", "2.png", "sub/3.png"]
    encoder = build_once("sample")
    assert np.array_equal(
        np.load(folder / "out/test_ims.npy"),
        [encode_photo(encoder, f"photos/{name}.png").numpy() for name in ("0", "1", "2", "sub/3")],
    )
    assert "only if its name ends in precomp: rename out before" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--captions", "photos"], ["--captions", "texts"]])
def test_text_files_beside_the_photos_or_in_a_folder(folder, flags, capsys):
    for place in ("photos", "texts"):
        (folder / place).mkdir(exist_ok=True)
        for number in range(4):
            (folder / place / f"{number}.txt").write_text(f"caption {number}\n" * 2)
    extract(*flags, encoder=SAMPLE)
    assert {split: len(names_in(folder / "out", split)) for split in ("train", "dev", "test")} == {
        "train": 2,
        "dev": 1,
        "test": 1,
    }
    assert "note: 6 photos have no caption" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--captions", "none"]])
def test_without_captions_all_photos_are_a_gallery(folder, flags, capsys):
    if flags:
        (folder / "photos/1.txt").write_text("A caption.\n")
    draw_photo(folder / "photos/sub" / ODD)
    extract(*flags, encoder=SAMPLE)
    assert {path.name for path in (folder / "out").iterdir()} == {
        "features.json",
        "gallery_ims.npy",
        "gallery_ids.txt",
    }
    assert lines(folder / "out/gallery_ids.txt") == [*(f"{n}.png" for n in range(10)), f"sub/{ODD}"]
    assert len(np.load(folder / "out/gallery_ims.npy")) == 11
    assert "11 photos are smaller than the 96 pixels" in capsys.readouterr().out


def test_splits_are_drawn_by_the_seed_out_of_the_whole_photos(folder):
    write_table(folder / "c.csv", [f"{n}.png,x" for n in range(10)])
    (folder / "photos/4.png").write_bytes(b"no photo")
    drawn = {}
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        extract(
            "--captions",
            "c.csv",
            "--dev",
            "2",
            "--test",
            "3",
            "--seed",
            seed,
            output=output,
            encoder=SAMPLE,
        )
        drawn[output] = {
            split: names_in(folder / output, split) for split in ("train", "dev", "test")
        }
    assert [len(names) for names in drawn["a"].values()] == [4, 2, 3]
    assert sorted(sum(drawn["a"].values(), [])) == [f"{n}.png" for n in range(10) if n != 4]
    assert drawn["a"] == drawn["b"] != drawn["c"]


# What goes wrong --------------------------------------------------------------------------------


def test_broken_photos_are_left_out_and_listed(folder, capsys):
    (folder / "photos/2.png").write_bytes((folder / "photos/2.png").read_bytes()[:500])
    (folder / "photos/3.png").write_bytes(b"no photo")
    draw_photo(folder / "photos/5.png", size=(1, 300))
    draw_photo(folder / "photos/line\nbreak.png")
    (folder / "photos" / ODD).write_bytes(b"")
    names = [
        *(f"{n}.png" for n in range(7)),
        '"line\nbreak.png"',
        "missing.png",
        ODD.replace('"', '""'),
    ]
    names[-1] = f'"{names[-1]}"'
    write_table(folder / "c.csv", [f"{name},caption" for name in names])
    extract("--captions", "c.csv", "--dev", "0", "--test", "0", encoder=SAMPLE)
    assert names_in(folder / "out", "train") == ["0.png", "1.png", "4.png", "6.png"]
    broken = dict(line.split("\t") for line in lines(folder / "out/broken.txt"))
    assert list(broken) == ["2.png", "3.png", "5.png", "line\\nbreak.png", "missing.png", ODD]
    assert broken["missing.png"] == "No such file or directory"
    assert broken["line\\nbreak.png"] == "its name has a line break"
    assert "too thin" in broken["5.png"]
    assert "6 of 10 photos could not be read" in capsys.readouterr().out


def test_broken_txt_goes_when_nothing_is_broken_any_more(folder):
    good = (folder / "photos/2.png").read_bytes()
    (folder / "photos/2.png").write_bytes(b"no photo")
    extract(encoder=SAMPLE)
    assert [line.split("\t")[0] for line in lines(folder / "out/broken.txt")] == ["2.png"]
    (folder / "photos/2.png").write_bytes(good)
    extract(encoder=SAMPLE)
    assert not (folder / "out/broken.txt").exists()
    assert len(np.load(folder / "out/gallery_ims.npy")) == 10


@pytest.mark.parametrize(
    "captions, flags, reason",
    [
        ("image,caption\n../x.png,x\n", [], "which lies outside photos"),
        ("image,caption\n/x.png,x\n", [], "which lies outside photos"),
        ("image,caption\n", [], "c.csv has no caption of a photo"),
        ("image,caption\n1.png,x\n2.png,x\n", ["--dev", "2"], "leave none of 2 photos to train on"),
        (
            "image,caption,split\n1.png,x,train\n",
            ["--test", "1"],
            "c.csv gives them: leave them out",
        ),
        ("image,caption\n11.png,x\n", [], "none of 1 photos can be read, such as 11.png"),
        ("image,caption\n1.png,x\n", ["--encoder", "resnet1"], "--encoder resnet1 is not known"),
        ("image,caption\n1.png,x\n", ["--images", "nowhere"], "photo folder nowhere is not there"),
        ("image,caption\n1.png,x\n", ["--device", "abacus"], "--device abacus"),
        ("image,caption\n1.png,x\n", ["--batch_size", "257"], "at most 256"),
        ("image,caption\n1.png,x\n", ["--output", "c.csv/out"], "cannot be written"),
        (None, ["--captions", "none", "--dev", "1"], "a gallery has none"),
        (None, ["--captions", "photos"], "photos has no caption of a photo"),
        (None, ["--captions", "none", "--images", "empty"], "no photo in --images"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, captions, flags, reason):
    (folder / "empty").mkdir()
    if captions is not None:
        (folder / "c.csv").write_text(captions)
        flags = ["--captions", "c.csv", *flags]
    before = tree(folder)
    with pytest.raises(InputError, match=reason):
        extract(*flags, encoder=SAMPLE)
    assert tree(folder) == before


@pytest.mark.parametrize("number, said", [(0, "holds nothing but zeros"), (2, "10 equal to row 0")])
def test_an_encoder_that_gives_every_photo_the_same_is_seen(
    folder, monkeypatch, capsys, number, said
):
    monkeypatch.setattr(
        blocks,
        "encode",
        lambda encoder, pictures, amp: torch.full(
            (len(pictures), *encoder.row_shape), float(number)
        ),
    )
    with (
        contextlib.nullcontext()
        if number
        else pytest.raises(InputError, match=f"out/gallery_ims.npy {said}")
    ):
        extract(encoder=SAMPLE)
    assert (folder / "out").exists() == bool(number)
    assert (
        not number
        or f"out/gallery_ims.npy has 10 rows, of which 10 of one number throughout and {said}"
        in (capsys.readouterr().err)
    )


def test_float16_rounds_what_float32_has(folder):
    extract(encoder=SAMPLE)
    extract("--dtype", "float16", output="half", encoder=SAMPLE)
    half = np.load(folder / "half/gallery_ims.npy")
    assert half.dtype == np.float16
    assert np.array_equal(half, np.load(folder / "out/gallery_ims.npy").astype(np.float16))
    assert json.loads((folder / "half/features.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    "name", ["train_ims.npy", "mine_ims.npy", "testall_caps.txt", "gallery_ids.txt", "broken.txt"]
)
def test_somebody_elses_files_are_not_written_over(folder, name):
    (folder / "out").mkdir()
    if name.endswith("_ims.npy"):
        np.save(folder / "out" / name, np.ones((2, 3)))
    else:
        (folder / "out" / name).write_text("somebody's\n")
    before = tree(folder)
    with pytest.raises(
        InputError, match=f"--output out holds {name}, which is not from this script"
    ):
        extract(encoder=SAMPLE)
    assert tree(folder) == before


def test_another_encoders_features_are_not_written_over(folder):
    extract(encoder=SAMPLE)
    before = tree(folder)
    with pytest.raises(
        InputError, match="--output out has features by sample .* but this run has them by shuffle"
    ):
        extract(encoder=SMALL)
    assert tree(folder) == before


def test_two_runs_do_not_write_to_one_folder(folder):
    (folder / "out/.blocks").mkdir(parents=True)
    with open(folder / "out/.blocks/.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="--output out/.blocks: another run is writing there"):
            extract(encoder=SAMPLE)
        assert (folder / "out/.blocks/.lock").exists()  # it is the other's still
    extract(encoder=SAMPLE)
    assert not (folder / "out/.blocks").exists()


# Killed runs, several processes -----------------------------------------------------------------


def test_the_script_decodes_in_processes(folder):
    (folder / "photos/3.png").write_bytes(b"no photo")
    flags = ["--images", "photos", *SMALL[:-2], "--workers", "2", "--batch_size", "2"]
    run = run_script("extract_features.py", *flags, "--output", "out", cwd=folder)
    assert (run.returncode, run.stdout.splitlines()[0]) == (
        0,
        ("out: 9 gallery photos with 0 captions, features of width 1024"),
    )
    extract("--batch_size", "2", output="here")
    assert tree(folder / "out") == tree(folder / "here")
