"""What each process of torchrun runs in the tests of several processes:

torchrun --standalone --nproc_per_node 4 tests/helpers/together.py compute OUT
torchrun --standalone --nproc_per_node 3 tests/helpers/together.py double <train.py's flags>
torchrun --standalone --nproc_per_node 2 tests/helpers/together.py differing <flag> <value> <train.py's flags>
"""

import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn

import data
import train
from data import Loader
from inputs.word_ids import WordIds
from layers.batch_norm import share_batch_norm
from layers.cross_attention import cross_attention_similarities
from loss import ContrastiveLoss
from memory_bank import MemoryBank
from model import build, l2norm
from retrieval.ranking import rank_shifted
from retrieval.similarity import SOURCES
from runtime import distributed
from runtime.errors import run_script
from training.shares import gradients, shared_batches

OPTIONS = {
    "data_name": "some_precomp",
    "img_dim": 8,
    "embed_size": 12,
    "word_dim": 6,
    "vocab_size": 9,
    "num_layers": 1,
    "finetune": True,
    "cnn_type": "resnet18",
    "cnn_weights": "none",
    "use_abs": False,
    "no_imgnorm": False,
    "measure": "cosine",
    "margin": 0.2,
    "max_violation": False,
    "sum_violation": False,
    "local_alpha": 30.0,
    "local_ep": 0.3,
    "global_alpha": 40.0,
    "global_beta": 40.0,
    "global_ep_nega": 0.1,
    "mb_k": 5,
    "cross_attn": None,
    "raw_feature_norm": "clipped_l2norm",
    "lambda_softmax": 9.0,
    "agg_func": "LogSumExp",
    "lambda_lse": 6.0,
    "precomp_enc_type": "basic",
    "bi_gru": False,
    "no_txtnorm": False,
}

T2I = {"cross_attn": "t2i", "bi_gru": True}

I2T = {
    "cross_attn": "i2t",
    "agg_func": "Mean",
    "lambda_softmax": 4.0,
    "precomp_enc_type": "weight_norm",
}

MLP = {"precomp_enc_type": "mlp", "image_pooling": "gpo", "sum_violation": True}

# Changes of the options, pairs of the batch, and --micro_batch.
CASES = {
    "hal": ({}, 23, None),
    "hal with the bank": ({"bank": 30}, 23, None),
    "sum-margin": ({"sum_violation": True}, 23, None),
    "max-margin": ({"max_violation": True}, 23, None),
    "order": ({"max_violation": True, "measure": "order", "use_abs": True}, 23, None),
    "a loss with weights": ({"loss": "infonce", "temperature": 0.3}, 23, None),
    "a loss with weights, micro": ({"loss": "infonce", "temperature": 0.3}, 23, 4),
    "seven pairs": ({}, 7, None),
    "one pair": ({"sum_violation": True}, 1, None),
    "micro": ({}, 23, 4),
    "micro, seven pairs": ({"bank": 30}, 7, 1),
    "t2i": (T2I, 23, None),
    "i2t, max-margin": ({**I2T, "max_violation": True}, 23, None),
    "i2t, seven pairs": (I2T, 7, None),
    "t2i, one pair": ({**T2I, "sum_violation": True}, 1, None),
    "i2t, two pairs": ({**I2T, "sum_violation": True}, 2, None),
    "t2i, micro": ({**T2I, "max_violation": True}, 23, 4),
    "i2t, micro, seven pairs": (I2T, 7, 1),
    "mlp": (MLP, 23, None),
    "mlp, fewer pairs than processes": ({**MLP, "image_pooling": "mean"}, 3, None),
    "mlp, gpo, one pair": (MLP, 1, None),
    "mlp, one region a process": ({**MLP, "image_pooling": "mean", "regions": 1}, 3, None),
    "cnn": ({"data_name": "photos"}, 6, None),
    "cnn, fewer pairs than processes": ({"data_name": "photos"}, 3, None),
    "cnn without batch norm, micro": ({"data_name": "photos", "without": "batch norm"}, 9, 2),
    "cnn that is frozen": ({"data_name": "photos", "finetune": False}, 6, None),
}

# Measure, images, images of a tile, items kept.
RANKINGS = [
    ("cosine", 40, 3, 10),
    ("cosine", 40, 3, 1),
    ("cosine", 40, 3, 0),
    ("order", 29, 7, 10),
    ("cosine", 3, 512, 2),
]


class Pairs(data.PrecompDataset):
    """Random float64 images (features, or 64 x 64 pixels) and captions, some with equal beginnings."""

    def __init__(self, pairs, shape):
        generator = torch.Generator().manual_seed(pairs)
        lengths = torch.randint(2, 7, (pairs,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.word_ids = WordIds(
            torch.randint(1, 3, (int(offsets[-1]),), generator=generator).int(), offsets
        )
        self.placed_word_ids, self.lengths = self.word_ids, self.word_ids.lengths
        self.images = torch.randn(pairs, *shape, generator=generator).double()
        self.placed_row_of = torch.arange(pairs)
        self.device, self.drops_words, self.drops_regions = torch.device("cpu"), None, None

    def _rows(self, rows):
        return self.images[rows]


def convolutions(width):
    """A small VGG-like network without batch norm, and without dropout, whose draws depend on the pieces."""
    layers = [
        layer
        for narrow, wide in ((3, 8), (8, 16), (16, 32))
        for layer in (nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, width), nn.ReLU()
    )


def case(name):
    """(model, loader, criterion, similarity, bank, size of a piece) of one of CASES, the same on every process."""
    changes, pairs, micro_batch = CASES[name]
    opt = Namespace(**{**OPTIONS, **changes})
    torch.manual_seed(1)
    model, criterion = build(opt), ContrastiveLoss(opt)
    if "without" in changes:
        model.img_enc.cnn = convolutions(model.img_enc.fc.in_features)
    model.double().train()
    criterion.double()
    bank = None
    if changes.get("bank"):
        images, captions = (
            l2norm(torch.randn(changes["bank"], opt.embed_size).double()) for _ in range(2)
        )
        bank = MemoryBank(images, captions, torch.arange(changes["bank"]))
    shape = (3, 64, 64) if opt.data_name == "photos" else (opt.img_dim,)
    if opt.cross_attn or opt.precomp_enc_type == "mlp":
        shape = (changes.get("regions", 5), opt.img_dim)
    similarity = (
        partial(cross_attention_similarities, opt=opt) if opt.cross_attn else criterion.similarity
    )
    return model, Loader(Pairs(pairs, shape), pairs), criterion, similarity, bank, micro_batch


def named_gradients(model, criterion):
    """{parameter: gradient} of both."""
    named = (*model.named_parameters(), *criterion.named_parameters())
    return {key: p.grad for key, p in named if p.grad is not None}


def gradients_of(name):
    """{parameter: gradient}, {buffer: value} and the loss of a case's whole batch."""
    model, loader, criterion, similarity, bank, micro_batch = case(name)
    share_batch_norm(model)
    (share,) = shared_batches(
        loader,
        [torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(3))],
        micro_batch,
    )
    parameters = [p for part in (model, criterion) for p in part.parameters() if p.requires_grad]
    no_image = loader.dataset.images[:0]
    loss, _, flags = gradients(model, share, criterion, similarity, bank, 1, parameters, no_image)
    if flags is not None:
        distributed.agree(flags)
    return named_gradients(model, criterion), dict(model.named_buffers()), loss.detach()


def rankings_of(measure, n, tile, top):
    """Rankings, plain and shifted, of n images with 1 to 7 captions each and many tied similarities."""
    draws = torch.Generator().manual_seed(n)
    image_of = torch.arange(n).repeat_interleave(torch.randint(1, 8, (n,), generator=draws))
    images, captions = (
        torch.randint(-1, 2, (rows, 5), generator=draws).float() for rows in (n, len(image_of))
    )
    shift = [torch.randint(0, 3, (rows,), generator=draws).float() for rows in (len(image_of), n)]
    source = SOURCES[measure](images, captions)
    source.tile_images = tile
    return rank_shifted(source, [None, shift], top, image_of)


def found_by_all(out):
    """Write, from the first process, what all computed and whether it is equal to the bit on all."""
    found = {name: gradients_of(name) for name in CASES}
    found["equal"], found["rankings"] = True, [rankings_of(*case) for case in RANKINGS]
    for name in CASES:
        flat = torch.cat(
            [
                value.flatten().double()
                for value in (*found[name][0].values(), *found[name][1].values())
            ]
        )
        everyone = distributed.gather(flat.unsqueeze(0), [1] * distributed.size())
        found["equal"] &= bool((everyone == everyone[0]).all())
    items = torch.cat(
        [
            part.flatten()
            for case in found["rankings"]
            for pair in case
            for side in pair
            for part in side
        ]
    )
    found["equal"] &= bool(
        (distributed.gather(items.unsqueeze(0), [1] * distributed.size()) == items).all()
    )
    if distributed.is_first():
        torch.save(found, out)


def in_double():
    """Make train.py use float64 for models, features and photos."""
    build, rows, image = train.build_model, data.PrecompDataset._rows, data.ImageDataset.image
    data.ImageDataset.image = lambda dataset, number: image(dataset, number).double()
    train.build_model = lambda *arguments: build(*arguments).double()
    data.PrecompDataset._rows = lambda dataset, *wanted: rows(dataset, *wanted).double()


def whole(name):
    """What gradients_of returns, from one plain backward pass over the whole batch.

    The batch is sorted by length, as a loader sorts it.
    """
    model, loader, criterion, similarity, bank, _ = case(name)
    indices = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(3))
    indices = torch.tensor(sorted(indices.tolist(), key=lambda i: -int(loader.dataset.lengths[i])))
    words = torch.zeros(len(indices), int(loader.dataset.lengths.max()), dtype=torch.int64)
    for row, index in enumerate(indices.tolist()):
        words[row, : loader.dataset.lengths[index]] = loader.dataset.word_ids[index]
    embeddings = model.forward_emb(
        loader.dataset.images[indices], words, loader.dataset.lengths[indices]
    )
    loss = criterion.of_similarities(
        similarity(*embeddings), *embeddings[:2], *(bank or (None,) * 3), indices
    )
    loss.backward()
    return named_gradients(model, criterion), dict(model.named_buffers()), loss.detach()


def check_same_gradients(found, expected, limit):
    """Check that gradients, buffers and the loss agree to `limit` of the largest gradient."""
    # A parameter without a gradient stays without one, or AdamW's decay would move it.
    assert found[0].keys() == expected[0].keys()
    largest = max(float(value.abs().max()) for value in expected[0].values())
    for key, value in expected[0].items():
        assert float((found[0][key] - value).abs().max()) <= limit * largest, key
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=limit, atol=limit)
    assert float(found[2]) == pytest.approx(float(expected[2]), rel=1e-12, abs=1e-14)


def main():
    """Run the command that the arguments name."""
    what, *rest = sys.argv[1:]
    if what == "compute":
        with distributed.session():
            found_by_all(rest[0])
    elif what == "double":
        in_double()
        train.main(rest)
    elif what == "differing":
        train.main([*rest[2:], *rest[:2]] if distributed.rank() else rest[2:])


if __name__ == "__main__":
    run_script(main)
