"""The same caption files through every script that reads them: each reads alike, or says the same.

A script goes on until it has read its captions, then ends with 0; what it refuses ends with 2 and
one sentence on stderr.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import compute_results
import data
import extract_features
import search
import train
import vocab
from gallery import build as build_gallery
from runtime import errors
from tests.helpers.made import RAW, TINY

SPLITS = ("train", "dev", "test")

FIVE = [f"A dog {number}." for number in range(5)]

MODEL = ["--model_path", "runs/runX/model_best.pth.tar", "--device", "cpu"]


@pytest.fixture
def ends(evaluated, monkeypatch, capsys):
    """A function that runs a script and gives its exit code, stderr, and what it read."""
    read = []

    def loaders_read(*args):
        pair = get_loaders(*args)
        read.append(tuple((loader.dataset.n_images, len(loader.dataset)) for loader in pair))
        raise SystemExit(0)

    def photos_read(*args):
        photos = next(argument for argument in args if isinstance(argument, list))
        read.append({photo.name: photo.captions for photo in photos if photo.captions})
        raise SystemExit(0)

    get_loaders = data.get_loaders
    monkeypatch.setattr(train, "get_loaders", loaders_read)
    monkeypatch.setattr(extract_features, "check_splits", photos_read)
    monkeypatch.setattr(build_gallery, "photo_encoder", lambda *_: (None, None))
    monkeypatch.setattr(build_gallery, "from_photos", photos_read)

    def run(main, flags):
        capsys.readouterr()
        code = errors._exit_code(lambda: main(flags))
        return code, capsys.readouterr().err, read.pop() if read else None

    return run


def check(found, reason):
    """Check exit code and stderr. reason: of a refusal, or None."""
    code, said, _ = found
    lines = said.splitlines()
    assert code == (2 if reason else 0), said
    assert "Traceback" not in said
    if reason:
        assert lines[-1].startswith("error: ") and reason in lines[-1]
        assert [line for line in lines if line.startswith("error")] == lines[-1:]


# Captions and ids of features -------------------------------------------------------------------

CAPTION_SCRIPTS = {
    "train.py": (train.main, [*TINY, "--vocab_path", "words", "--logger_name", "runs/new"]),
    "vocab.py": (vocab.main, ["--vocab_path", "words"]),
    "compute_results.py": (compute_results.main, MODEL),
}


def captions(change):
    """Change the lines of every split's captions, bytes to bytes."""

    def damage(folder):
        for split in SPLITS:
            path = folder / f"{split}_caps.txt"
            path.write_bytes(change(path.read_bytes()))

    return damage


def ids(text, n):
    """Write ids, a line for each of a split's images."""

    def damage(folder):
        for split in SPLITS:
            rows = len(np.load(folder / f"{split}_ims.npy"))
            (folder / f"{split}_ids.txt").write_bytes(text(rows)[:n])

    return damage


def as_token_file(content):
    return b"".join(
        b"%d.jpg#%d\t%s\n" % (place // 5, place % 5, line)
        for place, line in enumerate(content.splitlines())
    )


NOT_VOCAB = {"vocab.py"}  # does not read what is wrong there

# {input: (what writes it, what a refusal says, scripts that do not see it)}
FEATURE_INPUTS = {
    "whole": (captions(lambda content: content), None, ()),
    "Windows' lines and mark": (
        captions(lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")),
        None,
        (),
    ),
    "UTF-16": (captions(lambda content: content.decode().encode("utf-16")), "is UTF-16 text", ()),
    "Latin-1": (
        captions(lambda content: content.replace(b"dog", b"caf\xe9")),
        "looks like Latin-1",
        (),
    ),
    "xlsx": (
        captions(lambda _: b"PK\x03\x04[Content_Types].xml"),
        "is an Excel workbook (.xlsx)",
        (),
    ),
    "token file": (captions(as_token_file), "photos' names or numbers before its captions", ()),
    "blank last line": (
        captions(lambda content: content + b"\n"),
        "the last line is blank",
        NOT_VOCAB,
    ),
    "blank line within": (
        captions(lambda content: content.replace(b"\n", b"\n\n", 1).rsplit(b"\n", 2)[0]),
        None,
        (),
    ),
    "ids in UTF-16": (
        ids(lambda n: "\n".join(map(str, range(n))).encode("utf-16"), None),
        "is UTF-16 text",
        NOT_VOCAB,
    ),
    "ids with a blank line": (
        ids(lambda n: b"a\n\n" + b"b\n" * (n - 2), None),
        "line 2 is blank",
        NOT_VOCAB,
    ),
    "ids with blank ends": (
        ids(lambda n: b"".join(b" %d.jpg \r\n" % row for row in range(n)) + b" \n", None),
        None,
        (),
    ),
}


@pytest.mark.parametrize("script", CAPTION_SCRIPTS)
@pytest.mark.parametrize("case", FEATURE_INPUTS)
def test_captions_of_features(evaluated, ends, case, script):
    damage, reason, not_by = FEATURE_INPUTS[case]
    damage(evaluated / "data" / "tiny_precomp")
    main, flags = CAPTION_SCRIPTS[script]
    if script != "compute_results.py":
        flags = [*flags, "--data_name", "tiny_precomp"]
    check(found := ends(main, flags), None if script in not_by else reason)
    if script == "train.py" and not reason:
        assert found[2] == ((12, 60), (5, 25))


@pytest.mark.parametrize("script", CAPTION_SCRIPTS)
@pytest.mark.parametrize(
    "name, reason", [("tiny_precomp/", None), ("tiny_precomp//", None), ("mine", "mine")]
)
def test_names_of_features(evaluated, ends, name, reason, script):
    (evaluated / "data" / "tiny_precomp").rename(evaluated / "data" / "keep")
    (evaluated / "data" / "keep").rename(
        evaluated / "data" / ("mine" if reason else "tiny_precomp")
    )
    main, flags = CAPTION_SCRIPTS[script]
    check(found := ends(main, [*flags, "--data_name", name]), reason)
    if (
        reason and script != "compute_results.py"
    ):  # which asks for features first, as the checkpoint has them
        assert (
            "holds features (dev_ims.npy)" in found[1] and "rename it to mine_precomp" in found[1]
        )


# Karpathy's JSON and tables, of photos ----------------------------------------------------------

PHOTO_SCRIPTS = {
    "train.py": (
        train.main,
        [*RAW, "--data_name", "f8k", "--vocab_path", "words", "--logger_name", "runs/new"],
    ),
    "vocab.py": (vocab.main, ["--data_name", "f8k", "--vocab_path", "words", "--threshold", "1"]),
    "extract_features.py": (
        extract_features.main,
        ["--images", "data/f8k/images", "--output", "data/new_precomp"],
    ),
    "search.py": (
        search.main,
        [*MODEL, "--images", "data/f8k/images", "--index", "g", "--correction", "none", "a dog"],
    ),
}

ENTRIES = [
    (f"{n}.png", split, FIVE, {}) for n, split in enumerate(["train", "train", "val", "test"])
]


def as_json(entries):
    return json.dumps(
        {
            "images": [
                {
                    "filename": name,
                    "split": split,
                    "sentences": [{"raw": raw} for raw in captions],
                    **more,
                }
                for name, split, captions, more in entries
            ]
        }
    ).encode()


AN_ENTRY_A_CAPTION = [
    (name, split, [raw], more)
    for place in range(5)
    for name, split, captions, more in ENTRIES
    for raw in captions[place : place + 1]
]

SPELLED = [
    (name, {"val": " Validation", "train": "TRAIN"}.get(split, split), captions, more)
    for name, split, captions, more in ENTRIES
]

IN_FOLDERS = [
    (name, split, captions, {"filepath": "val2014"}) for name, split, captions, _ in ENTRIES
]

WITH_ROOT = [(f"images/{name}", split, captions, more) for name, split, captions, more in ENTRIES]

JSON_INPUTS = {
    "whole": (as_json(ENTRIES), None),
    "an entry a caption": (as_json(AN_ENTRY_A_CAPTION), None),
    "splits as people spell them": (as_json(SPELLED), None),
    "filepath": (as_json(IN_FOLDERS), None),
    "the folder's own name": (as_json(WITH_ROOT), None),
    "unknown split": (
        as_json([*ENTRIES, ("9.png", "holdout", FIVE, {})]),
        "images[4]: split is 'holdout'",
    ),
    "two splits": (
        as_json([*ENTRIES, ("3.png", "train", FIVE, {})]),
        "images[4]: photo 3.png is in split train",
    ),
    "no captions": (as_json([("0.png", "train", [], {})]), "caption"),
    "UTF-16": (as_json(ENTRIES).decode().encode("utf-16"), "is UTF-16 text"),
    "Latin-1": (as_json(ENTRIES).replace(b"dog", b"caf\xe9"), "looks like Latin-1"),
    "web page": (b"<html>", "is a web page"),
    "cut short": (as_json(ENTRIES)[:-9], "is not valid JSON"),
    "another layout": (b"[]", "has no list 'images'"),
}


def run_on_photos(ends, script, file):
    main, flags = PHOTO_SCRIPTS[script]
    return ends(main, flags if script in ("train.py", "vocab.py") else [*flags, "--captions", file])


@pytest.mark.parametrize("script", PHOTO_SCRIPTS)
@pytest.mark.parametrize("case", JSON_INPUTS)
def test_karpathys_json(evaluated, ends, case, script):
    content, reason = JSON_INPUTS[case]
    file = "data/f8k/dataset_flickr8k.json"
    Path(file).write_bytes(content)
    if case == "no captions" and script in (
        "vocab.py",
        "search.py",
    ):  # a vocabulary of nothing; photos alone
        reason = "no word but the special ones" if script == "vocab.py" else None
    check(found := run_on_photos(ends, script, file), reason)
    if reason or case == "no captions":
        return
    if script == "train.py":
        assert found[2] == ((2, 10), (1, 5))
    elif script != "vocab.py":
        assert found[2] == {f"{n}.png": FIVE for n in range(4)}


def table(header, row):
    rows = [row.format(n=n, c=c, text=FIVE[c]) for n in range(4) for c in range(5)]
    return "".join(f"{line}\n" for line in ([header] if header else []) + rows).encode()


TABLE_INPUTS = {
    "csv": (table("image,caption", "{n}.png,{text}"), None),
    "results.csv": (table("image_name| comment_number| comment", "{n}.png| {c}| {text}"), None),
    "token file": (table("", "{n}.png#{c}\t{text}"), None),
    "filepath and title": (table("filepath\ttitle", "{n}.png\t{text}"), None),
    "file_name and caption": (table("file_name,caption", "{n}.png,{text}"), None),
    "the folder's own name": (table("image,caption", "images/{n}.png,{text}"), None),
    "absolute names": (table("image,caption", "HERE/data/f8k/images/{n}.png,{text}"), None),
    "a swallowed row": (
        b'image,caption\n0.png,"A dog\n1.png,A cat\n2.png,A cow"\n',
        "line 2: a quoted",
    ),
    "an open quote": (b'image,caption\n0.png,x\n1.png,"A cat\n2.png,A cow\n', "line 3: "),
    "no header": (table("", "{n}.png,{text}"), "has no header"),
    "other columns": (table("photo;words", "{n}.png;{text}"), "must name image and caption"),
    "UTF-16": (
        table("image,caption", "{n}.png,{text}").decode().encode("utf-16"),
        "is UTF-16 text",
    ),
    "Latin-1": (
        table("image,caption", "{n}.png,caf\xe9").decode().encode("latin-1"),
        "looks like Latin-1",
    ),
    "xlsx": (b"PK\x03\x04[Content_Types].xml", "is an Excel workbook (.xlsx)"),
}


@pytest.mark.parametrize("script", ["extract_features.py", "search.py"])
@pytest.mark.parametrize("case", TABLE_INPUTS)
def test_tables(evaluated, ends, case, script):
    content, reason = TABLE_INPUTS[case]
    Path("captions").write_bytes(content.replace(b"HERE", str(evaluated).encode()))
    check(found := run_on_photos(ends, script, "captions"), reason)
    if not reason:
        assert found[2] == {f"{n}.png": FIVE for n in range(4)}
        assert "note: 7 photos in" in found[1] and "are not named in captions" in found[1]
