"""A GRU over a batch of captions that trains faster on a CPU than `nn.GRU`, with the same numbers.

- Captions that begin alike share their states: the batch is a tree of prefixes, with one level
  per word position. For the backward direction, captions that end alike share theirs.
- The input product W_ih x is computed once per distinct word of the batch.
- The backward pass is written out. Each weight's gradient is one product over all states, where
  autograd would add it up step by step. Equations as in the documentation of `torch.nn.GRU`.
- Gradients overwrite the gates they are computed from, since allocating large blocks of memory is
  slow. A second backward through the same states is therefore refused.

The number of rows in each product is rounded up: CPU libraries keep code for every shape they have
seen, and caption lengths would produce a new shape nearly every time.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

ROUND_LEVEL, ROUND_ALL = 16, 64  # multiples of rows: in one level's product, and over all levels


class PrefixTree(NamedTuple):
    """The distinct prefixes of a batch of captions, by level: first words, first two words, ..."""

    words: torch.Tensor  # (U,) distinct word ids, rounded up with 0
    word_of: torch.Tensor  # (nodes,) each prefix's last word, as a place in `words`
    # for each level but the first, (rounded nodes,) positions of the prefixes one word shorter
    parents: list
    sizes: list  # nodes a level
    # (B, T) the node of the prefix that ends with each word, 0 past a caption's length
    nodes: torch.Tensor
    ends: torch.Tensor  # (B,) the node of each whole caption


def prefix_tree(captions, lengths):
    """Build the PrefixTree of captions (B, T), word ids, longest caption first, with lengths (B,).

    Raises ValueError for another order, as packing does.
    """
    if (lengths.diff() > 0).any() or lengths[-1] < 1:
        raise ValueError("captions must come longest first, and have a word each")
    words, places = torch.unique(captions, return_inverse=True)
    node_of = torch.zeros(len(captions), dtype=torch.int64)
    word_of, parents, sizes, start = [], [], [], 0
    nodes = torch.zeros_like(places)
    running = (lengths.unsqueeze(1) > torch.arange(int(lengths[0]))).sum(0).tolist()
    for level, captions_left in enumerate(running):
        # A prefix is the prefix one word shorter plus a word. Both in one number, so that one
        # `unique` over the level finds the distinct prefixes.
        keys = node_of[:captions_left] * len(words) + places[:captions_left, level]
        distinct, node = torch.unique(keys, return_inverse=True)
        if level:
            rounded = -(-len(distinct) // ROUND_LEVEL) * ROUND_LEVEL
            parents.append(pad(distinct // len(words), (0, rounded - len(distinct))))
        word_of.append(distinct % len(words))
        sizes.append(len(distinct))
        node_of = start + node
        nodes[:captions_left, level] = node_of
        start += len(distinct)
    ends = nodes[torch.arange(len(nodes)), lengths - 1]
    return PrefixTree(_rounded(words), torch.cat(word_of), parents, sizes, nodes, ends)


def _rounded_up(rows):
    return -(-rows // ROUND_ALL) * ROUND_ALL


def _rounded(rows):
    """Append rows of zeros up to a multiple of ROUND_ALL."""
    return pad(rows, (0, 0) * (rows.dim() - 1) + (0, _rounded_up(len(rows)) - len(rows)))


class _TreeGRU(torch.autograd.Function):
    """One layer: products (inputs, 3H) -> states (nodes, H); node n takes row input_of[n]."""

    @staticmethod
    def forward(ctx, products, weight_hh, bias_hh, input_of, tree, dtype):
        """products: W_ih x + b_ih of each input; dtype: of the matrix products."""
        hidden, weight_hh, nodes = weight_hh.shape[1], weight_hh.to(dtype), len(input_of)
        gates = products.new_empty(_rounded_up(nodes), 3 * hidden)  # reset, update, new
        torch.index_select(products, 0, input_of, out=gates[:nodes])
        states, candidates = gates.new_empty(nodes, hidden), gates.new_empty(nodes, hidden)
        previous = gates.new_empty(len(gates), hidden)
        # The first level starts from the zero state; the rounding rows belong to no node.
        previous[: tree.sizes[0]] = previous[nodes:] = 0
        start = 0
        for level, size in enumerate(tree.sizes):
            rows = slice(start, start + size)
            if level == 0:  # nothing to multiply with the zero state
                recurrent = bias_hh.expand(size, -1)
            else:
                before = states.index_select(0, tree.parents[level - 1])
                previous[rows] = before[:size]
                recurrent = torch.add((before.to(dtype) @ weight_hh.t())[:size], bias_hh)
            reset_update, new = gates[rows, : 2 * hidden], gates[rows, 2 * hidden :]
            reset, update = reset_update.add_(recurrent[:, : 2 * hidden]).sigmoid_().chunk(2, 1)
            candidates[rows] = recurrent[:, 2 * hidden :]
            new.addcmul_(reset, candidates[rows]).tanh_()
            # h' = (1 - update) * new + update * h
            torch.lerp(new, previous[rows], update, out=states[rows])
            start += size
        ctx.save_for_backward(weight_hh, gates, candidates, previous, input_of)
        ctx.tree, ctx.inputs, ctx.spent = tree, len(products), False
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states):
        """Gradients of products, weight_hh and bias_hh; overwrites the saved tensors."""
        if ctx.spent:
            raise RuntimeError(
                "a second backward through the same captions' states, which the first has used "
                "up: add the losses up before backward, or encode the captions again"
            )
        ctx.spent = True
        weight_hh, gates, candidates, previous, input_of = ctx.saved_tensors
        dtype, tree, hidden, end = weight_hh.dtype, ctx.tree, weight_hh.shape[1], len(candidates)
        grad_states = grad_states.clone()
        # In place, `gates` becomes the gradients of W_hh h + b_hh, and `candidates` those of
        # W_in x + b_in.
        gates[end:] = 0
        cast = gates if dtype == gates.dtype else torch.zeros_like(gates, dtype=dtype)
        for level, size in reversed(list(enumerate(tree.sizes))):
            rows = slice(end - size, end)
            end -= size
            grad, candidate = grad_states[rows], candidates[rows]
            reset, update, new = gates[rows].chunk(3, 1)
            # Each gate's buffer takes its gradient once its value is no longer needed, so the order
            # of these lines matters: update first, new second, reset last.
            kept = grad * update
            grad_new = (grad - kept).mul_(1 - new * new)
            torch.mul(kept, 1 - update, out=update).mul_(previous[rows] - new)
            torch.mul(grad_new, reset, out=new)
            torch.mul(candidate.mul_(new), 1 - reset, out=reset)
            candidate.copy_(grad_new)
            if level:
                parents = tree.parents[level - 1]
                if cast is not gates:  # the products are in bf16
                    cast[rows] = gates[rows]
                grad_states.index_add_(
                    0, parents[:size], (cast[end : end + len(parents)] @ weight_hh)[:size] + kept
                )
        grad_weight_hh = (cast.t() @ previous.to(dtype)).to(gates.dtype)
        grad_bias_hh = gates.sum(0)
        grad_inputs = gates[: len(candidates)]
        # The last third differs, as the reset gate acts on W_hn h only: now those of W_ih x + b_ih.
        grad_inputs[:, 2 * hidden :] = candidates
        grad_products = gates.new_zeros(ctx.inputs, 3 * hidden).index_add_(0, input_of, grad_inputs)
        return grad_products, grad_weight_hh, grad_bias_hh, None, None, None


def _layer_states(rnn, name, inputs, input_of, tree, dtype):
    """The states (nodes, H) of one layer and direction.

    name: as in nn.GRU's parameters, such as l0 or l0_reverse; input_of: (nodes,) the row of
    `inputs` that each node takes.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(rnn, f"{kind}_{name}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    products = inputs.to(dtype) @ weight_ih.to(dtype).t() + bias_ih  # in float32, as the bias is
    return _TreeGRU.apply(products, weight_hh, bias_hh, input_of, tree, dtype)


def _top_states(rnn, embed, tree, dtype):
    """The top layer's states (nodes, H) of a one-directional GRU.

    Every layer shares the tree: a prefix has one state in each of them.
    """
    inputs, input_of = embed(tree.words), tree.word_of
    for layer in range(rnn.num_layers):
        states = _layer_states(rnn, f"l{layer}", inputs, input_of, tree, dtype)
        if layer + 1 < rnn.num_layers:
            inputs, input_of = _rounded(states), torch.arange(len(states))
    return states


def last_states(rnn, embed, captions, lengths, dtype=None):
    """The state of `rnn`'s top layer at each caption's last word: (B, H), as packed input gives it.

    rnn: an nn.GRU; if it is bidirectional, the result is the mean of that state and the backward
    state at the first word.
    embed: maps word ids to inputs.
    captions: (B, T) word ids on the CPU, longest first; lengths: (B,).
    dtype: of the matrix products (default: the weights').
    """
    dtype = dtype or rnn.weight_hh_l0.dtype
    if rnn.bidirectional:
        (ahead, nodes), (back, back_nodes) = _both_ways(rnn, embed, captions, lengths, dtype)
        ends = nodes.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
        return (ahead.index_select(0, ends) + back.index_select(0, back_nodes[:, 0])) / 2
    tree = prefix_tree(captions, lengths)
    return _top_states(rnn, embed, tree, dtype).index_select(0, tree.ends)


def word_states(rnn, embed, captions, lengths, dtype=None):
    """The state of `rnn`'s top layer at every word: (B, T, H), as packed input gives it.

    States past a caption's length are 0. For a bidirectional GRU, the mean of both directions.
    Arguments as in `last_states`.
    """
    dtype = dtype or rnn.weight_hh_l0.dtype
    if rnn.bidirectional:
        (ahead, nodes), (back, back_nodes) = _both_ways(rnn, embed, captions, lengths, dtype)
        states = (
            ahead.index_select(0, nodes.flatten()) + back.index_select(0, back_nodes.flatten())
        ) / 2
    else:
        tree = prefix_tree(captions, lengths)
        states = _top_states(rnn, embed, tree, dtype).index_select(0, tree.nodes.flatten())
    padding = torch.arange(captions.shape[1]) >= lengths.unsqueeze(1)
    return states.view(*captions.shape, -1).masked_fill(padding.unsqueeze(2), 0)


def _both_ways(rnn, embed, captions, lengths, dtype):
    """For each of the top layer's two directions: states (nodes, H) and every word's node (B, T).

    The backward direction walks the prefixes of the reversed captions. In the layers above the
    first, the "word" is a pair of nodes, one of each direction. Two captions have the same pair
    only if they are identical, so these layers share little.
    """
    place = torch.arange(captions.shape[1])
    mirrored = torch.where(place < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - place, place)
    words, inputs_of = captions, embed
    for layer in range(rnn.num_layers):
        tree = prefix_tree(words, lengths)
        back_tree = prefix_tree(words.gather(1, mirrored), lengths)
        inputs = inputs_of(tree.words)  # the same words in both trees
        ahead = _layer_states(rnn, f"l{layer}", inputs, tree.word_of, tree, dtype)
        back = _layer_states(rnn, f"l{layer}_reverse", inputs, back_tree.word_of, back_tree, dtype)
        back_nodes = back_tree.nodes.gather(1, mirrored)
        words = tree.nodes * len(back) + back_nodes

        def inputs_of(pairs, ahead=ahead, back=back):
            sides = (
                ahead.index_select(0, pairs // len(back)),
                back.index_select(0, pairs % len(back)),
            )
            return torch.cat(sides, 1)

    return (ahead, tree.nodes), (back, back_nodes)
