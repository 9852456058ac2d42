"""The memory bank: how it is drawn and built, and the weights that it gives."""

from argparse import Namespace

import pytest
import torch

from loss import SIMILARITIES
from memory_bank import MemoryBank, build_bank, draw_batches, global_weights, in_batch
from model import VSE
from tests.helpers import loops


def embeddings(n, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(n, width, generator=generator, dtype=torch.float64)
    ).abs()


def weights_of(im, s, bank, indices, k, measure="cosine", alpha=40.0, beta=40.0, epsilon=0.1):
    similarity = SIMILARITIES[measure]
    return global_weights(
        im,
        s,
        similarity(im, s),
        bank,
        torch.tensor(indices),
        similarity,
        k=k,
        alpha=alpha,
        beta=beta,
        epsilon=epsilon,
    )


class Elsewhere(torch.Tensor):
    """Claims to be on a GPU, so that the GPU's code path runs here."""

    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere], ids=["CPU", "GPU"])
@pytest.mark.parametrize(
    "entries, indices",
    [
        ([5, 0, 9, 3, 3, 41], [9, 3, 40, 0]),
        ([0, 1, 2], [2]),
        ([7, 8], [8, 7]),
        ([4], [90, 5, 3, 3]),
        ([99, 98], [1, 2]),
        ([-1, 9, 2], [1, 8, -1]),
        ([2**40, -(2**62), 3], [-(2**62), 3]),
    ],
    ids=["any order", "one index", "all", "none", "beyond", "negative", "far apart"],
)
def test_entries_of_the_batch_are_found(entries, indices, kind):
    found = in_batch(
        torch.tensor(entries).as_subclass(kind), torch.tensor(indices).as_subclass(kind)
    )
    assert found.tolist() == [entry in indices for entry in entries]


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize(
    "n, bank_size, k, indices",
    [
        (4, 10, 3, [20, 21, 22, 23]),
        (4, 10, 2, [0, 5, 20, 9]),
        (1, 10, 3, [20]),
        (3, 10, 250, [20, 21, 22]),
        (4, 3, 4, [20, 21, 22, 2]),
    ],
    ids=["plain", "some left out", "batch of one", "k is the batch", "fewer than k"],
)
def test_weights_equal_the_loop(n, bank_size, k, indices, measure):
    im, s = embeddings(n), embeddings(n, seed=1)
    bank = MemoryBank(
        embeddings(bank_size, seed=2), embeddings(bank_size, seed=3), torch.arange(bank_size)
    )
    W, w = loops.global_weights(
        im.tolist(),
        s.tolist(),
        indices,
        [part.tolist() for part in bank],
        k,
        40,
        40,
        0.1,
        measure=measure,
    )
    pair_weights, positive_weights = weights_of(im, s, bank, indices, k, measure)
    expected = torch.tensor([[float(x) for x in row] for row in W], dtype=torch.float64)
    assert (pair_weights - expected).abs().max() < 1e-12
    assert (
        positive_weights - torch.tensor([float(x) for x in w], dtype=torch.float64)
    ).abs().max() < 1e-12
    assert pair_weights.diagonal().eq(0).all()


def test_without_parameters_the_weights_take_the_released_ones():
    """k is 250, so that the 251st neighbour counts for nothing."""
    im, s = embeddings(252), embeddings(252, seed=1)
    bank = MemoryBank(embeddings(300, seed=2), embeddings(300, seed=3), torch.arange(300))
    indices = torch.arange(1000, 1252)
    found = global_weights(im, s, im @ s.t(), bank, indices)
    released, one_less, one_more = (
        weights_of(im, s, bank, indices.tolist(), k, alpha=40.0, beta=40.0, epsilon=0.1)
        for k in (250, 249, 251)
    )
    for part, expected, less, more in zip(found, released, one_less, one_more):
        assert torch.equal(part, expected)
        assert not torch.equal(part, less) and not torch.equal(part, more)


def test_equal_neighbours_all_count():
    """k of a bank of equal entries is k times one entry."""
    im, s = embeddings(3), embeddings(3, seed=1)
    one = embeddings(1, seed=2)
    bank = MemoryBank(one.repeat(8, 1), one.repeat(8, 1), torch.arange(8))
    W, w = loops.global_weights(
        im.tolist(), s.tolist(), [9, 9, 9], [part.tolist() for part in bank], 3, 40, 40, 0.1
    )
    pair_weights, positive_weights = weights_of(im, s, bank, [9, 9, 9], 3)
    assert float(pair_weights[0, 1]) == pytest.approx(float(W[0][1]), abs=1e-12)
    assert float(positive_weights[2]) == pytest.approx(float(w[2]), abs=1e-12)


def test_only_the_batch_s_own_captions_are_left_out():
    """The other four captions of a batch's image stay in the bank."""
    im, s = embeddings(5), embeddings(5, seed=1)
    bank = MemoryBank(embeddings(5, seed=2), embeddings(5, seed=3), torch.arange(5))
    indices = [3, 10, 15, 20, 25]
    W, _ = loops.global_weights(
        im.tolist(), s.tolist(), indices, [part.tolist() for part in bank], 5, 40, 40, 0.1
    )
    assert float(weights_of(im, s, bank, indices, 5)[0][0, 1]) == pytest.approx(
        float(W[0][1]), abs=1e-12
    )


def test_with_every_entry_left_out_the_weights_are_the_local_loss_s():
    im, s = embeddings(2), embeddings(2, seed=1)
    bank = MemoryBank(embeddings(2, seed=2), embeddings(2, seed=3), torch.tensor([4, 5]))
    pair_weights, positive_weights = weights_of(im, s, bank, [5, 4], 2)
    assert pair_weights.eq(1).all() and positive_weights.eq(1).all()


def test_weights_are_detached():
    im, s = embeddings(3).requires_grad_(), embeddings(3, seed=1).requires_grad_()
    bank = MemoryBank(embeddings(6, seed=2), embeddings(6, seed=3), torch.arange(6))
    assert not any(part.requires_grad for part in weights_of(im, s, bank, [7, 8, 9], 3))


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e7])
def test_weights_stay_within_0_and_1_at_any_scale(scale):
    im, s = embeddings(3), embeddings(3, seed=1)
    bank = MemoryBank(embeddings(6, seed=2), embeddings(6, seed=3), torch.arange(6))
    found = torch.cat(
        [part.ravel() for part in weights_of(im, s, bank, [7, 8, 9], 3, alpha=scale, beta=scale)]
    )
    assert ((found >= 0) & (found <= 1)).all()


def test_rate_one_keeps_every_batch():
    batches = [torch.tensor([number]) for number in range(9)]
    assert draw_batches(batches, 1.0, torch.Generator().manual_seed(0)) == batches


@pytest.mark.parametrize("seed", range(2))
def test_a_draw_that_would_keep_nothing_keeps_one_batch(seed):
    batches = ["a", "b", "c"]
    kept = draw_batches(batches, 1e-12, torch.Generator().manual_seed(seed))
    assert len(kept) == 1 and kept[0] in batches


def test_a_draw_keeps_about_the_rate_in_order_and_follows_the_seed():
    batches = list(range(4000))
    kept = draw_batches(batches, 0.05, torch.Generator().manual_seed(3))
    assert 120 < len(kept) < 280  # 200 within six standard deviations
    assert kept == sorted(set(kept))
    assert kept == draw_batches(batches, 0.05, torch.Generator().manual_seed(3))
    assert kept != draw_batches(batches, 0.05, torch.Generator().manual_seed(4))


def test_a_draw_is_added_to_only_where_it_would_keep_nothing():
    """Of 4 batches at a half, 1 in 16 draws keeps none and then one: 2 + 1/16 on average."""
    sizes = [
        len(draw_batches("abcd", 0.5, torch.Generator().manual_seed(seed))) for seed in range(2000)
    ]
    assert abs(sum(sizes) / len(sizes) - (2 + 1 / 16)) < 0.1  # more than four standard deviations


def test_the_one_batch_of_a_draw_of_none_follows_the_seed():
    kept = [draw_batches(range(1000), 1e-12, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert kept[0] == kept[1] != draw_batches(range(1000), 1e-12, torch.Generator().manual_seed(4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VSE(
        Namespace(
            data_name="tiny_precomp",
            img_dim=5,
            embed_size=4,
            finetune=False,
            cnn_type="vgg19",
            use_abs=False,
            no_imgnorm=False,
            vocab_size=9,
            word_dim=3,
            num_layers=1,
        )
    )


def batch(indices):
    n = len(indices)
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(n, 5, generator=generator),
        torch.randint(1, 9, (n, 4), generator=generator),
        torch.full((n,), 4),
        torch.tensor(indices),
        torch.tensor(indices),
    )


def test_the_bank_holds_the_batches_embeddings_in_batch_order(model):
    batches = [batch([8, 2, 5]), batch([1, 0])]
    bank = build_bank(model, batches)
    with torch.no_grad():
        images = torch.cat([model.img_enc(images) for images, *_ in batches])
        captions = torch.cat([model.txt_enc(words, lengths) for _, words, lengths, _, _ in batches])
    assert torch.allclose(bank.image_embeddings, images) and torch.allclose(
        bank.caption_embeddings, captions
    )
    assert bank.indices.tolist() == [8, 2, 5, 1, 0]


def test_the_bank_is_built_in_eval_mode_and_carries_no_graph(model):
    modes = []
    model.img_enc.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.train_start()
    bank = build_bank(model, [batch([1, 2])])
    assert modes == [False]
    assert not bank.image_embeddings.requires_grad and not bank.caption_embeddings.requires_grad
