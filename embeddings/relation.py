"""Find out which captions belong to which image, given rows of images and of captions.

In order of precedence:

- Two files of ids, one for captions and one for images: a caption belongs to the image of its id.
- Ids of captions. If they are the numbers of the rows, 0 to n - 1, they say which row is theirs.
  Otherwise there is a row per caption, and those of one id are the same image; or a row per id,
  in the order in which ids appear.
- Nothing. Five captions an image in turn; or, with as many rows as captions, equal rows are the
  same image.

Anything else is refused: a wrong guess gives recalls that look right. One line on stderr says what
was found.
"""

import sys
from typing import NamedTuple

import torch

from embeddings.files import in_blocks
from features.files import CAPTIONS_PER_IMAGE
from features.layout import equal_rows, first_of, image_by_image, in_fives, numbered, same_rows
from runtime.errors import InputError


class Relation(NamedTuple):
    """N images, C captions, and what belongs together. Images are in the order of first captions."""

    lines: torch.Tensor  # (C,) captions' rows in their file, image by image
    image_of: torch.Tensor  # (C,) each one's image, ascending from 0
    row_of: torch.Tensor  # (N,) each image's row in its file
    names: list | None  # N ids


class Sources(NamedTuple):
    """How messages name the files."""

    images: str
    captions: str
    ids: str  # of captions
    image_ids: str = ""


def relate(rows, n_captions, ids, image_ids, sources):
    """The Relation of images and captions; see the module's text.

    rows: (n, ...) of images, a tensor; ids, image_ids: lists, or None; sources: a Sources
    Raises InputError if they do not fit each other.
    """
    n_rows = len(rows)
    if ids is None and image_ids is not None:
        ids, image_ids = image_ids, None
    if ids is not None and image_ids is not None:
        row_of, how = _by_both(rows, n_captions, ids, image_ids, sources)
    elif ids is not None and len(ids) == n_captions:
        row_of, how = _by_caption_ids(rows, ids, sources)
    elif n_rows * CAPTIONS_PER_IMAGE == n_captions and (ids is None or len(ids) == n_rows):
        row_of = torch.arange(n_captions) // CAPTIONS_PER_IMAGE
        how = f"{CAPTIONS_PER_IMAGE} captions for each image in turn"
        if ids is None and (copies := repeated(rows)):
            how += f"; copies of earlier rows: {copies}, which ids alone would join"
        if ids is not None:
            row_of = _first_rows(rows, ids, sources.images, sources.ids)[row_of]
    elif n_rows == n_captions and ids is None:
        row_of, how = _by_rows(rows)
    else:
        raise _misfit(n_rows, n_captions, ids, sources)
    names = None
    if ids is not None:
        by_row = ids if len(ids) == n_rows and len(ids) != n_captions else None
        names = [by_row[row] for row in row_of.tolist()] if by_row else ids
    return _ordered(row_of, names, how, sources, n_rows)


def _ordered(row_of, names, how, sources, n_rows):
    """The Relation of captions with these rows (C,) and names (C), or None; says what was found."""
    image_of = numbered(row_of.tolist())[0]
    lines = image_by_image(image_of)
    firsts = first_of(image_of)
    n_images, n_captions = len(firsts), len(row_of)
    each = torch.bincount(image_of)
    least, most = int(each.min()), int(each.max())
    print(
        f"note: {sources.images}: {n_images} images in {n_rows} rows, {least}"
        + (f" to {most}" if most > least else "")
        + f" captions each, {n_captions} in all ({how})",
        file=sys.stderr,
    )
    names = names and [names[caption] for caption in firsts.tolist()]
    return Relation(lines, image_of[lines], row_of[firsts], names)


def _first_rows(rows, ids, images, shown):
    """For each row, the first row of its id: (n,); InputError unless rows of one id are equal."""
    image_of, names = numbered(ids)
    firsts = first_of(image_of)[image_of]
    others = (firsts != torch.arange(len(ids))).nonzero().squeeze(1)
    unlike = others[~same_rows(rows, others, firsts[others])]
    if len(unlike):
        row = int(unlike[0])
        raise InputError(
            f"{shown} gives rows {int(firsts[row])} and {row} of {images} one id, {ids[row]!r}, "
            "but they differ: give different images different ids"
        )
    return firsts


def _by_both(rows, n_captions, ids, image_ids, sources):
    """Each caption's row (C,) if both sides have ids, and how it was found."""
    for one, n, what, shown in (
        (image_ids, len(rows), sources.images, sources.image_ids),
        (ids, n_captions, sources.captions, sources.ids),
    ):
        if len(one) != n:
            raise InputError(
                f"{shown} has {len(one)} ids for the {n} rows of {what}: give one for each row"
            )
    row_of_id = dict(zip(reversed(image_ids), reversed(range(len(rows)))))  # an id's first row
    for line, name in enumerate(ids):
        if name not in row_of_id:
            raise InputError(
                f"{sources.ids}, line {line + 1}: {name!r} is not among the ids of images in "
                f"{sources.image_ids}: mend one of them"
            )
    _first_rows(rows, image_ids, sources.images, sources.image_ids)
    _check_used(row_of_id, ids, sources)
    return torch.tensor([row_of_id[name] for name in ids]), "by ids on both sides"


def _check_used(there, ids, sources):
    """Raise InputError if images have no caption, which would leave them without a rank."""
    unused = there.keys() - set(ids)
    if unused:
        name = next(name for name in there if name in unused)
        raise InputError(
            f"{sources.ids} names {len(there) - len(unused)} of the {len(there)} images of "
            f"{sources.images}, and not {name!r}: give each a caption, or leave those rows out"
        )


def _by_caption_ids(rows, ids, sources):
    """Each caption's row (C,) by the ids of captions alone, and how it was found."""
    n_rows, (image_of, names) = len(rows), numbered(ids)
    if len(names) == n_rows and set(names) == set(map(str, range(n_rows))):
        return torch.tensor(list(map(int, ids))), "ids are the numbers of rows, from 0"
    if n_rows == len(ids):
        return _first_rows(rows, ids, sources.images, sources.ids), "a row per caption, by ids"
    if n_rows != len(names):
        raise _misfit(n_rows, len(ids), ids, sources)
    runs = int((image_of.diff() != 0).sum()) + 1
    if runs > n_rows and len(set(ids[:n_rows])) < n_rows:
        raise InputError(
            f"{sources.ids} has the {n_rows} ids of {sources.images} in no order that tells which "
            "row is whose: give the ids of its rows in a second file after the first, or sort "
            "captions by image"
        )
    return image_of, "a row per id, in the order in which ids appear"


def _by_rows(rows):
    """Each caption's row (C,) if rows of images are given per caption, and how it was found."""
    if in_fives(rows):
        firsts = torch.arange(len(rows)) // CAPTIONS_PER_IMAGE * CAPTIONS_PER_IMAGE
        return firsts, f"each row comes {CAPTIONS_PER_IMAGE} times in turn"
    image_of = equal_rows(rows)
    firsts = first_of(image_of)
    if len(firsts) == len(rows):
        return image_of, "a caption an image, since no two rows are equal"
    return firsts[image_of], "equal rows are the same image"


def repeated(rows):
    """How many rows equal an earlier one to the bit."""
    seen = set()
    for _, block in in_blocks(rows):
        seen.update(hash(row.tobytes()) for row in block.contiguous().view(torch.uint8).numpy())
    return len(rows) - len(seen)


def _misfit(n_rows, n_captions, ids, sources):
    """The InputError for counts that do not fit."""
    if ids is None:
        return InputError(
            f"{sources.images} has {n_rows} rows for the {n_captions} of {sources.captions}: there "
            f"must be as many captions, or {CAPTIONS_PER_IMAGE} for each image in turn; otherwise "
            f"give {sources.ids.split()[0]} a file with the image's id for each caption on a line"
        )
    return InputError(
        f"{sources.ids} has {len(ids)} lines with {len(set(ids))} ids, {sources.images} has "
        f"{n_rows} rows and {sources.captions} {n_captions}: there must be a line for each "
        "caption, and a row for each id or for each caption"
    )
