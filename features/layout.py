"""Find out which captions and which feature rows belong to the same image.

If `<split>_ids.txt` names the images, the names decide. Without names, rows that are equal but for
rounding are one image. Images are numbered in the order in which they first appear, and an image's
first row stands for it.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch

from features.files import CAPTIONS_PER_IMAGE
from runtime.errors import InputError

# float16 changes a row by 0.0003 of its length; photos that look alike differ by 0.3 or more.
ROUNDING = 0.01
# Rows that `spread_of` samples; bytes compared at a time.
SAMPLE_ROWS, BLOCK_BYTES = 1000, 2**26
SKETCH, SKETCH_RADIUS = 8, 2.8  # chi-square of 8 exceeds 2.8**2 * 8 once in 10**9
MOST_PAIRS = 50  # equal rows per row, on average; more means broken features, not captions


class Layout(NamedTuple):
    """What belongs together in a split of precomputed features."""

    image_of: torch.Tensor  # (C,) each caption's image
    row_of: torch.Tensor  # (C,) each caption's feature row
    names: list | None  # N names of the images, or None


def caption_layout(features, n_captions, feature_file, ids_file, ids):
    """The Layout of features and captions; prints a line on stderr about what is guessed.

    ids: the lines of `ids_file`, or None if it does not exist. - One line per caption: captions
    with the same name are one image, and features have a row per caption or per image. - One line
    per row: rows with the same name are one image, and every row has five captions in turn. - No
    file: features have a row for every five captions in turn, or a row per caption (see
    `_by_rows`). Raises InputError for other numbers of rows, lines and captions.
    """
    rows, each = len(features), torch.arange(n_captions)
    if ids is not None:
        _check_ids(ids, rows, n_captions, ids_file)
    if ids is not None and len(ids) == n_captions:
        return _by_caption_names(features, ids, feature_file, ids_file)
    if rows * CAPTIONS_PER_IMAGE == n_captions:
        row_of = each // CAPTIONS_PER_IMAGE
        if ids is None:
            return Layout(row_of, row_of, None)
        image_of_row, names = numbered(ids)
        if len(names) < rows:
            print(
                f"note: {ids_file} has {len(names)} names for {rows} rows: rows of one name are "
                "taken for one image",
                file=sys.stderr,
            )
        found = Layout(image_of_row[row_of], row_of, names)
        _tell_unlike(features, found, feature_file)
        return found
    if rows == n_captions:
        return Layout(_by_rows(features, feature_file, ids_file), each, None)
    raise _misfit(features, n_captions, feature_file, ids_file)


def numbered(names):
    """Number names by first appearance: (n,) numbers, and the list of distinct names."""
    numbers = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names]), list(numbers)


def first_of(groups):
    """The position of the first element of each group: groups (n,) from 0 to N - 1 -> (N,)."""
    first = torch.empty(int(groups.max()) + 1, dtype=torch.int64)
    places = torch.arange(len(groups))
    return first.scatter_reduce_(0, groups, places, "amin", include_self=False)


def image_by_image(image_of):
    """The order of captions (C,) that puts each image's together, images by first caption."""
    return torch.sort(image_of, stable=True).indices


def within_cap(image_of, cap):
    """Positions, in order, of the captions of as many first images as have at most `cap` together.

    If the first image alone has more, its first `cap` captions.
    """
    if len(image_of) <= cap:
        return torch.arange(len(image_of))
    next_image = max(1, int(image_of.sort().values[cap]))
    return (image_of < next_image).nonzero().squeeze(1)[:cap]


def _check_ids(ids, rows, n_captions, ids_file):
    if len(ids) not in (rows, n_captions):
        raise InputError(
            f"{ids_file} has {len(ids)} lines for {rows} feature rows and {n_captions} captions: "
            "it needs one for each row, or for each caption; mend it, or remove it if each image "
            f"has {CAPTIONS_PER_IMAGE} captions in turn"
        )


def _misfit(features, n_captions, feature_file, ids_file, hint=""):
    rows = len(features)
    if features.dim() == 2 and features.shape[1] in (n_captions, n_captions / CAPTIONS_PER_IMAGE):
        return InputError(
            f"{feature_file} has {rows} rows of {features.shape[1]} numbers for {n_captions} "
            "captions, as if rows and columns were swapped: save the array transposed (array.T)"
        )
    return InputError(
        f"{feature_file} has {rows} rows for {n_captions} captions{hint}: there must be a row per "
        f"image, with {CAPTIONS_PER_IMAGE} captions each unless {ids_file} has a line per "
        "caption, or a row per caption"
    )


# By names ---------------------------------------------------------------------------------------


def _by_caption_names(features, ids, feature_file, ids_file):
    """The Layout if the ids file has a line per caption."""
    rows, each = len(features), torch.arange(len(ids))
    image_of, names = numbered(ids)
    n_images, steps = len(names), torch.ones(len(ids), dtype=torch.int64)
    steps[1:] = image_of.diff() != 0
    run_of = steps.cumsum(0) - 1  # number of the run of equal lines
    in_order = int(run_of[-1]) + 1 == n_images or len(set(ids[:n_images])) == n_images
    if rows == len(ids):
        found = Layout(image_of, each, names)
        unlike = _unlike(features, found)
        if in_order and len(unlike) == rows - n_images > 0:  # no two rows of a name are equal
            print(
                f"note: {feature_file} has as many rows as captions, {rows}, and those of one "
                f"name in {ids_file} are never the same: its first {n_images} rows are taken for "
                f"that file's {n_images} names in turn, the others for images without captions; "
                "if each caption has its own row, give rows of one name the same features",
                file=sys.stderr,
            )
            return found._replace(row_of=image_of)
        _tell_unlike(features, found, feature_file, unlike)
        return found
    if rows == n_images and in_order:
        return Layout(image_of, image_of, names)
    if rows == int(run_of[-1]) + 1:
        found = Layout(image_of, run_of, names)
        print(
            f"note: {ids_file} has {n_images} names, and some come back after others: the {rows} "
            "rows of the features are taken for its runs of equal lines, and runs of one name "
            "for one image",
            file=sys.stderr,
        )
        _tell_unlike(features, found, feature_file)
        return found
    if rows == n_images:
        raise InputError(
            f"{feature_file} has a row for each of the {rows} names in {ids_file}, whose captions "
            "do not stand together, so nothing tells which row is whose: sort captions and ids "
            "in the rows' order, or give features a row per caption"
        )
    raise _misfit(
        features, len(ids), feature_file, ids_file, f", of which {ids_file} makes {n_images} images"
    )


def _unlike(features, layout):
    """Feature rows that differ from the first row of their image by more than rounding."""
    first_captions = first_of(layout.row_of)
    image_of_row = layout.image_of[first_captions]
    representative = first_of(image_of_row)[image_of_row]
    rows = (representative != torch.arange(len(image_of_row))).nonzero().squeeze(1)
    return rows[~same_rows(features, rows, representative[rows])]


def _tell_unlike(features, layout, feature_file, unlike=None):
    """Warn of images whose rows differ."""
    unlike = _unlike(features, layout) if unlike is None else unlike
    if len(unlike):
        row = int(unlike[0])
        name = layout.names[int(layout.image_of[layout.row_of == row][0])]
        print(
            f"Warning: {len(unlike)} rows of {feature_file} are not the same as the first row of "
            f"their image, such as row {row} of {name!r}: the first stands for the image in "
            "evaluation; give different images different names",
            file=sys.stderr,
        )


# By rows ----------------------------------------------------------------------------------------


def _by_rows(features, feature_file, ids_file):
    """Each caption's image, (C,), if all that is known are features with a row per caption.

    VSE++ repeats each image's row five times. Otherwise equal rows are one image wherever they
    stand, and if no two are equal, each caption has its own.
    """
    rows = len(features)
    if in_fives(features):
        return torch.arange(rows) // CAPTIONS_PER_IMAGE
    image_of = equal_rows(features)
    n_images = int(image_of.max()) + 1
    what = (
        "one caption an image"
        if n_images == rows
        else f"{n_images} images, whose rows are the same"
    )
    print(
        f"note: {feature_file} has a row for each of {rows} captions, taken for {what}: if that "
        f"is wrong (say, {CAPTIONS_PER_IMAGE} captions for each of the first rows), add "
        f"{ids_file} with a line per caption that names its image",
        file=sys.stderr,
    )
    return image_of


def in_fives(features):
    """Whether each five rows in turn are equal."""
    if len(features) % CAPTIONS_PER_IMAGE:
        return False
    block = CAPTIONS_PER_IMAGE * max(1, _block(features) // CAPTIONS_PER_IMAGE)
    spread = spread_of(features[::CAPTIONS_PER_IMAGE])
    for part in features.split(block):
        fives = part.flatten(1).unflatten(0, (-1, CAPTIONS_PER_IMAGE))
        firsts = fives[:, :1].expand_as(fives)
        if (
            not torch.equal(fives, firsts)
            and not same_image(fives.flatten(0, 1), firsts.flatten(0, 1), spread).all()
        ):
            return False
    return True


def equal_rows(features):
    """The image of each row, (n,), if equal rows are one image.

    Rows of zeros carry no information: each is its own image. So is every row if all are equal, or
    so many that they cannot be captions of one image.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    n, spread = len(features), spread_of(features)
    if not spread:
        return torch.arange(n)
    points = torch.cat(
        [part.flatten(1).float() @ _sketch(features) for part in features.split(_block(features))]
    )
    tree, radius = cKDTree(points.numpy()), SKETCH_RADIUS * ROUNDING * spread
    if tree.count_neighbors(tree, radius) > MOST_PAIRS * n:
        return torch.arange(n)
    pairs = torch.from_numpy(tree.query_pairs(radius, output_type="ndarray")).long()
    pairs = _same_pairs(features, pairs[points[pairs[:, 0]].any(1)]).numpy()
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (n, n))
    return numbered(connected_components(graph, directed=False)[1].tolist())[0]


def _same_pairs(features, pairs):
    """Those of the pairs (n, 2), lower row first, that suffice to connect all equal rows.

    For most rows, the pair with the lowest other row is enough, so that one is compared first.
    """
    pairs = pairs[pairs[:, 0].sort(stable=True).indices]
    lowest = first_of(pairs[:, 1].unique(return_inverse=True)[1]) if len(pairs) else pairs[:, 0]
    same = torch.zeros(len(features), dtype=torch.bool)
    lowest = lowest[same_rows(features, *pairs[lowest].t())]
    same[pairs[lowest, 1]] = True
    others = pairs[~same[pairs[:, 1]]]
    return torch.cat([pairs[lowest], others[same_rows(features, *others.t())]])


def _sketch(features):
    """A random (width, SKETCH) matrix: products with it keep distances, approximately."""
    width = features[0].numel()
    return torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5


def same_rows(features, rows, others):
    """Which of `rows` (n,) equal `others` (n,) but for rounding, (n,) bool."""
    spread, block = spread_of(features), _block(features)
    return torch.cat(
        [
            torch.zeros(0, dtype=torch.bool),
            *(
                same_image(features[one].flatten(1), features[other].flatten(1), spread)
                for one, other in zip(rows.split(block), others.split(block))
            ),
        ]
    )


def same_image(rows, others, spread):
    """Which rows (n, width) equal `others` (n, width) but for rounding, (n,) bool.

    They may differ by 1 % of their length, and of `spread`, the typical distance from the mean:
    features that have much in common are still different images.
    """
    rows, others = rows.float(), others.float()
    alike = (rows == others) | (rows.isnan() & others.isnan())
    apart = torch.linalg.vector_norm((rows - others).masked_fill(alike, 0), dim=1)
    length = torch.linalg.vector_norm(others.nan_to_num(0, 0, 0), dim=1)
    return alike.all(1) | (apart < ROUNDING * length.clamp(max=spread))


def spread_of(features):
    """The root mean square distance of rows from their mean, over some rows, evenly spread."""
    n = max(2, min(len(features), SAMPLE_ROWS, _block(features)))
    places = torch.linspace(0, len(features) - 1, n).round().long()
    sample = features[places.to(features.device)].flatten(1).float().nan_to_num(0, 0, 0)
    return float((sample - sample.mean(0)).square().sum(1).mean().sqrt())


def _block(features):
    """How many rows to compare at a time."""
    return max(1, BLOCK_BYTES * len(features) // (features.numel() * features.element_size()))
