"""Gradients through a GRU in float16, as CUDA's autocast computes them with --amp bf16.

None may underflow.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import loss
import train
from loss import hal_loss, max_margin_loss, sum_margin_loss
from model import EncoderText, l2norm

BATCH, WIDTH, WORDS = 128, 192, 400

LOSSES = {"hal": hal_loss, "max": max_margin_loss, "sum": sum_margin_loss}


def batch():
    """Word ids (B, T) and lengths, longest first, and as many image embeddings."""
    torch.manual_seed(0)
    lengths = torch.randint(6, 14, (BATCH,)).sort(descending=True).values
    return (
        torch.randint(1, WORDS, (BATCH, int(lengths[0]))),
        lengths,
        l2norm(torch.randn(BATCH, WIDTH)),
    )


def gradients(kind, last_state, parameters, scale):
    """The parameters' gradients of a loss of captions whose states `last_state(captions, lengths)` gives."""
    captions, lengths, images = batch()
    for parameter in parameters:
        parameter.grad = None
    train.backward(
        LOSSES[kind](images @ l2norm(last_state(captions, lengths)).t()), parameters, scale
    )
    return [parameter.grad.clone() for parameter in parameters]


def errors(kind, scale):
    """For each parameter, the relative error of float16's gradient, and the share of its entries that became 0."""
    torch.manual_seed(1)
    encoder = EncoderText(WORDS, 64, WIDTH, 1)
    parameters = list(encoder.parameters())

    def in_(dtype):
        def last_state(captions, lengths):
            state = {name: weight.to(dtype) for name, weight in encoder.rnn.named_parameters()}
            packed = pack_padded_sequence(
                encoder.embed(captions).to(dtype), lengths, batch_first=True
            )
            return torch.func.functional_call(encoder.rnn, state, (packed,))[1][-1].float()

        return last_state

    exact, half = (
        gradients(kind, in_(dtype), parameters, scale) for dtype in (torch.float32, torch.float16)
    )
    return (
        [float((a - b).norm() / a.norm()) for a, b in zip(exact, half)],
        [float(((b == 0) & (a != 0)).float().mean()) for a, b in zip(exact, half)],
    )


def scale_of(kind, amp="bf16", device="cuda", size=BATCH):
    run = SimpleNamespace(
        opt=SimpleNamespace(amp=amp), model=SimpleNamespace(device=torch.device(device))
    )
    return train.backward_scale(run, SimpleNamespace(entry=loss.LOSSES[kind]), size)


@pytest.mark.parametrize("kind", LOSSES)
def test_with_its_scale_no_loss_s_gradients_underflow(kind):
    off, lost = errors(kind, scale_of(kind))
    assert max(off) < 0.02 and max(lost) < 0.003  # one entry in a bias is 0.0017


def test_hal_s_gradients_would_underflow_without_it():
    _, lost = errors("hal", 1)
    assert max(lost) > 0.005


@pytest.mark.parametrize(
    "kind, amp, device, size, expected",
    [
        ("hal", "bf16", "cuda", 128, 128),
        ("hal", "bf16", "cuda", 100, 128),
        ("hal", "bf16", "cuda", 1, 1),
        ("hal", "off", "cuda", 128, 1),
        ("hal", "bf16", "cpu", 128, 1),
        ("hal", "bf16", "mps", 128, 1),
        ("max", "bf16", "cuda", 128, 1),
        ("sum", "bf16", "cuda", 128, 1),
    ],
)
def test_only_hal_in_float16_is_scaled_and_by_a_power_of_two(kind, amp, device, size, expected):
    assert scale_of(kind, amp, device, size) == expected


def test_the_scale_leaves_gradients_as_they_are():
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    frozen = torch.ones(2, requires_grad=True)
    (plain,) = torch.autograd.grad(hal_loss(weight), weight)
    train.backward(hal_loss(weight), [weight, frozen], 64)
    assert torch.allclose(weight.grad, plain, rtol=1e-5, atol=1e-7) and frozen.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_s_gradients_on_cuda_are_those_of_float32(kind):
    torch.manual_seed(1)
    encoder = EncoderText(WORDS, 64, WIDTH, 1).cuda()
    parameters, found = list(encoder.parameters()), []
    for amp in (False, True):
        captions, lengths, images = batch()
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            embeddings = encoder(captions.cuda(), lengths)
        train.backward(LOSSES[kind](images.cuda() @ embeddings.t()), parameters, scale_of(kind))
        found.append([parameter.grad.clone() for parameter in parameters])
    for exact, half in zip(*found):
        assert (exact - half).norm() / exact.norm() < 0.02
        assert ((half == 0) & (exact != 0)).float().mean() < 0.003
