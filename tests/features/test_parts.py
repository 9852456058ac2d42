"""Features in parts: what is joined is what one run writes, and every row belongs to its id."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import extract_features
from features import blocks
from features.encoders import encode_photo
from runtime.errors import InputError
from tests.helpers.killed import kill_at_random, kill_commands
from tests.helpers.made import ROOT, tree
from tests.helpers.photos import SAMPLE, SMALL, build_once, draw_photo, extract, lines


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """`sample` describes 500 pictures whenever it is built."""
    monkeypatch.setattr(extract_features, "build_encoder", build_once)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder but for photos/0.png to photos/5.png, in blocks of two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_PHOTOS", 2)
    for number in range(6):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path


def extract_parts(n, *flags, encoder=SAMPLE):
    """Extract n parts, p1 to pn; returns their folders."""
    for number in range(1, n + 1):
        extract(*flags, "--part", f"{number}/{n}", output=f"p{number}", encoder=encoder)
    return [f"p{number}" for number in range(1, n + 1)]


def merge(*folders, output="m"):
    extract_features.main(["--merge", *folders, "--output", output])


# The same as one run ----------------------------------------------------------------------------


def draw_photos(rng):
    """Draw photos with odd names, some of them broken; returns {name: captions}."""
    names = {
        f"{rng.choice(['', 'B/', 'a/', 'a b/'])}{rng.choice(['x', 'Z', 'ü'])}{number}.png"
        for number in range(rng.randint(4, 20))
    }
    even = rng.random() < 0.5
    captions = {}
    for number, name in enumerate(sorted(names)):
        draw_photo(Path("photos") / name, number)
        n = 5 if even else rng.randint(1, 7)
        captions[name] = [f"caption {number}, {c}" for c in range(n)]
    for name in rng.sample(sorted(names), rng.randint(0, len(names) // 3)):
        (Path("photos") / name).write_bytes(b"no photo")
    return captions


def write_captions(rng, captions, splits):
    """Write c.csv, its photos in random order."""
    rows = ["image,caption,split" if splits else "image,caption"]
    for name in rng.sample(sorted(captions), len(captions)):
        split = f",{rng.choice(['train', 'val', 'test', 'restval'])}" if splits else ""
        rows += [f'{name},"{caption}"{split}' for caption in captions[name]]
    Path("c.csv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def check_rows(captions):
    """Compare every row of the data set m, and the captions of its id, with that photo's own."""
    encoder, seen = build_once("sample"), []
    for path in Path("m").glob("*_ims.npy"):
        split, rows = path.name.removesuffix("_ims.npy"), np.load(path)
        names = lines(Path(f"m/{split}_ids.txt"))
        texts = lines(Path(f"m/{split}_caps.txt")) if split != "gallery" else []
        firsts = list(dict.fromkeys(names))
        expected = [text for name in firsts for text in captions[name]]
        assert texts == (expected if split != "gallery" else [])
        if len(names) > len(firsts):  # an id for each caption
            assert names == [name for name in firsts for _ in captions[name]]
        assert len(rows) == len(firsts)
        for name, row in zip(firsts, rows):
            assert np.array_equal(row, encode_photo(encoder, f"photos/{name}").numpy()), name
        seen += firsts
    broken = [name for name in captions if Path("photos", name).read_bytes() == b"no photo"]
    assert sorted(seen) == sorted(captions.keys() - broken)
    if broken:
        assert {line.split("\t")[0] for line in lines(Path("m/broken.txt"))} == {*broken}


@pytest.mark.parametrize("seed", range(9))
def test_parts_in_any_order_make_what_one_run_makes(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    captions = draw_photos(rng)
    size, kind = rng.randint(1, 4), seed % 3
    monkeypatch.setattr(blocks, "BLOCK_PHOTOS", size)
    flags = ["--batch_size", "1"]
    if kind:
        write_captions(rng, captions, splits=kind == 1)
        flags += ["--captions", "c.csv", *(["--seed", str(seed)] if kind == 2 else [])]
    extract(*flags, output="whole", encoder=SAMPLE)
    folders = extract_parts(rng.randint(1, -(-len(captions) // size)), *flags)
    rng.shuffle(folders)
    merge(*folders)
    assert tree("m") == tree("whole")
    check_rows(captions)


def test_a_network_s_rows_are_the_same_to_the_bit(folder):
    flags = ["--batch_size", "2", "--dtype", "float16"]
    extract(*flags, output="whole", encoder=SMALL)
    merge(*reversed(extract_parts(3, *flags, encoder=SMALL)))
    assert tree("m") == tree("whole")


def test_drawn_splits_are_drawn_from_all_readable_photos(folder):
    Path("photos/0.png").write_bytes(b"no photo")
    rows = [f"{number}.png,caption {number}" for number in range(6)]
    Path("c.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    flags = ["--captions", "c.csv", "--dev", "2", "--test", "1", "--seed", "3"]
    extract(*flags, output="whole", encoder=SAMPLE)
    folders = extract_parts(3, *flags)
    assert [sorted(path.name for path in Path(one).glob("*_ims.npy")) for one in folders] == [
        ["train_ims.npy"]
    ] * 3
    merge(*folders)
    assert tree("m") == tree("whole") and len(np.load("m/dev_ims.npy")) == 2


def test_a_part_may_be_broken_altogether(folder, capsys):
    for number in (2, 3):
        Path(f"photos/{number}.png").write_bytes(b"no photo")
    extract(output="whole", encoder=SAMPLE)
    folders = extract_parts(3)
    assert "p2: part 2 of 3, no photos" in capsys.readouterr().out
    assert {path.name for path in Path("p2").iterdir()} == {
        "broken.txt",
        "features.json",
        "part.json",
    }
    merge(*folders)
    assert tree("m") == tree("whole")
    assert "2 of 6 photos could not be read: m/broken.txt" in capsys.readouterr().out


def test_without_a_readable_photo_nothing_is_merged(folder):
    for path in Path("photos").iterdir():
        path.write_bytes(b"no photo")
    folders = extract_parts(2)
    with pytest.raises(InputError, match="none of 6 photos can be read"):
        merge(*folders)
    assert not Path("m").exists()


# Refusals ---------------------------------------------------------------------------------------


def other_captions(folder):
    Path("c.csv").write_text("image,caption\n" + "".join(f"{n}.png,other\n" for n in range(6)))
    return ["--captions", "c.csv"]


def other_size(folder):
    draw_photo(folder / "photos/0.png", 0, (50, 30))
    return []


@pytest.mark.parametrize(
    "flags, n, words",
    [
        ([], 2, "p1 is part 1 of 3, but p3 is part 2 of 2: merge parts of one division"),
        (other_captions, 3, "p1 .part 1 of 3, of 6 photos. and p3 .part 3 of 3, of 6. are not of"),
        (other_size, 3, "are not of the same photos: make them again"),
        (["--normalise"], 3, "p3 has features by sample .*length one.*but p1 has them"),
        (["--dtype", "float16"], 3, "p1 was made with --dtype float32, but p3 with float16"),
    ],
)
def test_a_foreign_part_is_named(folder, flags, n, words):
    extract_parts(3)
    shutil.rmtree("p3")
    flags = flags(folder) if callable(flags) else flags
    extract(*flags, "--part", f"{n}/{n}", output="p3", encoder=SAMPLE)
    with pytest.raises(InputError, match=words):
        merge("p1", "p2", "p3")
    assert not Path("m").exists()


def test_another_draw_is_refused(folder):
    flags = other_captions(folder)
    extract(*flags, "--part", "1/2", "--seed", "1", output="p1", encoder=SAMPLE)
    extract(*flags, "--part", "2/2", "--seed", "2", output="p2", encoder=SAMPLE)
    with pytest.raises(InputError, match="p1 was made with --seed 1, but p2 with 2"):
        merge("p1", "p2")


@pytest.mark.parametrize(
    "folders, words",
    [
        (["p1", "p3"], "part 2 of 3 is missing"),
        (["p3"], "parts 1 and 2 of 3 are missing"),
        (["p1", "p2", "copy", "p3"], "part 2 of 3 is there twice, p2 and copy"),
        (["p1", "photos", "p3"], "--merge photos is no part"),
        (["p1", "nowhere", "p3"], "--merge nowhere is no part"),
    ],
)
def test_missing_and_doubled_parts_are_named(folder, folders, words):
    extract_parts(3)
    shutil.copytree("p2", "copy")
    with pytest.raises(InputError, match=words):
        merge(*folders)
    assert not Path("m").exists()


def flip(path, place):
    """Change one byte of a file."""
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)


@pytest.mark.parametrize(
    "name, harm",
    [
        ("gallery_ims.npy", lambda path: flip(path, -1)),
        ("gallery_ims.npy", lambda path: os.truncate(path, 200)),
        ("gallery_ids.txt", lambda path: flip(path, 0)),
        ("features.json", os.unlink),
        ("part.json", lambda path: flip(path, path.read_bytes().index(b'"photos": 6') + 10)),
    ],
)
def test_damage_is_named(folder, name, harm):
    extract_parts(3)
    harm(Path("p2") / name)
    with pytest.raises(InputError, match=f"p2/{name} is not as it was written"):
        merge("p1", "p2", "p3")
    assert not Path("m").exists()


def test_a_folder_holds_one_part_or_the_whole(folder):
    extract_parts(3)
    before = tree("p1")
    with pytest.raises(InputError, match="--output p1 holds part 1 of 3: name another one for the"):
        merge("p1", "p2", "p3", output="p1")
    with pytest.raises(InputError, match="p1 holds part 1 of 3: name another one for part 2 of 3"):
        extract("--part", "2/3", output="p1", encoder=SAMPLE)
    extract("--part", "1/3", output="p1", encoder=SAMPLE)
    assert tree("p1") == before
    extract(output="whole", encoder=SAMPLE)
    with pytest.raises(InputError, match="whole holds a whole data set"):
        extract("--part", "2/3", output="whole", encoder=SAMPLE)
    extract(output="p1", encoder=SAMPLE)
    assert tree("p1") == tree("whole")  # without part.json


def test_blocks_of_a_stopped_extraction_are_not_lost_to_a_merge(folder):
    extract_parts(2)
    Path("m/.blocks").mkdir(parents=True)
    Path("m/.blocks/1.npz").write_bytes(b"hours of work")
    with pytest.raises(InputError, match="--output m holds an extraction that was stopped"):
        merge("p1", "p2")
    assert Path("m/.blocks/1.npz").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--images", "photos", *SAMPLE, "--part", "4/4"],
            "only 3 blocks of photos.*make 3 parts at most",
        ),
        (["--texts", "x", "--text_encoder", "y", "--part", "1/2"], "--part divides the photos of"),
        (["--from", "x", "--part", "1/2"], "--part divides the photos of --images"),
        (["--merge", "p1", "--part", "1/2"], "--part divides the photos of --images"),
        (["--merge", "p1", "--captions", "c.csv"], "--captions is for photos, and --merge has"),
        (["--merge", "p1", "--normalise"], "--normalise is for photos, and --merge has"),
    ],
)
def test_flags_that_do_not_go_together(folder, flags, words):
    with pytest.raises(InputError, match=words):
        extract_features.main([*flags, "--output", "m"])
    assert not Path("m").exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "1/2/3", "1.0/2"])
def test_what_is_no_part_is_refused(folder, text):
    with pytest.raises(InputError, match="the third of four parts is 3/4"):
        extract(f"--part={text}")


# Kills and full disks ---------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_nothing(folder, small_disk):
    folders, disk = extract_parts(3), small_disk(8)
    with pytest.raises(InputError, match="could not be written .No space left on device"):
        merge(*folders, output=str(disk / "m"))
    assert list(disk.iterdir()) == []
    merge(*folders)
    extract(output="whole", encoder=SAMPLE)
    assert tree("m") == tree("whole")


def test_killed_parts_and_merges_end_in_the_same_bytes(folder):
    extract(output="whole", encoder=SAMPLE)
    extract_parts(3)
    wanted = tree("p2")
    kill_at_random(lambda: extract("--part", "2/3", output="p2", encoder=SAMPLE), "p2", 2)
    assert tree("p2") == wanted
    kill_at_random(lambda: merge("p1", "p2", "p3"), "m", 2)
    assert tree("m") == tree("whole")


def command(*flags):
    """A process of extract_features.py in the current folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "extract_features.py", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.soak
@pytest.mark.parametrize("what", ["part", "merge"])
def test_ten_kills_of_the_commands_end_in_the_same_bytes(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    for number in range(1200):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    extract(output="whole", encoder=SAMPLE)
    extract_parts(2)
    wanted = tree("whole" if what == "merge" else "p2")
    flags = ["--images", "photos", *SAMPLE, "--part", "2/2"]
    flags = [*(["--merge", "p1", "p2"] if what == "merge" else flags), "--output", "out"]
    print(f"\n{what}: {kill_commands(lambda: command(*flags), 'out')}")
    assert tree("out") == wanted
