"""Photos in, a data set or a gallery out: every layout of captions, broken photos, killed runs, several processes."""

import contextlib
import fcntl
import functools
import json
import os

import numpy as np
import pytest
import torch
from conftest import run_script, tree
from PIL import Image

import distributed
import extract_features
import photo_blocks
from errors import InputError
from extract_features import main
from features import build_encoder, encode_photo

SMALL = ["--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none", "--device", "cpu", "--workers", "0"]
SAMPLE = ["--encoder", "sample", "--workers", "0"]
ODD = os.fsdecode(b"odd \xff'\".png")


def draw_photo(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder but for photos/0.png to photos/9.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path


@functools.cache
def build_once(*flags):
    return build_encoder(*flags)


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """`sample` describes 500 pictures whenever it is built."""
    monkeypatch.setattr(extract_features, "build_encoder", build_once)


def write_table(path, rows, header="image,caption"):
    path.write_text("".join(f"{line}\n" for line in (header, *rows)), encoding="utf-8", errors="surrogateescape")


def extract(*flags, output="out", encoder=SMALL):
    main(["--images", "photos", "--output", output, *encoder, *flags])


def lines(path):
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]


def names_in(out, split):
    """A split's photos, one a row."""
    ids, rows = lines(out / f"{split}_ids.txt"), len(np.load(out / f"{split}_ims.npy"))
    return ids if len(ids) == rows else list(dict.fromkeys(ids))


# Data sets --------------------------------------------------------------------------------------

def test_a_table_with_splits(folder):
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    write_table(folder / "c.csv", [f"{n}.png,caption {n} {c},{split}" for n, split in enumerate(splits)
                                   for c in range(5)], "image,caption,split")
    extract("--captions", "c.csv", "--batch_size", "4")
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json"} | {
        f"{split}_{part}" for split in ("train", "dev", "test") for part in ("ims.npy", "caps.txt", "ids.txt")}
    encoder = build_encoder("shufflenet_v2_x0_5", "none")
    for split, numbers in {"train": range(6), "dev": (6, 7), "test": (8, 9)}.items():
        rows = np.load(folder / "out" / f"{split}_ims.npy")
        assert rows.dtype == np.float32
        assert np.allclose(rows, [encode_photo(encoder, f"photos/{n}.png").numpy() for n in numbers], rtol=1e-3,
                           atol=1e-8)
        assert len({row.tobytes() for row in rows}) == len(rows)
        assert lines(folder / "out" / f"{split}_caps.txt") == [f"caption {n} {c}" for n in numbers for c in range(5)]
        assert lines(folder / "out" / f"{split}_ids.txt") == [f"{n}.png" for n in numbers]


def test_any_number_of_captions_has_an_id_for_each(folder):
    write_table(folder / "c.csv", ["3.png,one", "1.png,two", "3.png,three", "2.png,four", "3.png,five"])
    extract("--captions", "c.csv", "--dev", "0", "--test", "0", encoder=SAMPLE)
    assert lines(folder / "out/train_caps.txt") == ["one", "three", "five", "two", "four"]
    assert lines(folder / "out/train_ids.txt") == ["3.png", "3.png", "3.png", "1.png", "2.png"]
    encoder = build_once("sample")
    assert np.array_equal(np.load(folder / "out/train_ims.npy"),
                          [encode_photo(encoder, f"photos/{n}.png").numpy() for n in (3, 1, 2)])


def test_another_extraction_leaves_nothing_of_the_one_before(folder):
    rows = [f"{n}.png,caption {n},{split}" for n, split in enumerate(["train", "train", "dev", "test"])]
    write_table(folder / "c.csv", rows, "image,caption,split")
    extract("--captions", "c.csv", encoder=SAMPLE)
    (folder / "out/notes.txt").write_text("mine")
    write_table(folder / "c.csv", [row.replace("test", "train") for row in rows], "image,caption,split")
    extract("--captions", "c.csv", encoder=SAMPLE)
    assert names_in(folder / "out", "train") == ["0.png", "1.png", "3.png"]
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json", "notes.txt"} | {
        f"{split}_{part}" for split in ("train", "dev") for part in ("ims.npy", "caps.txt", "ids.txt")}


def test_karpathys_splits(folder):
    images = [{"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"caption {n}"}]}
              for n, split in enumerate(["test", "val", "restval", "train"])]
    (folder / "c.json").write_text(json.dumps({"images": images}))
    extract("--captions", "c.json", encoder=SAMPLE)
    assert {split: names_in(folder / "out", split) for split in ("train", "dev", "test")} == {
        "train": ["2.png", "3.png"], "dev": ["1.png"], "test": ["0.png"]}


@pytest.mark.parametrize("flags", [[], ["--captions", "photos"], ["--captions", "texts"]])
def test_text_files_beside_the_photos_or_in_a_folder(folder, flags, capsys):
    for place in ("photos", "texts"):
        (folder / place).mkdir(exist_ok=True)
        for number in range(4):
            (folder / place / f"{number}.txt").write_text(f"caption {number}\n" * 2)
    extract(*flags, encoder=SAMPLE)
    assert {split: len(names_in(folder / "out", split)) for split in ("train", "dev", "test")} == {
        "train": 2, "dev": 1, "test": 1}
    assert "note: 6 photos have no caption" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--captions", "none"]])
def test_without_captions_all_photos_are_a_gallery(folder, flags, capsys):
    if flags:
        (folder / "photos/1.txt").write_text("A caption.\n")
    draw_photo(folder / "photos/sub" / ODD)
    extract(*flags, encoder=SAMPLE)
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json", "gallery_ims.npy",
                                                                  "gallery_ids.txt"}
    assert lines(folder / "out/gallery_ids.txt") == [*(f"{n}.png" for n in range(10)), f"sub/{ODD}"]
    assert len(np.load(folder / "out/gallery_ims.npy")) == 11
    assert "11 photos are smaller than the 96 pixels" in capsys.readouterr().out


def test_splits_are_drawn_by_the_seed_out_of_the_whole_photos(folder):
    write_table(folder / "c.csv", [f"{n}.png,x" for n in range(10)])
    (folder / "photos/4.png").write_bytes(b"no photo")
    drawn = {}
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        extract("--captions", "c.csv", "--dev", "2", "--test", "3", "--seed", seed, output=output, encoder=SAMPLE)
        drawn[output] = {split: names_in(folder / output, split) for split in ("train", "dev", "test")}
    assert [len(names) for names in drawn["a"].values()] == [4, 2, 3]
    assert sorted(sum(drawn["a"].values(), [])) == [f"{n}.png" for n in range(10) if n != 4]
    assert drawn["a"] == drawn["b"] != drawn["c"]


@pytest.mark.parametrize("n, flags, expected", [
    (2, {}, (2, 0, 0)), (3, {}, (1, 1, 1)), (40, {}, (32, 4, 4)), (20_000, {}, (18_000, 1000, 1000)),
    (40, {"dev": 0}, (36, 0, 4)), (10, {"dev": 9, "test": 0}, (1, 9, 0))])
def test_a_tenth_of_the_photos_is_drawn_unless_told(n, flags, expected):
    args = extract_features.parse_args(["--images", "x", "--output", "x", *(
        part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    splits = extract_features.draw_splits(args, [f"{number}.jpg" for number in range(n)])
    assert tuple(splits.count(split) for split in ("train", "dev", "test")) == expected


@pytest.mark.parametrize("before, after", [(1000, 1001), (1000, 1200), (1000, 2000), (20_000, 20_500)])
def test_further_photos_move_few_of_the_others_to_another_split(before, after):
    args = extract_features.parse_args(["--images", "x", "--output", "x"])
    names = [f"{number}.jpg" for number in np.random.default_rng(1).permutation(after)]
    old, new = (dict(zip(some, extract_features.draw_splits(args, some))) for some in (names[:before], names))
    tested_on = [name for name in old if new[name] == "test"]
    assert sum(old[name] == "train" for name in tested_on) <= 0.1 * len(tested_on)
    assert not [name for name in tested_on if old[name] == "dev"]


# What goes wrong --------------------------------------------------------------------------------

def test_broken_photos_are_left_out_and_listed(folder, capsys):
    (folder / "photos/2.png").write_bytes((folder / "photos/2.png").read_bytes()[:500])
    (folder / "photos/3.png").write_bytes(b"no photo")
    draw_photo(folder / "photos/5.png", size=(1, 300))
    draw_photo(folder / "photos/line\nbreak.png")
    (folder / "photos" / ODD).write_bytes(b"")
    names = [*(f"{n}.png" for n in range(7)), '"line\nbreak.png"', "missing.png", ODD.replace('"', '""')]
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


def test_a_block_may_be_broken_altogether(folder, watched):
    for number in range(4):
        (folder / f"photos/{number}.png").write_bytes(b"no photo")
    assert watched.extract("out") == [3, 1, 2]
    assert lines(folder / "out/gallery_ids.txt") == [f"{number}.png" for number in range(4, 10)]
    encoder = build_once("shufflenet_v2_x0_5", "none")
    assert np.allclose(np.load(folder / "out/gallery_ims.npy"), [
        encode_photo(encoder, f"photos/{number}.png").numpy() for number in range(4, 10)], rtol=1e-3, atol=1e-8)


def test_broken_txt_goes_when_nothing_is_broken_any_more(folder):
    good = (folder / "photos/2.png").read_bytes()
    (folder / "photos/2.png").write_bytes(b"no photo")
    extract(encoder=SAMPLE)
    assert [line.split("\t")[0] for line in lines(folder / "out/broken.txt")] == ["2.png"]
    (folder / "photos/2.png").write_bytes(good)
    extract(encoder=SAMPLE)
    assert not (folder / "out/broken.txt").exists()
    assert len(np.load(folder / "out/gallery_ims.npy")) == 10


@pytest.mark.parametrize("captions, flags, reason", [
    ("image,caption\n../x.png,x\n", [], "which lies outside photos"),
    ("image,caption\n/x.png,x\n", [], "which lies outside photos"),
    ("image,caption\n", [], "c.csv has no caption of a photo"),
    ("image,caption\n1.png,x\n2.png,x\n", ["--dev", "2"], "leave none of 2 photos to train on"),
    ("image,caption,split\n1.png,x,train\n", ["--test", "1"], "c.csv gives them: leave them out"),
    ("image,caption\n11.png,x\n", [], "none of 1 photos can be read, such as 11.png"),
    ("image,caption\n1.png,x\n", ["--encoder", "resnet1"], "--encoder resnet1 is not known"),
    ("image,caption\n1.png,x\n", ["--images", "nowhere"], "photo folder nowhere is not there"),
    ("image,caption\n1.png,x\n", ["--device", "abacus"], "--device abacus"),
    ("image,caption\n1.png,x\n", ["--batch_size", "257"], "at most 256"),
    ("image,caption\n1.png,x\n", ["--output", "c.csv/out"], "cannot be written"),
    (None, ["--captions", "none", "--dev", "1"], "a gallery has none"),
    (None, ["--captions", "photos"], "photos has no caption of a photo"),
    (None, ["--captions", "none", "--images", "empty"], "no photo in --images"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, captions, flags, reason):
    (folder / "empty").mkdir()
    if captions is not None:
        (folder / "c.csv").write_text(captions)
        flags = ["--captions", "c.csv", *flags]
    before = tree(folder)
    with pytest.raises(InputError, match=reason):
        extract(*flags, encoder=SAMPLE)
    assert tree(folder) == before


def test_features_too_large_for_float16_are_refused(folder, monkeypatch):
    large = torch.full((1, 368), 7e4)
    monkeypatch.setattr(photo_blocks, "encode", lambda encoder, pictures, amp: large.repeat(len(pictures), 1))
    with pytest.raises(InputError, match="photo 0.png: sample gives features that are not finite in float16"):
        extract("--dtype", "float16", encoder=SAMPLE)
    assert not (folder / "out").exists()


def test_float16_rounds_what_float32_has(folder):
    extract(encoder=SAMPLE)
    extract("--dtype", "float16", output="half", encoder=SAMPLE)
    half = np.load(folder / "half/gallery_ims.npy")
    assert half.dtype == np.float16
    assert np.array_equal(half, np.load(folder / "out/gallery_ims.npy").astype(np.float16))
    assert json.loads((folder / "half/features.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("name", ["train_ims.npy", "mine_ims.npy", "testall_caps.txt", "gallery_ids.txt", "broken.txt"])
def test_somebody_elses_files_are_not_written_over(folder, name):
    (folder / "out").mkdir()
    if name.endswith("_ims.npy"):
        np.save(folder / "out" / name, np.ones((2, 3)))
    else:
        (folder / "out" / name).write_text("somebody's\n")
    before = tree(folder)
    with pytest.raises(InputError, match=f"--output out holds {name}, which this script has not made"):
        extract(encoder=SAMPLE)
    assert tree(folder) == before


def test_another_encoders_features_are_not_written_over(folder):
    extract(encoder=SAMPLE)
    before = tree(folder)
    with pytest.raises(InputError, match="--output out has features by sample .* but this run has them by shuffle"):
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

@pytest.fixture
def watched(folder, monkeypatch):
    """Blocks of four photos in batches of three; the photos encoded so far, and a place to stop the run at."""
    class Watched:
        encoded, stop_at = [], None

        def extract(self, output, stop_at=None):
            """The photos that the run encoded; with stop_at it ends before so manieth batch."""
            self.encoded, self.stop_at, self.batch = [], stop_at, 0
            with contextlib.suppress(KeyboardInterrupt):
                extract("--batch_size", "3", output=output)
                assert stop_at is None
            return self.encoded

    state = Watched()
    encode = photo_blocks.encode

    def counted(encoder, pictures, amp):
        if state.batch == state.stop_at:
            raise KeyboardInterrupt
        state.batch += 1
        state.encoded.append(len(pictures))
        return encode(encoder, pictures, amp)
    monkeypatch.setattr(photo_blocks, "encode", counted)
    monkeypatch.setattr(photo_blocks, "BLOCK_PHOTOS", 4)
    return state


@pytest.mark.parametrize("stop_at, left", [(0, [3, 1, 3, 1, 2]), (1, [3, 1, 3, 1, 2]), (2, [3, 1, 2]), (4, [2])])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(folder, watched, stop_at, left):
    watched.extract("whole")
    watched.extract("out", stop_at)
    assert not any(path.suffix == ".npy" for path in (folder / "out").glob("*"))
    assert watched.extract("out") == left
    assert tree(folder / "out") == tree(folder / "whole")


def test_a_run_killed_before_its_last_step_encodes_nothing_again(folder, watched, monkeypatch):
    watched.extract("whole")
    with monkeypatch.context() as patch:
        patch.setattr(extract_features, "write_features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        watched.extract("out", stop_at=99)
    assert not (folder / "out/features.json").exists()
    assert watched.extract("out") == []
    assert tree(folder / "out") == tree(folder / "whole")


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers"),
    (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
    (RuntimeError("a bug"), None)])
def test_what_memory_does_not_hold_is_said(folder, monkeypatch, error, reason):
    monkeypatch.setattr(photo_blocks, "encode", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(InputError if reason else RuntimeError, match=reason or "a bug"):
        extract(encoder=SAMPLE)


def test_photos_that_changed_since_are_encoded_anew(folder, watched):
    watched.extract("out", stop_at=4)
    draw_photo(folder / "photos/5.png", seed=99, size=(50, 30))
    assert watched.extract("out") == [3, 1, 2]
    watched.extract("whole")
    assert tree(folder / "out") == tree(folder / "whole")


def test_torn_blocks_are_made_again(folder, watched):
    watched.extract("whole")
    watched.extract("out", stop_at=4)
    for block in (folder / "out/.blocks").iterdir():
        block.write_bytes(block.read_bytes()[:-10])
    assert watched.extract("out") == [3, 1, 3, 1, 2]
    assert tree(folder / "out") == tree(folder / "whole")


def test_what_a_kill_left_half_written_is_gone_at_the_end(folder, watched):
    watched.extract("out", stop_at=2)
    (folder / "out/.blocks/train_ims.npy.x7.tmp").write_bytes(b"half")
    watched.extract("out")
    assert {path.name for path in (folder / "out").iterdir()} == {"features.json", "gallery_ims.npy",
                                                                  "gallery_ids.txt"}


def test_each_of_two_processes_takes_its_share(folder, watched, monkeypatch):
    watched.extract("whole")
    shares = []
    for rank in (1, 0):  # the first process assembles, once the others have met it
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: 2)
        shares.append(watched.extract("out"))
    assert shares == [[3, 1], [3, 1, 2]]
    assert tree(folder / "out") == tree(folder / "whole")


def test_the_script_decodes_in_processes(folder):
    (folder / "photos/3.png").write_bytes(b"no photo")
    flags = ["--images", "photos", *SMALL[:-2], "--workers", "2", "--batch_size", "2"]
    run = run_script("extract_features.py", *flags, "--output", "out", cwd=folder)
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, (
        "out: 9 gallery photos with 0 captions, features of width 1024"))
    extract("--batch_size", "2", output="here")
    assert tree(folder / "out") == tree(folder / "here")
