"""Photo files: as a viewer shows them, as the released code reads them, and found in folders."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import EpsImagePlugin, Image, PngImagePlugin

from errors import InputError
from images import decode_image, photo_names, thumbnail

PIXELS = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3) * 7
# What each EXIF orientation asks a viewer to do to the stored rows and columns.
TURNS = {1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
         5: lambda p: p.swapaxes(0, 1), 6: lambda p: p[::-1].swapaxes(0, 1),
         7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: p[:, ::-1].swapaxes(0, 1)}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_photo_is_turned_as_its_exif_data_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png", as_seen=True)), TURNS[orientation](PIXELS))
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png")), PIXELS)  # the released code does not turn it


@pytest.mark.skipif(sys.platform == "win32", reason="alarms are POSIX")
def test_a_process_that_decodes_outlives_a_stop_for_a_while_and_ends_well():
    code = ("import os, signal, time, images; images.WORKER_GRACE = 1; images._outlive_signals(0); "
            "os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True); time.sleep(60)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (run.returncode, run.stdout) == (0, "alive\n")


@pytest.mark.parametrize("exif", [b"MM\0\x2a\0\0\0\x08\0\xff\x01\x12", b"no TIFF"])
def test_torn_exif_data_does_not_make_a_photo_broken(tmp_path, exif):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png", as_seen=True)), PIXELS)


def test_clear_parts_are_white(tmp_path):
    pixels = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    seen = np.asarray(decode_image(tmp_path / "a.png", as_seen=True)).astype(int)
    expected = np.array([[[200, 100, 50], [255, 255, 255], [244, 224, 214]]])  # a fifth of the colour, four of white
    assert abs(seen - expected).max() <= 1
    assert np.asarray(decode_image(tmp_path / "a.png")).tolist() == [[[200, 100, 50]] * 3]


def test_a_palettes_clear_colour_is_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(decode_image(tmp_path / "a.png", as_seen=True)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_greys_are_scaled_to_8(tmp_path, ending):
    greys = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(greys).save(tmp_path / f"a.{ending}")
    seen = np.asarray(decode_image(tmp_path / f"a.{ending}", as_seen=True))
    assert seen.tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_each_16_bit_grey_becomes_the_nearest_of_8(tmp_path):
    greys = np.arange(65536).reshape(256, 256)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "a.png")
    seen = np.asarray(decode_image(tmp_path / "a.png", as_seen=True))[:, :, 0]
    assert np.array_equal(seen, np.round(greys / 257))


def test_photos_are_found_at_any_depth_in_the_order_of_their_bytes(tmp_path):
    for name in ("b.jpg", "a.JPEG", "sub/c.png", "sub/deep/d.webp", "notes.txt", ".hidden.jpg", ".trash/e.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    odd = os.fsdecode(b"\xff.jpg")
    (tmp_path / odd).touch()
    assert photo_names(tmp_path) == ["a.JPEG", "b.jpg", "sub/c.png", "sub/deep/d.webp", odd]


def test_a_folder_that_is_not_there_or_none_is_said(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            photo_names(tmp_path / name)


def test_photos_that_are_not_read_and_linked_folders_are_told_of(tmp_path, capsys):
    for name in ("photos/a.jpg", "photos/b.HEIC", "photos/c.nef", "photos/notes.txt", "photos/d.jfif", "real/e.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("../real", tmp_path / "photos/linked")
    assert photo_names(tmp_path / "photos") == ["a.jpg", "d.jfif"]
    kinds, links = capsys.readouterr().err.splitlines()
    assert kinds.startswith("note: 2 photos of a kind that is not read passed over, such as 'b.HEIC'")
    assert links.startswith("note: 1 links to folders passed over") and "linked" in links


def test_what_would_start_another_program_is_no_photo(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    Image.fromarray(PIXELS).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.jpg")
    for act in (decode_image, lambda path: thumbnail(path, 10)):
        with pytest.raises(InputError, match="a.jpg cannot be read"):
            act(tmp_path / "a.jpg")
    assert not started


@pytest.mark.parametrize("name, how", [
    ("a.jpg", {"comment": b"12 Home Street"}), ("a.gif", {"comment": b"12 Home Street " * 5000}),
    ("a.png", {"pnginfo": "comment"}), ("a.jpg", {"exif": "12 Home Street"})])
def test_thumbnails_keep_nothing_but_the_picture(tmp_path, name, how):
    if "pnginfo" in how:
        how = {"pnginfo": PngImagePlugin.PngInfo()}
        how["pnginfo"].add_text("comment", "12 Home Street")
    if "exif" in how:
        how = {"exif": Image.Exif()}
        how["exif"][0x010e] = "12 Home Street"
    Image.new("RGB", (50, 50)).save(tmp_path / name, **how)
    assert b"Home Street" in (tmp_path / name).read_bytes()
    assert b"Home Street" not in thumbnail(tmp_path / name, 40)


def test_thumbnails_are_turned_as_a_viewer_shows_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(io.BytesIO(thumbnail(tmp_path / "a.jpg", 40))).size == (20, 40)
