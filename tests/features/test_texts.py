"""Captions as vectors of a frozen text model: reading, checking, and training on them."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_results
import train
from data import PrecompDataset
from evaluation import embed, load_for_evaluation
from features.texts import FrozenTexts, TextRows
from model import VSE, FrozenTextHead
from runtime.errors import InputError
from tests.helpers.made import SPLITS, load, states_equal, write_precomp, write_vectors
from tests.helpers.made import TEXT_WIDTH as WIDTH

FOLDER = Path("data/tiny_precomp")

FLAGS = [
    *("--data_name", "tiny_precomp", "--embed_size", "8", "--batch_size", "16"),
    *("--learning_rate", "0.01", "--device", "cpu", "--num_epochs", "2", "--text_features"),
]

BEST = "runs/runX/model_best.pth.tar"


@pytest.fixture(autouse=True)
def data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_precomp(FOLDER)
    write_vectors(FOLDER)


def test_rows_are_read_by_their_lines():
    rows = torch.arange(12.0).view(4, 3).half()
    texts = TextRows(rows, torch.tensor([2, 0, 3]))
    assert len(texts) == 3 and texts.lengths.tolist() == [1, 1, 1]
    assert texts[1].tolist() == [0.0, 1.0, 2.0] and texts[1].dtype == torch.float32
    assert texts.padded(torch.tensor([2, 0])).tolist() == [[9.0, 10.0, 11.0], [6.0, 7.0, 8.0]]


def test_a_batch_has_each_caption_s_vector():
    dataset = PrecompDataset(str(FOLDER), "dev", FrozenTexts())
    vectors = np.load(FOLDER / "dev_txts.npy").astype(np.float32)
    images = np.load(FOLDER / "dev_ims.npy")
    chosen = torch.tensor([7, 0, 19, 3])
    ((found_images, texts, lengths, ids, indices),) = dataset.load([chosen])
    assert indices.tolist() == chosen.tolist() and lengths.tolist() == [1] * 4
    np.testing.assert_array_equal(texts, vectors[chosen])
    np.testing.assert_array_equal(found_images, images[chosen // 5])


@pytest.mark.parametrize("layers", [1, 3])
def test_the_head_is_layers_with_relu_between_them(layers):
    torch.manual_seed(0)
    head = FrozenTextHead(0, WIDTH, 8, layers)
    texts = torch.randn(5, WIDTH)
    state, expected = head.state_dict(), texts
    for number in range(layers - 1):
        weight, bias = state[f"hidden.{2 * number}.weight"], state[f"hidden.{2 * number}.bias"]
        expected = (expected @ weight.T + bias).clamp(min=0)
    expected = expected @ state["fc.weight"].T + state["fc.bias"]
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(texts, None), expected)
    assert head.sizes(state) == {"word_dim": WIDTH, "num_layers": layers, "embed_size": 8}


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--loss", "infonce"],
        ["--loss", "hal+infonce"],
        ["--max_violation"],
        ["--memory_bank", "--mb_rate", "0.5", "--mb_k", "5"],
        ["--txt_layers", "2", "--img_layers", "3"],
        ["--micro_batch", "5"],
    ],
    ids=" ".join,
)
def test_every_loss_trains_and_resumes_to_the_bit(more, capsys):
    train.main([*FLAGS, *more, "--logger_name", "runs/whole"])
    said = capsys.readouterr()
    assert "Training VSE, text vectors," in said.err and "which text model made" in said.err
    train.main([*FLAGS, *more, "--num_epochs", "1"])
    train.main([*FLAGS, *more, "--resume", "auto"])
    one, other = (load(f"runs/{run}/checkpoint.pth.tar") for run in ("whole", "runX"))
    assert states_equal(one["model"], other["model"])
    assert one["opt"].word_dim == WIDTH and one["vocabulary"] == []
    capsys.readouterr()
    compute_results.main(["--model_path", BEST])
    assert capsys.readouterr().out.startswith("rsum: ")


def test_embeddings_are_the_head_s_of_each_caption_s_vector():
    train.main([*FLAGS, "--num_epochs", "1"])
    loaded = load_for_evaluation(Namespace(model_path=BEST))
    images, captions = embed(loaded.model, loaded.loader("test"))
    state = load(BEST)["model"]
    for found, name, encoder in ((images, "ims", 0), (captions, "txts", 1)):
        rows = torch.from_numpy(np.load(FOLDER / f"test_{name}.npy").astype(np.float32))
        expected = rows @ state[encoder]["fc.weight"].T + state[encoder]["fc.bias"]
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected)


def test_vectors_may_lie_in_a_folder_of_their_own():
    write_vectors(FOLDER, "vectors", described=True)
    for split in SPLITS:
        (FOLDER / f"{split}_txts.npy").unlink()
    train.main([*FLAGS, "--texts_path", "vectors", "--num_epochs", "1"])
    assert load(BEST)["texts"]["encoder"] == "sentence_transformers/some"
    compute_results.main(["--model_path", BEST])


def test_a_moved_folder_s_vectors_are_found_beside_the_captions(capsys):
    write_vectors(FOLDER, "vectors")
    train.main([*FLAGS, "--texts_path", "vectors", "--num_epochs", "1"])
    capsys.readouterr()
    compute_results.main(["--model_path", BEST])
    first = capsys.readouterr().out
    Path("vectors").rename("moved")
    compute_results.main(["--model_path", BEST])
    assert capsys.readouterr().out == first
    (FOLDER / "test_txts.npy").unlink()
    with pytest.raises(InputError, match="vectors/test_txts.npy or data/tiny_precomp/test_txts.np"):
        compute_results.main(["--model_path", BEST])


def test_vectors_of_another_width_than_the_checkpoint_s_are_refused():
    train.main([*FLAGS, "--num_epochs", "1"])
    np.save(FOLDER / "test_txts.npy", np.ones((30, WIDTH + 2), np.float32))
    with pytest.raises(InputError, match=f"have width {WIDTH + 2}, but the model takes {WIDTH}"):
        compute_results.main(["--model_path", BEST])


def test_hal_plus_infonce_is_the_sum_of_both():
    from loss import find_loss

    options = Namespace(local_alpha=20.0, local_ep=0.4, temperature=0.1)
    torch.manual_seed(1)
    S = torch.rand(5, 5, dtype=torch.float64)
    found = float(find_loss("hal+infonce").make(options)(S).detach())
    hal = nce = 0.0
    for i in range(5):
        away = [0.0 if i == j else float(S[i, j]) for j in range(5)]
        back = [0.0 if i == j else float(S[j, i]) for j in range(5)]
        for side in (away, back):
            hal += math.log(1 + sum(math.exp(20 * (s - 0.4)) for s in side)) / 20 / 5
        hal -= math.log(1 + float(S[i, i])) / 5
        for side in (S[i], S[:, i]):
            nce += (
                math.log(sum(math.exp(float(s) / 0.1) for s in side)) - float(S[i, i]) / 0.1
            ) / 10
    assert found == pytest.approx(hal + nce, abs=1e-6)  # the temperature is float32


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (
            lambda: (FOLDER / "train_txts.npy").unlink(),
            [],
            "data/tiny_precomp/train_txts.npy is not there, and the model takes",
        ),
        (lambda: (FOLDER / "dev_txts.npy").unlink(), [], "dev_txts.npy is not there"),
        (
            lambda: np.save(FOLDER / "dev_txts.npy", np.ones((25, WIDTH + 1), np.float32)),
            [],
            f"have width {WIDTH + 1}, but the model takes {WIDTH}",
        ),
        (
            lambda: np.save(FOLDER / "dev_txts.npy", np.ones((3, WIDTH), np.float32)),
            [],
            "has 3 rows for the 25 captions",
        ),
        (
            lambda: np.save(FOLDER / "dev_txts.npy", np.diag(np.full(25, np.nan))[:, 3:9]),
            [],
            "dev_txts.npy has NaN, infinity or a number beyond 1e+15 in row 3",
        ),
        (
            lambda: np.save(FOLDER / "dev_txts.npy", np.ones((25, 2, 3), np.float32)),
            [],
            "shape (captions, width)",
        ),
        (lambda: None, ["--bi_gru"], "--bi_gru does not go with --text_features"),
        (lambda: None, ["--cross_attn", "t2i"], "--cross_attn does not go with --text_features"),
        (lambda: None, ["--data_name", "f8k"], "--text_features is for precomputed features"),
    ],
)
def test_bad_input_is_one_sentence(change, flags, said):
    change()
    with pytest.raises(InputError, match=re.escape(said)):
        train.main([*FLAGS[:-1], *flags, "--text_features"])
    assert not Path("runs").exists()


def test_vectors_of_other_captions_or_models_are_refused():
    write_vectors(FOLDER, described=True)
    train.main([*FLAGS, "--num_epochs", "1"])
    content = json.loads((FOLDER / "texts.json").read_text())
    other = {**content, "encoder": "open_clip/ViT-B-32"}
    (FOLDER / "texts.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="trained on those by sentence_transformers/some"):
        compute_results.main(["--model_path", BEST])
    (FOLDER / "texts.json").write_text(json.dumps(content))
    lines = (FOLDER / "test_caps.txt").read_text().splitlines()
    (FOLDER / "test_caps.txt").write_text("\n".join([lines[1], lines[0], *lines[2:], ""]))
    with pytest.raises(InputError, match="made of other captions"):
        compute_results.main(["--model_path", BEST])


def test_the_model_takes_its_sizes_from_the_options():
    opt = Namespace(
        data_name="x_precomp", img_dim=4, embed_size=8, finetune=False, cnn_type="vgg19",
        use_abs=False, no_imgnorm=False, vocab_size=0, word_dim=WIDTH, num_layers=2,
        text_encoder="features", img_layers=2,
    )  # fmt: skip
    model = VSE(opt)
    assert model.img_enc.hidden[0].weight.shape == (8, 4)
    assert model.txt_enc.hidden[0].weight.shape == (8, WIDTH)
    images, texts = model.forward_emb(torch.randn(3, 4), torch.randn(3, WIDTH), [1, 1, 1])
    assert images.shape == texts.shape == (3, 8)
