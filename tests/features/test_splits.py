"""Splits that are drawn for photos whose captions give none."""

import numpy as np
import pytest

import extract_features
from features.splits import draw_splits


@pytest.mark.parametrize(
    "n, flags, expected",
    [
        (2, {}, (2, 0, 0)),
        (3, {}, (1, 1, 1)),
        (40, {}, (32, 4, 4)),
        (20_000, {}, (18_000, 1000, 1000)),
        (40, {"dev": 0}, (36, 0, 4)),
        (10, {"dev": 9, "test": 0}, (1, 9, 0)),
    ],
)
def test_a_tenth_of_the_photos_is_drawn_unless_told(n, flags, expected):
    args = extract_features.parse_args(
        [
            "--images",
            "x",
            "--output",
            "x",
            *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
        ]
    )
    splits = draw_splits(args, [f"{number}.jpg" for number in range(n)])
    assert tuple(splits.count(split) for split in ("train", "dev", "test")) == expected


@pytest.mark.parametrize(
    "before, after", [(1000, 1001), (1000, 1200), (1000, 2000), (20_000, 20_500)]
)
def test_further_photos_move_few_of_the_others_to_another_split(before, after):
    args = extract_features.parse_args(["--images", "x", "--output", "x"])
    names = [f"{number}.jpg" for number in np.random.default_rng(1).permutation(after)]
    old, new = (dict(zip(some, draw_splits(args, some))) for some in (names[:before], names))
    tested_on = [name for name in old if new[name] == "test"]
    assert sum(old[name] == "train" for name in tested_on) <= 0.1 * len(tested_on)
    assert not [name for name in tested_on if old[name] == "dev"]
