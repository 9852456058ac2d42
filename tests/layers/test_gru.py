"""The CPU's GRU against PyTorch's."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from layers.gru import last_states, prefix_tree, word_states

WORDS = 4  # few, so that captions begin alike

LENGTHS = [[1], [4], [5, 3, 3, 1], [2] * 6, [7, 1], [6] * 4 + [3] * 30]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """What torch.empty gives is NaN in here: nothing may depend on what lay in memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(lengths):
    """Captions (B, T) of random words, 0 past their lengths."""
    captions = torch.randint(1, WORDS, (len(lengths), lengths[0]))
    return captions * (torch.arange(lengths[0]) < torch.tensor(lengths).unsqueeze(1)), torch.tensor(
        lengths
    )


def theirs(rnn, embed, captions, lengths):
    ends = rnn(pack_padded_sequence(embed(captions), lengths, batch_first=True))[1]
    return (ends[-2] + ends[-1]) / 2 if rnn.bidirectional else ends[-1]


@pytest.mark.parametrize(
    "lengths, num_layers, dtype, tolerance",
    [
        *((lengths, layers, torch.float64, 1e-12) for lengths in LENGTHS for layers in (1, 3)),
        ([5, 3, 3, 1], 2, torch.float32, 1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
def test_states_and_gradients_equal_pytorch_s(bidirectional, lengths, num_layers, dtype, tolerance):
    torch.manual_seed(sum(lengths) + num_layers)
    rnn = torch.nn.GRU(3, 4, num_layers, batch_first=True, bidirectional=bidirectional).to(dtype)
    embed = torch.nn.Embedding(WORDS, 3, dtype=dtype)
    captions, lengths = batch(lengths)
    weights, parameters = (
        torch.randn(len(lengths), 4, dtype=dtype),
        [*rnn.parameters(), *embed.parameters()],
    )
    (mine, my_gradients), (other, other_gradients) = (
        (states, torch.autograd.grad((states * weights).sum(), parameters))
        for states in (
            last_states(rnn, embed, captions, lengths),
            theirs(rnn, embed, captions, lengths),
        )
    )
    assert mine.dtype == dtype and (mine - other).abs().max() < tolerance
    for a, b in zip(my_gradients, other_gradients, strict=True):
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max())


def all_of_theirs(rnn, embed, captions, lengths):
    packed = rnn(pack_padded_sequence(embed(captions), lengths, batch_first=True))[0]
    states = pad_packed_sequence(packed, batch_first=True, total_length=captions.shape[1])[0]
    return states.unflatten(2, (2, -1)).mean(2) if rnn.bidirectional else states


@pytest.mark.parametrize(
    "lengths, num_layers, dtype, tolerance",
    [
        *(
            (lengths, layers, torch.float64, 1e-10)
            for lengths in [*LENGTHS, [3, 2, 1, 1]]
            for layers in (1, 3)
        ),
        ([5, 3, 3, 1], 2, torch.float32, 1e-5),
    ],
    ids=str,
)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
def test_every_word_s_states_and_gradients_equal_pytorch_s(
    bidirectional, lengths, num_layers, dtype, tolerance
):
    torch.manual_seed(sum(lengths) + num_layers)
    rnn = torch.nn.GRU(3, 4, num_layers, batch_first=True, bidirectional=bidirectional).to(dtype)
    embed = torch.nn.Embedding(WORDS, 3, dtype=dtype)
    captions, lengths = batch(lengths)
    weights, parameters = (
        torch.randn(*captions.shape, 4, dtype=dtype),
        [*rnn.parameters(), *embed.parameters()],
    )
    (mine, my_gradients), (other, other_gradients) = (
        (states, torch.autograd.grad((states * weights).sum(), parameters))
        for states in (
            word_states(rnn, embed, captions, lengths),
            all_of_theirs(rnn, embed, captions, lengths),
        )
    )
    assert (
        mine.dtype == dtype and mine.shape == other.shape and (mine - other).abs().max() < tolerance
    )
    for a, b in zip(my_gradients, other_gradients, strict=True):
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
def test_junk_past_a_caption_s_length_changes_nothing(bidirectional, num_layers):
    torch.manual_seed(0)
    rnn = torch.nn.GRU(3, 4, num_layers, batch_first=True, bidirectional=bidirectional)
    embed = torch.nn.Embedding(WORDS, 3)
    captions, lengths = batch([5, 4, 4, 1])
    junk = captions + (WORDS - 1) * (torch.arange(5) >= lengths.unsqueeze(1))
    wider = torch.cat((junk, junk[:, :2]), 1)  # also wider than the longest caption
    states = word_states(rnn, embed, wider, lengths)
    assert (states[:, :5] - all_of_theirs(rnn, embed, captions, lengths)).abs().max() < 1e-6
    assert states.shape == (4, 7, 4) and states[:, 5:].eq(0).all() and states[1, 4].eq(0).all()


@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
def test_bf16_products_are_near_at_every_word(bidirectional):
    torch.manual_seed(0)
    rnn = torch.nn.GRU(8, 16, 2, batch_first=True, bidirectional=bidirectional)
    embed = torch.nn.Embedding(WORDS, 8)
    captions, lengths = batch([5, 5, 3, 2])
    states = word_states(rnn, embed, captions, lengths, torch.bfloat16)
    assert states.dtype == torch.float32
    assert 0 < (states - all_of_theirs(rnn, embed, captions, lengths)).abs().max() < 0.02
    assert all(
        g.dtype == torch.float32 for g in torch.autograd.grad(states.sum(), rnn.parameters())
    )


def test_both_directions_refuse_a_second_backward():
    rnn, embed = (
        torch.nn.GRU(3, 4, batch_first=True, bidirectional=True),
        torch.nn.Embedding(WORDS, 3),
    )
    states = word_states(rnn, embed, *batch([3, 2]))
    states[0].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="add the losses up before backward"):
        states[1].sum().backward()


@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
@pytest.mark.parametrize("lengths", [[2, 3], [2, 0]], ids=str)
def test_captions_in_another_order_are_refused_at_every_word(lengths, bidirectional):
    rnn, embed = (
        torch.nn.GRU(2, 3, batch_first=True, bidirectional=bidirectional),
        torch.nn.Embedding(WORDS, 2),
    )
    with pytest.raises(ValueError, match="longest first"):
        word_states(
            rnn, embed, torch.ones(len(lengths), 3, dtype=torch.int64), torch.tensor(lengths)
        )


@pytest.mark.parametrize("bidirectional", [False, True], ids=["ahead", "both ways"])
def test_bf16_products_are_near(bidirectional):
    torch.manual_seed(0)
    rnn = torch.nn.GRU(8, 16, batch_first=True, bidirectional=bidirectional)
    embed = torch.nn.Embedding(WORDS, 8)
    captions, lengths = batch([5, 5, 3, 2])
    states, exact = (
        last_states(rnn, embed, captions, lengths, torch.bfloat16),
        theirs(rnn, embed, captions, lengths),
    )
    assert states.dtype == torch.float32
    assert 1e-4 < (states - exact).abs().max() < 0.02  # rounded, and not as float32 is
    for near, gradient in zip(
        *(torch.autograd.grad(last.sum(), rnn.parameters()) for last in (states, exact))
    ):
        assert near.dtype == torch.float32
        assert 1e-4 < (near - gradient).abs().max() / gradient.abs().max() < 0.02


def test_a_second_backward_is_refused_since_the_first_used_the_states_up():
    rnn, embed = torch.nn.GRU(3, 4, batch_first=True), torch.nn.Embedding(WORDS, 3)
    states = last_states(rnn, embed, *batch([3, 2]))
    states[0].sum().backward(retain_graph=True)
    gradient = rnn.weight_hh_l0.grad.clone()
    with pytest.raises(RuntimeError, match="add the losses up before backward"):
        states[1].sum().backward()
    assert torch.equal(rnn.weight_hh_l0.grad, gradient)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_tree_has_every_distinct_prefix_once(lengths):
    torch.manual_seed(3)
    captions, lengths = batch(lengths)
    rows = [row[:length] for row, length in zip(captions.tolist(), lengths.tolist())]
    prefixes = [
        {tuple(row[:n]) for row in rows if len(row) >= n} for n in range(1, len(rows[0]) + 1)
    ]
    tree = prefix_tree(captions, lengths)
    assert tree.sizes == [len(level) for level in prefixes]
    # Walking up from each caption's end spells it backwards.
    parent_of = [None] * tree.sizes[0] + [
        parent
        for parents, size in zip(tree.parents, tree.sizes[1:])
        for parent in parents[:size].tolist()
    ]
    for row, node in zip(rows, tree.ends.tolist()):
        spelled = []
        while node is not None:
            spelled.append(tree.words[tree.word_of[node]].item())
            node = parent_of[node]
        assert spelled[::-1] == row


def test_extreme_inputs_stay_finite():
    rnn, embed = torch.nn.GRU(2, 3, batch_first=True), torch.nn.Embedding(WORDS, 2)
    embed.weight.data.fill_(1e30)
    assert last_states(rnn, embed, *batch([3, 2])).isfinite().all()


@pytest.mark.parametrize("lengths", [[2, 3], [3, 2, 3], [2, 0]], ids=str)
def test_captions_in_another_order_are_refused(lengths):
    rnn, embed = torch.nn.GRU(2, 3, batch_first=True), torch.nn.Embedding(WORDS, 2)
    with pytest.raises(ValueError, match="longest first"):
        last_states(
            rnn, embed, torch.ones(len(lengths), 3, dtype=torch.int64), torch.tensor(lengths)
        )
