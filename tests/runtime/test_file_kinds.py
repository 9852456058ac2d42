"""Files recognised by their first bytes."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import coco_dataset
from inputs.decoding import decode_image
from layers.pretrained import load_state
from runtime import torch_files
from runtime.errors import InputError
from runtime.file_kinds import binary_kind, foreign_kind
from vocab import read_vocabulary


def written(write):
    """The bytes that `write` puts into a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def workbook(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")


def archive(file):
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("captions.txt", "A dog.")


def tar(file):
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("captions.txt"))


def named(value):
    """A test's name: no bytes, which hold the time in archives."""
    return "" if isinstance(value, bytes) else value


@pytest.mark.parametrize(
    "head, what, remedy",
    [
        (b"<!DOCTYPE html>\n<html>", "a web page", "fetch it again"),
        (b"\n <HTML lang=en>", "a web page", "fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer",
            "git lfs pull",
        ),
        (written(workbook), "an Excel workbook (.xlsx)", "CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an Excel workbook (.xls)", "CSV UTF-8"),
        (written(archive), "a zip archive", "unpack"),
        (gzip.compress(b"A dog."), "gzip", "unpack"),
        (written(tar), "a tar archive", "unpack"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
        (written(lambda file: np.save(file, np.ones(3))), "a NumPy array", ""),
        (written(lambda file: torch.save([1], file)), "a zip archive", ""),
        (written(lambda file: Image.new("RGB", (2, 2)).save(file, "JPEG")), "a JPEG photo", ""),
        ("A dog.\n".encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
        ("A dog.\n".encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE"),
        ("A dog.\n".encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE"),
        ("A dog.\n".encode("utf-32"), "UTF-32 text", "iconv -f UTF-32"),
    ],
    ids=named,
)
def test_a_known_start_is_called_what_it_is(head, what, remedy):
    found = foreign_kind(head)
    assert found[0].startswith(what) or what in found[0]
    assert remedy in found[1]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"A",
        b"\n",
        b"A dog runs.\n",
        b"image,caption\na.jpg,x\n",
        b'{"images": []}',
        b"A\0 dog",
        "Un café.\n".encode(),
        "Un café.\n".encode("latin-1"),
        "一只狗。\n".encode(),
        b"<b>bold</b> words",
        b"\xef\xbb\xbfA dog.\n",
        b"PKs are kicks.\n",
        b"Rar! it says.\n",
    ],
    ids=str,
)
def test_text_is_nothing_else(head):
    assert foreign_kind(head) is None


PAGE, POINTER, TABLE = (
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1",
    b"7\t4\t4\t36\tAAAA\tAAAA\n",
)


@pytest.mark.parametrize(
    "head, what, remedy",
    [
        (b"", "empty", "fetch"),
        (bytes(99), "nothing but zero bytes", "fetch"),
        (b"0.5 1\n", "text", "another file"),
        (TABLE, "a tab-separated table", "extract_features.py --from"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "extract_features.py --from"),
        (pickle.dumps([1.0], 4), "a pickle", "load it where it was made"),
        (PAGE, "a web page", "fetch it again"),
    ],
    ids=str,
)
def test_in_place_of_a_binary_file_more_is_named(head, what, remedy):
    found = binary_kind(head)
    assert found[0] == what and remedy in found[1]


@pytest.mark.parametrize(
    "head, expected", [(b"\x01\x02\xff", []), (b"PK\x03\x04 archive/data.pkl", [b"PK"])]
)
def test_what_is_expected_or_unknown_is_nothing_else(head, expected):
    assert binary_kind(head, expected) is None


class Runs:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: torch_files.read(path, "checkpoint"),
        lambda path: load_state(torch.nn.Linear(1, 1), path, "resnet18", flag="--cnn_weights"),
    ],
    ids=["checkpoint", "state"],
)
@pytest.mark.parametrize(
    "content, what",
    [
        (PAGE, "is a web page"),
        (POINTER, "is a Git LFS pointer"),
        (TABLE, "is a tab-separated table"),
        (b"", "cut short"),
        (bytes(1000), "is nothing but zero bytes"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        (pickle.dumps({"a": 1}, 2), "is a pickle"),
        (pickle.dumps({"a": 1}, 0), "is text"),
        (pickle.dumps(Runs()), "is a pickle"),
        (written(archive), "is a zip archive"),
        (written(lambda file: torch.save({"a": Runs()}, file)), "asks to load"),
        (written(lambda file: torch.save([torch.ones(9)], file))[:300], "cut short"),
        (
            written(
                lambda file: torch.save([torch.ones(9)], file, _use_new_zipfile_serialization=False)
            )[:-9],
            "cut short",
        ),
        (b"\x01\x02\xff" * 99, "is not a"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_pytorchs_advice_to_run_what_a_file_asks_for_is_never_shown(
    tmp_path, capfd, recwarn, read, content, what
):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(str(tmp_path / "x.pth"))
    assert what in str(caught.value)
    assert not any(
        word in str(caught.value) for word in ("weights_only", "Weights only", "Re-running")
    )
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize(
    "name, read",
    [
        ("a.jpg", decode_image),
        ("v.pkl", read_vocabulary),
        (
            "annotations/coco_dev_ids.npy",
            lambda path: coco_dataset(path.rsplit("/", 2)[0], "dev", None, None, False),
        ),
    ],
)
@pytest.mark.parametrize(
    "content, what", [(PAGE, "is a web page"), (POINTER, "is a Git LFS pointer")]
)
def test_photos_vocabularies_and_ids_of_another_kind_are_named(tmp_path, name, read, content, what):
    (tmp_path / "annotations").mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=what):
        read(str(tmp_path / name))
