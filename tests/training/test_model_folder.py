"""A model as a folder: written, read, and refused if a file is missing, damaged or foreign."""

import builtins
import json
import struct
from argparse import Namespace

import pytest
import torch

from runtime.errors import InputError
from training import checkpoint, model_folder
from vocab import vocabulary_of

WORDS = ["<pad>", "<start>", "<end>", "<unk>", *"abcde"]

IMAGE = {"fc.weight": torch.arange(20.0).reshape(4, 5), "fc.bias": torch.ones(4)}

TEXT = {
    "embed.weight": torch.arange(27.0).reshape(9, 3) / 27,
    "rnn.weight_ih_l0": torch.full((12, 3), 0.5),
    "rnn.weight_hh_l0": torch.eye(12, 4),
    "rnn.bias_ih_l0": torch.zeros(12),
    "rnn.bias_hh_l0": -torch.ones(12),
}


FEATURES = {
    "format": 1, "encoder": "resnet18", "weights": "/private/resnet.pth", "weights_sha256": "0",
    "pooling": "pooled", "regions": None, "normalised": True, "resize": 256, "size": 224,
    "interpolation": "bilinear", "mean": [0.5], "std": [0.5], "width": 5, "dtype": "float32",
    "amp": "off", "versions": {},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with a whole model."""
    pytest.importorskip("safetensors")
    opt = Namespace(
        data_name="tiny_precomp", local_alpha=20.0, data_path="/private", tags=["a"], resume=None
    )
    content = {"model": [IMAGE, TEXT], "opt": opt, "epoch": 3, "best_rsum": 9.5, "Eiters": 7}
    content |= {"caption_reading": "text", "features": FEATURES}
    model_folder.write(str(tmp_path), content, vocabulary_of(WORDS), {"rsum": 8.5}, "# A card\n")
    return tmp_path


def test_what_is_written_is_read(folder):
    content = checkpoint.load(str(folder))
    for state, expected in zip(content["model"], (IMAGE, TEXT)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert content["vocabulary"] == WORDS
    assert (content["epoch"], content["best_rsum"], content["Eiters"]) == (3, 9.5, 7)
    opt = content["opt"]
    assert (opt.data_name, opt.local_alpha, opt.img_dim, opt.vocab_size) == (
        "tiny_precomp",
        20.0,
        5,
        9,
    )
    assert (opt.data_path, opt.logger_name) == ("data", folder.name)  # not the training's
    assert not hasattr(opt, "tags")
    assert content["features"] == {**FEATURES, "weights": "resnet.pth"}
    assert "private" not in (folder / "config.json").read_text()
    # Without the mark, HAL's options would mean the released reading.
    assert checkpoint.caption_reading(content) == "text"
    assert (folder / "README.md").read_text() == "# A card\n"


def test_the_weights_are_laid_out_as_safetensors_says(folder):
    """By the format's own words: 8 bytes of length, a JSON header, then the numbers."""
    content = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    entry = header["img_enc.fc.weight"]
    start, end = entry["data_offsets"]
    assert (entry["dtype"], entry["shape"]) == ("F32", [4, 5])
    numbers = struct.unpack("<20f", content[8 + size + start : 8 + size + end])
    assert list(numbers) == [float(n) for n in range(20)]


def test_the_file_itself_can_be_named(folder):
    assert model_folder.file_of(str(folder)) == str(folder / "model.safetensors")
    assert checkpoint.load(str(folder / "model.safetensors"))["epoch"] == 3
    assert model_folder.file_of("elsewhere") == "elsewhere"


def change(**entries):
    """Change entries of config.json; None removes one."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | entries
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def flip(name):
    """Change a bit in the middle of a file."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def foreign(content):
    """Another model.safetensors, which config.json describes."""

    def damage(folder):
        (folder / "model.safetensors").write_bytes(content)
        config = json.loads((folder / "config.json").read_text())
        digest = model_folder.hash_file(str(folder / "model.safetensors"))
        change(sha256=config["sha256"] | {"model.safetensors": digest})(folder)

    return damage


def packed(**entries):
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: (folder / "vocab.json").unlink(), ["vocab.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "--export"]),
        (change(format=2), ["format 2", "update"]),
        (change(format="1"), ["config.json"]),
        (change(options=None), ["config.json"]),
        (change(options={"embed_size": 5}), ["embed_size as 5", "4"]),
        (change(options={"cross_attn": ["t2i"]}), ["cross_attn"]),
        (change(sha256={}), ["SHA-256"]),
        (change(sha256={"/etc/passwd": "0"}), ["SHA-256"]),
        (change(caption_reading="loud"), ["caption reading"]),
        (change(features={"format": 1}), ["features"]),
        (flip("model.safetensors"), ["model.safetensors", "damaged"]),
        (flip("vocab.json"), ["vocab.json", "damaged"]),
        (foreign(b"x" * 40), ["model.safetensors", "not a file of safetensors"]),
        (foreign(b""), ["model.safetensors", "not a file of safetensors"]),
        (foreign(packed(**{"fc.weight": ONE})), ["fc.weight", "img_enc or txt_enc"]),
        (foreign(packed(**{"img_enc.fc.weight": ONE})), ["not those of an image encoder"]),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(folder, damage, named):
    damage(folder)
    with pytest.raises(InputError) as caught:
        checkpoint.load(str(folder))
    message = str(caught.value)
    assert all(part in message for part in named) and "\n" not in message


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match="pip install safetensors"):
        model_folder.package()
