"""Pooling against the released VSE-infinity code's numbers, and against plain loops."""

import math

import pytest
import torch

from layers import pooling
from layers.pooling import (
    GPO,
    POOLINGS,
    kmax_pool,
    max_pool,
    mean_pool,
    positional_encoding,
    region_lengths,
)
from tests.helpers.made import REFERENCE, states_equal

RELEASED = torch.load(REFERENCE / "vse_infty" / "gpo.pt", weights_only=True)

CASES = pytest.mark.parametrize(
    "case", RELEASED["cases"], ids=["36 regions", "12 regions", "no full length"]
)


def released_gpo():
    module = GPO(RELEASED["options"]["d_pe"], RELEASED["options"]["d_hidden"])
    module.load_state_dict(RELEASED["state"])
    return module


def small_gpo(dtype=torch.float64):
    torch.manual_seed(3)
    return GPO(4, 3).to(dtype)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# Against the released code ----------------------------------------------------------------------


def test_one_seed_gives_the_released_initial_weights():
    torch.manual_seed(RELEASED["options"]["seed"])
    state = GPO(RELEASED["options"]["d_pe"], RELEASED["options"]["d_hidden"]).state_dict()
    assert list(state) == list(RELEASED["state"]) and states_equal([state], [RELEASED["state"]])


def test_the_positional_encoding_is_the_released_one():
    expected = RELEASED["positional_encoding"]
    found = positional_encoding(*expected.shape)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-7


@CASES
def test_pooled_features_and_weights_equal_the_released_ones(case):
    pooled, weights = released_gpo().double()(case["features"].double(), case["lengths"])
    assert (pooled - case["pooled"]).abs().max() < 1e-10
    assert (
        weights.shape == case["pool_weights"].shape
        and (weights - case["pool_weights"]).abs().max() < 1e-10
    )
    pooled, _ = released_gpo()(case["features"], case["lengths"])
    assert pooled.dtype == torch.float32 and (pooled - case["pooled_float32"]).abs().max() < 1e-6


@CASES
def test_gradients_equal_the_released_ones(case):
    module, features = released_gpo().double(), case["features"].double().requires_grad_()
    (module(features, case["lengths"])[0] * case["projection"]).sum().backward()
    assert (features.grad - case["grad_features"]).abs().max() < 1e-10
    parameters = dict(module.named_parameters())
    for name, expected in case["grad_state"].items():
        assert (parameters[name].grad - expected).abs().max() < 1e-9 * max(
            1, expected.abs().max()
        ), name


# Generalized pooling ----------------------------------------------------------------------------


def gru_direction(weights, suffix, inputs):
    """The states after each of the inputs (lists of numbers), by the equations of a GRU."""
    w_in, w_out, b_in, b_out = (
        weights[f"gru.{kind}_l0{suffix}"]
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    size, states = len(w_out[0]), []
    state = [0.0] * size
    for x in inputs:
        from_input = [sum(a * b for a, b in zip(row, x)) + bias for row, bias in zip(w_in, b_in)]
        from_state = [
            sum(a * b for a, b in zip(row, state)) + bias for row, bias in zip(w_out, b_out)
        ]
        reset = [1 / (1 + math.exp(-from_input[i] - from_state[i])) for i in range(size)]
        update = [
            1 / (1 + math.exp(-from_input[size + i] - from_state[size + i])) for i in range(size)
        ]
        new = [
            math.tanh(from_input[2 * size + i] + reset[i] * from_state[2 * size + i])
            for i in range(size)
        ]
        state = [(1 - update[i]) * new[i] + update[i] * state[i] for i in range(size)]
        states.append(state)
    return states


def theta_loop(module, length, width):
    """The weights of `length` ranked values."""
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    table = [
        [
            (math.sin, math.cos)[i % 2](p * math.exp(-(i - i % 2) * math.log(10000) / width))
            for i in range(width)
        ]
        for p in range(length)
    ]
    ahead = gru_direction(weights, "", table)
    back = gru_direction(weights, "_reverse", table[::-1])[::-1]
    scores = [
        sum(v * (a + b) / 2 for v, a, b in zip(weights["linear.weight"][0], *pair))
        for pair in zip(ahead, back)
    ]
    shares = [math.exp(score / 0.1) for score in scores]
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("lengths", [[3, 6, 1, 3], [2, 2, 2, 2], [1, 1, 1, 1]], ids=str)
def test_gpo_equals_a_loop(lengths):
    module, features = small_gpo(), drawn(4, 6, 5)
    pooled, weights = module(features, torch.tensor(lengths))
    assert weights.shape == (4, max(lengths), 1)
    for item, length in enumerate(lengths):
        theta = theta_loop(module, length, 4)
        assert weights[item, :, 0].tolist() == pytest.approx(
            theta + [0] * (max(lengths) - length), abs=1e-6
        )
        assert weights[item, length:].eq(0).all()
        for feature in range(5):
            ranked = sorted(features[item, :length, feature].tolist(), reverse=True)
            expected = sum(share * value for share, value in zip(theta, ranked))
            assert pooled[item, feature].item() == pytest.approx(
                expected, abs=1e-6
            )  # the encoding is in float32


def test_gpo_s_gradients_equal_the_difference_quotients():
    module, lengths = small_gpo(), torch.tensor([2, 4, 3])
    features = drawn(3, 4, 2).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: module(x, lengths)[0], (features, *module.parameters()))


@pytest.mark.parametrize("lowest", [-1.0, -20000.0, -1e30])
def test_features_below_any_padding_pool_as_they_would_alone(lowest):
    module = small_gpo(torch.float32)
    one = torch.full((1, 2, 1), lowest)
    padded = torch.cat((torch.nn.functional.pad(one, (0, 0, 0, 3)), torch.ones(1, 5, 1)))
    assert module(padded, torch.tensor([2, 5]))[0][0].item() == pytest.approx(lowest, rel=1e-6)


def test_equal_weights_are_the_mean():
    module = small_gpo()
    torch.nn.init.zeros_(module.linear.weight)
    features, lengths = drawn(3, 4, 2), torch.tensor([4, 1, 3])
    assert torch.allclose(module(features, lengths)[0], mean_pool(features, lengths), rtol=1e-14)


def test_gpo_takes_lengths_as_floats_and_lists():
    module, features = small_gpo(), drawn(2, 3, 2)
    expected = module(features, torch.tensor([3, 2]))[0]
    assert torch.equal(module(features, torch.tensor([3.0, 2.0]))[0], expected)
    assert torch.equal(module(features, [3, 2])[0], expected)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="d_pe is 5"):
        GPO(5, 4)


# Every pooling ----------------------------------------------------------------------------------


def mean_loop(values):
    return sum(values) / len(values)


def kmax_loop(values, k=pooling.K_LARGEST):
    return mean_loop(sorted(values)[-k:])


LOOPS = {"mean": mean_loop, "max": max, "kmax": kmax_loop}


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 1, 6], [3, 2, 4], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("name", POOLINGS)
def test_simple_poolings_equal_a_loop(name, lengths):
    features = drawn(3, 7, 4)
    found = POOLINGS[name](features, torch.tensor(lengths))
    expected = [
        [LOOPS[name](features[item, :length, feature].tolist()) for feature in range(4)]
        for item, length in enumerate(lengths)
    ]
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_kmax_takes_the_stated_number(k):
    features, lengths = drawn(2, 4, 3), torch.tensor([4, 2])
    found = kmax_pool(features, lengths, k)
    expected = [
        [kmax_loop(features[item, :length, feature].tolist(), k) for feature in range(3)]
        for item, length in enumerate(lengths.tolist())
    ]
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


ALL = {**POOLINGS, "gpo": lambda features, lengths: small_gpo(features.dtype)(features, lengths)[0]}


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_the_difference_quotients(name):
    lengths = torch.tensor([2, 7, 6])
    torch.autograd.gradcheck(lambda x: ALL[name](x, lengths), drawn(3, 7, 2).requires_grad_())


@pytest.mark.parametrize("padding", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("name", ALL)
def test_padding_never_matters(name, padding):
    lengths, features = torch.tensor([2, 5, 1]), drawn(3, 5, 4).float()
    expected = torch.cat(
        [
            ALL[name](features[item : item + 1, :length], lengths[item : item + 1])
            for item, length in enumerate(lengths.tolist())
        ]
    )
    padded = torch.nn.functional.pad(features, (0, 0, 0, 2))
    padded.masked_fill_(
        (torch.arange(7) >= lengths.unsqueeze(1)).unsqueeze(2), padding
    ).requires_grad_()
    found = ALL[name](padded, lengths)
    found.sum().backward()
    assert torch.allclose(found, expected, rtol=1e-6)
    assert all(gradient[length:].eq(0).all() for gradient, length in zip(padded.grad, lengths))
    assert padded.grad.isfinite().all()


def test_a_maximum_shared_by_two_rows_shares_its_gradient():
    features = torch.tensor([[[2.0], [1.0], [2.0]]], requires_grad=True)
    max_pool(features, torch.tensor([3])).sum().backward()
    assert features.grad.flatten().tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("lengths", [[3, 0], [0, 0], [4, 3], [-1, 2]], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_lengths_that_cannot_be_are_refused(name, lengths):
    with pytest.raises(ValueError, match="from 1 to 3 rows"):
        ALL[name](drawn(2, 3, 4), torch.tensor(lengths))


# Regions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([1, 1, 1], 3),
        ([1, 0, 0], 1),
        ([1, 0, 1], 3),
        ([0, 1, 0], 2),
        ([0, 0, 0], 1),
        ([1, math.nan, 0], 2),
    ],
    ids=str,
)
def test_zero_rows_at_the_end_are_padding(rows, expected):
    images = torch.zeros(2, 3, 4)
    images[0, :, 2] = torch.tensor(rows)
    images[1] = 1
    assert region_lengths(images).tolist() == [expected, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("lengths_there", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_pooling_on_cuda_equals_the_cpu_s(name, lengths_there):
    lengths, features = torch.tensor([2, 5, 1]), drawn(3, 5, 4).float()
    module = small_gpo(torch.float32)
    pool = POOLINGS.get(name) or (lambda x, n: module.to(x.device)(x, n)[0])
    expected = pool(features, lengths)
    found = pool(features.cuda(), lengths.cuda() if lengths_there else lengths)
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
