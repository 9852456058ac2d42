"""Cross attention against the released code's numbers, plain loops and difference quotients."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from layers import cross_attention
from layers.cross_attention import cross_attention_similarities
from loss import hal_loss, max_margin_loss, sum_margin_loss
from runtime.errors import InputError
from tests.helpers.made import REFERENCE

RELEASED = REFERENCE / "scan"


def recorded(name):
    """[case] and {array name: tensor} of one reference file."""
    cases = json.loads((RELEASED / f"{name}.json").read_text())
    return cases, {
        key: torch.from_numpy(value) for key, value in np.load(RELEASED / f"{name}.npz").items()
    }


ATTENTION, ATTENTION_ARRAYS = recorded("attention")

SCORES, SCORE_ARRAYS = recorded("scores")

LOSSES, LOSS_ARRAYS = recorded("losses")

EVALUATIONS, EVALUATION_ARRAYS = recorded("evaluation")


def names(cases):
    return [case["name"] for case in cases]


def settings(**changes):
    """The options of a score."""
    return Namespace(
        **{
            "cross_attn": "t2i",
            "raw_feature_norm": "clipped_l2norm",
            "agg_func": "LogSumExp",
            "lambda_lse": 6.0,
            "lambda_softmax": 9.0,
            **changes,
        }
    )


def close(found, expected, relative):
    """Whether they differ by no more than this part of each entry, or a tenth of it of the largest."""
    return torch.allclose(
        found, expected, rtol=relative, atol=relative / 10 * expected.abs().max().item()
    )


# Against the released code ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ATTENTION, ids=names(ATTENTION))
def test_attention_equals_the_released_code_s(case):
    regions, words = (ATTENTION_ARRAYS[f"{case['inputs']}_{side}"] for side in ("regions", "words"))
    query, context = (words, regions) if case["cross_attn"] == "t2i" else (regions, words)
    opt = Namespace(raw_feature_norm=case["raw_feature_norm"])
    attended, weights = cross_attention.func_attention(query, context, opt, case["smooth"])
    assert attended.shape == query.shape and weights.shape == (
        len(query),
        context.shape[1],
        query.shape[1],
    )
    assert (attended - ATTENTION_ARRAYS[f"{case['name']}_weighted"]).abs().max() < 1e-10
    assert (weights - ATTENTION_ARRAYS[f"{case['name']}_attention"]).abs().max() < 1e-10


def check_gradients(case, arrays, value, images, captions):
    """The gradients of value equal the released ones, which are NaN where a zero region breaks them."""
    value.backward()
    for leaf, name in ((images, "images"), (captions, "captions")):
        assert leaf.grad.isfinite().all()
        if case["gradients_finite"]:
            assert close(leaf.grad, arrays[f"{case['name']}_grad_{name}"], 1e-7)


@pytest.mark.parametrize("case", SCORES, ids=names(SCORES))
def test_scores_and_gradients_equal_the_released_code_s(case):
    images, captions, lengths, weights = (
        SCORE_ARRAYS[f"{case['inputs']}_{part}"]
        for part in ("images", "captions", "lengths", "weights")
    )
    images, captions = images.clone().requires_grad_(), captions.clone().requires_grad_()
    score = getattr(cross_attention, f"xattn_score_{case['cross_attn']}")
    found = score(images, captions, lengths.tolist(), Namespace(**case))
    assert (found - SCORE_ARRAYS[f"{case['name']}_scores"]).abs().max() < 1e-10
    check_gradients(case, SCORE_ARRAYS, (found * weights).sum(), images, captions)


@pytest.mark.parametrize("case", SCORES, ids=names(SCORES))
def test_scores_of_pairs_equal_the_released_code_s(case):
    images, captions, lengths = (
        SCORE_ARRAYS[f"{case['inputs']}_{part}"] for part in ("images", "captions", "lengths")
    )
    starts = torch.arange(len(captions)) * captions.shape[1]
    pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(captions))).t()
    pairs = pairs[:, torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(0))]
    of_two = pairs[:, pairs[1] < 2]  # fewer captions than images: taken together by caption
    for chosen in (pairs, of_two, pairs[:, :1]):
        found = cross_attention.pair_similarities(
            images, captions.flatten(0, 1), starts, lengths, chosen, Namespace(**case)
        )
        assert (found - SCORE_ARRAYS[f"{case['name']}_scores"][tuple(chosen)]).abs().max() < 1e-10


@pytest.mark.parametrize("few", [0, 2], ids=["all pairs", "those with gradients"])
@pytest.mark.parametrize("case", LOSSES, ids=names(LOSSES))
def test_losses_of_the_scores_equal_the_released_code_s(monkeypatch, case, few):
    monkeypatch.setattr(cross_attention, "FEW", few)
    images, captions, lengths = (
        LOSS_ARRAYS[f"{case['inputs']}_{part}"] for part in ("images", "captions", "lengths")
    )
    images, captions = images.clone().requires_grad_(), captions.clone().requires_grad_()
    similarities = cross_attention_similarities(images, captions, lengths, Namespace(**case))
    assert (similarities - LOSS_ARRAYS[case["scores"]]).abs().max() < 1e-10
    assert (similarities.diagonal() <= 0).sum() == case["negative_pairs"]
    if case["kind"] == "hal":
        value = hal_loss(similarities, case["local_alpha"], case["local_ep"])
    else:
        value = (max_margin_loss if case["max_violation"] else sum_margin_loss)(
            similarities, case["margin"]
        )
    assert value.item() == pytest.approx(case["loss"], rel=1e-10, abs=1e-12)
    check_gradients(case, LOSS_ARRAYS, value, images, captions)


@pytest.mark.parametrize("shard_size", [7, 128])
@pytest.mark.parametrize(
    "as_given", [torch.Tensor.numpy, torch.Tensor.clone], ids=["arrays", "tensors"]
)
@pytest.mark.parametrize("case", EVALUATIONS, ids=names(EVALUATIONS))
def test_a_split_s_scores_and_ranks_equal_the_released_code_s(case, as_given, shard_size):
    images, captions, lengths = (
        as_given(EVALUATION_ARRAYS[part]) for part in ("images", "captions", "lengths")
    )
    shard = getattr(cross_attention, f"shard_xattn_{case['options']['cross_attn']}")
    scores = shard(images, captions, lengths, Namespace(**case["options"]), shard_size)
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float64
    expected = {
        key.removeprefix(f"{case['name']}_"): value.numpy()
        for key, value in EVALUATION_ARRAYS.items()
    }
    assert np.abs(scores - expected["scores"]).max() < 1e-10
    order = np.argsort(-scores, 1)
    assert [min(np.flatnonzero(row // 5 == image)) for image, row in enumerate(order)] == expected[
        "i2t_ranks"
    ].tolist()
    assert order[:, 0].tolist() == expected["i2t_top1"].tolist()
    order = np.argsort(-scores.T, 1)
    assert [row.tolist().index(c // 5) for c, row in enumerate(order)] == expected[
        "t2i_ranks"
    ].tolist()
    assert order[:, 0].tolist() == expected["t2i_top1"].tolist()


# Parts ------------------------------------------------------------------------------------------


def loop_score(image, words, opt):
    """The score of one image's regions and one caption's words, its contexts built, number by number."""
    queries, contexts = (words, image) if opt.cross_attn == "t2i" else (image, words)
    leaky = [
        [max(s, 0.1 * s) for s in (sum(a * b for a, b in zip(q, v)) for q in queries)]
        for v in contexts
    ]
    scaled = [[x / (math.sqrt(sum(y * y for y in row)) + 1e-8) for x in row] for row in leaky]
    relevance = []
    for place, q in enumerate(queries):
        weights = [math.exp(opt.lambda_softmax * row[place]) for row in scaled]
        attended = [
            sum(w * v[d] for w, v in zip(weights, contexts)) / sum(weights) for d in range(len(q))
        ]
        size = math.hypot(*q) * math.hypot(*attended)
        relevance.append(sum(a * b for a, b in zip(q, attended)) / max(size, 1e-8))
    if opt.agg_func == "Mean":
        return sum(relevance) / len(relevance)
    return math.log(sum(math.exp(opt.lambda_lse * r) for r in relevance)) / opt.lambda_lse


def batch(images=4, regions=5, lengths=(6, 6, 3, 1), width=8, dtype=torch.float64):
    """Normalised regions and words, with NaN past the captions' lengths."""
    torch.manual_seed(images + regions + len(lengths))
    words = torch.randn(len(lengths), max(lengths), width, dtype=dtype)
    words = torch.nn.functional.normalize(words, dim=2)
    words[torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)] = torch.nan
    return (
        torch.nn.functional.normalize(torch.randn(images, regions, width, dtype=dtype), dim=2),
        words,
        lengths,
    )


WAYS = [("t2i", "LogSumExp"), ("i2t", "Mean")]

SHAPES = [
    (4, 5, (6, 6, 3, 1)),
    (3, 1, (2, 2)),
    (1, 1, (1,)),
    (1, 4, (5, 3, 2)),
    (4, 36, (3,)),
    (2, 3, (2, 4, 1, 4)),
]


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
@pytest.mark.parametrize("images, regions, lengths", SHAPES, ids=str)
def test_scores_equal_a_plain_loop_s_in_every_shape_and_order(
    images, regions, lengths, cross_attn, agg_func
):
    opt = settings(cross_attn=cross_attn, agg_func=agg_func)
    images, words, lengths = batch(images, regions, lengths)
    expected = [
        [
            loop_score(image, caption[:length], opt)
            for caption, length in zip(words.tolist(), lengths)
        ]
        for image in images.tolist()
    ]
    for given in (lengths, torch.tensor(lengths), np.array(lengths)):
        found = cross_attention_similarities(images, words, given, opt)
        assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
@pytest.mark.parametrize(
    "limits",
    [{"CACHED": 1}, {"CACHED": 130}, {"LARGEST": 1}, {"LARGEST": 200, "CACHED": 70}],
    ids=str,
)
def test_tiles_and_blocks_change_nothing(monkeypatch, limits, cross_attn, agg_func):
    opt = settings(cross_attn=cross_attn, agg_func=agg_func)
    images, words, lengths = batch(7, 5, (6, 6, 6, 3, 1))
    weights = torch.randn(7, 5, dtype=torch.float64)

    def scores_and_gradients():
        leaves = [images.clone().requires_grad_(), words.clone().requires_grad_()]
        scores = cross_attention_similarities(*leaves, lengths, opt)
        return scores, *torch.autograd.grad((scores * weights).sum(), leaves)

    whole = scores_and_gradients()
    for name, value in limits.items():
        monkeypatch.setattr(cross_attention, name, value)
    for found, expected in zip(scores_and_gradients(), whole):
        assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("agg_func", cross_attention.AGGREGATIONS)
@pytest.mark.parametrize("norm", cross_attention.NORMS)
@pytest.mark.parametrize("cross_attn", ["t2i", "i2t"])
def test_gradients_equal_difference_quotients(cross_attn, norm, agg_func):
    opt = settings(cross_attn=cross_attn, raw_feature_norm=norm, agg_func=agg_func)
    images, words, lengths = batch(2, 3, (3, 3, 1), 3)
    words = words.nan_to_num(0.5)
    leaves = [1.5 * images.requires_grad_(), 0.7 * words.requires_grad_()]  # lengths other than 1
    assert torch.autograd.gradcheck(
        lambda *leaves: cross_attention_similarities(*leaves, lengths, opt), leaves
    )


@pytest.mark.parametrize("agg_func", cross_attention.AGGREGATIONS)
@pytest.mark.parametrize("norm", cross_attention.NORMS)
@pytest.mark.parametrize("cross_attn", ["t2i", "i2t"])
@pytest.mark.parametrize("zeros", [slice(0, 1), slice(None)], ids=["one region", "whole image"])
def test_zero_regions_give_finite_gradients(zeros, cross_attn, norm, agg_func):
    opt = settings(cross_attn=cross_attn, raw_feature_norm=norm, agg_func=agg_func)
    images, words, lengths = batch(3, 4, (5, 2, 1), dtype=torch.float32)
    images[1, zeros] = 0
    words[0, 1] = 0
    leaves = [images.requires_grad_(), words.requires_grad_()]
    scores = cross_attention_similarities(*leaves, lengths, opt)
    assert scores.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(scores.sum(), leaves))


@pytest.mark.parametrize("few", [0, 1], ids=["all pairs", "theirs alone"])
@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
def test_the_gradients_of_few_pairs_add_up_pair_by_pair(monkeypatch, cross_attn, agg_func, few):
    """As max-margin has them: most pairs take no part in the loss."""
    monkeypatch.setattr(cross_attention, "FEW", few)
    monkeypatch.setattr(cross_attention, "PAIRS", 2)
    opt = settings(cross_attn=cross_attn, agg_func=agg_func)
    images, words, lengths = batch(6, 4, (5, 5, 4, 4, 4, 2))
    pairs, expected = (
        [(0, 1), (0, 0), (3, 5), (5, 4)],
        [torch.zeros_like(images), torch.zeros_like(words)],
    )
    for image, caption in pairs:
        leaves = [
            images[image : image + 1].clone().requires_grad_(),
            words[caption : caption + 1].clone().requires_grad_(),
        ]
        score = cross_attention_similarities(*leaves, lengths[caption : caption + 1], opt)
        for grads, grad, place in zip(
            expected, torch.autograd.grad(score.sum(), leaves), (image, caption)
        ):
            grads[place] += grad[0]
    leaves = [images.requires_grad_(), words.requires_grad_()]
    scores = cross_attention_similarities(*leaves, lengths, opt)
    for found, grads in zip(
        torch.autograd.grad(sum(scores[pair] for pair in pairs), leaves), expected
    ):
        assert (found - grads).abs().max() < 1e-12


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
def test_a_loss_without_a_violation_has_zero_gradients(cross_attn, agg_func):
    images, words, lengths = batch(4, 3, (3, 3, 2, 1))
    leaves = [images.requires_grad_(), words.requires_grad_()]
    similarities = cross_attention_similarities(
        *leaves, lengths, settings(cross_attn=cross_attn, agg_func=agg_func)
    )
    for grad in torch.autograd.grad(max_margin_loss(similarities, margin=-9.0), leaves):
        assert grad.eq(0).all()


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
def test_backward_keeps_both_sides_and_the_scores_but_no_attended_contexts(cross_attn, agg_func):
    images, words, lengths = batch(20, 9, (7,) * 20, 64)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_attention_similarities(
            images.requires_grad_(),
            words.requires_grad_(),
            lengths,
            settings(cross_attn=cross_attn, agg_func=agg_func),
        )
    sides, scores, contexts = images.numel() + words.numel(), 20 * 9 * 20 * 7, 20 * 20 * 7 * 64
    assert sum(kept.values()) < 2 * sides + 2 * scores < contexts


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
def test_bf16_products_are_near_and_their_scores_and_gradients_float32(cross_attn, agg_func):
    images, words, lengths = batch(6, 36, (9, 9, 4, 2), 64, torch.float32)
    exact, near = [], []
    for found, amp in ((exact, "off"), (near, "bf16")):
        leaves = [images.clone().requires_grad_(), words.clone().requires_grad_()]
        scores = cross_attention_similarities(
            *leaves, lengths, settings(cross_attn=cross_attn, agg_func=agg_func, amp=amp)
        )
        found += [scores, *torch.autograd.grad(scores.square().sum(), leaves)]
    for a, b in zip(
        near, exact
    ):  # on the whole: where a score changes its sign, the leaky norm's slope jumps
        assert a.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * b.norm()


def test_the_precision_of_products_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        images, words, lengths = batch()
        cross_attention_similarities(
            images.requires_grad_(), words, lengths, settings()
        ).sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("cross_attn, agg_func", WAYS)
def test_autocast_around_the_scores_does_not_reach_them(cross_attn, agg_func):
    opt = settings(cross_attn=cross_attn, agg_func=agg_func)
    images, words, lengths = batch(dtype=torch.float32)
    images.requires_grad_()
    expected = cross_attention_similarities(images, words, lengths, opt)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_attention_similarities(images, words, lengths, opt)
        found.sum().backward()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cross_attn": "i2i"}, "--cross_attn is i2i: choose one of t2i, i2t"),
        (
            {"raw_feature_norm": "l3norm"},
            "--raw_feature_norm is l3norm: choose one of clipped_l2norm",
        ),
        ({"agg_func": "Median"}, "--agg_func is Median: choose one of LogSumExp"),
    ],
)
def test_names_that_are_none_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        cross_attention_similarities(*batch(), settings(**changes))


@pytest.mark.parametrize("lengths", [(6, 6, 3), (6, 6, 3, 0), (7, 6, 3, 1), ()], ids=str)
def test_lengths_that_the_words_do_not_have_are_refused(lengths):
    images, words, _ = batch()
    with pytest.raises(InputError, match="lengths"):
        cross_attention_similarities(images, words, lengths, settings())
