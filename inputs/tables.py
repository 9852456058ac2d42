"""Tables of photos and captions: CSV, TSV and Flickr's token files, with the usual columns."""

import csv
import io
import re
import sys
from typing import NamedTuple

from runtime.errors import InputError

SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a |"}

# Names of the columns in tables found on the web; the first is what they are called here.
IMAGE_COLUMNS = (
    "image",
    "image_name",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "image_file",
    "file",
    "path",
    "img",
)

CAPTION_COLUMNS = (
    "caption",
    "captions",
    "title",
    "comment",
    "text",
    "sentence",
    "raw",
    "description",
    "caption_text",
)
NUMBER_COLUMN = "comment_number"  # of Flickr30k's results.csv
SHOWN = 60  # characters quoted in a message
TOKEN_LINE = re.compile(r"([^\t]+)#\d+ *\t(.*)")  # as in Flickr8k.token.txt
_PHOTO = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:#\d+)?"

# A photo's name or number, then a separator.
NAMED_LINE = re.compile(rf"[^\t]+#\d+ *\t|\S+{_PHOTO} *[\t,;|]|\d+\t", re.IGNORECASE)
PHOTO_NAME = re.compile(rf"[^\n]*{_PHOTO}", re.IGNORECASE)
NUMBERED = re.compile(r"\S*\d\S*")  # a name without an ending, such as an id


class Row(NamedTuple):
    """What a caption file says about one caption."""

    where: str  # its place in the file, in words
    name: str  # of the photo, as the file has it
    caption: str | None  # None: the photo has none
    split: str | None  # None: the file gives none
    folder: str = ""  # of the photo, if given beside the name (Karpathy's `filepath`)


def names_photos(lines):
    """Whether most non-blank lines begin with a photo's name or number and a separator."""
    filled = [line for line in lines if line]
    return 2 * sum(bool(NAMED_LINE.match(line)) for line in filled) > len(filled)


def table_rows(path, text):
    """The Rows of a table's text: a header, then a photo and a caption per line; or a token file.

    Raises InputError, naming the line, for a table that is broken or lacks the columns.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")
    if TOKEN_LINE.match(first):
        return _token_rows(path, text)
    return _header_rows(path, text, max(SEPARATORS, key=first.count))


def _token_rows(path, text):
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = TOKEN_LINE.match(line)
        if found is None:
            raise InputError(
                f"{path}, line {number}: {line[:SHOWN]!r} is not `image#number<TAB>"
                "caption`, as the first line is: mend that line"
            )
        yield Row(f"line {number}", found[1].strip(), found[2], None)


def _header_rows(path, text, separator):
    records = _records(path, text, separator)
    header = [cell.strip() for cell in next(records, (1, []))[1]]
    image, caption, split = _columns(path, header)
    for line, cells in records:
        if not any(map(str.strip, cells)):  # Excel leaves such rows at the end
            continue
        if len(cells) == len(header) - 1:
            cells = _with_number(path, line, cells, header)
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the header has "
                f"{len(header)}: put quotation marks around cells that contain "
                f"{SEPARATORS[separator]}"
            )
        _refuse_swallowed(path, line, cells, separator, image)
        name = cells[image].strip()
        if not name:
            raise InputError(f"{path}, line {line}: the cell of the image is empty: name a file")
        own = cells[split].strip() if split is not None else None
        yield Row(f"line {line}", name, cells[caption], own or None)


def _records(path, text, separator):
    """Yield (first line's number, cells) of each record; InputError for stray quotation marks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}, line {line}: {error}, with what was read up to line "
                f"{reader.line_num} as one row: check the quotation marks there"
            ) from error


def _columns(path, header):
    """The indices of a table's columns: (image, caption, split or None)."""
    lowered = [cell.lower() for cell in header]
    image = _column(path, lowered, IMAGE_COLUMNS)
    caption = _column(path, lowered, CAPTION_COLUMNS)
    if image is None or caption is None:
        shown = ", ".join(header[:10])[:SHOWN]
        if header and NAMED_LINE.match(f"{header[0]}\t"):
            raise InputError(
                f"{path} has no header, its first line is {shown!r}: put "
                "`image,caption` above it, with the separator of the other lines"
            )
        raise InputError(
            f"{path} has the columns {shown!r}: its first line must name image and caption (and, "
            "if you like, split) once each, separated by commas, tabs, semicolons or |"
        )
    if (lowered[image], lowered[caption]) != (IMAGE_COLUMNS[0], CAPTION_COLUMNS[0]):
        print(
            f"note: {path}: photos are read from the column {header[image]!r}, captions from "
            f"{header[caption]!r}",
            file=sys.stderr,
        )
    return image, caption, _column(path, lowered, ("split",))


def _column(path, header, names):
    """The index of the one column with one of these names, or None; names[0] comes first."""
    found = [place for place, cell in enumerate(header) if cell == names[0]] or [
        place for place, cell in enumerate(header) if cell in names
    ]
    if len(found) > 1:
        raise InputError(
            f"{path} has several columns that may be the {names[0]}, "
            f"{' and '.join(header[place] for place in found)}: call the right one "
            f"{names[0]}, and no other"
        )
    return found[0] if found else None


def _with_number(path, line, cells, header):
    """Repair a row of results.csv that lacks the separator after its caption's number.

    Flickr30k has one such row.
    """
    lowered = [cell.lower() for cell in header]
    number = lowered.index(NUMBER_COLUMN) if NUMBER_COLUMN in lowered else len(cells)
    found = number < len(cells) and re.fullmatch(r"\s*(\d+)\s+(\S.*)", cells[number], re.DOTALL)
    if not found:
        return cells
    print(
        f"note: {path}, line {line}: read as if a separator stood after the number {found[1]}",
        file=sys.stderr,
    )
    return [*cells[:number], found[1], found[2], *cells[number + 1 :]]


def _refuse_swallowed(path, line, cells, separator, image):
    """Raise InputError if a quoted cell swallows rows because its closing mark is missing."""
    for cell in cells:
        lines = re.split("[\r\n]+", cell)
        for inner in lines if len(lines) > 1 else []:
            parts = [part.strip(' "') for part in inner.split(separator)]
            named = any(map(PHOTO_NAME.fullmatch, parts)) or (
                len(parts) == len(cells) and NUMBERED.fullmatch(parts[image])
            )
            if len(parts) > 1 and named:
                raise InputError(
                    f"{path}, line {line}: a quoted cell that begins there swallows "
                    f"further rows, such as {inner[:SHOWN]!r}: close its quotation "
                    "mark, or take it out"
                )
