"""Draw the sample data set, so that `python3 train.py` has something to train on at once.

It consists of small pictures of coloured things on a ground, each with five captions that describe
a part of it. It is not in the paper: recalls on it show that training works, not what HAL reaches
on photographs.

`draw("data")` writes `data/sample_precomp/` (features and captions, laid out like `coco_precomp`)
and `data/sample/` (fewer pictures with Karpathy's JSON, laid out like `f8k`). The seed alone
decides what is drawn: all random draws come from one `random.Random`, and pixels and features are
computed such that they are identical on every machine.
"""

import hashlib
import importlib.metadata
import itertools
import json
import random
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from runtime.errors import InputError

SEED = 2020
SPLIT_IMAGES = {"train": 500, "dev": 200, "test": 200}
RAW_IMAGES = {"train": 60, "dev": 20, "test": 20}  # the first of each split
KARPATHY_SPLITS = {"train": "train", "dev": "val", "test": "test"}
GRID = 3  # a picture has GRID x GRID cells, each with room for one thing
CELL = 32  # pixels
SIDE = GRID * CELL
SHAPE_SIDE = 24  # shapes are defined in a square of this side
LEVELS = 3  # of a colour channel that features distinguish
COLOURS = LEVELS**3
# A part of the description that varies less over the training split is no feature.
LEAST_DEVIATION = 3
MOST_DEVIATIONS = 3  # features are clipped there, or rare ones would dominate

# What a thing is, another name for it, and the parts of its shape: outlines as corner points x,y
# and discs as x,y,radius. Where two parts overlap there is a hole.
KINDS = {
    "arrow": ("arrow", "0,8 13,8 13,1 24,12 13,23 13,16 0,16"),
    "ball": ("round ball", "12,12,12"),
    "boat": ("sailboat", "0,17 24,17 19,24 5,24; 11,0 11,15 2,15; 13,3 22,15 13,15"),
    "box": ("crate", "1,2 23,2 23,23 1,23; 1,8 23,8 23,10 1,10"),
    "cup": ("mug", "2,3 18,3 16,23 4,23; 18,6 24,6 24,16 17,16 17,13 21,13 21,9 18,9"),
    "fish": ("fish", "0,12 5,6 11,4 17,9 24,3 22,12 24,21 17,15 11,20 5,18; 6,11,2"),
    "flag": ("flag", "2,0 24,7 6,14 6,24 2,24"),
    "heart": ("heart", "12,24 1,12 0,7 3,2 8,1 12,5 16,1 21,2 24,7 23,12"),
    "house": ("cottage", "12,0 24,11 21,11 21,24 3,24 3,11 0,11; 9,15 15,15 15,24 9,24"),
    "mushroom": ("mushroom", "0,13 2,6 7,1 12,0 17,1 22,6 24,13 15,13 16,24 8,24 9,13"),
    "star": ("star", "12,0 15,9 24,9 17,14 20,23 12,17 4,23 7,14 0,9 9,9"),
    "tree": ("fir tree", "12,0 18,8 15,8 22,18 14,18 14,24 10,24 10,18 2,18 9,8 6,8"),
}
PLURALS = {"box": "boxes", "fish": "fish"}  # the others end in s

PAINTS = {  # red, green, blue, and the words for it
    "red": ((213, 42, 42), ("red", "red", "bright red")),
    "orange": ((235, 128, 30), ("orange",)),
    "yellow": ((230, 213, 42), ("yellow", "yellow", "golden")),
    "green": ((30, 140, 50), ("green", "green", "dark green")),
    "blue": ((42, 60, 213), ("blue",)),
    "purple": ((128, 42, 150), ("purple", "purple", "violet")),
    "pink": ((230, 120, 190), ("pink",)),
    "white": ((240, 240, 240), ("white",)),
    "black": ((25, 25, 25), ("black",)),
    "brown": ((120, 65, 30), ("brown",)),
}
PAINT_SHADES = 12  # a group's paint is lighter or darker by up to this much

SIZES = {  # pixels, and the words for it
    "small": (14, ("small", "little", "tiny")),
    "medium": (20, ("",)),
    "large": (28, ("large", "big", "huge")),
}


class Ground(NamedTuple):
    colour: tuple  # red, green, blue
    mark_colour: tuple
    mark_size: tuple  # height and width in pixels
    marks: int  # how many are strewn over it
    hides: tuple  # paints too similar to it
    settings: tuple  # phrases: what it is
    on: tuple  # phrases: where things on it are


GROUNDS = {
    "grass": Ground((120, 190, 90), (60, 150, 60), (4, 1), 70, ("green",),
                    ("a green meadow", "a lawn"), ("on the grass", "in the meadow")),
    "sand": Ground((225, 200, 140), (200, 160, 110), (1, 2), 80, (),
                   ("a sandy beach", "a desert"), ("on the sand", "on the beach", "in the desert")),
    "sea": Ground((60, 130, 195), (140, 200, 230), (1, 8), 30, (),
                  ("the open sea", "a calm lake"), ("on the water", "out at sea", "on the lake")),
    "night": Ground((30, 30, 110), (235, 235, 200), (1, 1), 40, ("blue", "black"),
                    ("a night sky", "a dark, clear night"), ("in the night sky", "in the dark")),
    "snow": Ground((232, 238, 244), (150, 190, 215), (2, 2), 30, ("white",),
                   ("a snowy field", "a winter scene"), ("in the snow", "on the snow")),
    "floor": Ground((165, 115, 60), (110, 70, 30), (1, SIDE), 9, ("brown", "orange"),
                    ("a wooden floor", "a floor of bare planks"),
                    ("on the floor", "on the planks")),
    "street": Ground((128, 128, 128), (225, 225, 225), (2, 12), 12, ("white",),
                     ("a grey street", "a long road"), ("on the street", "on the road")),
    "wall": Ground((210, 190, 180), (150, 60, 50), (4, 10), 110, ("red", "brown", "white"),
                   ("a brick wall", "an old wall"), ("on the wall", "against the bricks")),
}  # fmt: skip

CELL_PLACES = {  # (row, column) of a single thing
    (0, 0): ("in the upper left", "at the top left"),
    (0, 1): ("at the top", "near the top edge"),
    (0, 2): ("in the upper right", "at the top right"),
    (1, 0): ("on the left", "at the left edge"),
    (1, 1): ("in the middle", "in the centre"),
    (1, 2): ("on the right", "at the right edge"),
    (2, 0): ("in the lower left", "at the bottom left"),
    (2, 1): ("at the bottom", "near the bottom edge"),
    (2, 2): ("in the lower right", "at the bottom right"),
}

LINE_PLACES = {  # cells of three things in a line
    ((0, 0), (0, 1), (0, 2)): ("in a row at the top", "along the top"),
    ((1, 0), (1, 1), (1, 2)): ("in a row in the middle", "side by side in the middle"),
    ((2, 0), (2, 1), (2, 2)): ("in a row at the bottom", "along the bottom"),
    ((0, 0), (1, 0), (2, 0)): ("in a column on the left", "down the left side"),
    ((0, 1), (1, 1), (2, 1)): ("in a column in the middle", "one below the other"),
    ((0, 2), (1, 2), (2, 2)): ("in a column on the right", "down the right side"),
}
SCATTERED_PLACES = ("here and there", "in different places", "scattered about")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

# How often a caption is about the first group, and a description gives its colour and its size.
FIRST_GROUP, TELLS_COLOUR, TELLS_SIZE = 0.7, 0.9, 0.3

# Every picture gets one caption of each of: name, place, one or many, alone or together, ground.
PATTERNS = {
    "name": ("{thing} {on}.", "Somebody's put {thing} {on}.", "You can see {thing} here.",
             "A picture of {thing}.", "{setting} with {thing}."),
    "place": ("{thing} {place}.", "There {are} {thing} {place}.", "{place} {are} {thing}.",
              "The {colour} {noun} {are} {place}.", "Look, {thing} {place}!"),
    "one": ("Only one {noun} {on}, and it's {colour}.", "A single {noun}, {colour} all over.",
            "Just one {noun}. It's {colour}."),
    "many": ("{number} {noun} {on}.", "I count {number} {noun}, all {colour}.",
             "{number} {noun}. They're {colour}."),
    "alone": ("Nothing but {thing} {on}.", "{setting}, empty except for {thing}.",
              "{thing} and nothing else.", "{thing} {place}, nothing more."),
    "together": ("{thing} {relation} {other}.", "{thing} and {other} {on}.",
                 "{thing}, and {other} too.",
                 "The {colour} {noun} {are} {relation} {other}."),
    "ground": ("{setting}. {something} {are} {place}.",
               "It's {setting}, and the {noun} {are} {colour}.",
               "{something} {on}.", "Don't miss the {noun} {on}."),
}  # fmt: skip


class Group(NamedTuple):
    """Things that are alike, one in each of its cells."""

    kind: str
    paint: str
    size: str
    cells: tuple  # of (row, column)
    places: tuple  # phrases: where they are


class Scene(NamedTuple):
    ground: str
    groups: tuple  # the first is the one that most captions are about


class Example(NamedTuple):
    split: str
    filename: str
    pixels: np.ndarray  # (SIDE, SIDE, 3) uint8
    captions: list


def draw_scene(rng):
    """Draw a Scene of one to four groups of different kinds and paints."""
    ground = rng.choice(list(GROUNDS))
    count = rng.choice((1, 1, 1, 2, 2, 2, 2, 3, 3, 4))
    kinds = rng.sample(list(KINDS), count)
    paints = rng.sample([paint for paint in PAINTS if paint not in GROUNDS[ground].hides], count)
    free = list(CELL_PLACES)
    groups = []
    for kind, paint in zip(kinds, paints):
        cells, places = draw_cells(free, count - len(groups) - 1, rng)
        free = [cell for cell in free if cell not in cells]
        groups.append(Group(kind, paint, rng.choice(list(SIZES)), cells, places))
    return Scene(ground, tuple(groups))


def draw_cells(free, spare, rng):
    """Draw cells for a group, with phrases for where they are; `spare` free cells stay free."""
    lines = [line for line in LINE_PLACES if set(line) <= set(free)]
    most = min(len(NUMBERS) - 1, len(free) - spare)
    arrangement = rng.choice(("single", "single", "line", "scattered"))
    if arrangement == "line" and lines and most >= GRID:
        line = rng.choice(lines)
        return line, LINE_PLACES[line]
    if arrangement == "scattered" and most >= 2:
        cells = tuple(sorted(rng.sample(free, rng.randint(2, most))))
        return cells, LINE_PLACES.get(cells, SCATTERED_PLACES)
    cell = rng.choice(free)
    return (cell,), CELL_PLACES[cell]


@cache
def stencil(kind, side):
    """The pixels whose centres lie in the shape, by the even-odd rule: (side, side) bool."""
    # In units in which corner points are integers as well.
    centres = (2 * np.arange(side) + 1) * SHAPE_SIDE
    x, y = centres[None, :], centres[:, None]
    inside = np.zeros((side, side), bool)
    for part in KINDS[kind][1].split(";"):
        points = [
            tuple(2 * side * int(number) for number in point.split(",")) for point in part.split()
        ]
        if len(points) == 1:
            disc_x, disc_y, radius = points[0]
            inside ^= (x - disc_x) ** 2 + (y - disc_y) ** 2 <= radius**2
            continue
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
            beside = (x - x0) * (y1 - y0) < (x1 - x0) * (y - y0)
            inside ^= ((y0 > y) != (y1 > y)) & (beside == (y1 > y0))
    return inside


def paint_scene(scene, rng):
    """The scene's pixels, (SIDE, SIDE, 3) uint8."""
    ground = GROUNDS[scene.ground]
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:] = ground.colour
    height, width = ground.mark_size
    for _ in range(ground.marks):
        top, left = rng.randint(0, SIDE - height), rng.randint(0, SIDE - width)
        pixels[top : top + height, left : left + width] = ground.mark_colour
    for group in scene.groups:
        shade = rng.randint(-PAINT_SHADES, PAINT_SHADES)
        colour = [min(255, channel + shade) for channel in PAINTS[group.paint][0]]
        side = SIZES[group.size][0]
        for row, column in group.cells:
            top, left = (CELL * cell + rng.randint(1, CELL - side - 1) for cell in (row, column))
            pixels[top : top + side, left : left + side][stencil(group.kind, side)] = colour
    return pixels


def noun(group, rng):
    name = rng.choice((group.kind, KINDS[group.kind][0]))
    return name if len(group.cells) == 1 else PLURALS.get(name, f"{name}s")


def describe(group, rng):
    """A phrase such as "a large red star", "two stars" or "some tiny boxes"."""
    count = len(group.cells)
    size = rng.choice(SIZES[group.size][1]) if rng.random() < TELLS_SIZE else ""
    colour = rng.choice(PAINTS[group.paint][1]) if rng.random() < TELLS_COLOUR else ""
    words = " ".join(word for word in (size, colour, noun(group, rng)) if word)
    if count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    vague = "a pair of" if count == 2 else rng.choice(("some", "several"))
    return f"{rng.choice((NUMBERS[count], NUMBERS[count], vague))} {words}"


def relation(group, other, rng):
    """Where the group is, seen from the other; something vague unless all of it is on one side."""
    rows, columns = zip(*group.cells)
    other_rows, other_columns = zip(*other.cells)
    if max(columns) < min(other_columns):
        return rng.choice(("to the left of", "left of"))
    if min(columns) > max(other_columns):
        return rng.choice(("to the right of", "right of"))
    if max(rows) < min(other_rows):
        return rng.choice(("above", "over"))
    if min(rows) > max(other_rows):
        return rng.choice(("below", "beneath"))
    return rng.choice(("near", "not far from"))


def phrases(group, scene, rng):
    """The fields of PATTERNS for one caption, which is mostly about the group."""
    colour = rng.choice(PAINTS[group.paint][1])
    several = len(group.cells) > 1
    fields = {
        "thing": describe(group, rng),
        "noun": noun(group, rng),
        "colour": colour,
        "number": NUMBERS[len(group.cells)],
        "something": f"some {colour} things" if several else f"something {colour}",
        "are": "are" if several else "is",
        "place": rng.choice(group.places),
        "on": rng.choice(GROUNDS[scene.ground].on),
        "setting": rng.choice(GROUNDS[scene.ground].settings),
    }
    others = [other for other in scene.groups if other != group]
    if others:
        other = rng.choice(others)
        fields.update(other=describe(other, rng), relation=relation(group, other, rng))
    return fields


def write_captions(scene, rng):
    """Five captions, no two alike."""
    captions = []
    for told in ("name", "place", "count", "company", "ground"):
        group = scene.groups[0] if rng.random() < FIRST_GROUP else rng.choice(scene.groups)
        if told == "count":
            told = "many" if len(group.cells) > 1 else "one"
        if told == "company":
            told = "together" if len(scene.groups) > 1 else "alone"
        while True:
            caption = rng.choice(PATTERNS[told]).format(**phrases(group, scene, rng))
            caption = re.sub(r"(^|\. )([a-z])", lambda start: start[1] + start[2].upper(), caption)
            if caption not in captions:
                break
        captions.append(caption)
    rng.shuffle(captions)
    return captions


def draw_examples(seed):
    """Draw all examples of all splits.

    No two have the same kinds, paints and numbers on the same ground.
    """
    rng = random.Random(seed)
    examples, gists = [], set()
    for split, images in SPLIT_IMAGES.items():
        for _ in range(images):
            while True:
                scene = draw_scene(rng)
                gist = (
                    scene.ground,
                    frozenset((g.kind, g.paint, len(g.cells)) for g in scene.groups),
                )
                if gist not in gists:
                    break
            gists.add(gist)
            filename = f"sample_{len(examples):04d}.png"
            examples.append(
                Example(split, filename, paint_scene(scene, rng), write_captions(scene, rng))
            )
    return examples


def describe_pixels(pixels):
    """Integers that describe where a picture's colours are, and what shapes they have.

    pixels: (SIDE, SIDE, 3) uint8; returns (GRID * GRID * COLOURS + COLOURS * 14,).

    First, for each cell and colour, the square root of the colour's area, in hundredths. Then, for
    each colour, how its edge divides into the 14 ways in which a colour can partly fill a patch of
    two by two pixels, in thousandths: lines, slopes and corners, which differ between shapes.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.int64) * LEVELS // 256, 2, 0)
    colours = (red * LEVELS + green) * LEVELS + blue
    rows = np.arange(SIDE) // CELL
    cells = rows[:, None] * GRID + rows[None, :]
    areas = np.bincount((cells * COLOURS + colours).ravel(), minlength=GRID * GRID * COLOURS)

    index = np.arange(COLOURS)[:, None, None]
    has = (colours == index).astype(np.int16)  # (COLOURS, SIDE, SIDE)
    patches = has[:, :-1, :-1] + 2 * has[:, :-1, 1:] + 4 * has[:, 1:, :-1] + 8 * has[:, 1:, 1:]
    counts = np.bincount((16 * index + patches).ravel(), minlength=16 * COLOURS).reshape(
        COLOURS, 16
    )
    edges = counts[:, 1:15]  # patches without the colour, and full of it, are left out
    shares = 1000 * edges // np.maximum(edges.sum(axis=1, keepdims=True), 1)
    return np.concatenate([np.rint(100 * np.sqrt(areas)).astype(np.int64), shares.ravel()])


def compute_features(examples):
    """Features (n_examples, width) float32, rows of length one, and the `standard` behind them.

    They are descriptions, standardised over the training split. Without centring, all pictures
    would look alike to a new model, and HAL does not pull together a pair whose similarity is
    negative. Only integers are summed, so the order of the sums does not matter.
    """
    descriptions = np.stack([describe_pixels(example.pixels) for example in examples])
    own = standard(descriptions[[example.split == "train" for example in examples]])
    return standardise(descriptions, own), own


def standard(descriptions):
    """The centre and deviation, (width,) each, of the training split's descriptions (n, width)."""
    centre = descriptions.sum(axis=0) // len(descriptions)
    return centre, np.sqrt(((descriptions - centre) ** 2).sum(axis=0) / len(descriptions))


def standardise(descriptions, standard):
    """Features, float32 with rows of length one, from descriptions (n, width).

    Parts of the description that hardly vary are left out.
    """
    centre, deviation = standard
    varies = deviation > LEAST_DEVIATION
    # in hundredths of a deviation
    scores = np.rint(100 * (descriptions - centre)[:, varies] / deviation[varies]).astype(np.int64)
    scores = scores.clip(-100 * MOST_DEVIATIONS, 100 * MOST_DEVIATIONS)
    return (scores / np.sqrt((scores**2).sum(axis=1, keepdims=True))).astype(np.float32)


def describe_features(standard):
    """The features.json (see features/description.py) of features standardised by `standard`."""
    digest = hashlib.sha256(b"".join(part.tobytes() for part in standard)).hexdigest()
    return {
        "format": 1,
        "encoder": "sample",
        "weights": "none",
        "weights_sha256": digest,
        "pooling": "pooled",
        "regions": None,
        "normalised": False,
        "resize": SIDE,
        "size": SIDE,
        "interpolation": "bicubic",
        "mean": [],
        "std": [],
        "width": int((standard[1] > LEAST_DEVIATION).sum()),
        "versions": {
            package: importlib.metadata.version(package) for package in ("numpy", "pillow")
        },
    }


def save_images(folder, examples):
    (folder / "images").mkdir()
    for example in examples:
        Image.fromarray(example.pixels).save(folder / "images" / example.filename)


def write_precomp(folder, examples):
    """Write pictures, features.json and, for each split, features, captions and file names."""
    save_images(folder, examples)
    features, own = compute_features(examples)
    description = {**describe_features(own), "dtype": str(features.dtype), "amp": "off"}
    write_lines(folder / "features.json", [json.dumps(description, indent=1)])
    for split in SPLIT_IMAGES:
        rows = [row for row, example in enumerate(examples) if example.split == split]
        captions = [caption for row in rows for caption in examples[row].captions]
        np.save(folder / f"{split}_ims.npy", features[rows])
        write_lines(folder / f"{split}_caps.txt", captions)
        write_lines(folder / f"{split}_ids.txt", [examples[row].filename for row in rows])


def write_lines(path, lines):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_raw(folder, examples):
    """Write a few of the pictures, with their captions in Karpathy's JSON."""
    splits = {
        split: [example for example in examples if example.split == split] for split in RAW_IMAGES
    }
    chosen = [example for split, images in RAW_IMAGES.items() for example in splits[split][:images]]
    save_images(folder, chosen)
    images, sentence_ids = [], itertools.count()
    for image_id, example in enumerate(chosen):
        sentences = [
            {"raw": caption, "tokens": re.findall(r"[a-z]+", caption.lower().replace("'", "")),
             "imgid": image_id, "sentid": next(sentence_ids)}
            for caption in example.captions
        ]  # fmt: skip
        images.append({
            "filename": example.filename, "split": KARPATHY_SPLITS[example.split],
            "imgid": image_id,
            "sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences,
        })  # fmt: skip
    write_lines(
        folder / "dataset_sample.json", [json.dumps({"dataset": "sample", "images": images})]
    )


WRITERS = {"sample_precomp": write_precomp, "sample": write_raw}


def draw(data_path, seed=SEED):
    """Draw those folders of WRITERS that data_path lacks; return their paths.

    Each appears whole or not at all: it is written to a scratch folder beside it and then moved.
    Raises InputError if data_path cannot be written.
    """
    try:
        return draw_missing(Path(data_path), seed)
    except OSError as error:
        raise InputError(
            f"the sample data cannot be drawn into --data_path {data_path} "
            f"({error.strerror or error}): name a writable folder with a few megabytes of free "
            "space"
        ) from error


def draw_missing(data_path, seed):
    """As `draw`, but raises OSError."""
    missing = [name for name in WRITERS if not (data_path / name).exists()]
    if not missing:
        return []
    examples = draw_examples(seed)
    data_path.mkdir(parents=True, exist_ok=True)
    for name in missing:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_path) as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            WRITERS[name](folder, examples)
            try:
                folder.rename(data_path / name)
            except OSError:
                # If it exists, another process was faster: drop ours.
                if not (data_path / name).is_dir():
                    raise
    return [data_path / name for name in missing]
