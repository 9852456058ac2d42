"""Files from strangers.

Reading one runs no code, fills no memory, and ends in a result or an InputError.
"""

import argparse
import json
import os
import pickle
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import CocoDataset, FlickrDataset, coco_dataset
from experiments import records
from features.description import read_features_json
from features.files import open_features, read_ids
from gallery import build as build_gallery
from inputs import word_ids
from inputs.captions import read_captions, read_json
from inputs.decoding import decode_image
from inputs.tokenizer import SPECIAL_WORDS
from layers.pretrained import _build_cnn
from model import VSE
from retrieval import intervals
from runtime.errors import InputError
from runtime.files import append, lock
from training import checkpoint, run_record
from vocab import find_vocabulary, read_vocabulary, vocabulary_of, write_vocabulary

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))  # a reader

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VOCABULARY = vocabulary_of([*SPECIAL_WORDS, "dog"])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def damage(draw, whole):
    """`whole` with some bytes changed, cut short, or both."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def ends_well(read, *arguments):
    """The result, or None if the input was refused with an InputError."""
    try:
        return read(*arguments)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


def options(**changes):
    small = {
        "data_name": "made_precomp",
        "img_dim": 3,
        "embed_size": 4,
        "word_dim": 2,
        "num_layers": 1,
        "vocab_size": 5,
        "finetune": False,
        "cnn_type": "vgg19",
        "use_abs": False,
        "no_imgnorm": False,
    }
    return argparse.Namespace(**{**small, **changes})


def checkpoint_content(**changes):
    small = VSE(options())
    return {
        "epoch": 1,
        "model": [small.img_enc.state_dict(), small.txt_enc.state_dict()],
        "best_rsum": np.float64(1.5),
        "opt": options(**changes),
        "Eiters": 3,
    }


def saved(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("saved") / "file"
    torch.save(content, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """A good file's bytes for each reader."""
    folder = tmp_path_factory.mktemp("whole")
    write_vocabulary(VOCABULARY, str(folder / "v.pkl"))
    write_vocabulary(VOCABULARY, str(folder / "v.json"))
    np.save(folder / "features.npy", np.ones((3, 4), np.float32))
    Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)).save(
        folder / "image.png"
    )
    Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)).save(
        folder / "image.jpg"
    )
    torch.save(checkpoint_content(), folder / "checkpoint")
    flickr = {
        "images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "a dog"}] * 5}]
    }
    (folder / "flickr.json").write_text(json.dumps(flickr))
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": number, "image_id": 1, "caption": "a dog"} for number in range(5)],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    (folder / "captions.txt").write_bytes("A dog runs.\nUn café é grande.\n\nA cat.\n".encode())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def open_checkpoint(path):
    """Everything that evaluation takes from one."""
    content = checkpoint.load(path)
    checkpoint.caption_reading(content)
    if content.get("vocabulary") is not None:
        checkpoint.vocabulary(content, path)
    checkpoint.load_weights(VSE(content["opt"]), content, path)
    return content


def flickr(path):
    return FlickrDataset("images", path, "train", VOCABULARY)


def coco(path):
    return CocoDataset("images", path, VOCABULARY)


READERS = {
    "v.pkl": read_vocabulary,
    "v.json": read_vocabulary,
    "features.npy": open_features,
    "image.png": decode_image,
    "image.jpg": decode_image,
    "checkpoint": open_checkpoint,
    "flickr.json": flickr,
    "coco.json": coco,
    "captions.txt": read_captions,
}


@pytest.mark.parametrize("name", READERS)
def test_the_whole_file_is_read(name, whole_files, tmp_path):
    path = tmp_path / name
    path.write_bytes(whole_files[name])
    assert READERS[name](str(path)) is not None


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_a_result_or_an_input_error(name, whole_files, tmp_path):
    path = tmp_path / name

    @fuzz
    @given(damage(whole_files[name]))
    def run(data):
        path.write_bytes(data)
        found = ends_well(READERS[name], str(path))
        if name in ("v.pkl", "v.json") and found is not None:  # no wrong answer that looks right
            assert found.words[:4] == list(SPECIAL_WORDS) and len(found.words) == len(
                set(found.words)
            ) == len(found)
        if name == "features.npy" and found is not None:
            assert found.dim() == 2 and found.isfinite().all()

    run()


@pytest.fixture
def in_time():
    """Fail a test that takes ten seconds, such as one that waits for a pipe forever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits without end"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


PIPES = {
    **READERS,
    "weights.pth": lambda path: _build_cnn("resnet18", path),
    "ids.txt": read_ids,
    "captions.json": lambda path: read_json(path),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_refused_at_once(name, tmp_path, in_time):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} is .*not a regular file"):
        PIPES[name](str(tmp_path / name))


SPECIAL = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "endless": lambda path: os.symlink("/dev/zero", path),
}

# What opens a file by a name that is its own, and that name.
BY_NAME = {
    "lock": (".lock", lock),
    "run.json": ("run.json", lock),
    "log": ("log.jsonl", lock),
    "checkpoint": ("checkpoint.pth.tar", lock),
    "step log": ("log.jsonl", lambda folder: run_record.step_log(folder, 3)),
    "rsums": ("rst_val_run", lambda folder: run_record.epoch_log(folder, 3)),
    "products": ("run.json", run_record.noted_products),
    "record's run": ("run.json", records.read_run),
    "checkpoint itself": (
        "checkpoint.pth.tar",
        lambda folder: checkpoint.load(f"{folder}/checkpoint.pth.tar"),
    ),
    "features.json": ("features.json", read_features_json),
    "vocabulary": ("run_vocab.json", lambda folder: find_vocabulary(folder, "run")),
    "table": ("figures.csv", lambda folder: append(f"{folder}/figures.csv", "a line")),
    "ranks": ("ranks.npz", lambda folder: intervals.read_ranks(f"{folder}/ranks.npz")),
    "validations": ("log.jsonl", records.read_epochs),
    "hash": ("a.npy", lambda folder: build_gallery.hash_file(f"{folder}/a.npy")),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("what", BY_NAME)
def test_a_special_file_of_a_known_name_is_refused_at_once(
    what, kind, tmp_path, in_time, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name, read = BY_NAME[what]
    os.mkdir("run")
    SPECIAL[kind](f"run/{name}")
    with pytest.raises(InputError, match=rf"{name} is .*not a regular file") as caught:
        read("run")
    assert "\n" not in str(caught.value) and os.listdir("run") == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
def test_a_pipe_in_place_of_coco_s_ids_is_refused_at_once(tmp_path, in_time):
    (tmp_path / "annotations").mkdir()
    os.mkfifo(tmp_path / "annotations" / "coco_dev_ids.npy")
    with pytest.raises(InputError, match="coco_dev_ids.npy is .*not a regular file"):
        coco_dataset(str(tmp_path), "dev", VOCABULARY, None, False)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX")
def test_a_pipe_in_place_of_cached_captions_is_passed_over(tmp_path, in_time):
    right = word_ids.number_words(["a dog"], VOCABULARY, cache_dir=str(tmp_path))
    cached = next(tmp_path.iterdir())
    cached.unlink()
    os.mkfifo(cached)
    assert (
        word_ids.number_words(["a dog"], VOCABULARY, cache_dir=str(tmp_path)).words.tolist()
        == right.words.tolist()
    )
    assert cached.is_fifo()


@pytest.mark.parametrize("name", ["captions.txt", "v.json", "flickr.json", "coco.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(name, whole_files, tmp_path):
    """As Windows' editors write it; in a caption it would make the first word <unk>."""
    found = {}
    for folder, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(mark + whole_files[name])
        content = READERS[name](str(tmp_path / folder / name))
        found[folder] = (
            content
            if isinstance(content, list)
            else getattr(content, "words", None) or content.captions
        )
    assert found["marked"] == found["plain"] and len(found["plain"]) > 3


@pytest.mark.parametrize("read", [read_vocabulary, flickr, coco])
def test_random_json_ends_in_a_result_or_an_input_error(read, tmp_path):
    path = tmp_path / "file.json"

    @fuzz
    @given(JSON, st.sampled_from([None, "images", "annotations", "word2idx"]))
    def run(content, key):
        path.write_text(json.dumps(content if key is None else {"images": [], key: content}))
        ends_well(read, str(path))

    run()


@pytest.mark.parametrize("where", ["opt", "vocabulary", "caption_reading", "epoch", "model"])
def test_checkpoints_with_anything_in_them_end_in_a_result_or_an_input_error(where, tmp_path):
    path = tmp_path / "checkpoint"

    @fuzz
    @given(JSON, st.sampled_from(sorted(checkpoint.OPTION_DEFAULTS)))
    def run(value, option):
        content = checkpoint_content()
        if where == "opt":
            setattr(content["opt"], option, value)
        else:
            content[where] = value
        torch.save(content, path)
        ends_well(open_checkpoint, str(path))

    run()


def test_a_damaged_caption_cache_is_made_again(tmp_path):
    lines = ["a dog", "a cat", "dog dog"]
    right = word_ids.number_words(lines, VOCABULARY, cache_dir=str(tmp_path))
    cached = next(tmp_path.iterdir())
    whole = cached.read_bytes()

    @fuzz
    @given(damage(whole))
    def run(data):
        cached.write_bytes(data)
        found = word_ids.number_words(lines, VOCABULARY, cache_dir=str(tmp_path))
        assert len(found) == 3 and found.words.max() < len(VOCABULARY)
        assert torch.equal(found.words, right.words) and torch.equal(found.offsets, right.offsets)

    run()


# Made to do harm --------------------------------------------------------------------------------


class Command:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


COMMANDS = {
    "system": Command(os.system, "touch harmed"),
    "eval": Command(eval, "open('harmed', 'w')"),
    "import": Command(__import__, "antigravity"),
    "open": Command(open, "harmed", "w"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_vocabulary_pickle_runs_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x_vocab.pkl").write_bytes(pickle.dumps({"word2idx": COMMANDS[command]}))
    with pytest.raises(InputError, match="asks for"):
        find_vocabulary(str(tmp_path), "x")
    assert os.listdir(tmp_path) == ["x_vocab.pkl"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_runs_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**checkpoint_content(), "more": COMMANDS[command]}, "file")
    with pytest.raises(InputError):
        checkpoint.load("file")
    assert os.listdir(tmp_path) == ["file"]


def test_object_arrays_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.array([[COMMANDS["system"]]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="x.npy"):
        open_features("x.npy")
    assert os.listdir(tmp_path) == ["x.npy"]


def test_a_vocabulary_that_unfolds_without_end_is_refused_quickly(tmp_path):
    bomb = "x"
    for _ in range(60):
        bomb = (bomb, bomb)  # 2 ** 60 items if anybody ever printed or compared it
    path = tmp_path / "v.pkl"
    path.write_bytes(pickle.dumps({"word2idx": {"<pad>": bomb}}))
    with pytest.raises(InputError):
        read_vocabulary(str(path))


def test_a_checkpoint_option_that_unfolds_without_end_is_refused_quickly(tmp_path):
    bomb = "x"
    for _ in range(60):
        bomb = (bomb, bomb)
    for name in ("embed_size", "cnn_type", "batch_size", "data_name"):
        torch.save(checkpoint_content(**{name: bomb}), tmp_path / "file")
        with pytest.raises(InputError, match=name):
            checkpoint.load(str(tmp_path / "file"))


def test_a_tensor_that_is_larger_than_its_memory_is_refused(tmp_path):
    content = checkpoint_content()
    content["model"][1]["embed.weight"] = torch.zeros(1).expand(2**40, 2)
    torch.save(content, tmp_path / "file")
    with pytest.raises(InputError, match="embed.weight"):
        checkpoint.load(str(tmp_path / "file"))


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save(checkpoint_content(), tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as stored,
        zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.namelist():
            packed.writestr(entry, stored.read(entry))
    with pytest.raises(InputError, match="is refused: it is compressed"):
        checkpoint.load(str(tmp_path / "file"))


def test_an_absurdly_large_image_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png"):
        decode_image(str(tmp_path / "large.png"))


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "a\0.png", ""]
)
def test_file_names_that_reach_outside_the_folder_are_refused(name, tmp_path):
    (tmp_path / "f.json").write_text(
        json.dumps({"images": [{"filename": name, "split": "train", "sentences": [{"raw": "a"}]}]})
    )
    (tmp_path / "c.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": name}],
                "annotations": [{"id": 1, "image_id": 1, "caption": "a"}],
            }
        )
    )
    for read, path in ((flickr, "f.json"), (coco, "c.json")):
        with pytest.raises(InputError, match="outside"):
            read(str(tmp_path / path))


def test_a_caption_without_end_is_refused(tmp_path):
    with pytest.raises(InputError, match="characters"):
        word_ids.number_words(["a " * 1_000_000], VOCABULARY)


def test_broken_images_are_counted_and_left_out(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "c.png")
    images = [
        {
            "filename": f"{name}.png",
            "split": "val",
            "sentences": [{"raw": f"{name} {n}"} for n in range(5)],
        }
        for name in "abc"
    ]
    (tmp_path / "f.json").write_text(json.dumps({"images": images}))
    dataset = FlickrDataset(
        str(tmp_path), str(tmp_path / "f.json"), "val", VOCABULARY, skip_broken=True
    )
    assert [os.path.basename(path) for path in dataset.image_files] == ["a.png", "c.png"]
    assert dataset.captions[5] == "c 0" and dataset.image_of.tolist() == [0] * 5 + [1] * 5
    assert "1 broken" in capsys.readouterr().err
