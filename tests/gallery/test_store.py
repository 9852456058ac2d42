"""A gallery's files: texts, paths that must stay inside, publishing, clearing away, and damage.

GALLERY_DAMAGES=300 GALLERY_SEED=2 python3 -m pytest tests/gallery/test_store.py -k damage  # more
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from gallery import index, store
from runtime.errors import InputError

DAMAGES, SEED = (
    int(os.environ.get("GALLERY_DAMAGES", "40")),
    int(os.environ.get("GALLERY_SEED", "1")),
)

TEXTS = [
    "plain",
    "",
    "quotes '\"",
    "line\nbreak",
    "zwei Wörter",
    os.fsdecode(b"odd \xff"),
    "../up",
    "<script>",
]


@pytest.mark.parametrize("texts", [TEXTS, [], ["", ""]])
def test_texts_come_back_as_they_were(tmp_path, texts):
    store.write_texts(str(tmp_path / "t"), texts)
    found = store.Texts(str(tmp_path / "t"))
    assert list(found) == texts and len(found) == len(texts)
    for number in range(-len(texts), len(texts)):
        assert found[number] == texts[number]
    for number in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            found[number]


@pytest.mark.parametrize(
    "ends",
    [
        np.array([3, 99]),
        np.array([3, 2]),
        np.array([[4]]),
        np.array([4.0]),
        np.array([-1, 4]),
        np.array([9, 4]),
        np.zeros(0, np.int64),
    ],
)
def test_ends_that_are_not_those_of_the_texts_are_said(tmp_path, ends):
    store.write_texts(str(tmp_path / "t"), ["ab", "cd"])
    np.save(tmp_path / "t.npy", ends)
    with pytest.raises(InputError, match="build it again"):
        list(store.Texts(str(tmp_path / "t")))


def test_texts_that_are_gone_are_said(tmp_path):
    store.write_texts(str(tmp_path / "t"), ["ab", "cd"])
    os.unlink(tmp_path / "t.bin")
    with pytest.raises(InputError, match="build it again"):
        store.Texts(str(tmp_path / "t"))


def test_arrays_of_objects_are_not_read(tmp_path):
    store.write_texts(str(tmp_path / "t"), ["ab"])
    np.save(tmp_path / "t.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="t.npy cannot be read"):
        store.Texts(str(tmp_path / "t"))


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, a folder in it, one beside it, and links of every kind."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "photos2").mkdir()
    for path in ("photos/a.png", "photos/deep/b.png", "secret.png", "photos2/c.png"):
        (tmp_path / path).write_bytes(b"x")
    os.symlink("../secret.png", root / "out.png")
    os.symlink("..", root / "up")
    os.symlink("deep/b.png", root / "in.png")
    os.symlink("loop.png", root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("name", ["a.png", "deep/b.png", "in.png", "./a.png", "deep/../a.png"])
def test_what_lies_inside_has_a_path(folder, name):
    assert store.inside(str(folder), name) == os.path.realpath(folder / name)


@pytest.mark.parametrize(
    "name",
    [
        "out.png",
        "up/secret.png",
        "../secret.png",
        "../photos2/c.png",
        "/etc/hostname",
        "loop.png",
        "pipe.png",
        "deep",
        "",
        ".",
        "gone.png",
        "nul\0.png",
        "a.png/x",
        "x" * 5000,
    ],
)
def test_what_does_not_has_none(folder, name):
    assert store.inside(str(folder), name) is None


def test_only_what_a_build_made_is_cleared_away(tmp_path):
    for name in (
        "gallery-files-abcd1234",
        "gallery-files-mine",
        "files-2020",
        "gallery-files-ABCD1234",
    ):
        (tmp_path / name).mkdir()
    store.clear(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "files-2020",
        "gallery-files-ABCD1234",
        "gallery-files-mine",
    ]
    with pytest.raises(InputError, match="other files"):
        store.refuse_foreign(str(tmp_path))


# Damage -------------------------------------------------------------------------------------------


def build_made(folder, kind):
    """A gallery of 300 made-up photos with captions, facts and hubs."""
    rng, n, width = np.random.default_rng(4), 300, 12
    rows = rng.standard_normal((n, width + 1)).astype(np.float32)
    captions = [
        [f"photo {number}, caption {place}" for place in range(number % 3)] for number in range(n)
    ]
    embedded = torch.from_numpy(
        rng.standard_normal((sum(map(len, captions)), width)).astype(np.float32)
    )
    os.makedirs(folder)
    with store.new_files(folder) as files:
        store.save_rows(os.path.join(files, "embeddings.npy"), [rows], rows.shape)
        if kind != "exact":
            index.build(
                kind,
                torch.from_numpy(rows),
                torch.from_numpy(rows[:50]),
                os.path.join(files, store.INDEX),
            )
        store.save(os.path.join(files, "hubs.npy"), rng.integers(0, 99, n))
        store.write_items(
            files,
            [f"deep/{number}.jpg" for number in range(n)],
            captions,
            embedded,
            [(number, 5) for number in range(n)],
        )
        store.publish(
            folder,
            files,
            {
                "count": n,
                "width": width,
                "captions": len(embedded),
                "model": {"path": "m", "sha256": ""},
                "source": "s",
                "precomp": None,
                "folder": "photos",
                "features": None,
                "index": kind,
                "hubs": "its own",
                "correction": {
                    "method": "csls",
                    "parameters": {"k": 3},
                    "bank_split": "train",
                    "bank_images": None,
                },
            },
        )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{type of index: a gallery's folder}; not to be changed."""
    return {
        kind: build_made(str(tmp_path_factory.mktemp("made") / "g"), kind)
        for kind in ("exact", "ivf_sq8")
    }


def all_that_it_says(folder):
    """Every answer of a gallery, and all that it knows of its photos."""
    found = store.Gallery(folder)
    queries = torch.from_numpy(
        np.random.default_rng(5).standard_normal((20, 12)).astype(np.float32)
    )
    answers = [
        *found.search(queries, 10),
        *found.search(queries, 10, corrected=True),
        *found.search_alike(queries, 10, normalised=False),
        *found.search_captions(queries, 10),
    ]
    return (
        [answer.numpy().tobytes() for answer in answers],
        list(found.items),
        found.facts.tolist(),
        [found.captions(number) for number in range(found.count)],
        found.hub_counts.tolist(),
        {name: value for name, value in found.description.items() if name != "checksums"},
    )


def damage(path, rng):
    """Change a file in one of six ways, as bad disks, broken copies and other programs do."""
    content = bytearray(path.read_bytes())
    way, place = rng.integers(6), int(rng.integers(len(content)))
    if way == 0:
        for bit in rng.integers(0, 8 * len(content), rng.integers(1, 31)):
            content[bit // 8] ^= 1 << bit % 8
    elif way == 1:
        del content[place:]
    elif way == 2:
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    elif way == 3:
        content += content[place:] or b"0"
    elif way == 4:  # numbers that have changed places
        at = 8 * rng.integers(0, max(1, len(content) // 8), 2)
        one, other = (content[start : start + 8] for start in at)
        content[at[0] : at[0] + 8], content[at[1] : at[1] + 8] = other, one
    else:
        content[place] = (content[place] + int(rng.integers(1, 256))) % 256
    path.write_bytes(content)


@pytest.mark.parametrize("number", range(DAMAGES))
def test_a_damaged_file_is_refused_or_changes_no_answer(made, tmp_path, number):
    rng = np.random.default_rng([SEED, number])
    whole = made[("exact", "ivf_sq8")[number % 2]]
    shutil.copytree(whole, tmp_path / "g")
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    path = tmp_path / names[rng.integers(len(names))]
    before = path.read_bytes()
    while path.read_bytes() == before:
        damage(path, rng)
    if path.name != store.NAME:  # that one's spaces may differ and it says the same
        with pytest.raises(InputError, match=path.name):
            store.check_whole(str(tmp_path / "g"))
    try:
        found = all_that_it_says(str(tmp_path / "g"))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found == all_that_it_says(whole)


def test_larger_files_are_looked_at_by_a_check_and_before_they_are_written_again(
    made, tmp_path, monkeypatch, capsys
):
    shutil.copytree(made["exact"], tmp_path / "g")
    folder = str(tmp_path / "g")
    monkeypatch.chdir(tmp_path)
    search.main(["--index", folder, "--check"])
    assert capsys.readouterr().out.startswith(f"{folder}: all 9 files, ")
    path = Path(folder) / store.describe(folder)["files"] / "embeddings.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="embeddings.npy is not as it was written"):
        store.Gallery(folder)
    monkeypatch.setattr(store, "OPENING_BYTES", path.stat().st_size)
    store.Gallery(folder)
    with pytest.raises(InputError, match="embeddings.npy is not as it was written"):
        store.Gallery(folder, whole=True)
    (path.parent / "hubs.npy").unlink()
    with pytest.raises(
        InputError, match="embeddings.npy, hubs.npy in .* are not as written: delete"
    ):
        search.main(["--index", folder, "--check"])


def rewritten(place, **changes):
    """gallery.json with other values; None as its checksums, as older ones have none."""
    path = Path(place) / "gallery.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_older_gallery_opens_and_is_said_to_be_unchecked(made, tmp_path, capsys):
    shutil.copytree(made["exact"], tmp_path / "g")
    rewritten(tmp_path / "g", checksums=None)
    assert all_that_it_says(str(tmp_path / "g")) == all_that_it_says(made["exact"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the gallery") and "--rebuild_index" in line
    with pytest.raises(InputError, match="without checksums .*--rebuild_index"):
        store.check_whole(str(tmp_path / "g"))


@pytest.mark.parametrize("place, value", [(0, 1), (-1, 0), (7, 10**6), (7, -1)])
def test_captions_of_nobody_are_said(made, tmp_path, place, value):
    shutil.copytree(made["exact"], tmp_path / "g")
    rewritten(tmp_path / "g", checksums=None)
    path = next((tmp_path / "g").rglob("caption_starts.npy"))
    starts = np.load(path)
    starts[place] = value
    np.save(path, starts)
    with pytest.raises(
        InputError, match="caption_starts.npy does not say which captions are whose"
    ):
        store.Gallery(str(tmp_path / "g"))


def test_photos_without_a_folder_are_said(made, tmp_path):
    shutil.copytree(made["exact"], tmp_path / "g")
    rewritten(tmp_path / "g", checksums=None, folder=None)
    with pytest.raises(InputError, match="gallery.json names photos, but not their folder"):
        store.describe(str(tmp_path / "g"))


def test_a_gallery_that_another_replaces_while_it_is_opened_is_the_other(tmp_path, monkeypatch):
    def build(count):
        with store.new_files(tmp_path) as files:
            store.save_rows(
                os.path.join(files, "embeddings.npy"), [np.ones((count, 3))], (count, 3)
            )
            store.write_items(files, list(map(str, range(count))), [[]] * count, None, None)
            store.publish(
                tmp_path,
                files,
                {
                    "count": count,
                    "width": 2,
                    "captions": 0,
                    "model": {"path": "m", "sha256": ""},
                    "source": "",
                    "precomp": None,
                    "folder": None,
                    "features": None,
                    "index": "exact",
                    "hubs": None,
                    "correction": {
                        "method": "none",
                        "parameters": {},
                        "bank_split": "train",
                        "bank_images": None,
                    },
                },
            )

    def describe(folder):
        found = own(folder)
        if found["count"] == 4:
            build(5)
        return found

    build(4)
    own = store.describe
    monkeypatch.setattr(store, "describe", describe)
    found = store.Gallery(tmp_path)
    assert found.count == len(found.items) == 5
    os.unlink(os.path.join(found.files, "embeddings.npy"))
    with pytest.raises(InputError, match="embeddings.npy is not there"):
        store.Gallery(tmp_path)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="not finite"), store.new_files(str(tmp_path)) as files:
        store.save_rows(
            os.path.join(files, "rows.npy"),
            [torch.tensor([[1.0]]), torch.tensor([[float("nan")]])],
            (2, 1),
        )
    assert not list(tmp_path.iterdir())


def test_rows_come_back_as_one_array(tmp_path):
    blocks = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 8).view(1, 2).half()]
    store.save_rows(str(tmp_path / "rows.npy"), blocks, (4, 2))
    assert np.array_equal(
        np.load(tmp_path / "rows.npy"), np.arange(8, dtype=np.float32).reshape(4, 2)
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é", "plain é"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        (os.fsdecode(b"\xff"), "\\udcff"),
        ("\u202egpj", "\\u202egpj"),
    ],
)
def test_what_is_shown_can_be_printed(text, shown):
    assert store.shown(text) == shown
    store.shown(text).encode()


def test_a_gallery_s_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no whole gallery"):
        store.Gallery(str(tmp_path / "nowhere"))
    assert not Path(tmp_path / "nowhere").exists()
