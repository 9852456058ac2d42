"""Captions of photos and of features, from every layout."""

import json
import os
import re

import pytest

from features.files import read_ids
from inputs.captions import (
    CaptionedPhoto,
    read_caption_texts,
    read_captions,
    read_json,
    read_karpathy,
    read_photo_captions,
)
from inputs.tokenizer import tokenize
from runtime.errors import InputError
from tests.helpers.made import REFERENCE, write
from vocab import (
    read_vocabulary,
)


def test_karpathys_json(tmp_path):
    content = {
        "images": [
            {
                "filename": "a.jpg",
                "split": "val",
                "sentences": [{"raw": "One."}, {"raw": "Two.\n"}],
            },
            {
                "filename": "b.jpg",
                "split": "restval",
                "filepath": "val2014",
                "sentences": [{"raw": "Three."}],
            },
            {"filename": "c.jpg", "split": "test", "sentences": []},
        ]
    }
    assert read_photo_captions(write(tmp_path / "c.json", json.dumps(content))) == [
        CaptionedPhoto("a.jpg", ["One.", "Two."], "dev"),
        CaptionedPhoto("val2014/b.jpg", ["Three."], "restval"),
        CaptionedPhoto("c.jpg", [], "test"),
    ]


def karpathy(*entries):
    """Entries (filename, split, captions[, filepath]) as JSON."""
    keys = ("filename", "split", "sentences", "filepath")
    images = [
        dict(zip(keys, (*entry[:2], [{"raw": raw} for raw in entry[2]], *entry[3:])))
        for entry in entries
    ]
    return json.dumps({"images": images})


def test_an_entry_a_caption_is_merged_by_the_photo_wherever_it_stands(tmp_path):
    path = write(
        tmp_path / "c.json",
        karpathy(
            ("a.jpg", "val", ["One."]),
            ("b.jpg", "train", [" Two. "]),
            ("./a.jpg", "dev", ["Three."]),
            ("b.jpg", "train", ["Four."]),
            ("a.jpg", " VALIDATION ", ["", "One."]),
        ),
    )
    assert read_karpathy(path) == [
        CaptionedPhoto("a.jpg", ["One.", "Three.", "", "One."], "dev"),
        CaptionedPhoto("b.jpg", [" Two. ", "Four."], "train"),
    ]


@pytest.mark.parametrize("read", [read_karpathy, read_photo_captions])
@pytest.mark.parametrize(
    "entries, reason",
    [
        (
            [("a.jpg", "training", ["x"])],
            r"images\[0\]: split is 'training': it must be one of train, restval, dev",
        ),
        ([("a.jpg", "train", ["x"]), ("b.jpg", "", ["x"])], r"images\[1\]: split is ''"),
        (
            [("a.jpg", "train", ["x"]), ("a.jpg", "val", ["y"])],
            r"images\[1\]: photo a.jpg is in split dev, but earlier in",
        ),
        ([("a.jpg", "train", ["x"], 7)], r"images\[0\]: .*'filepath' must be text"),
    ],
)
def test_a_json_that_contradicts_itself_is_refused_with_the_place(tmp_path, read, entries, reason):
    with pytest.raises(InputError, match=reason):
        read(write(tmp_path / "c.json", karpathy(*entries)))


@pytest.mark.parametrize(
    "files, found",
    [
        (
            ["val2014/1.jpg", "train2014/1.jpg"],
            ["val2014/1.jpg", "train2014/1.jpg", "train2014/2.jpg"],
        ),
        (["val2014/1.jpg", "1.jpg", "2.jpg"], ["val2014/1.jpg", "1.jpg", "2.jpg"]),
        (["val2014/1.jpg"], ["val2014/1.jpg", "train2014/1.jpg", "train2014/2.jpg"]),
    ],
)
def test_filepath_comes_before_the_name_unless_the_photo_is_without_it(
    tmp_path, capsys, files, found
):
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "images" / name, "")
    path = write(
        tmp_path / "c.json",
        karpathy(
            ("1.jpg", "test", ["x"], "val2014"),
            ("1.jpg", "train", ["y"], "train2014"),
            ("2.jpg", "train", ["z"], "train2014"),
        ),
    )
    assert [photo.name for photo in read_karpathy(path, str(tmp_path / "images"))] == found
    said = capsys.readouterr().err
    assert said.count("\n") == ("1.jpg" in found)
    assert ("2 photos are looked for elsewhere, such as train2014/1.jpg as 1.jpg in" in said) == (
        "1.jpg" in found
    )


def test_photos_of_two_folders_never_become_one(tmp_path):
    write(tmp_path / "1.jpg", "")
    path = write(
        tmp_path / "c.json",
        karpathy(("1.jpg", "test", ["x"], "val2014"), ("1.jpg", "test", ["y"], "train2014")),
    )
    with pytest.raises(InputError, match="val2014/1.jpg and train2014/1.jpg would both be .*1.jpg"):
        read_karpathy(path, str(tmp_path))


def coco(annotations):
    return json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
            "annotations": annotations,
        }
    )


def test_cocos_json(tmp_path):
    content = coco(
        [
            {"image_id": 3, "caption": "One."},
            {"image_id": 7, "caption": "Two."},
            {"image_id": 3, "caption": "Three."},
        ]
    )
    assert read_photo_captions(write(tmp_path / "c.json", content)) == [
        CaptionedPhoto("b.jpg", ["One.", "Three."], None),
        CaptionedPhoto("a.jpg", ["Two."], None),
    ]


@pytest.mark.parametrize(
    "content",
    [
        coco([{"image_id": 5, "caption": "x"}]),
        coco([{"caption": "x"}]),
        coco([{"image_id": [7], "caption": "x"}]),
        coco([{"image_id": 7}]),
        '{"annotations": [{"image_id": 7, "caption": "x"}], "images": 3}',
        "[]",
        "{",
        '{"images": 1}',
        '{"images": [{"id": 1, "file_name": 2}], "annotations": [{"image_id": 1, "caption": "x"}]}',
    ],
)
def test_what_is_wrong_with_a_json_is_said(tmp_path, content):
    with pytest.raises(InputError, match="c.json"):
        read_photo_captions(write(tmp_path / "c.json", content))


def photos_at(folder, *names):
    """A folder `photos` with (empty) photos of these names."""
    for name in names:
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / "photos" / name, "")
    return folder / "photos"


@pytest.mark.parametrize(
    "given, name, note",
    [
        ("{photos}/sub/a.jpg", "sub/a.jpg", ""),
        ("{link}/sub/a.jpg", "{link}/sub/a.jpg", ""),
        (
            "photos/a.jpg",
            "a.jpg",
            "1 photos are looked for elsewhere, such as photos/a.jpg as a.jpg in",
        ),
        ("photos/sub/a.jpg", "sub/a.jpg", "such as photos/sub/a.jpg as sub/a.jpg in"),
        ("photos/photos/b.jpg", "photos/b.jpg", "such as photos/photos/b.jpg as photos/b.jpg in"),
        ("photos/b.jpg", "photos/b.jpg", ""),
        ("photos/gone.jpg", "photos/gone.jpg", ""),
        ("other/a.jpg", "other/a.jpg", ""),
        ("./sub//a.jpg", "sub/a.jpg", ""),
        ("/photos/a.jpg", "/photos/a.jpg", ""),
    ],
)
@pytest.mark.parametrize("layout", ["table", "karpathy", "coco"])
def test_names_are_found_below_the_folder(tmp_path, capsys, layout, given, name, note):
    photos, link = photos_at(tmp_path, "a.jpg", "sub/a.jpg", "photos/b.jpg"), tmp_path / "link"
    given, name = (text.format(photos=photos, link=link) for text in (given, name))
    content = {
        "table": f"image,caption\n{given},One.\n",
        "karpathy": karpathy((given, "test", ["One."])),
        "coco": json.dumps(
            {
                "images": [{"id": 1, "file_name": given}],
                "annotations": [{"image_id": 1, "caption": "One."}],
            }
        ),
    }[layout]
    path = write(tmp_path / ("c.csv" if layout == "table" else "c.json"), content)
    assert [photo[:2] for photo in read_photo_captions(path, str(photos))] == [(name, ["One."])]
    assert note in (said := capsys.readouterr().err) and bool(said) == bool(note)


def test_two_spellings_of_a_name_are_one_photo(tmp_path):
    photos = photos_at(tmp_path, "a.jpg")
    names = ["a.jpg", "photos/a.jpg", f"{photos}/a.jpg", "./a.jpg"]
    rows = [f"{name},{place}\n" for place, name in enumerate(names)]
    path = write(tmp_path / "c.csv", "image,caption\n" + "".join(rows))
    assert read_photo_captions(path, str(photos)) == [
        CaptionedPhoto("a.jpg", ["0", "1", "2", "3"], None)
    ]


@pytest.mark.parametrize(
    "texts, photo, captions, note",
    [
        (["a.txt"], "a.jpg", ["a.txt"], ""),
        (["a.jpg.txt"], "a.jpg", ["a.jpg.txt"], ""),
        (
            ["A.TXT"],
            "a.jpg",
            ["A.TXT"],
            "1 text files in . differ from their photo's name in capitals only and are used, "
            "such as sub/A.TXT for sub/a.jpg",
        ),
        (["A.JPG.txt"], "a.jpg", ["A.JPG.txt"], "in capitals only"),
        (["a.TXT"], "a.jpg", ["a.TXT"], "in capitals only"),
        (
            ["b.txt"],
            "a.jpg",
            [],
            "1 text files in . have no photo of their name, such as 'sub/b.txt'",
        ),
    ],
)
def test_a_photo_s_text_file_may_be_called_otherwise(
    tmp_path, monkeypatch, capsys, texts, photo, captions, note
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for text in texts:
        write(tmp_path / "sub" / text, text)
    assert read_caption_texts(".", [f"sub/{photo}"]) == [
        CaptionedPhoto(f"sub/{photo}", captions, None)
    ]
    assert note in (said := capsys.readouterr().err) and said.count("\n") == bool(note)


def test_a_text_file_of_another_photo_is_not_taken(tmp_path):
    write(tmp_path / "a.txt", "One.")
    assert read_caption_texts(str(tmp_path), ["A.jpg", "a.jpg"]) == [
        CaptionedPhoto("A.jpg", [], None),
        CaptionedPhoto("a.jpg", ["One."], None),
    ]


@pytest.mark.parametrize("texts", [["a.txt", "a.jpg.txt"], ["A.txt", "A.TXT"]], ids=str)
def test_two_text_files_of_one_photo_are_refused(tmp_path, texts):
    for text in texts:
        write(tmp_path / text, "One.")
    with pytest.raises(InputError, match=f"photo a.jpg has 2 text files in .*{texts[0]}"):
        read_caption_texts(str(tmp_path), ["a.jpg"])


def test_text_files_of_the_photos_names(tmp_path):
    write(tmp_path / "a.txt", " One. \n\nTwo.\r\n")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.txt", "Three.")
    names = ["a.jpg", "empty.png", "none.jpg", "sub/b.jpeg"]
    assert read_caption_texts(str(tmp_path), names) == [
        CaptionedPhoto("a.jpg", ["One.", "Two."], None),
        CaptionedPhoto("empty.png", [], None),
        CaptionedPhoto("none.jpg", [], None),
        CaptionedPhoto("sub/b.jpeg", ["Three."], None),
    ]


# Caption files of features ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, reason",
    [
        (["a.jpg#0\tA dog.", "a.jpg#1\tA cat.", "b c.jpg#0\tA bird."], "'a.jpg#0.tA dog.'"),
        (["12\tA dog.", "12\tA cat."], "photos' names or numbers before its captions"),
        (["image,caption", "a.jpg,A dog.", "b.jpg,A cat."], "photos' names or numbers before"),
        (["a.jpg| 0| A dog.", "", "b.jpg| 0| A cat."], "photos' names or numbers before"),
    ],
    ids=str,
)
def test_a_table_in_place_of_captions_is_refused(tmp_path, lines, reason):
    with pytest.raises(
        InputError, match=f"{reason}.* keep the captions alone, one a line, or give the file to"
    ):
        read_captions(write(tmp_path / "test_caps.txt", "\n".join(lines) + "\n"))


@pytest.mark.parametrize(
    "lines",
    [
        ["1 dog", "2 dogs", "10,000 dogs"],
        ["a.jpg is shown", "x.jpg", "y.png"],
        ["A tab\tin it", "#1\tdog"],
        ["dog.\tA", "cat.\tB"],
        ["12\tA dog.", "A dog", "A cat"],
    ],
    ids=str,
)
def test_captions_with_names_and_tabs_in_them_stay_captions(tmp_path, lines):
    assert read_captions(write(tmp_path / "test_caps.txt", "\n".join(lines) + "\n")) == lines


@pytest.mark.parametrize(
    "content, reason",
    [
        ("A dog.\n".encode("utf-16"), "is UTF-16 text, .*iconv -f UTF-16 -t UTF-8"),
        (
            "A dog and a cat.\n".encode("utf-16-le"),
            "is UTF-16LE text, .*iconv -f UTF-16LE -t UTF-8",
        ),
        (b"PK\x03\x04....xl/workbook.xml", "is an Excel workbook"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x1f\x8b....", "is compressed by gzip"),
        (
            "Un café.\n".encode("latin-1"),
            "line 1: not UTF-8 .*Latin-1 .*`iconv -f WINDOWS-1252 -t UTF-8",
        ),
        ("Un café.\n".encode() + b"\xff\n", "line 2: not UTF-8 .* mend that line"),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [read_captions, read_json, read_ids])
def test_what_is_no_text_in_utf8_is_called_what_it_is(tmp_path, read, content, reason):
    path = write(tmp_path / "file", content)
    if read is read_ids and "not UTF-8" in reason:  # names keep their bytes
        assert [os.fsencode(line) for line in read(path)] == content.splitlines()
        return
    with pytest.raises(InputError, match=reason):
        read(path)


VSE_INFTY = REFERENCE / "vse_infty"


def test_lines_of_vse_infinity_s_caption_files_are_its_own_but_for_a_lone_carriage_return(tmp_path):
    file = json.loads((VSE_INFTY / "tokenization.json").read_text(encoding="utf-8"))["file"]
    content = bytes.fromhex(file["hex"])
    (tmp_path / "caps.txt").write_bytes(re.sub(rb"\r(?!\n)", b"\n", content))
    own = read_captions(tmp_path / "caps.txt")
    assert [tokenize(caption) for caption in own] == [
        tokenize(caption) for caption in file["captions"]
    ]
    (tmp_path / "caps.txt").write_bytes(content)
    assert len(read_captions(tmp_path / "caps.txt")) == len(own) - 1


@pytest.mark.parametrize(
    "content, captions",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\n\n\ntwo\n", ["one", "", "", "two"]),
        (b"\n", [""]),
        (b"one\n\n", ["one", ""]),
        (b" \t\x0b\x0cone two \r\n", ["one two"]),
        ("a\u2028b\x85c\x1cd\re\n".encode(), ["a\u2028b\x85c\x1cd\re"]),
        ("\u00a0caf\u00e9\u3000\n".encode(), ["\u00a0caf\u00e9\u3000"]),
        (b"a\x00b\n", ["a\x00b"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
    ],
    ids=[
        "plain",
        "no last newline",
        "crlf",
        "empty lines",
        "one empty",
        "empty last",
        "white space",
        "other breaks",
        "unicode spaces",
        "nul",
        "byte order mark",
        "mark elsewhere",
    ],
)
def test_caption_files_split_at_newlines_and_lose_ascii_space_only(tmp_path, content, captions):
    (tmp_path / "caps.txt").write_bytes(content)
    assert read_captions(str(tmp_path / "caps.txt")) == captions


@pytest.mark.parametrize(
    "content, line",
    [(b"a\nb\xff\n", 2), (b"\xe9\n", 1), (b"a\n\n\xc3", 3), (b"a\n\xed\xa0\x80\n", 2)],
)
def test_captions_that_are_not_utf8_are_refused_with_their_line(tmp_path, content, line):
    (tmp_path / "caps.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"caps\.txt, line {line}: .*UTF-8"):
        read_captions(str(tmp_path / "caps.txt"))


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["nothing", "byte order mark"])
def test_an_empty_caption_file_is_refused(tmp_path, content):
    (tmp_path / "caps.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"caps\.txt is empty"):
        read_captions(str(tmp_path / "caps.txt"))


@pytest.mark.parametrize("reader", [read_captions, read_json, read_karpathy, read_vocabulary])
@pytest.mark.parametrize("name", ["absent", "folder"])
def test_a_file_that_is_not_there_is_named(tmp_path, reader, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=name):
        reader(str(tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 100000, b'{"images": ', b"\x00"],
    ids=["empty", "cut", "bytes", "deep", "torn", "nul"],
)
@pytest.mark.parametrize("reader", [read_json, read_karpathy, read_vocabulary])
def test_broken_json_is_refused(tmp_path, reader, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json") as caught:
        reader(str(tmp_path / "file.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"images": {}},
        {"images": []},
        {"images": [1]},
        {"images": [{"filename": "a.png", "split": "train"}]},
        {"images": [{"filename": "a.png", "split": "train", "sentences": [{}]}]},
        {"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": 5}]}]},
        {"images": [{"filename": 5, "split": "train", "sentences": []}]},
        {"images": [{"filename": "a.png", "split": None, "sentences": []}]},
    ],
    ids=str,
)
def test_json_of_another_layout_is_refused(tmp_path, content):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"dataset\.json"):
        read_karpathy(str(tmp_path / "dataset.json"))
