"""Bottom-up attention's tables and HDF5 files become data sets and galleries."""

import base64
import json
import os

import numpy as np
import pytest

import extract_features
from data import PrecompDataset
from features.bottom_up import image_key
from inputs.tokenizer import SPECIAL_WORDS
from runtime.errors import InputError
from tests.helpers.made import tree
from vocab import vocabulary_of

IDS, BOXES, WIDTH = [391895, 7, 60623, 12], [3, 1, 4, 2], 5

NAMES = [f"COCO_val2014_{number:012d}.jpg" for number in IDS]


def features_of(image):
    """An image's features (boxes, width), by its id."""
    return (
        np.random.default_rng(image)
        .standard_normal((BOXES[IDS.index(image)], WIDTH))
        .astype(np.float32)
    )


def encoded(array):
    return base64.b64encode(array.tobytes()).decode()


def write_tsv(path, ids=IDS, cells=6, header=False):
    lines = []
    for image in ids:
        rows = features_of(image)
        boxes = encoded(np.ones((len(rows), 4), np.float32))
        before = (
            [image, 640, 480, len(rows), boxes]
            if cells == 6
            else [image, 480, 640, "A", "A", "A", "A", len(rows), boxes]
        )
        lines.append("\t".join(map(str, [*before, encoded(rows)])))
    names = "image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures"
    path.write_text("".join(f"{line}\n" for line in ([names] if header else []) + lines))


def write_hdf5(path, layout):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        if layout in ("image_id", "image_ids", "ids"):
            table = np.zeros((len(IDS), max(BOXES), WIDTH), np.float32)
            for place, image in enumerate(IDS):
                table[place, : BOXES[place]] = features_of(image)
            file["features"] = table
            file[layout] = (
                [name.encode() for name in NAMES]
                if layout == "ids"
                else np.array(IDS, (np.float64 if layout == "image_ids" else np.int64))
            )
            return
        for image in IDS:
            name = {
                "group": f"{image}/features",
                "data set": f"{image}",
                "suffix": f"{image}_features",
            }[layout]
            file[name] = features_of(image)
            file[f"{image}/boxes" if layout == "group" else f"{image}_boxes"] = np.ones(
                (2, 4), np.float32
            )


def write_captions(path, names=NAMES, splits=("train", "val", "test", "train")):
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} {c}"} for c in range(5)]}
        for name, split in zip(names, splits)
    ]
    path.write_text(json.dumps({"images": images}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_captions(tmp_path / "c.json")
    return tmp_path


def convert(source, *flags, output="out_precomp", captions="c.json"):
    extract_features.main(
        [
            "--from",
            *([source] if isinstance(source, str) else source),
            "--captions",
            captions,
            "--output",
            output,
            *flags,
        ]
    )


def expected(images, dtype=np.float32):
    """The rows of a split by a plain loop."""
    rows = np.zeros((len(images), max(BOXES), WIDTH), dtype)
    for place, image in enumerate(images):
        for box, numbers in enumerate(features_of(image)):
            rows[place, box] = numbers
    return rows


LAYOUTS = [
    "plain",
    "header",
    "ten cells",
    "image_id",
    "image_ids",
    "ids",
    "group",
    "data set",
    "suffix",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rows_of_a_plain_loop(folder, layout, capsys):
    if layout in ("plain", "header", "ten cells"):
        write_tsv(folder / "f", cells=10 if layout == "ten cells" else 6, header=layout == "header")
    else:
        write_hdf5(folder / "f", layout)
    convert("f")
    out = folder / "out_precomp"
    for split, places in {"train": [0, 3], "dev": [1], "test": [2]}.items():
        rows = np.load(out / f"{split}_ims.npy")
        assert rows.dtype == np.float32 and np.array_equal(
            rows, expected([IDS[place] for place in places])
        )
        assert (out / f"{split}_ids.txt").read_text().splitlines() == [
            NAMES[place] for place in places
        ]
        assert (out / f"{split}_caps.txt").read_text().splitlines() == [
            f"{NAMES[place]} {c}" for place in places for c in range(5)
        ]
    assert len(list(out.iterdir())) == 9
    assert capsys.readouterr().err == ""
    dataset = PrecompDataset(str(out), "train", vocabulary_of([*SPECIAL_WORDS, "a"]), img_dim=WIDTH)
    assert dataset.n_images == 2 and np.array_equal(dataset[5][0], expected([12])[0])


def test_two_cells_are_an_id_and_rows_of_2048_numbers(folder):
    rows = np.random.default_rng(0).standard_normal((36, 2048)).astype(np.float32)
    (folder / "f.tsv").write_text(f"image_id\tfeatures\n7\t{encoded(rows)}\n")
    convert("f.tsv", captions="none")
    assert np.array_equal(np.load("out_precomp/gallery_ims.npy"), rows[None])
    assert (folder / "out_precomp/gallery_ids.txt").read_text() == "7\n"


def test_parts_of_a_table_are_one_and_come_in_the_captions_order(folder, capsys):
    write_tsv(folder / "b.tsv", IDS[2:])
    write_tsv(folder / "a.tsv", IDS[:3])
    write_captions(folder / "c.json", NAMES[::-1], ["train"] * 4)
    convert(["b.tsv", "a.tsv"])
    assert np.array_equal(np.load("out_precomp/train_ims.npy"), expected(IDS[::-1]))
    assert capsys.readouterr().err == "note: 1 ids come again, and their first features are taken\n"


def test_what_has_no_counterpart_is_counted_in_one_line(folder, capsys):
    write_tsv(folder / "f.tsv")
    write_captions(folder / "c.json", [*NAMES[:2], "COCO_val2014_000000000099.jpg"], ["train"] * 3)
    convert("f.tsv")
    assert np.array_equal(np.load("out_precomp/train_ims.npy"), expected(IDS[:2])[:, :3])
    assert capsys.readouterr().err == (
        "note: 1 photos have no features and are left out; 2 images have no captions and are left out\n"
    )


def test_splits_are_drawn_numbers_halved_and_rows_scaled(folder):
    write_tsv(folder / "f.tsv")
    (folder / "c.csv").write_text("image,caption\n" + "".join(f"{name},a\n" for name in NAMES))
    convert(
        "f.tsv", "--dev", "1", "--test", "1", "--dtype", "float16", "--normalise", captions="c.csv"
    )
    for split, n in (("train", 2), ("dev", 1), ("test", 1)):
        rows = np.load(f"out_precomp/{split}_ims.npy")
        ids = (folder / f"out_precomp/{split}_ids.txt").read_text().splitlines()
        assert rows.dtype == np.float16 and len(ids) == len(rows) == n
        for name, image in zip(ids, rows):
            for row, raw in zip(image, features_of(IDS[NAMES.index(name)]), strict=False):
                length = sum(float(x) ** 2 for x in raw) ** 0.5
                assert row.tolist() == pytest.approx([x / length for x in raw.tolist()], abs=1e-3)


@pytest.mark.parametrize(
    "one, other",
    [
        ("391895", "COCO_val2014_000000391895.jpg"),
        ("000000000007", "train2014/COCO_train2014_000000000007.jpg"),
        ("1000092795", "1000092795.jpg"),
        ("1000268201_693b08cb0e", "a/1000268201_693b08cb0e.JPG"),
        ("a.b", "a.b.png"),
        ("COCO_val2014_000000000007.jpg", "7"),
    ],
)
def test_ids_and_file_names_of_an_image_meet(one, other):
    assert image_key(one) == image_key(other)


@pytest.mark.parametrize(
    "one, other", [("7", "image_7.jpg"), ("07a", "7a"), ("693", "1000268201_693.jpg"), ("a", "A")]
)
def test_ids_of_others_do_not(one, other):
    assert image_key(one) != image_key(other)


def spoiled(change):
    def write(folder):
        write_tsv(folder / "f.tsv")
        lines = (folder / "f.tsv").read_text().split("\n")
        (folder / "f.tsv").write_text(change(lines))

    return write


def with_cell(place, value):
    def change(lines):
        cells = lines[1].split("\t")
        cells[place] = value
        return "\n".join([lines[0], "\t".join(cells), *lines[2:]])

    return spoiled(change)


NAN = encoded(np.full((1, WIDTH), np.nan, np.float32))

REFUSED = {
    "cut in a cell": (
        spoiled(lambda lines: "\n".join(lines)[:-7]),
        [],
        "line 4: its features are not base64",
    ),
    "cut before it": (
        spoiled(lambda lines: "\n".join(lines[:3]) + "\n12\t640"),
        [],
        "line 4 has 2 cells|line 4: its",
    ),
    "other boxes": (
        with_cell(3, "2"),
        [],
        "line 2: its features are not base64 of float32 numbers for 2 boxes",
    ),
    "no number": (with_cell(3, "two"), [], "for two boxes"),
    "no base64": (with_cell(5, "!" * 28), [], "line 2: its features are not base64"),
    "not finite": (with_cell(5, NAN), [], "line 2 has features that are not finite"),
    "another width": (with_cell(5, encoded(np.ones((1, 6), np.float32))), [], r"widths \[5, 6\]"),
    "other ids": (
        lambda folder: (write_tsv(folder / "f.tsv"), write_captions(folder / "c.json", ["a.jpg"])),
        [],
        "none of 4 images in --from, such as '391895', is one of 1 in c.json, such as 'a.jpg'",
    ),
    "one id twice": (
        lambda folder: (
            write_tsv(folder / "f.tsv"),
            write_captions(folder / "c.json", [NAMES[0], "391895.jpg"]),
        ),
        [],
        "c.json has 2 photos that may be image '391895'",
    ),
    "a page": (
        lambda folder: (folder / "f.tsv").write_text("<!DOCTYPE html>\t"),
        [],
        "is a web page, not bottom-up",
    ),
    "gzip": (
        lambda folder: (folder / "f.tsv").write_bytes(b"\x1f\x8b\x08\t"),
        [],
        "compressed by gzip.*unpack",
    ),
    "text": (
        lambda folder: (folder / "f.tsv").write_text("a,b\n"),
        [],
        "is text, not bottom-up.*: give one of these",
    ),
    "none": (lambda folder: None, [], "--from f.tsv cannot be read"),
    "flags of photos": (spoiled("\n".join), ["--pooling", "grid"], "--pooling is for photos"),
    "no images": (spoiled(lambda lines: "image_id\tfeatures\n"), [], "has no image's features"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(folder, kind):
    write, flags, reason = REFUSED[kind]
    write(folder)
    before = tree(folder)
    with pytest.raises(InputError, match=reason):
        convert("f.tsv", *flags)
    assert tree(folder) == before


def test_somebodys_files_are_not_written_over_and_a_killed_runs_are(folder):
    write_tsv(folder / "f.tsv")
    (folder / "out_precomp/.blocks").mkdir(parents=True)
    (folder / "out_precomp/.blocks/train_ims.npy.abcdefgh.tmp").write_bytes(b"half")
    convert("f.tsv")
    assert not (folder / "out_precomp/.blocks").exists() and len(os.listdir("out_precomp")) == 9
    before = tree(folder)
    with pytest.raises(InputError, match="--output out_precomp is not empty: name another folder"):
        convert("f.tsv")
    assert tree(folder) == before


def test_hdf5_without_h5py_names_the_command(folder, monkeypatch):
    (folder / "f.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90))
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(
        InputError, match="f.h5 is an HDF5 file, which needs h5py: pip install h5py"
    ):
        convert("f.h5")


@pytest.mark.parametrize("size", [90, 700, 3000])
def test_hdf5_that_is_cut_short_is_refused(folder, size):
    write_hdf5(folder / "f.h5", "group")
    whole = (folder / "f.h5").read_bytes()
    (folder / "f.h5").write_bytes(whole[:size])
    with pytest.raises(InputError, match="f.h5 is damaged or cut short"):
        convert("f.h5")
    assert not (folder / "out_precomp").exists()


def test_hdf5_without_ids_says_what_it_holds(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File("f.h5", "w") as file:
        file["features"], file["spatial"] = np.ones((4, 3, 5)), np.ones((4, 3, 6))
    with pytest.raises(
        InputError, match=r"holds features \(4, 3, 5\), spatial \(4, 3, 6\): it needs .*image_id"
    ):
        convert("f.h5")
