"""Galleries in parts: what is joined is what one build makes, and every row belongs to its item."""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation import load_for_evaluation
from gallery import build as build_gallery
from gallery import store
from runtime.errors import InputError
from tests.helpers.galleries import MODEL, PHOTOS, QUESTION, TEST, ask, files_of, results
from tests.helpers.killed import kill_at_random, kill_commands
from tests.helpers.made import ROOT, write_image

NNN = ["--captions", "captions.csv", "--correction", "nnn"]


def build(output, *flags, part=None):
    """Build a gallery, or a part of one, of the current folder's photos."""
    photos = [output if flag == "g" else flag for flag in PHOTOS]
    ask(*photos, *flags, *(["--part", part] if part else []))


def build_parts(n, *flags):
    """Build n parts, g1 to gn; returns their folders."""
    for number in range(1, n + 1):
        build(f"g{number}", *flags, part=f"{number}/{n}")
    return [f"g{number}" for number in range(1, n + 1)]


def merge(*folders, output="m", flags=()):
    ask("--index", output, "--merge", *folders, "--device", "cpu", *flags)


def same(one, other):
    """Whether two galleries have the same arrays, texts and broken.txt, and say the same."""
    said = [
        {key: store.describe(folder)[key] for key in store.describe(folder) if key != "files"}
        for folder in (one, other)
    ]
    for content in said:
        content["checksums"].pop("gallery.json")  # it counts the arrays' folder in
    broken = [
        path.read_bytes() if path.exists() else None
        for path in (Path(folder, "broken.txt") for folder in (one, other))
    ]
    return files_of(one) == files_of(other) and said[0] == said[1] and broken[0] == broken[1]


# The same as one build --------------------------------------------------------------------------


def spoil(rng):
    """Break some photos, and add links; a photo's captions stay uneven."""
    for name in rng.sample(sorted(os.listdir("photos/deep")), rng.randint(0, 3)):
        Path("photos/deep", name).write_bytes(b"no photo")
    write_image(Path("outside.png"), 20)
    os.symlink(os.path.abspath("outside.png"), "photos/a.png")
    rows = Path("captions.csv").read_text().splitlines()
    kept = [row for row in rows[1:] if rng.random() < 0.6]
    Path("captions.csv").write_text("\n".join([rows[0], *kept]) + "\n")


def check_rows(folder):
    """Compare every row with that of each photo alone: its own must be the nearest, and near."""
    found = store.Gallery(folder)
    loaded = load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))
    loaded.model.val_start()
    encoder, _ = build_gallery.photo_encoder(loaded)
    alone = [build_gallery.encoders.encode_photo(encoder, f"photos/{item}") for item in found.items]
    for number, row in enumerate(found.embeddings[:, :-1]):
        distances = [float((row - one).norm()) for one in alone]
        assert min(distances) == distances[number] < 1e-5, found.items[number]
        assert sorted(distances)[1] > 1e-5  # the photos' rows differ by more than rounding


@pytest.mark.parametrize("seed", range(4))
def test_parts_in_any_order_make_what_one_build_makes(photos, monkeypatch, seed):
    rng = random.Random(seed)
    spoil(rng)
    size = rng.randint(2, 4)
    monkeypatch.setattr("features.blocks.BLOCK_PHOTOS", size)
    flags = NNN if seed % 2 else ["--correction", "nnn"]
    build("whole", *flags)
    folders = build_parts(rng.randint(2, 12 // size), *flags)
    rng.shuffle(folders)
    merge(*folders)
    assert same("m", "whole")
    check_rows("m")


def test_a_part_is_a_gallery_that_answers(photos, capsys):
    build("g2", *NNN, QUESTION, "--json", "--top", "12", part="2/3")
    items = [answer["item"] for answer in results(capsys)[-1]["results"]]
    names = sorted(f"deep/{number}.png" for number in range(12))
    assert sorted(items) == names[4:8]
    build("g2", *NNN, QUESTION, part="2/3")
    assert "the gallery g2 is there, and is asked as it is" in capsys.readouterr().err


def test_a_part_may_be_broken_altogether(photos, capsys):
    for name in sorted(os.listdir("photos/deep"))[4:8]:
        Path("photos/deep", name).write_bytes(b"no photo")
    build("whole", *NNN)
    build("g1", *NNN, part="1/3")
    with pytest.raises(InputError, match="none of the 4 photos in photos can be read"):
        build("g2", *NNN, part="2/3")
    build("g3", *NNN, part="3/3")
    assert not store.is_whole("g2") and json.loads(Path("g2/part.json").read_text())["of"] == 3
    merge("g1", "g2", "g3")
    assert same("m", "whole")
    for path in Path("photos/deep").iterdir():
        path.write_bytes(b"no photo")
    with pytest.raises(InputError, match="none of the 12 photos"):
        build("all", part="1/1")
    with pytest.raises(InputError, match="no photo of any part could be read"):
        merge("all", output="n")


def test_merged_galleries_are_asked_changed_and_not_made_again(photos, capsys):
    folders = build_parts(2, *NNN)
    merge(*folders, flags=[QUESTION])
    before = store.describe("m")
    capsys.readouterr()
    merge(*folders, flags=[QUESTION])
    assert "the gallery m is there, and is asked as it is" in capsys.readouterr().err
    assert store.describe("m") == before
    write_image(Path("photos/more/1.png"), 20)
    ask("--index", "m", "--workers", "0", "--add", "photos", "--device", "cpu")
    assert "13 photos, before 12; 1 were encoded" in capsys.readouterr().err
    with pytest.raises(InputError, match="the gallery m is not that of the parts"):
        merge(*folders)
    with pytest.raises(InputError, match="the gallery g1 is part 1 of 2: name another --index"):
        merge(*folders, output="g1")


def test_where_the_photos_are_on_the_merging_machine(photos, capsys):
    os.makedirs("first/deeper")
    build("first/deeper/g1", part="1/2")
    build("g2", part="2/2")
    shutil.move("first/deeper/g1", "g1")
    model = ["--model_path", MODEL]
    with pytest.raises(InputError, match="the parts' checkpoint is not here .*--model_path"):
        merge("g1", "g2")
    merge("g1", "g2", flags=model)
    assert "there are no photos in" in capsys.readouterr().err
    merge("g1", "g2", output="n", flags=[*model, "--images", "photos"])
    found = store.Gallery("n")
    assert [found.photo(number) for number in range(12)] == [
        os.path.realpath(f"photos/{item}") for item in found.items
    ]
    build("whole")
    assert same("n", "whole")


# Refusals ---------------------------------------------------------------------------------------


def other_model():
    content = torch.load(MODEL, weights_only=False)
    content["epoch"] = 99
    os.makedirs("runs/other")
    torch.save(content, "runs/other/model_best.pth.tar")
    return ["--model_path", "runs/other/model_best.pth.tar", "--correction", "nnn"]


def other_captions():
    path = Path("captions.csv")
    path.write_text(path.read_text().replace("a", "e", 30))
    return NNN


def other_bank():
    path = Path("data/mine_precomp/train_caps.txt")
    path.write_text(path.read_text().replace("dog", "cat").replace("red", "green"))
    return ["--correction", "nnn"]


@pytest.mark.parametrize(
    "flags, part, words",
    [
        (["--correction", "nnn"], "3/3", "g1 is part 1 of 2, but g2 is part 3 of 3: merge parts"),
        (["--correction", "csls"], "2/2", "g1 and g2 correct hubs differently .method nnn"),
        (["--correction", "nnn", "--correction_k", "3"], "2/2", "correct hubs differently"),
        (["--correction", "none"], "2/2", "g1 and g2 correct hubs differently"),
        (other_bank, "2/2", "g1 and g2 correct hubs by banks of different captions"),
        (other_model, "2/2", "g1 and g2 are of different models: build all parts with one"),
        (NNN, "2/2", "g1 .part 1 of 2, of 12 photos. and g2 .* are not of the same photos"),
    ],
)
def test_a_foreign_part_is_named(photos, flags, part, words):
    build("g1", "--correction", "nnn", part="1/2")
    build("g2", *(flags() if callable(flags) else flags), part=part)
    with pytest.raises(InputError, match=words):
        merge("g1", "g2")
    assert not Path("m").exists()


@pytest.mark.parametrize("change", [other_model, other_bank])
def test_another_model_or_bank_on_the_merging_machine_is_refused(photos, change):
    folders = build_parts(2, "--correction", "nnn")
    flags = change()[:-2]
    words = "is of another model than runs/other" if flags else "bank .split train. are not in"
    with pytest.raises(InputError, match=words):
        merge(*folders, flags=flags)
    assert not Path("m").exists()


@pytest.mark.parametrize(
    "folders, words",
    [
        (["g1", "g3"], "part 2 of 3 is missing"),
        (["g1", "g2", "copy", "g3"], "part 2 of 3 is there twice, g2 and copy"),
        (["g1", "photos", "g3"], "--merge photos is no part"),
    ],
)
def test_missing_and_doubled_parts_are_named(photos, folders, words):
    build_parts(3)
    shutil.copytree("g2", "copy")
    with pytest.raises(InputError, match=words):
        merge(*folders)
    assert not Path("m").exists()


@pytest.mark.parametrize("name", ["embeddings.npy", "items.bin", "facts.npy", "gallery.json"])
def test_damage_is_named(photos, name):
    folders = build_parts(2)
    path = Path("g2", "" if name == "gallery.json" else store.describe("g2")["files"], name)
    content = bytearray(path.read_bytes())
    content[content.index(b'"number": 2') + 10 if name == "gallery.json" else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not as it was written"):
        merge(*folders)
    assert not Path("m").exists()


@pytest.mark.parametrize("change", [["--rebuild_index"], ["--prune"]])
def test_a_part_that_was_changed_is_one_no_more(photos, change):
    folders = build_parts(2)
    os.unlink("photos/deep/9.png")
    ask("--index", "g2", *change, "--workers", "0", "--device", "cpu")
    with pytest.raises(InputError, match="--merge g2 is a gallery, but not a part, or was changed"):
        merge(*folders)


def test_a_gallery_is_one_part_or_the_whole(photos):
    build("g1", part="1/2")
    build("whole")
    for output, part, words in (
        ("g1", "2/2", "the gallery g1 is part 1 of 2, not part 2 of 2"),
        ("whole", "1/2", "the gallery whole is not a part, not part 1 of 2"),
    ):
        with pytest.raises(InputError, match=words):
            build(output, part=part)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([*PHOTOS, "--part", "4/4"], "only 3 blocks of photos.*make 3 parts at most"),
        ([*TEST, "--part", "1/2"], "--part does nothing without --images"),
        ([*TEST, "--images", "photos", "--part", "1/2"], "--part does nothing with --precomp"),
        ([*PHOTOS, "--part", "1/2", "--prune"], "--prune does nothing with --part"),
        (["--index", "g", "--merge", "g1", "--correction", "nnn"], "--correction does nothing"),
        (["--merge", "g1"], "--merge needs --index"),
    ],
)
def test_flags_that_do_not_go_together(photos, flags, words):
    with pytest.raises(InputError, match=words):
        ask(*flags)
    assert not Path("g").exists()


# Kills and full disks ---------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_no_gallery(photos, small_disk):
    folders, disk = build_parts(2), small_disk(1)
    with pytest.raises(InputError, match="No space left on device"):
        merge(*folders, output=str(disk / "m"))
    assert not store.is_whole(str(disk / "m"))
    assert not list(disk.glob("m/gallery*"))


def test_killed_parts_and_merges_end_in_the_same_bytes(photos):
    build("whole", *NNN)
    build_parts(2, *NNN)
    wanted = files_of("g2")
    kill_at_random(lambda: build("g2", *NNN, part="2/2"), "g2", 2)
    assert files_of("g2") == wanted
    kill_at_random(lambda: merge("g1", "g2"), "m", 2)
    assert same("m", "whole")


def command(*flags):
    """A process of search.py in the current folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "search.py", *flags, "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.soak
@pytest.mark.parametrize("what", ["part", "merge"])
def test_ten_kills_of_the_commands_end_in_the_same_bytes(photos, monkeypatch, what):
    monkeypatch.setattr("features.blocks.BLOCK_PHOTOS", 256)  # as in the commands
    for number in range(600):
        write_image(Path(f"photos/more/{number}.png"), number % 40 + 1)
    build("whole", *NNN)
    build_parts(2, *NNN)
    flags = ["--images", "photos", *NNN, "--workers", "0", "--batch_size", "3", "--part", "2/2"]
    flags = [*(["--merge", "g1", "g2"] if what == "merge" else flags), "--index", "out"]
    wanted = files_of("whole" if what == "merge" else "g2")
    print(f"\n{what}: {kill_commands(lambda: command(*flags), 'out')}")
    assert files_of("out") == wanted
