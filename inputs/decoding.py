"""Decode photo files, in the same way for training, extraction, galleries and the search page.

`Decoder` decodes in a separate process, for a server that must answer other requests meanwhile.
So nothing heavy is imported here.
"""

import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext, suppress
from functools import lru_cache

import numpy as np

from runtime.errors import InputError
from runtime.file_kinds import HEAD, binary_kind
from runtime.files import check_regular

# Pillow's names. Other formats are no photos, or start other programs (an EPS file named .jpg
# would run Ghostscript).
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
HEIC_REMEDY = "pip install pillow-heif, or save them as JPEGs"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = (
    f"import sys; sys.path.insert(0, {ROOT!r}); "
    "from inputs.decoding import serve_forever; serve_forever()"
)
LENGTH = struct.Struct("<Q")  # the number of a photo's bytes, sent before them
DECODING_SECONDS = 30
DECODING_NICE = 5  # so that the server's own threads come first


@lru_cache
def reads_heic():
    """Whether pillow-heif is installed; if it is, Pillow opens HEIC photos from now on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def photo_formats():
    """Those of PHOTO_FORMATS that this Pillow can read, and HEIF if it can; AVIF came with 11.3."""
    from PIL import Image

    Image.init()
    names = PHOTO_FORMATS + ("HEIF",) * reads_heic()
    return tuple(name for name in names if name in Image.OPEN)


def open_photo(file):
    """Open a path or an open file as a PIL picture, without decoding it yet.

    Raises InputError if it has more pixels than Pillow's limit, and Pillow's errors if it is not a
    photo of PHOTO_FORMATS.
    """
    from PIL import Image

    # Never undone: restoring the filters is not safe with other threads running.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        picture = Image.open(file, formats=photo_formats())
        too_large = picture.width * picture.height > Image.MAX_IMAGE_PIXELS
    except Image.DecompressionBombError:  # raised for twice as many
        too_large = True
    except Image.UnidentifiedImageError as error:
        head = _head(file)
        if re.match(b"....ftyp(hei|hev|mif1|msf1)", head, re.DOTALL) and not reads_heic():
            raise InputError(f"HEIC photos need pillow-heif: {HEIC_REMEDY}") from error
        kind = binary_kind(head)
        if not kind:
            raise
        raise InputError(f"it is {kind[0]}, not a photo") from error
    if too_large:
        raise InputError(f"it has more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
    return picture


def _head(file):
    """The first bytes of a path or an open file."""
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:
            return opened.read(HEAD)
    file.seek(0)
    return file.read(HEAD)


def decode_image(path, least_side=None):
    """Decode a photo to a PIL picture in RGB, as a viewer shows it.

    It is turned as its EXIF data say, transparent parts become white, and greys of 16 bits or
    floating-point numbers are scaled to 8 bits.

    path: of a file, or an open file.
    least_side: pixels that suffice for both sides; a JPEG is decoded to about that size only.
    Raises InputError if it cannot be decoded or is absurdly large (Pillow's limit).
    """
    is_open = hasattr(path, "read")
    if not is_open:
        check_regular(path)
    try:
        # Opened here: from a path, Pillow may map the file to memory, and then it mixes up the rows
        # of a TIFF that lies on its side.
        with (
            nullcontext(path) if is_open else open(path, "rb") as file,
            open_photo(file) as picture,
        ):
            if least_side:
                picture.draft(None, (least_side, least_side))
            return _in_rgb(picture)
    except Exception as error:  # decoders raise errors of many kinds on broken files
        if is_open:
            raise InputError(
                f"this photo cannot be read ({error}): give another copy of it"
            ) from error
        raise InputError(
            f"image {path} cannot be read ({error}): fetch it again, or leave such images out with "
            "--skip_broken_images"
        ) from error


def _in_rgb(picture):
    """Convert a PIL picture to RGB, so that it looks as in a viewer."""
    from PIL import Image, ImageOps

    picture.load()
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    # The picture is fine, and only its EXIF data are torn: it has no orientation then.
    except Exception:
        pass
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _greys_of_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _greys_of_8_bits(picture):
    """Round a PIL picture of 16-bit greys, or of floating-point greys from 0 to 1, to 8 bits.

    Raises InputError for other numbers, whose scale is unknown.
    """
    from PIL import Image

    kind, white = (np.float32, 1) if picture.mode == "F" else (np.int32, 65535)
    greys = np.array(picture, kind)
    low, high = greys.min(), greys.max()
    if not (low >= 0 and high <= white):  # nor NaN
        raise InputError(
            f"its greys go from {low:g} to {high:g}, but black to white is 0 to {white}: save it "
            "with 8 bits"
        )
    if picture.info.get("transparency") is not None:
        greys[greys == picture.info["transparency"]] = white  # the one grey that is clear
    if kind is np.float32:
        return Image.fromarray(np.rint(greys * 255).astype(np.uint8))
    greys += 128  # rounds to the nearest; ties cannot occur
    return Image.fromarray(np.floor_divide(greys, 257, out=greys).astype(np.uint8))


def thumbnail(path, side):
    """A photo as the bytes of a JPEG of at most side x side pixels; InputError if it is broken."""
    picture = decode_image(path, least_side=2 * side)
    picture.thumbnail((side, side))
    picture.info.clear()  # comments, which would be written, too
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


# In a process of its own ------------------------------------------------------------------------


def answer(requests, answers):
    """Decode photos until the requests end; both streams are binary, as `Decoder` uses them."""
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        try:
            picture = decode_image(io.BytesIO(requests.read(*LENGTH.unpack(head))))
            said, pixels = {"size": picture.size}, picture.tobytes()
        except InputError as error:
            said, pixels = {"error": str(error.__cause__ or error)}, b""
        answers.write(json.dumps(said).encode() + b"\n")
        answers.write(pixels)
        answers.flush()
        del pixels, said


def _ask(requests, answers, content):
    """Send a photo's bytes; return (the process's reply, RGB pixels).

    Raises OSError or ValueError if the process has ended.
    """
    requests.write(LENGTH.pack(len(content)))
    requests.write(content)
    requests.flush()
    said = json.loads(answers.readline())
    width, height = said.get("size", (0, 0))
    # Not a bytearray, which would hold Python's lock while it clears itself.
    pixels = np.empty(3 * width * height, np.uint8)
    if answers.readinto(pixels) < len(pixels):
        raise OSError("fewer pixels than were said")
    return said, pixels


class Decoder:
    """A process that decodes photos one at a time, for one thread. It starts with the first photo.

    Some decoders hold Python's lock throughout, some photos take seconds or a gigabyte, and a rare
    one may crash the process. In a separate process, that disturbs nothing else.
    """

    def __init__(self, seconds=DECODING_SECONDS):
        """seconds: after which decoding a photo is given up."""
        self.seconds, self.process = seconds, None

    def __call__(self, file):
        """Decode an open file to what `decode_image` returns; InputError if that fails."""
        from PIL import Image

        # A new session, so that Ctrl-C reaches the server only.
        process = self.process = self.process or subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        watch = threading.Timer(self.seconds, process.kill)
        watch.start()
        try:
            said, pixels = _ask(process.stdin, process.stdout, file.read())
        except (OSError, ValueError) as error:  # it has ended, somewhere
            self.close()
            raise InputError(
                f"decoding it takes more memory than there is, or over {self.seconds} seconds"
            ) from error
        finally:
            watch.cancel()
        if "error" in said:
            raise InputError(said["error"])
        return Image.frombytes("RGB", tuple(said["size"]), pixels)

    def close(self):
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):  # what it was not sent yet
                    stream.close()


def serve_forever():
    """Answer standard input on standard output: the main program of a `Decoder`'s process."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(DECODING_NICE)
    answer(sys.stdin.buffer, sys.stdout.buffer)
