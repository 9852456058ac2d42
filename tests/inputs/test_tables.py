"""Tables of photos and captions: CSV, TSV, and the layouts found on the web."""

import os
import re

import pytest

from inputs.captions import (
    CaptionedPhoto,
    read_photo_captions,
)
from runtime.errors import InputError
from tests.helpers.made import write

NON_UTF8 = os.fsdecode(b"\xff.jpg")


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.csv", 'image,caption\na.jpg,"A dog, and a cat."\nb.jpg, A bird \n\na.jpg,A "dog"\n'),
        (
            "c.csv",
            '\ufeffCaption,Image,note\n"A dog, and a cat.",a.jpg,x\r\nA bird,b.jpg,\r\n"A ""dog""",a.jpg,\r\n',
        ),
        (
            "c.tsv",
            'image\tcaption\na.jpg\tA dog, and a cat.\nb.jpg\tA bird\nb.jpg\t \na.jpg\tA "dog"\n',
        ),
        ("c.csv", 'image;caption\na.jpg;A dog, and a cat.\nb.jpg;A bird\na.jpg;"A ""dog"""\n'),
        (
            "c.csv",
            'image;caption;split\na.jpg ;A dog, and a cat.;\nb.jpg;A bird;\n a.jpg;A "dog";\n;;\n; ;\n',
        ),
    ],
)
def test_a_table_has_several_rows_a_photo(tmp_path, name, content):
    assert read_photo_captions(write(tmp_path / name, content)) == [
        CaptionedPhoto("a.jpg", ["A dog, and a cat.", 'A "dog"'], None),
        CaptionedPhoto("b.jpg", ["A bird"], None),
    ]


def test_a_tables_splits_are_called_as_the_files_are(tmp_path):
    rows = {
        "train": "train",
        " Restval ": "restval",
        "val": "dev",
        "DEV": "dev",
        "Validation": "dev",
        "test": "test",
        "testall": "testall",
    }
    table = write(
        tmp_path / "c.csv", "image,caption,split\n" + "".join(f"x{s}x.jpg,x,{s}\n" for s in rows)
    )
    assert [(photo.name, photo.split) for photo in read_photo_captions(table)] == [
        (f"x{given}x.jpg", split) for given, split in rows.items()
    ]


def test_names_keep_their_bytes_and_captions_their_lines(tmp_path):
    table = write(tmp_path / "c.csv", b'image,caption\n\xff.jpg,"one\r\nline"\n"x\ny.jpg",two\n')
    assert read_photo_captions(table) == [
        CaptionedPhoto(NON_UTF8, ["one line"], None),
        CaptionedPhoto("x\ny.jpg", ["two"], None),
    ]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("photo,words\na.jpg,x\n", "must name image and caption"),
        ("", "must name image and caption"),
        ("image,caption\na.jpg,one, two\n", "line 2: 3 cells, but the header has 2"),
        ('image,caption\na.jpg,"one\nb.jpg,two\n', "quotation marks"),
        (b"image,caption\na.jpg,\xff\n", "line 2: the caption is not UTF-8"),
        ("image,caption\na.jpg,x\n ,y\n", "line 3: the cell of the image is empty"),
        ("image,caption,split\na.jpg,x,training\n", "line 2: split is 'training'"),
        (
            "image,caption,split\na.jpg,x,train\na.jpg,y,val\n",
            "line 3: photo a.jpg is in split dev, but earlier in train",
        ),
        ("image,caption,split\na.jpg,x,train\nb.jpg,y,\n", "photo b.jpg has no split"),
        ("image,caption\na.jpg," + "x" * 200_000, "field larger than field limit"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        read_photo_captions(write(tmp_path / "c.csv", content))


def test_a_table_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_photo_captions(str(tmp_path / "c.csv"))


TWO = [
    CaptionedPhoto("a.jpg", ["A dog, and a cat.", 'A "dog" .'], None),
    CaptionedPhoto("b.jpg", ["A bird"], None),
]

NO_NOTE = r"^$"

COLUMNS = "photos are read from the column {!r}, captions from {!r}\n"


@pytest.mark.parametrize(
    "name, content, note",
    [
        (
            "results.csv",
            'image_name| comment_number| comment\na.jpg| 0| A dog, and a cat.\na.jpg| 1| A "dog" .\n'
            "b.jpg| 0| A bird\n",
            COLUMNS.format("image_name", "comment"),
        ),
        (
            "results.csv",
            'image_name| comment_number| comment\na.jpg| 0| A dog, and a cat.\na.jpg| 1   A "dog" .\n'
            "b.jpg| 0| A bird\n",
            "line 3: read as if a separator stood after the number 1\n",
        ),
        (
            "x.token.txt",
            'a.jpg#0\tA dog, and a cat.\na.jpg#1\tA "dog" .\r\n\nb.jpg#0\tA bird',
            NO_NOTE,
        ),
        (
            "c.tsv",
            'filepath\ttitle\na.jpg\tA dog, and a cat.\na.jpg\tA "dog" .\nb.jpg\tA bird\n',
            COLUMNS.format("filepath", "title"),
        ),
        (
            "c.csv",
            'File_Name,caption,,\na.jpg,"A dog, and a cat.",,\na.jpg,A "dog" .,,\nb.jpg,A bird,,\n',
            COLUMNS.format("File_Name", "caption"),
        ),
        (
            "c.csv",
            "image;filename;title;caption\n"
            'a.jpg;x;y;A dog, and a cat.\na.jpg;x;y;"A ""dog"" ."\nb.jpg;;;A bird\n',
            NO_NOTE,
        ),
    ],
    ids=[
        "results.csv",
        "results.csv's row",
        "token",
        "open_clip",
        "empty columns",
        "own names first",
    ],
)
def test_tables_that_go_around_are_read(tmp_path, capsys, name, content, note):
    assert read_photo_captions(write(tmp_path / name, content)) == TWO
    said = capsys.readouterr().err
    assert re.search(note, said) if note == NO_NOTE else note in said


@pytest.mark.parametrize(
    "name, content, reason",
    [
        (
            "c.csv",
            'image,caption\na.jpg,"A dog\nb.jpg,A cat\nc.jpg,A bird"\nd.jpg,x\n',
            "line 2: a quoted cell that begins there swallows further rows, such as 'b.jpg,A cat'",
        ),
        (
            "c.csv",
            'image,caption\na,x\n1,"A dog\n2,A cat"\n',
            "line 3: a quoted cell .* such as '2,A cat'",
        ),
        (
            "c.csv",
            'caption,image\nA dog,a.jpg\n"A cat,b.jpg\nA bird",c.jpg\n',
            "line 3: a quoted cell .* such as 'A cat,b.jpg'",
        ),
        ("c.csv", 'image,caption\na.jpg,x\nb.jpg,"A dog\nc.jpg,A cat\n', "line 3: .* up to line"),
        (
            "c.csv",
            'image,caption\na.jpg,x\nb.jpg,"A dog\nc.jpg,"A cat"\n',
            "line 3: .* up to line 4",
        ),
        (
            "c.csv",
            "image,title,comment\na.jpg,x,y\n",
            "several columns that may be the caption, title and comment",
        ),
        ("c.csv", "a.jpg,A dog\nb.jpg,A cat\n", "has no header, its first line is 'a.jpg, A dog'"),
        (
            "x.token.txt",
            "a.jpg#0\tA dog\nb.jpg A cat\n",
            "line 2: 'b.jpg A cat' is not `image#number<TAB>caption`",
        ),
        (
            "c.csv",
            "image,caption\na.jpg,un café\n".encode("latin-1"),
            "line 2: the caption is not UTF-8: it looks like Latin-1 .* `iconv -f WINDOWS-1252 -t UTF-8",
        ),
        (
            "c.csv",
            "image,caption\na.jpg,A dog\n".encode("utf-16"),
            "is UTF-16 text, .*iconv -f UTF-16 -t UTF-8",
        ),
        ("c.csv", b"PK\x03\x04....[Content_Types].xml", "is an Excel workbook .+CSV UTF-8"),
        ("c.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1....", "is an Excel workbook .+CSV UTF-8"),
        (
            "c.json",
            '{"images": "é"}'.encode("latin-1"),
            "line 1: not UTF-8 .*iconv -f WINDOWS-1252",
        ),
        ("c.json", '{"images": []}'.encode("utf-16"), "is UTF-16 text"),
    ],
)
def test_a_table_that_is_read_wrongly_otherwise_is_refused(tmp_path, name, content, reason):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=reason):
        read_photo_captions(path)
