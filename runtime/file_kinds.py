"""What a file is, by its first bytes, for messages about files of the wrong kind."""

import re

HEAD = 4096  # bytes that suffice to recognise a file
ZIP = b"PK\x03\x04"
HDF5 = b"\x89HDF\r\n\x1a\n"
TSV_COLUMNS = 6  # of bottom-up attention's tables
NUL_SHARE = 0.4  # of every other byte: about 1 for Latin letters in UTF-16, 0 for other text
LEAST = 12  # bytes needed to recognise UTF-16 without a byte order mark
EXCEL = "save the sheet in Excel as CSV UTF-8 and give that"
PACKED = "unpack it and give what it holds"
OTHER = "give another file"
CONVERT = "make a data set of it with python3 extract_features.py --from FILE"
FETCH = "the download led there instead of to the file, so fetch it again"

# (how the file begins, what it is, what to do)
WORDS = [
    (b"<!doctype html", "a web page", FETCH),
    (b"<html", "a web page", FETCH),
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file",
        "run `git lfs pull` where it came from",
    ),
]

BYTES = [
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook (.xls) or of old Office", EXCEL),
    (ZIP, "a zip archive", PACKED),
    (b"\x1f\x8b", "compressed by gzip", PACKED),
    (b"BZh9", "compressed by bzip2", PACKED),
    (b"\xfd7zXZ\x00", "compressed by xz", PACKED),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", PACKED),
    (b"Rar!\x1a\x07", "a RAR archive", PACKED),
    (HDF5, "an HDF5 file", OTHER),
    (b"\x93NUMPY", "a NumPy array (.npy)", OTHER),
    (b"\xff\xd8\xff", "a JPEG photo", OTHER),
    (b"\x89PNG\r\n", "a PNG picture", OTHER),
    (b"%PDF-", "a PDF", OTHER),
]

# UTF-32's mark begins with UTF-16's.
MARKS = [
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
]


def foreign_kind(head):
    """What a file with these first bytes is and what to do, as two strings; None if unknown.

    head: at least the first `HEAD` bytes, or the whole file. The strings complete a sentence such
    as "x.csv is a zip archive: unpack it and give what it holds".
    """
    head = head[:HEAD]
    if head.startswith(ZIP) and (b"xl/" in head or b"[Content_Types].xml" in head):
        return "an Excel workbook (.xlsx)", EXCEL
    begin = head.lstrip().lower()
    for start, what, remedy in WORDS:
        if begin.startswith(start):
            return what, remedy
    for start, what, remedy in BYTES:
        if head.startswith(start):
            return what, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", PACKED
    encoding = wide_encoding(head)
    return (f"{encoding} text", to_utf8(encoding)) if encoding else None


def binary_kind(head, expected=()):
    """As `foreign_kind`, if a binary file is expected: also names text, pickles and empty files.

    expected: what the expected file begins with, as bytes. A file that begins so, or was cut short
    within it, gives None.
    """
    if any(head[: len(start)] == start[: len(head)] for start in expected):
        return None
    if head.startswith(HDF5):
        return "an HDF5 file", f"if it holds features, {CONVERT}"
    if found := foreign_kind(head):
        return found
    if not head.strip(b"\0"):
        return ("nothing but zero bytes" if head else "empty"), "fetch or make it again"
    if head.startswith(b"\x80"):
        return "a pickle", "load it where it was made, and save what is needed in the right form"
    if re.search(rb"[\0-\x08\x0e-\x1f\x7f-\xff]", head):
        return None
    if head.split(b"\n")[0].count(b"\t") >= TSV_COLUMNS - 1:
        return "a tab-separated table", f"if it holds bottom-up attention's features, {CONVERT}"
    return "text", OTHER


def wide_encoding(head):
    """The name of UTF-16 or UTF-32 if these are the first bytes of text in it; else None."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = head[first::2], head[1 - first :: 2]
        if len(head) >= LEAST and zeros.count(0) > NUL_SHARE * len(zeros) and not others.count(0):
            return encoding
    return None


def to_utf8(encoding):
    """What to do about text in another encoding."""
    return f"convert it with `iconv -f {encoding} -t UTF-8 OLD > NEW` and give that"
