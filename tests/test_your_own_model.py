"""The code of docs/your-own-model.md and of the README's section, run as it stands there.

Each block computes the same loss as the plain loop. Blocks for another package need it and skip
without it; nothing is downloaded, since the models are tiny and random.
"""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from loss import HAL
from memory_bank import MemoryBank
from tests.helpers import loops, pages
from tests.helpers.made import ROOT

IMAGE_OF = [0, 1, 1, 2, 3, 3]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected_loss(im, s, image_of=None, weights=None):
    """HAL with alpha 30 and epsilon 0.7, of embeddings of any length, as a loop."""
    im, s = (normalize(one.detach().double()).tolist() for one in (im, s))
    return loops.hal(loops.similarities(im, s), 30, 0.7, *(weights or (None, None)), image_of)


@pytest.fixture
def names():
    """What the blocks expect: encoders, a batch, its embeddings, and a criterion."""
    torch.manual_seed(0)
    image_encoder, text_encoder = nn.Linear(5, 8).double(), nn.Linear(7, 8).double()
    images, texts, image_ids = numbers(6, 5), numbers(6, 7, seed=1), torch.tensor(IMAGE_OF)
    im, s = normalize(image_encoder(images)), normalize(text_encoder(texts))
    return {
        "torch": torch,
        "normalize": normalize,
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "loader": [(images, texts, image_ids)],
        "optimizer": torch.optim.SGD(
            [*image_encoder.parameters(), *text_encoder.parameters()], lr=0.1
        ),
        "image_ids": image_ids,
        "im": im,
        "s": s,
        "criterion": HAL(alpha=30, epsilon=0.7),
    }


RUN_BELOW = {
    ("Plain PyTorch", 0),
    ("open_clip", 0),
    ("sentence-transformers", 0),
    ("pytorch-metric-learning", 0),
    ("VSE-infinity", 0),
    ("SGRAF", 0),
    ("Collapse", 0),
    ("Several processes", 0),
    ("Several processes", 1),
    ("The memory bank", 0),
}


def test_every_block_of_the_page_is_run_by_a_test_and_is_short():
    found = pages.blocks()
    assert {(heading, number) for heading, number, _ in found} == RUN_BELOW
    assert all(len(lines) <= 12 for _, _, lines in found), found


@pytest.mark.parametrize(
    "heading, page",
    [("Plain PyTorch", "docs/your-own-model.md"), ("HAL in your own model", "README.md")],
)
def test_plain_pytorch(names, heading, page):
    expected = expected_loss(names["im"], names["s"], IMAGE_OF)
    before = names["image_encoder"].weight.clone()
    exec(pages.code(heading, page=page), names)
    assert names["loss"].item() == pytest.approx(expected, abs=1e-12)
    assert names["image_encoder"].weight.grad.abs().sum() > 0
    if page != "README.md":
        assert not torch.equal(names["image_encoder"].weight, before)


def test_open_clip(names):
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=1, width=16, head_width=8, patch_size=8, image_size=16
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=6, vocab_size=20, width=16, heads=2, layers=1
        ),
        output_dict=True,
    )
    images = numbers(6, 3, 16, 16, dtype=torch.float32)
    texts = torch.arange(36).view(6, 6) % 20
    names |= {"model": model, "images": images, "texts": texts}
    exec(pages.code("open_clip"), names)
    features = model.encode_image(images), model.encode_text(texts)
    assert names["loss"].item() == pytest.approx(expected_loss(*features), abs=1e-6)
    names["loss"].backward()
    assert model.visual.conv1.weight.grad.abs().sum() > 0 and model.logit_scale.grad is None


def test_sentence_transformers(names, tmp_path):
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = ["[UNK]", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = library.SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu"
    )
    anchors, texts = ["a b", "c d", "c d", "e f", "g h", "g h"], list("ijklmn")
    features = [torch.tensor(model.encode(side)) for side in (anchors, texts)]
    expected = expected_loss(*features, IMAGE_OF)
    args = library.SentenceTransformerTrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=6,
        learning_rate=0.1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    pairs = Dataset.from_dict({"anchor": anchors, "positive": texts, "label": IMAGE_OF})
    names |= {"model": model, "args": args, "pairs": pairs}
    exec(pages.code("sentence-transformers"), names)
    (logged,) = [one["loss"] for one in names["trainer"].state.log_history if "loss" in one]
    assert float(logged) == pytest.approx(expected, abs=1e-4)  # the trainer rounds it
    assert (torch.tensor(model.encode(anchors)) - features[0]).abs().max() > 0


def test_pytorch_metric_learning(names):
    pytest.importorskip(
        "pytorch_metric_learning", reason="pytorch-metric-learning is not installed"
    )
    exec(pages.code("pytorch-metric-learning"), names)
    expected = expected_loss(names["im"], names["s"], IMAGE_OF)
    assert names["loss"].item() == pytest.approx(expected, abs=1e-12)
    names["loss"].backward()
    assert names["image_encoder"].weight.grad.abs().sum() > 0


def test_vse_infinity(names):
    logged = []

    class Model:
        """Calls its criterion as VSE-infinity's model does."""

        def forward_loss(self, image_embeddings, caption_embeddings):
            loss = self.criterion(image_embeddings, caption_embeddings)
            logged.append((loss.item(), image_embeddings.size(0)))
            return loss

    exec(pages.code("VSE-infinity"), names | {"model": Model()})
    (loss, size) = logged[0]
    assert loss == pytest.approx(expected_loss(names["im"], names["s"]), abs=1e-12) and size == 6


def test_sgraf(names):
    class Model(nn.Module):
        """Scores every image and caption by a small network, between 0 and 1."""

        def __init__(self):
            super().__init__()
            self.score = nn.Linear(8, 1).double()

        def forward_sim(self, im, s, lengths):
            return self.score(im.unsqueeze(1) * s).squeeze(2).sigmoid()

    names |= {"model": Model(), "lengths": [4] * 6}
    scores = names["model"].forward_sim(names["im"], names["s"], None).tolist()
    exec(pages.code("SGRAF"), names)
    rows = [[loops.Decimal(x) for x in row] for row in scores]
    expected = loops.hal(rows, 30, 0.7, image_of=IMAGE_OF)
    assert names["loss"].item() == pytest.approx(expected, abs=1e-12)


def test_collapse(names):
    im = names["im"]
    one = im[:1].expand(6, -1)
    for s, share in ((im, 1.0), (-im, 0.0), (torch.cat([im[:3], -im[3:]]), 0.5)):
        exec(pages.code("Collapse"), names | {"s": s}, found := {})
        assert found["positive_share"] == share
        rows = loops.similarities(im.tolist(), s.tolist())
        everything = sum(sum(row) for row in rows) / 36
        expected = sum(rows[i][i] for i in range(6)) / 6 - everything
        assert float(found["gap"]) == pytest.approx(float(expected), abs=1e-12)
    exec(pages.code("Collapse"), names | {"im": one, "s": one}, found := {})
    assert found["positive_share"] == 1 and abs(found["gap"]) < 1e-12


def test_the_memory_bank(names):
    samples = numbers(9, 5, seed=2), numbers(9, 7, seed=3), torch.arange(9)
    names |= dict(zip(("sample_images", "sample_texts", "sample_indices"), samples))
    names["indices"] = [2, 5, 20, 21, 22, 23]
    exec(pages.code("The memory bank"), names)
    bank = [
        normalize(names["image_encoder"](samples[0])).tolist(),
        normalize(names["text_encoder"](samples[1])).tolist(),
        range(9),
    ]
    im, s = names["im"].tolist(), names["s"].tolist()
    weights = loops.global_weights(im, s, names["indices"], bank, 250, 40, 40, 0.1)
    expected = expected_loss(names["im"], names["s"], weights=weights)
    assert (
        isinstance(names["bank"], MemoryBank) and not names["bank"].image_embeddings.requires_grad
    )
    assert names["loss"].item() == pytest.approx(expected, abs=1e-11)


def test_two_processes_are_as_exact_as_one(tmp_path, names):
    """DistributedDataParallel over gloo: the loss and the gradients of one process with all pairs."""
    images, texts, image_ids = names["loader"][0]
    weights = [
        numbers(8, width, seed=4).requires_grad_() for width in (images.shape[1], texts.shape[1])
    ]
    parts = images, texts, image_ids, *(weight.detach() for weight in weights)
    torch.save(parts, tmp_path / "batch.pt")
    script = [sys.executable, ROOT / "tests/helpers/two_processes.py"]
    processes = [
        subprocess.Popen([*script, str(rank), tmp_path], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    both = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    im, s = (normalize(rows @ weight.t()) for rows, weight in zip((images, texts), weights))
    expected = torch.autograd.grad(HAL(30, 0.7)(im, s, image_ids), weights)
    whole = expected_loss(im, s, IMAGE_OF)
    for found in both:
        assert float(found["loss"]) == pytest.approx(whole, abs=1e-14)
    assert float(both[0]["share"] + both[1]["share"]) == pytest.approx(whole, abs=1e-14)
    for name in ("loss", "share"):
        for *slopes, exact in zip(*(found[f"slopes of {name}"] for found in both), expected):
            assert max(float((slope - exact).abs().max()) for slope in slopes) < 1e-15


def test_figures_on_the_page_are_those_of_the_results():
    """But for the collapse's, which were measured for the page."""
    text = (ROOT / "docs/your-own-model.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|^## Collapse$.*?(?=^## )", "", text, flags=re.S | re.M)
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    told = re.findall(r"\d+\.\d+", text)
    assert len(told) > 10 and set(told) <= set(re.findall(r"\d+\.\d+", results))
