"""Text models by name: captions to vectors. The packages are made-up modules here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import extract_features
import train
from features import text_models
from features.text_description import hash_captions
from features.text_models import text_model, write_texts
from inputs.captions import read_captions
from runtime.errors import InputError
from tests.helpers.made import SPLITS, write_precomp

FOLDER = Path("data/tiny_precomp")

WIDTH = 4

NAME, BEST = "sentence_transformers/some", "runs/runX/model_best.pth.tar"


def vector(text):
    """A text's vector: how many letters of four kinds it has."""
    return [float(sum(letter in kind for letter in text)) for kind in ("abcdef", "ghi", "rst", "o")]


class Sentences(torch.nn.Module):
    """In place of SentenceTransformer; counts the texts that it encodes."""

    encoded, gone = 0, "missing"

    def __init__(self, name, device="cpu"):
        super().__init__()
        if name == Sentences.gone:
            raise OSError("no such model, and no network")
        self.scale = torch.nn.Parameter(torch.tensor(2.0 if name == "other" else 1.0))

    def encode(self, texts, batch_size, device, convert_to_tensor, show_progress_bar):
        Sentences.encoded += len(texts)
        return torch.tensor([vector(text) for text in texts]) * self.scale.detach()


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up = SimpleNamespace(SentenceTransformer=Sentences)
    monkeypatch.setitem(sys.modules, "sentence_transformers", made_up)
    monkeypatch.setattr(Sentences, "encoded", 0)
    write_precomp(FOLDER)


def extract(*more):
    extract_features.main(["--texts", str(FOLDER), "--text_encoder", NAME, *more])


def test_each_caption_s_vector_is_written_in_file_order_with_a_description():
    extract("--dtype", "float32")
    content = json.loads((FOLDER / "texts.json").read_text())
    assert content["encoder"] == NAME and content["width"] == WIDTH and not content["normalised"]
    for split in ("train", "dev", "test", "testall"):
        captions = read_captions(f"{FOLDER}/{split}_caps.txt")
        rows = np.load(FOLDER / f"{split}_txts.npy")
        np.testing.assert_array_equal(rows, np.array([vector(one) for one in captions], np.float32))
        assert content["captions_sha256"][split] == hash_captions(captions)
    assert not (FOLDER / text_models.BLOCKS).exists()


def test_a_killed_run_goes_on_with_its_finished_blocks(monkeypatch):
    monkeypatch.setattr(text_models, "BLOCK_CAPTIONS", 20)
    for split in SPLITS:  # no block is like another
        path = FOLDER / f"{split}_caps.txt"
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{split} {i} {line}\n" for i, line in enumerate(lines)))
    model = text_model(NAME)
    already = Sentences.encoded
    dying = model._replace(encode=lambda texts, batch_size: dies(model, texts))

    def dies(model, texts):
        if Sentences.encoded - already >= 60:
            raise KeyboardInterrupt
        return model.encode(texts)

    with pytest.raises(KeyboardInterrupt):
        write_texts(str(FOLDER), str(FOLDER), dying, batch_size=20)
    assert not (FOLDER / "texts.json").exists()
    before = Sentences.encoded
    write_texts(str(FOLDER), str(FOLDER), model, batch_size=20)
    whole = 5 * sum(SPLITS.values())
    assert Sentences.encoded - before == whole - 60 and (FOLDER / "texts.json").exists()


def encoded_by(run):
    """How many captions a run encodes; text_model itself encodes one text."""
    before = Sentences.encoded
    run()
    return Sentences.encoded - before - 1


def test_only_what_is_missing_or_has_changed_is_encoded(capsys):
    counts = {split: 5 * images for split, images in SPLITS.items()}
    assert encoded_by(extract) == sum(counts.values())
    first = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    capsys.readouterr()
    assert encoded_by(extract) == 0
    assert capsys.readouterr().out.count("already there") == len(SPLITS)
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == first
    lines = (FOLDER / "dev_caps.txt").read_text().splitlines()
    (FOLDER / "dev_caps.txt").write_text("\n".join(["Another caption.", *lines[1:], ""]))
    assert encoded_by(extract) == counts["dev"]
    np.testing.assert_array_equal(np.load(FOLDER / "dev_txts.npy")[0], vector("Another caption."))
    (FOLDER / "test_txts.npy").write_bytes(first["test_txts.npy"][:-8])
    assert encoded_by(extract) == counts["test"]
    assert (FOLDER / "test_txts.npy").read_bytes() == first["test_txts.npy"]


def test_another_type_is_written_anew_and_elsewhere_if_asked():
    extract()
    assert encoded_by(lambda: extract("--dtype", "float16")) == 5 * sum(SPLITS.values())
    assert np.load(FOLDER / "dev_txts.npy").dtype == np.float16
    extract("--output", "vectors")
    assert sorted(path.name for path in Path("vectors").iterdir()) == sorted(
        ["texts.json", *(f"{split}_txts.npy" for split in SPLITS)]
    )
    captions = read_captions(f"{FOLDER}/train_caps.txt")
    found = np.load("vectors/train_txts.npy")
    np.testing.assert_array_equal(found, np.array([vector(one) for one in captions], np.float32))


def test_a_split_that_is_gone_loses_its_vectors(capsys):
    extract()
    (FOLDER / "testall_caps.txt").unlink()
    assert encoded_by(extract) == 0
    assert "testall_txts.npy: removed" in capsys.readouterr().out
    assert not (FOLDER / "testall_txts.npy").exists()
    assert "testall" not in json.loads((FOLDER / "texts.json").read_text())["captions_sha256"]


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e6, "float16")])
def test_a_vector_that_is_not_finite_is_named_by_its_line(value, dtype):
    (FOLDER / "dev_caps.txt").write_text("a dog\na cat\n" * 15)
    model = text_model(NAME)

    def encode(texts, batch_size):
        rows = model.encode(texts, batch_size)
        rows[[number for number, text in enumerate(texts) if text == "a cat"]] = value
        return rows

    with pytest.raises(InputError, match=f"as {dtype}, for line 2 of dev_caps.txt .'a cat'.: "):
        write_texts(str(FOLDER), "out", model._replace(encode=encode), dtype=dtype)
    assert not Path("out/texts.json").exists()


def test_training_evaluation_and_questions_read_the_same_model(capsys):
    from search import main as search

    extract()
    train.main(
        [
            *("--data_name", "tiny_precomp", "--embed_size", "8", "--batch_size", "16"),
            *("--device", "cpu", "--num_epochs", "1", "--text_features"),
        ]
    )
    capsys.readouterr()
    search(["--model_path", BEST, "--precomp", str(FOLDER), "--index", "gallery", "a red dog"])
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = [float(words[0]) for words in found if words and words[0][-1:].isdigit()]
    assert len(scores) >= 5  # photos, best first
    assert scores == sorted(scores, reverse=True)


def test_a_model_that_was_moved_is_named_when_it_is_asked(monkeypatch, capsys):
    from search import main as search

    extract()
    flags = ["--data_name", "tiny_precomp", "--embed_size", "8", "--batch_size", "16"]
    train.main([*flags, "--device", "cpu", "--num_epochs", "1", "--text_features"])
    ask = ["--index", "gallery", "--model_path", BEST, "a red dog"]
    capsys.readouterr()
    search(["--precomp", str(FOLDER), *ask])
    first = capsys.readouterr().out
    monkeypatch.setattr(Sentences, "gone", "some")
    with pytest.raises(InputError, match="sentence_transformers/some could not be loaded"):
        search(ask)
    search([*ask, "--text_model", "sentence_transformers/elsewhere"])
    assert capsys.readouterr().out == first
    with pytest.raises(InputError, match="with other weights_sha256: bring back"):
        search([*ask, "--text_model", "sentence_transformers/other"])


def test_a_folder_is_described_by_its_whole_path(monkeypatch):
    monkeypatch.setattr(Sentences, "gone", None)
    Path("models/some").mkdir(parents=True)
    found = text_model("sentence_transformers/models/some").description["encoder"]
    assert found == f"sentence_transformers/{Path('models/some').resolve()}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sentence_transformers/missing", "could not be loaded"),
        ("word2vec", "is not known"),
        ("open_clip/ViT-B-32", "pip install open_clip_torch"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_sentence(name, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=said):
        extract_features.main(["--texts", str(FOLDER), "--text_encoder", name])
    assert not list(FOLDER.glob("*_txts.npy"))


def test_vectors_of_another_model_are_not_replaced():
    extract()
    with pytest.raises(InputError, match="with other weights_sha256: name another --output"):
        extract_features.main(
            ["--texts", str(FOLDER), "--text_encoder", "sentence_transformers/other"]
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "photos"], "--output is missing"),
        (["--texts", "data"], "go together"),
        (["--texts", "nowhere", "--text_encoder", NAME], "has no captions"),
        (["--texts", "data", "--text_encoder", NAME, "--captions", "none"], "leave one out"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(InputError, match=said):
        extract_features.main(flags)
