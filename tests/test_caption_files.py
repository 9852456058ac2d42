"""Captions of photos, out of every layout."""

import json
import os

import pytest

from caption_files import CaptionedPhoto, read_caption_texts, read_photo_captions
from errors import InputError

NON_UTF8 = os.fsdecode(b"\xff.jpg")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name, content", [
    ("c.csv", 'image,caption\na.jpg,"A dog, and a cat."\nb.jpg, A bird \n\na.jpg,A "dog"\n'),
    ("c.csv", '\ufeffCaption,Image,note\n"A dog, and a cat.",a.jpg,x\r\nA bird,b.jpg,\r\n"A ""dog""",a.jpg,\r\n'),
    ("c.tsv", 'image\tcaption\na.jpg\tA dog, and a cat.\nb.jpg\tA bird\nb.jpg\t \na.jpg\tA "dog"\n'),
    ("c.csv", 'image;caption\na.jpg;A dog, and a cat.\nb.jpg;A bird\na.jpg;"A ""dog"""\n'),
    ("c.csv", 'image;caption;split\na.jpg ;A dog, and a cat.;\nb.jpg;A bird;\n a.jpg;A "dog";\n;;\n; ;\n'),
])
def test_a_table_has_several_rows_a_photo(tmp_path, name, content):
    assert read_photo_captions(write(tmp_path / name, content)) == [
        CaptionedPhoto("a.jpg", ["A dog, and a cat.", 'A "dog"'], None), CaptionedPhoto("b.jpg", ["A bird"], None)]


def test_a_tables_splits_are_called_as_the_files_are(tmp_path):
    rows = {"train": "train", "restval": "train", "val": "dev", "DEV": "dev", "test": "test", "testall": "testall"}
    table = write(tmp_path / "c.csv", "image,caption,split\n" + "".join(f"{s}.jpg,x,{s}\n" for s in rows))
    assert [(photo.name, photo.split) for photo in read_photo_captions(table)] == [
        (f"{given}.jpg", split) for given, split in rows.items()]


def test_names_keep_their_bytes_and_captions_their_lines(tmp_path):
    table = write(tmp_path / "c.csv", b'image,caption\n\xff.jpg,"one\r\nline"\n"x\ny.jpg",two\n')
    assert read_photo_captions(table) == [CaptionedPhoto(NON_UTF8, ["one line"], None),
                                          CaptionedPhoto("x\ny.jpg", ["two"], None)]


@pytest.mark.parametrize("content, reason", [
    ("photo,text\na.jpg,x\n", "must name image and caption"),
    ("", "must name image and caption"),
    ("image,caption\na.jpg,one, two\n", "line 2: 3 cells, but the header has 2"),
    ('image,caption\na.jpg,"one\nb.jpg,two\n', "quotation marks"),
    (b"image,caption\na.jpg,\xff\n", "line 2: the caption is not UTF-8"),
    ("image,caption\na.jpg,x\n ,y\n", "line 3: the cell of the image is empty"),
    ("image,caption,split\na.jpg,x,training\n", "line 2: split is 'training'"),
    ("image,caption,split\na.jpg,x,train\na.jpg,y,val\n", "line 3: photo a.jpg is in split dev, but before in train"),
    ("image,caption,split\na.jpg,x,train\nb.jpg,y,\n", "photo b.jpg has no split"),
    ("image,caption\na.jpg," + "x" * 200_000, "field larger than field limit"),
])
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        read_photo_captions(write(tmp_path / "c.csv", content))


def test_a_table_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_photo_captions(str(tmp_path / "c.csv"))


def test_karpathys_json(tmp_path):
    content = {"images": [
        {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "One."}, {"raw": "Two.\n"}]},
        {"filename": "b.jpg", "split": "restval", "filepath": "val2014", "sentences": [{"raw": "Three."}]},
        {"filename": "c.jpg", "split": "test", "sentences": []}]}
    assert read_photo_captions(write(tmp_path / "c.json", json.dumps(content))) == [
        CaptionedPhoto("a.jpg", ["One.", "Two."], "dev"), CaptionedPhoto("val2014/b.jpg", ["Three."], "train"),
        CaptionedPhoto("c.jpg", [], "test")]


def coco(annotations):
    return json.dumps({"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
                       "annotations": annotations})


def test_cocos_json(tmp_path):
    content = coco([{"image_id": 3, "caption": "One."}, {"image_id": 7, "caption": "Two."},
                    {"image_id": 3, "caption": "Three."}])
    assert read_photo_captions(write(tmp_path / "c.json", content)) == [
        CaptionedPhoto("b.jpg", ["One.", "Three."], None), CaptionedPhoto("a.jpg", ["Two."], None)]


@pytest.mark.parametrize("content", [
    coco([{"image_id": 5, "caption": "x"}]), coco([{"caption": "x"}]), coco([{"image_id": [7], "caption": "x"}]),
    coco([{"image_id": 7}]), '{"annotations": [{"image_id": 7, "caption": "x"}], "images": 3}', "[]", "{",
    '{"images": 1}',
    '{"images": [{"id": 1, "file_name": 2}], "annotations": [{"image_id": 1, "caption": "x"}]}'])
def test_what_is_wrong_with_a_json_is_said(tmp_path, content):
    with pytest.raises(InputError, match="c.json"):
        read_photo_captions(write(tmp_path / "c.json", content))


def test_text_files_of_the_photos_names(tmp_path):
    write(tmp_path / "a.txt", " One. \n\nTwo.\r\n")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.txt", "Three.")
    names = ["a.jpg", "empty.png", "none.jpg", "sub/b.jpeg"]
    assert read_caption_texts(str(tmp_path), names) == [
        CaptionedPhoto("a.jpg", ["One.", "Two."], None), CaptionedPhoto("empty.png", [], None),
        CaptionedPhoto("none.jpg", [], None), CaptionedPhoto("sub/b.jpeg", ["Three."], None)]
