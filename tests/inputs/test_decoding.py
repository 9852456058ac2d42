"""Photos as a viewer shows them, the same on every way in; thumbnails.

Decoding in another process.
"""

import io
import os

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

from data import ImageDataset
from features import blocks
from features.encoders import Encoder, encode_photo
from inputs.decoding import Decoder, decode_image, thumbnail
from inputs.photos import photo_names
from inputs.tokenizer import SPECIAL_WORDS
from runtime.errors import InputError
from vocab import vocabulary_of

PIXELS = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3) * 7


# What each EXIF orientation asks a viewer to do to the stored rows and columns.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def on_white(colours, alpha):
    """(H, W, 3) colours whose share alpha / 255 hides a white paper."""
    share = alpha[:, :, None] / 255
    return colours * share + 255 * (1 - share)


def palette_of(rng, clear=None):
    """A picture with a palette of eight colours, one of them transparent, and what a viewer shows of it."""
    colours = rng.integers(0, 256, (8, 3), dtype=np.uint8)
    numbers = rng.integers(0, 8, (5, 7), dtype=np.uint8)
    picture = Image.fromarray(numbers, "P")
    picture.putpalette(colours.ravel().tolist())
    shown = colours[numbers]
    if clear is not None:
        shown[numbers == clear] = 255
    return picture, shown


def drawn(kind, rng):
    """(a picture of that kind, the RGB pixels that a viewer shows of it, what it is saved with)."""
    colours = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    greys, alpha = rng.integers(0, 256, (2, 5, 7), dtype=np.uint8)
    deep = rng.integers(0, 65536, (5, 7))
    three = lambda values: np.repeat(values[:, :, None], 3, 2)  # noqa: E731
    if kind == "colours":
        return Image.fromarray(colours), colours, {}
    if kind == "colours and how clear":
        return Image.fromarray(np.dstack([colours, alpha]), "RGBA"), on_white(colours, alpha), {}
    if kind == "a colour that is clear":
        colours[2, 3] = colours[4, 1]
        shown = np.where((colours == colours[2, 3]).all(2)[:, :, None], 255, colours)
        return Image.fromarray(colours), shown, {"transparency": tuple(colours[2, 3].tolist())}
    if kind == "a palette":
        return *palette_of(rng), {}
    if kind == "a palette with a clear colour":
        return *palette_of(rng, clear=3), {"transparency": 3}
    if kind == "greys":
        return Image.fromarray(greys), three(greys), {}
    if kind == "greys and how clear":
        return Image.fromarray(np.dstack([greys, alpha]), "LA"), on_white(three(greys), alpha), {}
    if kind == "black and white":
        return (
            Image.fromarray(greys).convert("1", dither=0),
            three(np.where(greys < 128, 0, 255)),
            {},
        )
    if kind == "16-bit greys":
        return Image.fromarray(deep.astype(np.uint16)), three(np.round(deep / 257)), {}
    if kind == "16-bit greys, one clear":
        shown = np.where(deep == deep[2, 3], 255, np.round(deep / 257))
        return (
            Image.fromarray(deep.astype(np.uint16)),
            three(shown),
            {"transparency": int(deep[2, 3])},
        )
    if kind == "16-bit greys in 32 bits":
        return Image.fromarray(deep.astype(np.int32)), three(np.round(deep / 257)), {}
    if kind == "greys from 0 to 1":
        return Image.fromarray((deep / 65535).astype(np.float32)), three(np.round(deep / 257)), {}
    raise ValueError(kind)


KINDS = [
    ("colours", "png"),
    ("colours", "tif"),
    ("colours", "bmp"),
    ("colours and how clear", "png"),
    ("colours and how clear", "tif"),
    ("a colour that is clear", "png"),
    ("a palette", "png"),
    ("a palette", "tif"),
    ("a palette with a clear colour", "png"),
    ("greys", "png"),
    ("greys", "tif"),
    ("greys and how clear", "png"),
    ("greys and how clear", "tif"),
    ("black and white", "png"),
    ("black and white", "tif"),
    ("16-bit greys", "png"),
    ("16-bit greys", "tif"),
    ("16-bit greys", "pgm"),
    ("16-bit greys, one clear", "png"),
    ("16-bit greys in 32 bits", "tif"),
    ("greys from 0 to 1", "tif"),
    ("greys from 0 to 1", "pfm"),
]

VOCABULARY = vocabulary_of([*SPECIAL_WORDS, "dog"])


def saved(picture, path, options):
    """Save a picture; Pillow before 11 reads PGM of 16 bits, but writes none."""
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 7 5 65535\n" + np.asarray(picture).astype(">u2").tobytes())
    else:
        picture.save(path, **options)


def roads(path):
    """The photo as training, extraction, the page's uploads and the thumbnails see it, before each resizes it."""
    description = {"resize": 1, "normalised": False}
    seen = []
    encoder = Encoder(
        torch.nn.Identity(),
        lambda picture: seen.append(picture) or torch.zeros(1),
        description,
        torch.device("cpu"),
    )
    pictures = [ImageDataset([str(path)], ["a dog"], [0], VOCABULARY).image(0)]
    blocks.Photos(path.parent, [path.name], encoder)[0]
    encode_photo(encoder, io.BytesIO(path.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "thumbnail", lambda picture, size: seen.append(picture.copy()))
        thumbnail(path, 1000)
    pictures += seen
    assert len(pictures) == 4 and all(picture.mode == "RGB" for picture in pictures)
    return [np.asarray(picture) for picture in pictures]


@pytest.mark.parametrize("orientation", [None, 1, 6, 7])
@pytest.mark.parametrize("kind, ending", KINDS)
def test_a_photo_of_any_kind_is_seen_alike_on_every_road(tmp_path, kind, ending, orientation):
    """As a viewer shows it, to the bit; where it is partly clear, to the nearest of 255 steps."""
    picture, shown, options = drawn(kind, np.random.default_rng(KINDS.index((kind, ending))))
    if orientation and ending in ("png", "tif"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
        shown = TURNS[orientation](shown)
    path = tmp_path / f"a.{ending}"
    saved(picture, path, options)
    first, *others = roads(path)
    for other in others:
        assert np.array_equal(other, first)
    assert first.shape == shown.shape
    assert np.abs(first - np.asarray(shown, float)).max() <= ("how clear" in kind)


@pytest.fixture
def decoder():
    """One in a process of its own."""
    found = Decoder()
    yield found
    found.close()


def test_a_process_decodes_photos_one_after_the_other_as_they_are_decoded_here(tmp_path, decoder):
    for number, (kind, ending) in enumerate(KINDS):
        picture, _, options = drawn(kind, np.random.default_rng(number))
        saved(picture, tmp_path / f"a.{ending}", options)
        seen = decoder(open(tmp_path / f"a.{ending}", "rb"))
        assert (seen.mode, seen.size) == ("RGB", picture.size)
        assert np.array_equal(np.asarray(seen), np.asarray(decode_image(tmp_path / f"a.{ending}")))
        with pytest.raises(InputError, match="it is text, not a photo"):
            decoder(io.BytesIO(b"no photo"))
    assert decoder.process.poll() is None


@pytest.mark.parametrize(
    "end",
    [
        lambda decoder: decoder.process.kill(),
        lambda decoder: decoder.process.stdin.close(),
        lambda decoder: setattr(decoder, "seconds", 0),
    ],
    ids=["killed", "closed", "late"],
)
def test_a_process_that_ended_costs_one_photo_and_another_takes_its_place(tmp_path, decoder, end):
    large = io.BytesIO()
    Image.new("L", (4000, 4000)).save(large, "PNG", compress_level=1)
    small = io.BytesIO()
    Image.fromarray(PIXELS).save(small, "PNG")
    assert np.array_equal(np.asarray(decoder(io.BytesIO(small.getvalue()))), PIXELS)
    first = decoder.process
    end(decoder)
    with pytest.raises(InputError, match="takes more memory than there is, or over"):
        decoder(io.BytesIO(large.getvalue()))
    assert first.poll() is not None and decoder.process is None
    decoder.seconds = 60
    assert np.array_equal(np.asarray(decoder(io.BytesIO(small.getvalue()))), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_what_the_released_transforms_make_of_them(tmp_path, mode):
    """To the bit: these convert what Pillow reads to RGB, and do no more."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = np.asarray(stored.convert("RGB"))
    for seen in roads(tmp_path / "a.jpg"):
        assert np.array_equal(seen, expected)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_photo_is_turned_as_its_exif_data_says(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as stored:
        expected = TURNS[orientation](np.asarray(stored))
    for seen in roads(tmp_path / f"a.{ending}"):
        assert np.array_equal(seen, expected)


@pytest.mark.parametrize(
    "values, kind, said",
    [
        ([-0.5, 1], np.float32, "from -0.5 to 1, but black to white is 0 to 1"),
        ([0, 255], np.float32, "from 0 to 255"),
        ([0, np.nan], np.float32, "nan"),
        ([0, np.inf], np.float32, "from 0 to inf"),
        ([-1, 5], np.int32, "from -1 to 5, but black to white is 0 to 65535"),
        ([0, 65536], np.int32, "from 0 to 65536"),
    ],
)
def test_greys_of_no_known_scale_are_refused(tmp_path, values, kind, said):
    Image.fromarray(np.array([values], kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif cannot be read .*{said}.*: save it with 8 bits"):
        decode_image(tmp_path / "a.tif")


@pytest.mark.parametrize("exif", [b"MM\0\x2a\0\0\0\x08\0\xff\x01\x12", b"no TIFF"])
def test_torn_exif_data_does_not_make_a_photo_broken(tmp_path, exif):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png")), PIXELS)


def test_each_16_bit_grey_becomes_the_nearest_of_8(tmp_path):
    greys = np.arange(65536).reshape(256, 256)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "a.png")
    seen = np.asarray(decode_image(tmp_path / "a.png"))[:, :, 0]
    assert np.array_equal(seen, np.round(greys / 257))


def test_what_would_start_another_program_is_no_photo(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    Image.fromarray(PIXELS).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.jpg")
    for act in (decode_image, lambda path: thumbnail(path, 10)):
        with pytest.raises(InputError, match="a.jpg cannot be read"):
            act(tmp_path / "a.jpg")
    assert not started


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.jpg", {"comment": b"12 Home Street"}),
        ("a.gif", {"comment": b"12 Home Street " * 5000}),
        ("a.png", {"pnginfo": "comment"}),
        ("a.jpg", {"exif": "12 Home Street"}),
    ],
)
def test_thumbnails_keep_nothing_but_the_picture(tmp_path, name, how):
    if "pnginfo" in how:
        how = {"pnginfo": PngImagePlugin.PngInfo()}
        how["pnginfo"].add_text("comment", "12 Home Street")
    if "exif" in how:
        how = {"exif": Image.Exif()}
        how["exif"][0x010E] = "12 Home Street"
    Image.new("RGB", (50, 50)).save(tmp_path / name, **how)
    assert b"Home Street" in (tmp_path / name).read_bytes()
    assert b"Home Street" not in thumbnail(tmp_path / name, 40)


def test_thumbnails_are_turned_as_a_viewer_shows_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(io.BytesIO(thumbnail(tmp_path / "a.jpg", 40))).size == (20, 40)


@pytest.mark.parametrize("brand", ["heic", "heix", "mif1", "hevc"])
def test_a_heic_photo_without_pillow_heif_names_the_command(tmp_path, monkeypatch, brand):
    monkeypatch.setattr("inputs.decoding.reads_heic", lambda: False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + bytes(40))
    with pytest.raises(InputError, match="HEIC photos need pillow-heif: pip install pillow-heif"):
        decode_image(str(tmp_path / "a.heic"))


def test_heic_photos_are_read_with_pillow_heif(tmp_path, capsys):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.random.default_rng(5).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(
        tmp_path / "a.HEIC", quality=-1, chroma=444, matrix_coefficients=0
    )  # lossless
    assert photo_names(tmp_path) == ["a.HEIC"] and capsys.readouterr().err == ""
    assert np.array_equal(decode_image(str(tmp_path / "a.HEIC")), pixels)
    for seen in roads(tmp_path / "a.HEIC"):
        assert np.array_equal(seen, pixels)
