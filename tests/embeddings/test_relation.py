"""Which captions belong to which image: every layout against plain loops."""

import numpy as np
import pytest
import torch

from embeddings.relation import Sources, relate
from runtime.errors import InputError

SOURCES = Sources("--embeddings I", "--embeddings C", "--ids F", "--ids G")
RNG = np.random.default_rng(5)


def rows(n, width=6):
    return torch.from_numpy(np.random.default_rng(n).standard_normal((n, width)).astype(np.float32))


def found(images, n_captions, ids=None, image_ids=None):
    return relate(images, n_captions, ids, image_ids, SOURCES)


def check(relation, row_of_caption, images):
    """The relation gives each caption a row that is its image's, and images by first caption."""
    n_captions = len(row_of_caption)
    assert sorted(relation.lines.tolist()) == list(range(n_captions))
    assert relation.image_of.tolist() == sorted(relation.image_of.tolist())
    groups = {}
    for caption in range(n_captions):  # images by the bits of their rows, in order of appearance
        groups.setdefault(images[row_of_caption[caption]].numpy().tobytes(), []).append(caption)
    expected = list(groups.values())
    for image, captions in enumerate(expected):
        own = [
            line
            for line, number in zip(relation.lines.tolist(), relation.image_of.tolist())
            if number == image
        ]
        assert own == captions
        assert torch.equal(images[relation.row_of[image]], images[row_of_caption[captions[0]]])
    assert len(relation.row_of) == len(expected)


def test_five_captions_an_image_in_turn(capsys):
    images = rows(4)
    check(found(images, 20), [caption // 5 for caption in range(20)], images)
    assert "4 images in 4 rows, 5 captions each, 20 in all (5 captions" in capsys.readouterr().err


def test_five_captions_an_image_with_names_of_the_rows():
    relation = found(rows(4), 20, list("abcd"))
    assert relation.names == list("abcd")


def test_rows_of_one_name_are_one_image():
    images = rows(4)
    images[3] = images[1]
    relation = found(images, 20, list("abcb"))
    check(relation, [caption // 5 for caption in range(20)], images)
    assert relation.names == list("abc") and len(relation.lines) == 20


def test_copies_among_five_captions_each_stay_and_are_counted(capsys):
    images = rows(4)
    images[3] = images[1]
    assert len(found(images, 20).row_of) == 4
    assert "copies of earlier rows: 1, which ids alone would join" in capsys.readouterr().err


def test_rows_repeated_five_times_in_turn(capsys):
    images = rows(4).repeat_interleave(5, 0)
    check(found(images, 20), list(range(20)), images)
    assert "each row comes 5 times in turn" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_uneven_equal_rows_in_any_order_are_one_image(capsys, kind):
    own = RNG.permutation(np.repeat(np.arange(6), [1, 4, 2, 7, 3, 2])).tolist()
    images = rows(6)[own].to(kind)
    check(found(images, 19), list(range(19)), images.float())
    assert "6 images in 19 rows, 1 to 7 captions each, 19 in all (equal rows" in (
        capsys.readouterr().err
    )


def test_a_caption_an_image(capsys):
    images = rows(7)
    check(found(images, 7), list(range(7)), images)
    assert "a caption an image, since no two rows are equal" in capsys.readouterr().err


def test_uneven_ids_in_the_order_of_the_rows():
    images, ids = rows(3), ["x", "y", "y", "z", "z", "z"]
    relation = found(images, 6, ids)
    check(relation, [0, 1, 1, 2, 2, 2], images)
    assert relation.names == ["x", "y", "z"]


def test_permuted_ids_that_are_row_numbers():
    own = RNG.permutation(np.repeat(np.arange(5), [3, 1, 2, 5, 4])).tolist()
    images = rows(5)
    relation = found(images, 15, list(map(str, own)))
    check(relation, own, images)
    assert relation.names == [str(row) for row in dict.fromkeys(own)]


def test_permuted_row_numbers_of_as_many_captions():
    own = RNG.permutation(9).tolist()
    images = rows(9)
    check(found(images, 9, list(map(str, own))), own, images)


def test_permuted_ids_of_a_row_per_caption():
    own = RNG.permutation(np.repeat(np.arange(5), [3, 1, 2, 5, 4])).tolist()
    images = rows(5)[own]
    relation = found(images, 15, [f"photo {row}" for row in own])
    check(relation, list(range(15)), images)


def test_permuted_ids_on_both_sides():
    own = RNG.permutation(np.repeat(np.arange(5), [3, 1, 2, 5, 4])).tolist()
    order = RNG.permutation(5).tolist()  # row r is photo order[r]
    images = rows(5)
    relation = found(images, 15, [f"photo {one}" for one in own], [f"photo {one}" for one in order])
    check(relation, [order.index(one) for one in own], images)
    assert relation.names[0] == f"photo {own[0]}"


def test_ids_on_both_sides_find_repeated_rows():
    images = rows(3)[[0, 1, 0, 2]]
    relation = found(images, 4, ["b", "a", "a", "c"], ["a", "b", "a", "c"])
    check(relation, [1, 0, 0, 3], images)


BAD = {
    "other counts": ((rows(4), 13), "has 4 rows for the 13 of --embeddings C: .* give --ids a fil"),
    "more rows than captions": ((rows(9), 4), "has 9 rows for the 4"),
    "too few ids": (
        (rows(4), 20, ["a"] * 7),
        "--ids F has 7 lines with 1 ids, --embeddings I has 4 rows and --embeddings C 20",
    ),
    "more ids than rows": ((rows(2), 6, list("aabbcc")), "6 lines with 3 ids, .* has 2 rows"),
    "ids in no order": (
        (rows(3), 6, list("abacbc")),
        "has the 3 ids of --embeddings I in no order that tells which row is whose",
    ),
    "too few ids of images": (
        (rows(3), 6, list("abacbc"), list("ab")),
        "--ids G has 2 ids for the 3 rows of --embeddings I",
    ),
    "too few ids of captions": (
        (rows(3), 6, list("abacb"), list("abc")),
        "--ids F has 5 ids for the 6 rows of --embeddings C",
    ),
    "an unknown id": (
        (rows(3), 6, list("abadbc"), list("abc")),
        "--ids F, line 4: 'd' is not among the ids of images in --ids G",
    ),
    "an image without a caption": (
        (rows(3), 6, list("ababab"), list("abc")),
        "--ids F names 2 of the 3 images of --embeddings I, and not 'c'",
    ),
    "an id of two images": (
        (rows(3), 6, list("abacbc"), list("aac")),
        "line 2: 'b' is not among",
    ),
    "an id of two different rows": (
        (rows(3), 6, list("aaaccc"), list("aac")),
        "--ids G gives rows 0 and 1 of --embeddings I one id, 'a', but they differ",
    ),
    "an id of two different rows per caption": (
        (rows(4), 4, list("abca")),
        "--ids F gives rows 0 and 3 of --embeddings I one id, 'a', but they differ",
    ),
    "a name of two different rows": (
        (rows(4), 20, list("abca")),
        "--ids F gives rows 0 and 3 of --embeddings I one id, 'a', but they differ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    arguments, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence):
        found(*arguments)
