"""The GRU over a batch of captions on a CPU, faster than `nn.GRU` in training and with the same numbers.

- Captions that begin alike share their states: the batch is a tree of prefixes, a level a word. Backwards,
  captions that end alike do.
- Each word's input product is made once a batch.
- The backward pass is written out: each weight's gradient is one product over all states, where
  autograd would add it up step by step. Equations as in `torch.nn.GRU`'s documentation.
- It writes gradients over the gates that they are made of, since fresh large blocks of memory are slow; so a
  second backward through the same states is refused.

Products are made with rounded-up numbers of rows: CPU libraries keep code for every shape that they
have met, and captions' lengths would make a new one nearly every time.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

ROUND_LEVEL, ROUND_ALL = 16, 64  # rows of one level's products, and of those over all levels


class PrefixTree(NamedTuple):
    """The distinct prefixes of a batch of captions, level by level (the first words, the first two, ...)."""

    words: torch.Tensor  # (U,) distinct word ids, rounded up with 0
    word_of: torch.Tensor  # (nodes,) each prefix's last word, as a place in `words`
    parents: list  # for each level but the first, (rounded nodes,) places of the prefixes one word shorter
    sizes: list  # nodes a level
    nodes: torch.Tensor  # (B, T) the node of each caption's prefix that ends with this word, 0 past its length
    ends: torch.Tensor  # (B,) the node of each whole caption


def prefix_tree(captions, lengths):
    """captions: (B, T) word ids, longest first; lengths: (B,). Raises ValueError for another order, as packing does."""
    if (lengths.diff() > 0).any() or lengths[-1] < 1:
        raise ValueError("captions must come longest first, and have a word each")
    words, places = torch.unique(captions, return_inverse=True)
    node_of = torch.zeros(len(captions), dtype=torch.int64)
    word_of, parents, sizes, start = [], [], [], 0
    nodes = torch.zeros_like(places)
    running = (lengths.unsqueeze(1) > torch.arange(int(lengths[0]))).sum(0).tolist()
    for level, captions_left in enumerate(running):
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
    """Filled up with zeros at the end."""
    return pad(rows, (0, 0) * (rows.dim() - 1) + (0, _rounded_up(len(rows)) - len(rows)))


class _TreeGRU(torch.autograd.Function):
    """One layer: input products (inputs, 3H), of which node n takes row input_of[n] -> states (nodes, H)."""

    @staticmethod
    def forward(ctx, products, weight_hh, bias_hh, input_of, tree, dtype):
        """products: W_ih x + b_ih; dtype: of the matrix products."""
        hidden, weight_hh, nodes = weight_hh.shape[1], weight_hh.to(dtype), len(input_of)
        gates = products.new_empty(_rounded_up(nodes), 3 * hidden)  # reset, update, new
        torch.index_select(products, 0, input_of, out=gates[:nodes])
        states, candidates = gates.new_empty(nodes, hidden), gates.new_empty(nodes, hidden)
        previous = gates.new_empty(len(gates), hidden)
        previous[:tree.sizes[0]] = previous[nodes:] = 0  # the first level's states before it, and no node's
        start = 0
        for level, size in enumerate(tree.sizes):
            rows = slice(start, start + size)
            if level == 0:  # from the zero state there is nothing to multiply
                recurrent = bias_hh.expand(size, -1)
            else:
                before = states.index_select(0, tree.parents[level - 1])
                previous[rows] = before[:size]
                recurrent = torch.add((before.to(dtype) @ weight_hh.t())[:size], bias_hh)
            reset_update, new = gates[rows, :2 * hidden], gates[rows, 2 * hidden:]
            reset, update = reset_update.add_(recurrent[:, :2 * hidden]).sigmoid_().chunk(2, 1)
            candidates[rows] = recurrent[:, 2 * hidden:]
            new.addcmul_(reset, candidates[rows]).tanh_()
            torch.lerp(new, previous[rows], update, out=states[rows])
            start += size
        ctx.save_for_backward(weight_hh, gates, candidates, previous, input_of)
        ctx.tree, ctx.inputs, ctx.spent = tree, len(products), False
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states):
        """Gradients of the input products, and of the recurrent weight and bias; they overwrite what was saved."""
        if ctx.spent:
            raise RuntimeError("a second backward through the same captions' states, which the first has used up: add "
                               "the losses up before backward, or encode the captions again")
        ctx.spent = True
        weight_hh, gates, candidates, previous, input_of = ctx.saved_tensors
        dtype, tree, hidden, end = weight_hh.dtype, ctx.tree, weight_hh.shape[1], len(candidates)
        grad_states = grad_states.clone()
        # In place, gates become the gradients of W_hh h + b_hh, and candidates those of W_in x + b_in.
        gates[end:] = 0
        cast = gates if dtype == gates.dtype else torch.zeros_like(gates, dtype=dtype)
        for level, size in reversed(list(enumerate(tree.sizes))):
            rows = slice(end - size, end)
            end -= size
            grad, candidate, (reset, update, new) = grad_states[rows], candidates[rows], gates[rows].chunk(3, 1)
            kept = grad * update
            grad_new = (grad - kept).mul_(1 - new * new)
            torch.mul(kept, 1 - update, out=update).mul_(previous[rows] - new)
            torch.mul(grad_new, reset, out=new)
            torch.mul(candidate.mul_(new), 1 - reset, out=reset)
            candidate.copy_(grad_new)
            if level:
                parents = tree.parents[level - 1]
                if cast is not gates:
                    cast[rows] = gates[rows]
                grad_states.index_add_(0, parents[:size], (cast[end:end + len(parents)] @ weight_hh)[:size] + kept)
        grad_weight_hh = (cast.t() @ previous.to(dtype)).to(gates.dtype)
        grad_bias_hh = gates.sum(0)
        grad_inputs = gates[:len(candidates)]
        grad_inputs[:, 2 * hidden:] = candidates  # from here on of W_ih x + b_ih
        grad_products = gates.new_zeros(ctx.inputs, 3 * hidden).index_add_(0, input_of, grad_inputs)
        return grad_products, grad_weight_hh, grad_bias_hh, None, None, None


def _layer_states(rnn, name, inputs, input_of, tree, dtype):
    """The states (nodes, H) of the layer `name` (l0, l0_reverse, ...), whose node n takes row input_of[n] of inputs."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(rnn, f"{kind}_{name}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    products = inputs.to(dtype) @ weight_ih.to(dtype).t() + bias_ih  # in float32, as the bias is
    return _TreeGRU.apply(products, weight_hh, bias_hh, input_of, tree, dtype)


def _top_states(rnn, embed, tree, dtype):
    """The top layer's states (nodes, H) of a one-directional GRU: a prefix has one state in every layer."""
    inputs, input_of = embed(tree.words), tree.word_of
    for layer in range(rnn.num_layers):
        states = _layer_states(rnn, f"l{layer}", inputs, input_of, tree, dtype)
        if layer + 1 < rnn.num_layers:
            inputs, input_of = _rounded(states), torch.arange(len(states))
    return states


def last_states(rnn, embed, captions, lengths, dtype=None):
    """The top layer's state at each caption's last word: (B, H), as packed captions through `rnn` give it.

    rnn: an nn.GRU, of a bi-directional one the mean of that and the backward state at the first word; embed: word ids
    -> inputs; captions: (B, T) word ids on the CPU, longest first; lengths: (B,); dtype: of the matrix products (the
    weights' own unless given).
    """
    dtype = dtype or rnn.weight_hh_l0.dtype
    if rnn.bidirectional:
        (ahead, nodes), (back, back_nodes) = _both_ways(rnn, embed, captions, lengths, dtype)
        ends = nodes.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
        return (ahead.index_select(0, ends) + back.index_select(0, back_nodes[:, 0])) / 2
    tree = prefix_tree(captions, lengths)
    return _top_states(rnn, embed, tree, dtype).index_select(0, tree.ends)


def word_states(rnn, embed, captions, lengths, dtype=None):
    """The top layer's state at every word: (B, T, H), as packed captions through `rnn` give it, 0 past the lengths.

    rnn: an nn.GRU; of a bi-directional one, the mean of both directions' states. The rest as in `last_states`.
    """
    dtype = dtype or rnn.weight_hh_l0.dtype
    if rnn.bidirectional:
        (ahead, nodes), (back, back_nodes) = _both_ways(rnn, embed, captions, lengths, dtype)
        states = (ahead.index_select(0, nodes.flatten()) + back.index_select(0, back_nodes.flatten())) / 2
    else:
        tree = prefix_tree(captions, lengths)
        states = _top_states(rnn, embed, tree, dtype).index_select(0, tree.nodes.flatten())
    padding = torch.arange(captions.shape[1]) >= lengths.unsqueeze(1)
    return states.view(*captions.shape, -1).masked_fill(padding.unsqueeze(2), 0)


def _both_ways(rnn, embed, captions, lengths, dtype):
    """Of the top layer's two directions, each: states (nodes, H) and every word's node (B, T).

    The backward direction walks the prefixes of the reversed captions. A layer above the first takes pairs of nodes
    for its words, one of each direction: the same pair means the same whole caption, so little is shared there.
    """
    place = torch.arange(captions.shape[1])
    mirrored = torch.where(place < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - place, place)
    words, inputs_of = captions, embed
    for layer in range(rnn.num_layers):
        tree, back_tree = prefix_tree(words, lengths), prefix_tree(words.gather(1, mirrored), lengths)
        inputs = inputs_of(tree.words)  # the same words in both trees
        ahead = _layer_states(rnn, f"l{layer}", inputs, tree.word_of, tree, dtype)
        back = _layer_states(rnn, f"l{layer}_reverse", inputs, back_tree.word_of, back_tree, dtype)
        back_nodes = back_tree.nodes.gather(1, mirrored)
        words = tree.nodes * len(back) + back_nodes

        def inputs_of(pairs, ahead=ahead, back=back):
            return torch.cat((ahead.index_select(0, pairs // len(back)), back.index_select(0, pairs % len(back))), 1)
    return (ahead, tree.nodes), (back, back_nodes)
