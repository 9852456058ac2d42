"""The losses against the released code's numbers and plain loops."""

import json
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss import (
    HAL,
    LOSSES,
    ContrastiveLoss,
    InfoNCE,
    cosine_sim,
    find_loss,
    hal_loss,
    max_margin_loss,
    order_sim,
    sum_margin_loss,
)
from memory_bank import MemoryBank, global_weights
from tests.helpers import loops
from tests.helpers.made import REFERENCE, ROOT

CASES = json.loads((REFERENCE / "losses.json").read_text())

VSE_INFINITY = json.loads((REFERENCE / "vse_infty" / "losses.json").read_text())

LAST_DIGITS = 1e-15  # what sums of a few float64 numbers may be off by

BANK = ("bank_image_embeddings", "bank_caption_embeddings", "bank_indices")


def options(**changes):
    """The options a loss reads, at the released defaults."""
    return Namespace(
        **{
            "measure": "cosine",
            "max_violation": False,
            "sum_violation": False,
            "margin": 0.2,
            "local_alpha": 30.0,
            "local_ep": 0.3,
            "global_alpha": 40.0,
            "global_beta": 40.0,
            "global_ep_posi": 0.2,
            "global_ep_nega": 0.1,
            "mb_k": 250,
            "mb_rate": 0.05,
            **changes,
        }
    )


def embeddings(n, width=6, seed=0, dtype=torch.float64):
    """(n, width) rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(n, width, generator=generator, dtype=torch.float64)
    ).to(dtype)


def matrix(n, seed=0):
    """(n, n) similarities as a tensor and as the loops' rows."""
    S = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return S, [[loops.Decimal(float(x)) for x in row] for row in S]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_loss_and_gradients_equal_the_released_code(case):
    numbers = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(REFERENCE / case["file"]).items()
    }
    im = numbers["image_embeddings"].requires_grad_()
    s = numbers["caption_embeddings"].requires_grad_()
    bank = [numbers[name] for name in BANK] if case["uses_bank"] else [None] * 3
    loss = ContrastiveLoss(Namespace(**case["options"]))(im, s, *bank, numbers["indices"])
    loss.backward()
    assert loss.dtype == torch.float64
    assert abs(loss.item() - case["loss"]) < 1e-9
    assert (im.grad - numbers["grad_image"]).abs().max() < 1e-9
    assert (s.grad - numbers["grad_caption"]).abs().max() < 1e-9


@pytest.mark.parametrize("case", VSE_INFINITY, ids=lambda case: case["name"])
def test_loss_and_gradients_equal_vse_infinity_s(case):
    """Of tied hardest negatives it takes one, we take all.

    For those, gradients are compared with a loop.
    """
    numbers = {
        name: torch.from_numpy(value)
        for name, value in np.load(REFERENCE / "vse_infty" / "losses.npz").items()
    }
    im = numbers[f"{case['batch']}_image"].requires_grad_()
    s = numbers[f"{case['batch']}_caption"].requires_grad_()
    opt = options(max_violation=case["max_violation"], sum_violation=True, margin=case["margin"])
    loss = ContrastiveLoss(opt)(im, s)
    loss.backward()
    assert abs(loss.item() - case["loss"]) < 1e-9
    grad_image, grad_caption = (
        numbers[f"{case['name']}_grad_{kind}"] for kind in ("image", "caption")
    )
    if case["name"] == "ties_max_0.2":
        of_similarities = torch.tensor(
            hardest_gradient((im @ s.t()).tolist(), case["margin"]), dtype=torch.float64
        )
        grad_image, grad_caption = of_similarities @ s, of_similarities.t() @ im
    assert (im.grad - grad_image).abs().max() < 1e-9
    assert (s.grad - grad_caption).abs().max() < 1e-9


def hardest_gradient(S, margin):
    """The max-margin loss's gradient in each similarity.

    Shared by those that tie, nothing where none violates.
    """
    n = len(S)
    gradient = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for cells in ([(i, j) for j in range(n) if j != i], [(j, i) for j in range(n) if j != i]):
            worst = max((S[a][b] for a, b in cells), default=-1)
            ties = [(a, b) for a, b in cells if S[a][b] == worst]
            if margin + worst - S[i][i] > 0:
                gradient[i][i] -= 1
                for a, b in ties:
                    gradient[a][b] += 1 / len(ties)
    return gradient


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["uses_bank"]], ids=lambda case: case["name"]
)
def test_the_batch_indices_may_come_as_a_tuple_and_the_bank_s_as_a_list(case):
    """As the loaders and banks of VSE++ code return them."""
    numbers = np.load(REFERENCE / case["file"])
    im, s, mb_img, mb_cap = (
        torch.from_numpy(numbers[name])
        for name in ("image_embeddings", "caption_embeddings", *BANK[:2])
    )
    loss = ContrastiveLoss(Namespace(**case["options"]))(
        im, s, mb_img, mb_cap, numbers["bank_indices"].tolist(), tuple(numbers["indices"].tolist())
    )
    assert abs(loss.item() - case["loss"]) < 1e-9


@pytest.mark.parametrize("sizes", [(9,), (4, 1, 4)], ids=["one batch", "three batches"])
@pytest.mark.parametrize("rows", [torch.clone, torch.Tensor.numpy], ids=["tensors", "arrays"])
@pytest.mark.parametrize("numbers", [torch.clone, torch.Tensor.tolist], ids=["tensors", "lists"])
def test_the_bank_may_come_as_lists_of_its_batches(sizes, rows, numbers):
    im, s = embeddings(4), embeddings(4, seed=1)
    bank = [embeddings(9, seed=2), embeddings(9, seed=3), torch.arange(9)]
    batches = [
        [kind(batch) for batch in part.split(sizes)]
        for kind, part in zip((rows, rows, numbers), bank)
    ]
    indices = [2, 50, 8, 52]
    W, w = loops.global_weights(
        im.tolist(), s.tolist(), indices, [part.tolist() for part in bank], 3, 40, 40, 0.1
    )
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 30.0, 0.3, W, w)
    found = ContrastiveLoss(options(mb_k=3))(im, s, *batches, [indices[:1], indices[1:]])
    assert float(found) == pytest.approx(expected, abs=1e-11)


def test_cosine_similarity_is_the_dot_product_of_each_pair():
    im, s = embeddings(3), embeddings(5, seed=1)
    expected = [[float(x) for x in row] for row in loops.similarities(im.tolist(), s.tolist())]
    np.testing.assert_allclose(cosine_sim(im, s), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "shape, dtype",
    [((1, 1), torch.float64), ((3, 5), torch.float32), ((17, 4), torch.float64)],
    ids=str,
)
def test_order_similarity_is_the_negative_length_of_the_violations(shape, dtype):
    im, s = embeddings(shape[0], dtype=dtype).abs(), embeddings(shape[1], seed=1, dtype=dtype).abs()
    found = order_sim(im, s)
    expected = [
        [float(x) for x in row] for row in loops.similarities(im.tolist(), s.tolist(), "order")
    ]
    assert found.dtype == dtype and (found <= 0).all()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14
    )


def test_order_similarity_has_finite_gradients_where_nothing_is_violated():
    im = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    s = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    order_sim(im, s).sum().backward()
    assert im.grad.eq(0).all() and s.grad.eq(0).all()


@pytest.mark.parametrize("n, margin", [(1, 0.2), (2, 0.0), (7, 0.2), (7, 1.5)])
@pytest.mark.parametrize(
    "loss, loop", [(sum_margin_loss, loops.sum_margin), (max_margin_loss, loops.max_margin)]
)
def test_margin_losses_equal_the_loops(loss, loop, n, margin):
    S, rows = matrix(n, seed=n)
    assert float(loss(S, margin)) == pytest.approx(loop(rows, margin), abs=1e-12)


@pytest.mark.parametrize("loss, expected", [(sum_margin_loss, 4 * 0.2), (max_margin_loss, 4 * 0.2)])
def test_margin_losses_of_a_collapsed_pair_are_the_margins(loss, expected):
    assert float(loss(torch.full((2, 2), 0.7, dtype=torch.float64), 0.2)) == pytest.approx(
        expected, abs=1e-15
    )


@pytest.mark.parametrize(
    "loss, expected",
    [
        (sum_margin_loss, lambda rows: loops.sum_margin(rows, 0.2)),
        (max_margin_loss, lambda rows: loops.max_margin(rows, 0.2)),
        (hal_loss, lambda rows: loops.hal(rows, 30.0, 0.3)),
    ],
    ids=["sum", "max", "hal"],
)
def test_without_parameters_the_losses_take_the_released_ones(loss, expected):
    S, rows = matrix(5, seed=8)
    assert float(loss(S)) == pytest.approx(expected(rows), abs=1e-12)


@pytest.mark.parametrize(
    "n, alpha, epsilon", [(1, 30.0, 0.3), (2, 1.0, 0.0), (7, 60.0, 0.7), (7, 5.0, -0.2)]
)
def test_local_hal_equals_the_loop(n, alpha, epsilon):
    S, rows = matrix(n, seed=10 + n)
    assert float(hal_loss(S, alpha, epsilon)) == pytest.approx(
        loops.hal(rows, alpha, epsilon), abs=1e-12
    )


@pytest.mark.parametrize("n", [1, 6])
def test_weighted_hal_equals_the_loop(n):
    S, rows = matrix(n, seed=20 + n)
    W, w = torch.rand(n, n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    W.fill_diagonal_(0)
    expected = loops.hal(
        rows,
        30.0,
        0.3,
        [[loops.Decimal(float(x)) for x in row] for row in W],
        [loops.Decimal(float(x)) for x in w],
    )
    assert float(hal_loss(S, 30.0, 0.3, (W, w))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["local", "with weights"])
@pytest.mark.parametrize(
    "image_of", [range(1), range(2), range(24), [i // 3 for i in range(24)]], ids=str
)
@pytest.mark.parametrize("alpha, epsilon", [(30.0, 0.7), (5.0, -0.2)])
def test_hal_and_its_gradient_equal_the_loops_as_far_as_float64_goes(
    alpha, epsilon, image_of, weighted
):
    image_of = list(image_of)
    n = len(image_of)
    S, rows = matrix(n, seed=n)
    S.requires_grad_()
    draws = torch.Generator().manual_seed(n)
    W = torch.rand(n, n, generator=draws, dtype=torch.float64).fill_diagonal_(0)
    w = torch.rand(n, generator=draws, dtype=torch.float64)
    parts = (
        [[loops.Decimal(float(x)) for x in row] for row in W],
        [loops.Decimal(float(x)) for x in w],
    )
    exact = (rows, alpha, epsilon, *(parts if weighted else (None, None)), image_of)
    loss = HAL(alpha, epsilon)(S, ids=image_of, weights=(W, w) if weighted else None)
    loss.backward()
    assert loss.item() == pytest.approx(loops.hal(*exact), rel=LAST_DIGITS, abs=LAST_DIGITS)
    expected = torch.tensor(loops.hal_gradient(*exact), dtype=torch.float64)
    assert (S.grad - expected).abs().max() < LAST_DIGITS / n


def test_where_nothing_can_overflow_local_hal_rounds_like_the_plain_formula():
    """To the last bit of float32: below epsilon no exponent is above 0, and nothing is shifted."""
    S = matrix(40, seed=4)[0].float() * 0.3
    E = torch.exp(30.0 * (S.masked_fill(torch.eye(40, dtype=torch.bool), 0) - 0.3))
    plain = (torch.log(1 + E.sum(0)) + torch.log(1 + E.sum(1))) / 30.0 - torch.log(
        1 + S.diagonal().relu()
    )
    assert float(hal_loss(S)) == float(plain.mean())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("alpha", [1e3, 1e8])
def test_local_hal_stays_finite_and_right_at_scales_that_overflow_exp(alpha, dtype, tolerance):
    S, rows = matrix(5, seed=3)
    S = S.to(dtype).requires_grad_()
    loss = hal_loss(S, alpha, 0.3)
    loss.backward()
    rows = [[loops.Decimal(float(x)) for x in row] for row in S.detach()]
    assert loss.item() == pytest.approx(loops.hal(rows, alpha, 0.3), abs=tolerance)
    assert S.grad.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_global_hal_stays_finite_and_right_at_scales_that_overflow_exp(scale, dtype, tolerance):
    im, s = (
        embeddings(4, dtype=dtype).requires_grad_(),
        embeddings(4, seed=1, dtype=dtype).requires_grad_(),
    )
    bank = (embeddings(9, seed=2, dtype=dtype), embeddings(9, seed=3, dtype=dtype), torch.arange(9))
    indices = torch.tensor([2, 50, 51, 52])
    opt = options(local_alpha=scale, global_alpha=scale, global_beta=scale, mb_k=3)
    loss = ContrastiveLoss(opt)(im, s, *bank, indices)
    loss.backward()
    parts = im.tolist(), s.tolist()
    W, w = loops.global_weights(
        *parts, indices, [part.tolist() for part in bank], 3, scale, scale, 0.1
    )
    assert loss.item() == pytest.approx(
        loops.hal(loops.similarities(*parts), scale, 0.3, W, w), abs=tolerance
    )
    assert im.grad.isfinite().all() and s.grad.isfinite().all()


def test_a_pair_with_negative_similarity_draws_no_positive_gradient():
    S = torch.tensor([[-0.1, 0.2], [0.1, 0.5]], dtype=torch.float64, requires_grad=True)
    hal_loss(S, 30.0, 0.3).backward()
    assert S.grad[0, 0] == 0
    assert S.grad[1, 1] == pytest.approx(-1 / (2 * 1.5), abs=1e-12)


@pytest.mark.parametrize(
    "flags, loop",
    [
        ({"max_violation": True}, loops.max_margin),
        ({"sum_violation": True}, loops.sum_margin),
        ({"max_violation": True, "sum_violation": True}, loops.max_margin),
    ],
)
@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_the_options_choose_the_margin_loss_and_max_wins(measure, flags, loop):
    im, s = embeddings(5).abs(), embeddings(5, seed=1).abs()
    found = ContrastiveLoss(options(measure=measure, margin=0.3, **flags))(im, s)
    assert float(found) == pytest.approx(
        loop(loops.similarities(im.tolist(), s.tolist(), measure), 0.3), abs=1e-12
    )


@pytest.mark.parametrize(
    "arguments, named, measure, loop",
    [
        ((), {"margin": 0.3}, "cosine", loops.sum_margin),
        (
            (),
            {"margin": 0.3, "measure": "cosine", "max_violation": False},
            "cosine",
            loops.sum_margin,
        ),
        ((), {"margin": 0.3, "measure": "order", "max_violation": True}, "order", loops.max_margin),
        ((0.3,), {"max_violation": True}, "cosine", loops.max_margin),
        ((0.3, "order"), {}, "order", loops.sum_margin),
        ((0.3, False, True), {}, "cosine", loops.max_margin),
    ],
    ids=["margin", "all by name", "order", "margin by place", "two by place", "all by place"],
)
def test_vse_plus_plus_s_call_is_a_margin_loss(arguments, named, measure, loop):
    im, s = embeddings(5).abs(), embeddings(5, seed=1).abs()
    expected = loop(loops.similarities(im.tolist(), s.tolist(), measure), 0.3)
    assert float(ContrastiveLoss(*arguments, **named)(im, s)) == pytest.approx(expected, abs=1e-12)


def test_vse_plus_plus_s_defaults_are_the_sum_margin_loss_with_margin_0():
    im, s = embeddings(5), embeddings(5, seed=1)
    expected = loops.sum_margin(loops.similarities(im.tolist(), s.tolist()), 0)
    assert expected > 0 and float(ContrastiveLoss()(im, s)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("hardest, loop", [(False, loops.sum_margin), (True, loops.max_margin)])
def test_scan_s_call_without_a_margin_takes_0_whatever_the_options_have(hardest, loop):
    im, s = embeddings(5), embeddings(5, seed=1)
    expected = loop(loops.similarities(im.tolist(), s.tolist()), 0)
    found = ContrastiveLoss(options(margin=0.2), max_violation=hardest)(im, s)
    assert expected > 0 and float(found) == pytest.approx(expected, abs=1e-12)


def test_the_options_may_come_by_name():
    im, s = embeddings(5), embeddings(5, seed=1)
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 30.0, 0.3)
    assert float(ContrastiveLoss(opt=options())(im, s)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize(
    "n, bank_size, k, indices",
    [
        (5, 12, 3, range(100, 105)),
        (5, 12, 4, [0, 3, 100, 101, 11]),
        (1, 12, 250, [4]),
        (5, 12, 250, range(5)),
        (5, 3, 4, [0, 100, 101, 102, 103]),
        (5, 1, 4, range(100, 105)),
    ],
    ids=[
        "none left out",
        "some left out",
        "batch of one",
        "k beyond the batch",
        "fewer than k",
        "one entry",
    ],
)
def test_global_hal_equals_the_loop(n, bank_size, k, indices, measure):
    im, s = embeddings(n).abs(), embeddings(n, seed=1).abs()
    bank = (
        embeddings(bank_size, seed=2).abs(),
        embeddings(bank_size, seed=3).abs(),
        torch.arange(bank_size),
    )
    parts = im.tolist(), s.tolist()
    W, w = loops.global_weights(
        *parts, indices, [part.tolist() for part in bank], k, 40, 40, 0.1, measure=measure
    )
    expected = loops.hal(loops.similarities(*parts, measure), 30.0, 0.3, W, w)
    found = ContrastiveLoss(options(mb_k=k, measure=measure))(
        im, s, *bank, torch.tensor(list(indices))
    )
    assert float(found) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    "bank_indices", [[], [7, 8], [8, 7, 7, 8]], ids=["empty bank", "all left out", "doubles"]
)
def test_without_bank_entries_it_is_the_local_loss_with_its_gradients(bank_indices):
    im, s = embeddings(2).requires_grad_(), embeddings(2, seed=1).requires_grad_()
    n = len(bank_indices)
    bank = (
        embeddings(n, seed=2),
        embeddings(n, seed=3),
        torch.tensor(bank_indices, dtype=torch.int64),
    )
    loss = ContrastiveLoss(options())(im, s, *bank, torch.tensor([7, 8]))
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 30.0, 0.3)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    found = torch.autograd.grad(loss, (im, s))
    local = torch.autograd.grad(hal_loss(cosine_sim(im, s)), (im, s))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, local))


def test_no_gradient_reaches_the_bank_or_flows_through_its_weights():
    im, s = embeddings(4).requires_grad_(), embeddings(4, seed=1).requires_grad_()
    bank_images, bank_captions = (
        embeddings(9, seed=2).requires_grad_(),
        embeddings(9, seed=3).requires_grad_(),
    )
    loss = ContrastiveLoss(options(mb_k=3))(
        im, s, bank_images, bank_captions, torch.arange(9), torch.arange(20, 24)
    )
    loss.backward()
    assert bank_images.grad is None and bank_captions.grad is None
    W, w = loops.global_weights(
        im.tolist(),
        s.tolist(),
        range(20, 24),
        (bank_images.tolist(), bank_captions.tolist(), range(9)),
        3,
        40,
        40,
        0.1,
    )
    weights = (
        torch.tensor([[float(x) for x in row] for row in W], dtype=torch.float64),
        torch.tensor([float(x) for x in w], dtype=torch.float64),
    )
    (fixed,) = torch.autograd.grad(hal_loss(cosine_sim(im, s), 30.0, 0.3, weights), im)
    assert (im.grad - fixed).abs().max() < 1e-10


@pytest.mark.parametrize("flags", [{}, {"max_violation": True}, {"sum_violation": True}])
def test_zero_embeddings_give_a_finite_loss_and_gradient(flags):
    im, s = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    loss = ContrastiveLoss(options(**flags))(im, s)
    loss.backward()
    assert loss.isfinite() and im.grad.isfinite().all() and s.grad.isfinite().all()


def test_the_loss_leaves_its_inputs_as_they_are():
    S, _ = matrix(4)
    before = S.clone()
    hal_loss(S), max_margin_loss(S), sum_margin_loss(S)
    assert torch.equal(S, before)


@pytest.mark.parametrize("image_of", [[0, 0, 1, 1, 2], [3, 3, 3, 3, 3], [0, 1, 2, 3, 4]], ids=str)
def test_other_captions_of_the_same_image_are_no_negatives_if_their_images_are_named(image_of):
    im, s = embeddings(5), embeddings(5, seed=1)
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 30.0, 0.3, image_of=image_of)
    assert float(HAL(30.0, 0.3)(im, s, torch.tensor(image_of))) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    "kind", [torch.tensor, list, tuple, np.array], ids=lambda kind: kind.__name__
)
def test_images_may_be_named_by_whatever_a_loader_returns(kind):
    im, s = embeddings(5), embeddings(5, seed=1)
    image_of = [2**40, 2**40, -3, 0, -3]
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 30.0, 0.3, image_of=image_of)
    assert float(HAL(30.0, 0.3)(im, s, kind(image_of))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ids", [[7], [1, 2, 3, 4]], ids=["one", "one too few"])
def test_images_must_be_named_for_every_pair(ids):
    """A single number would otherwise stand for all pairs and leave no negative."""
    with pytest.raises(ValueError, match=rf"same= is \({len(ids)}, {len(ids)}\), .* \(5, 5\)"):
        HAL()(embeddings(5), embeddings(5, seed=1), ids)


def test_switching_hal_to_the_hardest_negative_changes_nothing():
    """As VSE-infinity's training does, after its warm-up epochs."""
    im, s = embeddings(5), embeddings(5, seed=1)
    criterion = HAL()
    before = float(criterion(im, s))
    for switch in (criterion.max_violation_on, criterion.max_violation_off):
        assert switch() is None and float(criterion(im, s)) == before
        assert "Does nothing" in switch.__doc__


def test_a_pair_that_is_no_negative_draws_no_gradient():
    S = matrix(3, seed=5)[0].requires_grad_()
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    hal_loss(S, 30.0, 0.3, same=same).backward()
    assert S.grad[0, 1] == S.grad[1, 0] == 0 and S.grad[0, 2] > 0 and S.grad.isfinite().all()


def test_the_module_takes_embeddings_or_their_similarities():
    im, s = embeddings(5), embeddings(5, seed=1)
    expected = loops.hal(loops.similarities(im.tolist(), s.tolist()), 60.0, 0.7)
    criterion = HAL(60.0, 0.7)
    assert list(criterion.parameters()) == []
    assert float(criterion(im, s)) == pytest.approx(expected, abs=1e-12)
    assert float(criterion(im @ s.t())) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["local", "with weights"])
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 4), (5, 0, 2)], ids=str)
def test_the_processes_shares_add_up_to_the_whole_loss_and_its_gradients(sizes, weighted):
    """Each process has its own rows of both directions.

    The last case has a process without a pair.
    """
    im, s = embeddings(7).requires_grad_(), embeddings(7, seed=1).requires_grad_()
    image_of = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    same = image_of.unsqueeze(1) == image_of
    W, w = (
        torch.rand(7, 7, dtype=torch.float64).fill_diagonal_(0),
        torch.rand(7, dtype=torch.float64),
    )
    total = 0
    for own in torch.arange(7).split(sizes):
        for queries, targets, pair_weights in ((im, s, W), (s, im, W.t())):
            weights = (pair_weights[own], w[own]) if weighted else None
            total = total + hal_loss(
                queries[own] @ targets.t(), 30.0, 0.3, weights, same[own], positives=own
            )
    rows = loops.similarities(im.tolist(), s.tolist())
    parts = (
        [[loops.Decimal(float(x)) for x in row] for row in W],
        [loops.Decimal(float(x)) for x in w],
    )
    expected = loops.hal(rows, 30.0, 0.3, *(parts if weighted else ()), image_of=image_of.tolist())
    assert float(total) == pytest.approx(expected, abs=1e-12)
    found = torch.autograd.grad(total, (im, s))
    whole = torch.autograd.grad(
        hal_loss(im @ s.t(), 30.0, 0.3, (W, w) if weighted else None, same), (im, s)
    )
    assert all((a - b).abs().max() < 1e-14 for a, b in zip(found, whole))


def test_a_matrix_that_is_not_square_asks_for_the_positives():
    with pytest.raises(ValueError, match=r"2 x 3, not square.*positives="):
        hal_loss(torch.rand(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    """Of embeddings in half precision, the loss and gradients of the same numbers in float32."""
    halves = [embeddings(128, 64, seed, torch.float32).to(dtype) for seed in (0, 1)]
    im, s = (half.clone().requires_grad_() for half in halves)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = HAL(30.0, 0.3)(im, s)
    loss.backward()
    exact = [half.float().requires_grad_() for half in halves]
    expected = hal_loss(exact[0] @ exact[1].t(), 30.0, 0.3)
    expected.backward()
    assert loss.dtype == torch.float32 and float(loss) == float(expected)
    assert torch.equal(im.grad, exact[0].grad.to(dtype))


def test_float16_keeps_gradients_that_the_plain_formula_rounds_to_zero():
    """Of a batch of 128, HAL loses only those that float16 cannot hold."""
    S = embeddings(128, 64, 0) @ embeddings(128, 64, 1).t()
    found, plain = (S.half().requires_grad_() for _ in range(2))
    HAL(30.0, 0.3)(found).backward()
    E = torch.exp(30 * (plain.masked_fill(torch.eye(128, dtype=torch.bool), 0) - 0.3))
    hubness = (torch.log(1 + E.sum(0)) + torch.log(1 + E.sum(1))) / 30
    (hubness - torch.log(1 + plain.diagonal().relu())).mean().backward()
    rows = [[loops.Decimal(float(x)) for x in row] for row in found.detach()]
    exact = torch.tensor(loops.hal_gradient(rows, 30, 0.3), dtype=torch.float64)
    zeros = [int((slope == 0).sum()) for slope in (found.grad, exact.half(), plain.grad)]
    assert zeros[0] == zeros[1] < zeros[2] / 2, zeros
    assert (found.grad.double() - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("missing", ["the bank's", "the batch's"])
def test_the_bank_asks_for_indices(missing):
    im, s = embeddings(2), embeddings(2, seed=1)
    of_bank, of_batch = torch.arange(2), torch.arange(2)
    if missing == "the bank's":
        of_bank = None
    else:
        of_batch = None
    with pytest.raises(ValueError, match="needs the captions' indices"):
        global_weights(im, s, im @ s.t(), MemoryBank(im, s, of_bank), of_batch)


# PyTorch's transformations ----------------------------------------------------------------------

NINE = MemoryBank(embeddings(9, seed=2), embeddings(9, seed=3), torch.arange(9))
INDICES = torch.tensor([2, 5, 20, 21, 22, 23])  # two of them are in the bank
TRANSFORMED = {
    "local": lambda im, s: HAL(30.0, 0.3)(im, s),
    "same images": lambda im, s: HAL(30.0, 0.3)(im, s, torch.tensor([0, 0, 1, 2, 2, 3])),
    "similarities": lambda im, s: HAL(30.0, 0.3)(im @ s.t()),
    "a share": lambda im, s: hal_loss(im[2:4] @ s.t(), positives=torch.tensor([2, 3])),
    "bank": lambda im, s: hal_loss(
        im @ s.t(), weights=global_weights(im, s, im @ s.t(), NINE, INDICES, k=4)
    ),
    "max": lambda im, s: max_margin_loss(im @ s.t()),
}


def with_gradients(function, im, s):
    """(The loss, its gradients in im and s) of plain autograd."""
    im, s = im.clone().requires_grad_(), s.clone().requires_grad_()
    loss = function(im, s)
    loss.backward()
    return loss.detach(), im.grad, s.grad


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_compile_takes_the_whole_function(name):
    """Without a break: fullgraph=True raises at one."""
    im, s = embeddings(6), embeddings(6, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(TRANSFORMED[name], fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        with_gradients(compiled, im, s), with_gradients(TRANSFORMED[name], im, s)
    ):
        assert (found - expected).abs().max() < 1e-15


# Without a pool of processes, and without test compilations to find the processor's vectors.
QUICK = {"compile_threads": 1, "cpp.vec_isa_ok": False}


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="torch.compile finds no C++ compiler here",
)
def test_torch_compile_s_own_code_gives_the_same_loss_and_gradients():
    pytest.importorskip("setuptools", reason="older torch.compile needs setuptools")
    im, s = embeddings(6), embeddings(6, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(TRANSFORMED["same images"], fullgraph=True, options=QUICK)
    expected = with_gradients(TRANSFORMED["same images"], im, s)
    for one, other in zip(with_gradients(compiled, im, s), expected):
        assert (one - other).abs().max() < 1e-15


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_s_gradients_are_autograd_s(name):
    im, s = embeddings(6), embeddings(6, seed=1)
    _, *expected = with_gradients(TRANSFORMED[name], im, s)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        found = transform(TRANSFORMED[name], (0, 1))(im, s)
        assert all((a - b).abs().max() < 1e-14 for a, b in zip(found, expected))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_maps_over_batches(name):
    """Three batches at once, and the gradient of each."""
    ims, ss = (torch.stack([embeddings(6, seed=seed + k) for seed in range(3)]) for k in (0, 3))
    found = torch.func.vmap(torch.func.grad_and_value(TRANSFORMED[name], (0, 1)))(ims, ss)
    for number, (im, s) in enumerate(zip(ims, ss)):
        loss, *slopes = with_gradients(TRANSFORMED[name], im, s)
        assert abs(found[1][number] - loss) < 1e-14
        for one, other in zip(found[0], slopes):
            assert (one[number] - other).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["local", "bank"])
def test_second_derivatives_are_those_of_the_formula(name):
    """The shift that keeps exp from overflowing is left out of the graph, so that is no matter."""
    im, s = (e.requires_grad_() for e in (embeddings(6), embeddings(6, seed=1)))
    weights = global_weights(im, s, im @ s.t(), NINE, INDICES, k=4) if name == "bank" else None
    assert torch.autograd.gradgradcheck(
        lambda im, s: hal_loss(5 * im @ s.t(), 3.0, 0.3, weights), (im, s)
    )


# Copied elsewhere, and the bank's indices --------------------------------------------------------


def test_indices_of_the_bank_may_be_any_numbers():
    """A table as long as the largest would take a terabyte."""
    im, s = embeddings(3), embeddings(3, seed=1)
    small = global_weights(
        im, s, im @ s.t(), MemoryBank(im, s, torch.tensor([7, 8, 9])), torch.tensor([1, 8, 2])
    )
    large = global_weights(
        im, s, im @ s.t(), MemoryBank(im, s, torch.tensor([2**40, 8, 9])), torch.tensor([1, 8, 2])
    )
    assert all(torch.equal(a, b) for a, b in zip(small, large))


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("far", [2**40, 2**63 - 1, -1, -(2**62)])
def test_indices_far_apart_take_no_table_as_long_as_the_largest(far):
    im, s = embeddings(3), embeddings(3, seed=1)
    bank = MemoryBank(im, s, [far, 8, 2])
    with LargestTensor() as largest:
        found = global_weights(im, s, im @ s.t(), bank, (1, 8, far))
    one_left = [part[2:].tolist() for part in (im, s)]
    W, w = loops.global_weights(
        im.tolist(), s.tolist(), [7, 7, 7], (*one_left, [2]), 3, 40, 40, 0.1
    )
    assert largest.elements < 100
    for part, expected in zip(found, (W, w)):
        expected = torch.tensor(np.array(expected, dtype=float))
        assert (part - expected).abs().max() < 1e-12


def test_a_bank_without_entries_gives_the_local_loss_s_weights():
    im, s = embeddings(3), embeddings(3, seed=1)
    nothing = MemoryBank(embeddings(0), embeddings(0), [])
    assert all(part.eq(1).all() for part in global_weights(im, s, im @ s.t(), nothing, [1, 2, 3]))


@pytest.mark.parametrize("n, temperature", [(1, 0.07), (6, 0.07), (6, 1.0)])
def test_info_nce_equals_the_loop(n, temperature):
    S, rows = matrix(n, seed=n)
    assert float(InfoNCE(temperature)(S)) == pytest.approx(
        loops.info_nce(rows, temperature), rel=1e-6
    )


def test_info_nce_learns_its_temperature_down_to_a_hundredth():
    S, rows = matrix(6, seed=2)
    criterion = InfoNCE(0.5)
    criterion(S).backward()
    h = 1e-4
    slope = (loops.info_nce(rows, 0.5 * math.exp(-h)) - loops.info_nce(rows, 0.5 * math.exp(h))) / (
        2 * h
    )
    assert float(criterion.log_scale.grad) == pytest.approx(slope, rel=1e-4)
    assert float(InfoNCE(0.001)(S)) == pytest.approx(loops.info_nce(rows, 0.01), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_is_called_with_a_matrix_and_gives_a_scalar_with_a_gradient(name):
    entry = LOSSES[name]
    opt = options(loss=name, **{flag.name: flag.default for flag in entry.flags})
    S = matrix(5)[0].requires_grad_()
    value = ContrastiveLoss(opt).of_similarities(S, None, None)
    value.backward()
    assert value.shape == () and S.grad.abs().sum() > 0
    assert entry.title.format(**vars(opt))


@pytest.mark.parametrize(
    "kind, reason",
    [
        (
            "nothing",
            "there is no loss 'nothing': choose hal, max, sum, infonce, ",
        ),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.helpers.loops:nothing", "has no attribute 'nothing'"),
    ],
)
def test_a_loss_that_is_not_there_is_told(kind, reason):
    with pytest.raises(ValueError, match=reason):
        find_loss(kind)


ALONE = """
import json, sys
import numpy as np, torch
from loss import HAL, SIMILARITIES, hal_loss, max_margin_loss, sum_margin_loss
from memory_bank import MemoryBank, global_weights

torch.set_num_threads(1)
folder, here = sys.argv[1:]
found = {}
for case in json.load(open(f"{folder}/losses.json")):
    opt, numbers = case["options"], np.load(f"{folder}/{case['file']}")
    numbers = {key: torch.from_numpy(np.asarray(value)) for key, value in numbers.items()}
    im = numbers["image_embeddings"].requires_grad_()
    s = numbers["caption_embeddings"].requires_grad_()
    similarity = SIMILARITIES[opt["measure"]]
    scores, weights = similarity(im, s), None
    if case["uses_bank"]:
        bank = MemoryBank(*(numbers[f"bank_{key}"] for key in (
            "image_embeddings", "caption_embeddings", "indices")))
        weights = global_weights(
            im, s, scores, bank, numbers["indices"], similarity, opt["mb_k"],
            opt["global_alpha"], opt["global_beta"], opt["global_ep_nega"])
    if opt["max_violation"]:
        loss = max_margin_loss(scores, opt["margin"])
    elif opt["sum_violation"]:
        loss = sum_margin_loss(scores, opt["margin"])
    else:
        loss = HAL(opt["local_alpha"], opt["local_ep"])(scores, weights=weights)
    loss.backward()
    off = [float((one.grad - numbers[f"grad_{kind}"]).abs().max())
           for one, kind in ((im, "image"), (s, "caption"))]
    found[case["name"]] = [abs(float(loss) - case["loss"]), *off]
files = [module.__file__ or "" for module in sys.modules.values() if hasattr(module, "__file__")]
print(json.dumps([found, sorted(file for file in files if file.startswith(here))]))
"""


def test_the_two_files_work_by_themselves(tmp_path):
    """Copied into an empty folder, with nothing else on the path, they give the released numbers."""
    for name in ("loss.py", "memory_bank.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "check.py").write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "check.py", REFERENCE, ROOT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found, of_this_project = json.loads(run.stdout)
    assert found.keys() == {case["name"] for case in CASES}
    assert max(number for numbers in found.values() for number in numbers) < 1e-9
    inside = [file for file in of_this_project if "site-packages" not in file]
    assert inside == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_loss_on_cuda_equals_the_released_code(case):
    numbers = {
        name: torch.from_numpy(np.asarray(value)).cuda()
        for name, value in np.load(REFERENCE / case["file"]).items()
    }
    bank = [numbers[name] for name in BANK] if case["uses_bank"] else [None] * 3
    loss = ContrastiveLoss(Namespace(**case["options"]))(
        numbers["image_embeddings"], numbers["caption_embeddings"], *bank, numbers["indices"].cpu()
    )
    assert abs(loss.item() - case["loss"]) < 1e-9
