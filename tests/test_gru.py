"""The CPU's GRU against PyTorch's."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from gru import last_states

LENGTHS = [[1], [4], [5, 3, 3, 1], [2] * 6, [7, 1]]


def both(num_layers, lengths, dtype):
    """(states, gradients) of the CPU's GRU and of PyTorch's on the same captions."""
    torch.manual_seed(sum(lengths) + num_layers)
    rnn = torch.nn.GRU(3, 4, num_layers, batch_first=True).to(dtype)
    inputs = torch.randn(len(lengths), lengths[0], 3, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(lengths), 4, dtype=dtype)
    found = []
    for states in (last_states, lambda rnn, packed: rnn(packed)[1][-1]):
        value = states(rnn, pack_padded_sequence(inputs, torch.tensor(lengths), batch_first=True))
        found.append((value, torch.autograd.grad((value * weights).sum(), [inputs, *rnn.parameters()])))
    return found


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_states_and_gradients_equal_pytorch_s(num_layers, lengths, dtype, tolerance):
    (mine, my_gradients), (theirs, their_gradients) = both(num_layers, lengths, dtype)
    assert mine.dtype == dtype and (mine - theirs).abs().max() < tolerance
    assert all((a - b).abs().max() < tolerance for a, b in zip(my_gradients, their_gradients, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_states_need_no_gradient(lengths):
    rnn = torch.nn.GRU(3, 4, 2, batch_first=True)
    packed = pack_padded_sequence(torch.randn(len(lengths), lengths[0], 3), torch.tensor(lengths), batch_first=True)
    with torch.no_grad():
        assert (last_states(rnn, packed) - rnn(packed)[1][-1]).abs().max() < 1e-5


def test_extreme_gates_stay_finite():
    rnn = torch.nn.GRU(2, 3, batch_first=True)
    packed = pack_padded_sequence(torch.full((2, 3, 2), 1e30), torch.tensor([3, 2]), batch_first=True)
    assert last_states(rnn, packed).isfinite().all()
