"""Cross attention: the similarity of an image and a caption by their regions and words.

The scores of SCAN (Lee et al., ECCV 2018), which the HAL paper (Liu et al., AAAI 2020) also
trains. Everything here is a function of regions, words and options. Calls, options and numbers
are those of the released code; docs/deviations.md lists the deviations.

One side asks (queries), the other answers (contexts): with t2i words ask and regions answer, with
i2t regions ask and words answer. A query q attends to the contexts V with weights a; its relevance
is the cosine of q and the attended vector V'a.

V'a itself is never computed. With the scores s = V q and the Gram matrix G = V V',
q.V'a = a.s and |V'a|^2 = a' G a. So a batch takes one large product, a softmax and one small
product. Captions of one length are processed together, without padding.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from runtime.device import to_device
from runtime.errors import InputError, check_choice

EPS = 1e-8  # keeps divisors from 0, with the released code's value
SLOPE = 0.1  # the "clipped" norms do not clip to 0: they are leaky ReLUs
LARGEST = 2**27  # region x word scores held at once; beyond that, images are taken in turns
CACHED = 2**20  # scores per block on a CPU, so that a block stays in its cache
FEW = 0.1  # below this share of pairs with a gradient, only theirs are computed
PAIRS = 16  # ... this many at a time
PAIRED = 256  # images whose Gram matrices are computed at a time when pairs are scored
# The words of a batch are padded to a multiple of this, or the large product would have a new
# shape in every batch, for which CPU libraries would keep code (see gru.py).
ROUNDED = 64
NORMS = ("clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "no_norm", "softmax")

AGGREGATIONS = {  # of (n, m, queries)
    "LogSumExp": lambda relevance, sharpness: (sharpness * relevance).logsumexp(2) / sharpness,
    "Mean": lambda relevance, _: relevance.mean(2),
    "Sum": lambda relevance, _: relevance.sum(2),
    "Max": lambda relevance, _: relevance.max(2).values,
}


def choice(opt, flag, choices):
    """The value of option `flag`; raises InputError unless it is one of the choices."""
    return check_choice(flag, getattr(opt, flag), choices)


def l1norm(X, dim, eps=EPS):
    """Vectors along `dim` divided by the sum of their absolute values + eps."""
    return X / (X.abs().sum(dim, keepdim=True) + eps)


def cosine_similarity(x1, x2, dim=1, eps=EPS):
    """The cosines of vectors along `dim`, which is dropped; lengths' products below eps are eps."""
    lengths = torch.linalg.vector_norm(x1, dim=dim) * torch.linalg.vector_norm(x2, dim=dim)
    return (x1 * x2).sum(dim) / lengths.clamp(min=eps)


def _attention(scores, norm, smooth, eps=EPS):
    """Attention weights over the contexts, of the shape of scores (n, contexts, ..., queries).

    The norm is over the queries, the softmax over the contexts.
    """
    if norm.startswith("clipped"):
        scores = leaky_relu(scores, SLOPE)
    if norm == "softmax":
        scores = smooth * scores.softmax(-1)
    elif norm.endswith("l1norm"):
        scores = scores * (smooth / (scores.abs().sum(-1, keepdim=True) + eps))
    elif norm.endswith("l2norm"):
        squares = scores.square().sum(-1, keepdim=True)
        # A context of zeros has no direction. Dividing by 1 instead of 0 keeps its scores zero and
        # the gradient of the root finite.
        scores = scores * (smooth / (squares.masked_fill(squares == 0, 1).sqrt() + eps))
    else:
        scores = smooth * scores
    return scores.softmax(1)


def func_attention(query, context, opt, smooth, eps=EPS):
    """Attend: query (n, queries, D), context (n, contexts, D) -> (n, queries, D) and the weights.

    The weights are (n, contexts, queries). opt: raw_feature_norm; smooth: the inverse temperature
    of the softmax over the contexts; eps: added to what the norm divides by.
    """
    weights = _attention(context @ query.mT, choice(opt, "raw_feature_norm", NORMS), smooth, eps)
    return weights.mT @ context, weights


@contextmanager
def _plain_products(device):
    """Compute small products without oneDNN and without autocast.

    oneDNN keeps compiled code for every shape it has seen, and these products have many shapes.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _product(one, other, dtype):
    """Multiply two matrices in this dtype, whatever autocast says."""
    with torch.autocast(one.device.type, enabled=False):
        return one.to(dtype) @ other.to(dtype)


class _Group(NamedTuple):
    """Images, or captions, that have the same number of vectors each."""

    length: int  # vectors each
    count: int
    rows: slice  # of all vectors
    members: slice  # of all images or captions


def _grouped(shapes):
    """Consecutive groups from a list of (length, count)."""
    groups, row, member = [], 0, 0
    for length, count in shapes:
        groups.append(
            _Group(length, count, slice(row, row + length * count), slice(member, member + count))
        )
        row, member = row + length * count, member + count
    return groups


def _vectors(rows, group):
    """A group's vectors: (members, vectors each, D)."""
    return rows[group.rows].unflatten(0, (-1, group.length))


def _scores(scores, group, asking):
    """The part of the scores between two groups: (owners, K, askers, Q)."""
    return (
        scores[group.rows, asking.rows]
        .unflatten(0, (-1, group.length))
        .unflatten(2, (-1, asking.length))
    )


def _terms(terms, group, asking):
    """The part of a term between two groups: (owners, askers, Q)."""
    return terms[group.members, asking.rows].unflatten(1, (-1, asking.length))


def _blocks(owners, askers, device):
    """Split the scores into blocks that fit in the cache (CPU) or in memory (GPU).

    Yields (number of the owners' group, that group, the askers' group, slice of the group's
    owners).
    """
    size = CACHED if device.type == "cpu" else LARGEST
    for number, group in enumerate(owners):
        for asking in askers:
            # max(1, ...): an empty batch has no scores.
            step = max(1, size // max(1, group.length * asking.length * asking.count))
            for start in range(0, group.count, step):
                yield number, group, asking, slice(start, start + step)


def _gradients(scores, gram, grad_dots, grad_squares, norm, smooth):
    """Gradients with respect to scores (n, K, ..., Q) and Gram matrices (n, K, K).

    grad_dots, grad_squares: (n, ..., Q), the gradients of the two terms.
    """
    scores, grad_dots = scores.detach().requires_grad_(), grad_dots.unsqueeze(1)
    with torch.enable_grad():
        weights = _attention(scores, norm, smooth)
    # The terms are a.s and a' G a. Their gradient by a is s * grad_dots + 2 G a * grad_squares; it
    # goes on through the softmax to s. By s directly it is a * grad_dots, by G it is
    # grad_squares * a a'.
    flat = weights.detach().flatten(2)
    scaled = flat * grad_squares.flatten(1).unsqueeze(1)
    grad_weights = (scores.detach() * grad_dots).flatten(2).baddbmm_(gram, scaled, alpha=2)
    (grad,) = torch.autograd.grad(weights, scores, grad_weights.view_as(weights))
    return grad.addcmul_(weights.detach(), grad_dots), scaled @ flat.mT


class _Terms(torch.autograd.Function):
    """The two terms a.s and a' G a of every query with every owner of contexts.

    Each is (owners, queries). contexts, queries: (rows, D), grouped as owners and askers say; rows
    behind the groups are ignored. Backward recomputes each block: autograd would store many times
    the memory of the scores.
    """

    @staticmethod
    def forward(ctx, contexts, queries, owners, askers, norm, smooth, dtype):
        """dtype: of the large product of both sides, and of its gradients."""
        scores = _product(contexts, queries.t(), dtype)
        dots = contexts.new_empty(owners[-1].members.stop, askers[-1].rows.stop)
        squares = torch.empty_like(dots)
        with _plain_products(contexts.device):
            grams = [
                vectors @ vectors.mT for vectors in (_vectors(contexts, group) for group in owners)
            ]
            for number, group, asking, some in _blocks(owners, askers, contexts.device):
                part = _scores(scores, group, asking)[some].to(contexts.dtype)
                weights = _attention(part, norm, smooth)
                mixed = (grams[number][some] @ weights.flatten(2)).view_as(weights)
                _terms(dots, group, asking)[some] = (weights * part).sum(1)
                _terms(squares, group, asking)[some] = mixed.mul_(weights).sum(1)
        # The weights, as large as the scores, are not saved: backward computes them block by block.
        ctx.save_for_backward(contexts, queries, scores, *grams)
        ctx.groups, ctx.how = (owners, askers), (norm, smooth)
        return dots, squares

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_terms):
        contexts, queries, scores, *grams = ctx.saved_tensors
        known = contexts, queries, scores, grams, grad_terms, ctx.how
        pairs = _few_pairs(grad_terms, *ctx.groups)
        gradients = (
            _gradients_of_all(*known, *ctx.groups)
            if pairs is None
            else _gradients_of_pairs(*known, pairs)
        )
        return *gradients, None, None, None, None, None


def _gradients_of_all(contexts, queries, scores, grams, grad_terms, how, owners, askers):
    """Gradients of contexts and queries, computed for every pair of an owner and an asker."""
    grad_scores, grad_grams = torch.empty_like(scores), [torch.zeros_like(gram) for gram in grams]
    # `empty_like` above is filled block by block; only the rows behind the groups are left.
    grad_scores[owners[-1].rows.stop :] = grad_scores[:, askers[-1].rows.stop :] = 0
    with _plain_products(contexts.device):
        for number, group, asking, some in _blocks(owners, askers, contexts.device):
            part = _scores(scores, group, asking)[some].to(contexts.dtype)
            grads = (_terms(grad, group, asking)[some] for grad in grad_terms)
            grad_part, grad_gram = _gradients(part, grams[number][some], *grads, *how)
            _scores(grad_scores, group, asking)[some] = grad_part
            grad_grams[number][some] += grad_gram
    grad_contexts = _product(grad_scores, queries, scores.dtype).to(contexts.dtype)
    grad_queries = _product(grad_scores.t(), contexts, scores.dtype).to(queries.dtype)
    with _plain_products(contexts.device):
        # G = V V' depends on V twice, and its gradient is symmetric: hence alpha=2.
        for group, grad_gram in zip(owners, grad_grams):
            _vectors(grad_contexts, group).baddbmm_(grad_gram, _vectors(contexts, group), alpha=2)
    return grad_contexts, grad_queries


def _few_pairs(grad_terms, owners, askers):
    """List the pairs that have a gradient; None if there are many, or on a GPU.

    A max-margin loss gives gradients to at most three entries for each of the batch's pairs. On a
    GPU, counting them would make the CPU wait.

    Each entry is (number of the owners' group, that group, the askers' group, owners, askers).
    """
    if grad_terms[0].device.type != "cpu":
        return None
    # A pair counts once even if several of the asker's queries have a gradient: `any(2)`.
    touched = (grad_terms[0] != 0) | (grad_terms[1] != 0)
    pairs = [
        (number, group, asking, *_terms(touched, group, asking).any(2).nonzero(as_tuple=True))
        for number, group in enumerate(owners)
        for asking in askers
    ]
    found = sum(len(pair[-1]) for pair in pairs)
    return pairs if found < FEW * owners[-1].members.stop * askers[-1].members.stop else None


def _gradients_of_pairs(contexts, queries, scores, grams, grad_terms, how, pairs):
    """Gradients of contexts and queries if only these pairs of an owner and an asker have any."""
    grad_contexts, grad_queries = torch.zeros_like(contexts), torch.zeros_like(queries)
    some = (
        (*pair[:3], *chunk)
        for pair in pairs
        for chunk in zip(*(which.split(PAIRS) for which in pair[3:]))
    )
    with _plain_products(contexts.device):
        for number, group, asking, owner, asker in some:
            part = _scores(scores, group, asking)[owner, :, asker].to(contexts.dtype)
            grads = (_terms(grad, group, asking)[owner, asker] for grad in grad_terms)
            grad_part, grad_gram = _gradients(part, grams[number][owner], *grads, *how)
            owned, asked = _vectors(contexts, group)[owner], _vectors(queries, asking)[asker]
            grad_owned = (grad_part @ asked).baddbmm_(grad_gram, owned, alpha=2)
            _vectors(grad_contexts, group).index_add_(0, owner, grad_owned)
            _vectors(grad_queries, asking).index_add_(0, asker, grad_part.mT @ owned)
    return grad_contexts, grad_queries


def _relevance(dots, squares, lengths):
    """Cosines of the queries and what they attend to, from both terms and the queries' lengths."""
    # Rounding can make a square slightly negative, and the root has no gradient at 0. The clamp
    # changes nothing else: EPS below is far larger than the root of `tiny`.
    attended = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
    return dots / (lengths * attended).clamp(min=EPS)


def _by_length(lengths):
    """The order that puts the longest captions first, and the groups of captions of one length."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    return order, _grouped(zip((-values).tolist(), counts.tolist()))


def _packed(vectors, starts, order, groups):
    """Gather the words of all groups, caption after caption: (rows, D)."""
    places = np.concatenate(
        [(starts[order[group.members], None] + np.arange(group.length)).ravel() for group in groups]
    )
    # The padding repeats word 0: no one reads those scores.
    places = np.pad(places, (0, -len(places) % ROUNDED))
    return vectors.index_select(0, to_device(torch.from_numpy(places), vectors.device))


def _similarities(images, vectors, starts, lengths, opt, cross_attn):
    """`flat_similarities` of as many images as fit in memory at once."""
    order, captions = _by_length(lengths)
    owners, askers = _grouped([(images.shape[1], len(images))]), captions
    contexts, queries = images.flatten(0, 1), _packed(vectors, starts, order, captions)
    if cross_attn == "i2t":
        owners, askers, contexts, queries = askers, owners, queries, contexts
    dtype = torch.bfloat16 if getattr(opt, "amp", "off") == "bf16" else images.dtype
    dots, squares = _Terms.apply(
        contexts, queries, owners, askers, opt.raw_feature_norm, opt.lambda_softmax, dtype
    )
    relevance = _relevance(dots, squares, torch.linalg.vector_norm(queries[: dots.shape[1]], dim=1))
    aggregate = AGGREGATIONS[opt.agg_func]
    scores = torch.cat(
        [
            aggregate(
                relevance[:, asking.rows].unflatten(1, (-1, asking.length)),
                getattr(opt, "lambda_lse", None),
            )
            for asking in askers
        ],
        1,
    )
    scores = scores if cross_attn == "t2i" else scores.t()
    return scores[:, to_device(torch.from_numpy(np.argsort(order)), scores.device)]


def _checked(opt, cross_attn=None):
    """Which side asks, t2i or i2t; raises InputError if an option has an unknown value."""
    choice(opt, "raw_feature_norm", NORMS)
    choice(opt, "agg_func", AGGREGATIONS)
    return cross_attn or choice(opt, "cross_attn", ("t2i", "i2t"))


def cross_attention_similarities(images, words, lengths, opt, cross_attn=None):
    """Similarities S (I, C) of regions (I, R, D) and words (C, T, D), lengths (C,) of which count.

    opt: cross_attn (t2i | i2t, unless given here), raw_feature_norm, lambda_softmax, agg_func,
    lambda_lse (for LogSumExp) and amp ("bf16" computes the large products in bf16). LogSumExp is
    not a mean: scores may exceed 1. Raises InputError for an unknown option value, or lengths that
    do not fit the words.
    """
    lengths = torch.as_tensor(lengths).tolist()
    if len(lengths) != len(words) or not all(1 <= length <= words.shape[1] for length in lengths):
        raise InputError(
            f"the words of {len(words)} captions, at most {words.shape[1]} each, came with the "
            f"lengths {', '.join(map(str, lengths[:9])) or '(none)'}: give each caption's own "
            "number of words"
        )
    starts = np.arange(len(words)) * words.shape[1]
    return flat_similarities(
        images, words.flatten(0, 1), starts, np.array(lengths), opt, cross_attn
    )


def flat_similarities(images, vectors, starts, lengths, opt, cross_attn=None):
    """Similarities S (I, C) of regions (I, R, D) and captions that lie one after the other.

    Caption c is vectors[starts[c] : starts[c] + lengths[c]]. vectors: (rows, D); starts, lengths:
    (C,) arrays. opt and InputError as in `cross_attention_similarities`.
    """
    cross_attn = _checked(opt, cross_attn)
    tiles = images.split(max(1, LARGEST // (images.shape[1] * int(lengths.sum()))))
    if len(tiles) == 1:
        return _similarities(images, vectors, starts, lengths, opt, cross_attn)
    return torch.cat(
        [
            checkpoint(
                _similarities,
                tile,
                vectors,
                starts,
                lengths,
                opt,
                cross_attn,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for tile in tiles
        ]
    )


def pair_similarities(images, vectors, starts, lengths, pairs, opt):
    """Similarities (n,) of pairs (2, n) of an image's number and a caption's, without gradients.

    Other arguments as in `flat_similarities`, but starts, lengths and pairs are tensors on the CPU.
    Each product takes one image with all its captions of one length, or, if the pairs name fewer
    captions than images, one caption with all its images.
    """
    cross_attn, device = _checked(opt), images.device
    by = 0 if len(pairs[0].unique()) <= len(pairs[1].unique()) else 1
    found, length_of = images.new_empty(pairs.shape[1]), lengths[pairs[1]]
    numbers, image_of = pairs[0].unique(return_inverse=True)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        known = torch.cat(
            [_known(images[some.to(device)], cross_attn == "t2i") for some in numbers.split(PAIRED)]
        )
        for length in length_of.unique().tolist():
            places = (length_of == length).nonzero().squeeze(1)
            places = places[pairs[by, places].argsort(stable=True)]
            captions, caption_of = pairs[1, places].unique(return_inverse=True)
            words = vectors[(starts[captions].unsqueeze(1) + torch.arange(length)).to(device)]
            known_words = _known(words, cross_attn == "i2t")
            size = max(
                1, (CACHED if device.type == "cpu" else LARGEST) // (images.shape[1] * length)
            )
            for some, own in zip(places.split(size), caption_of.split(size)):
                sides = (images, pairs[0, some]), (words, own)
                scores = _pair_scores(*sides[by], *sides[1 - by])
                # to (pairs, contexts, queries)
                scores = scores if (by == 0) == (cross_attn == "i2t") else scores.mT
                both = known[image_of[some].to(device)], known_words[own.to(device)]
                found[some.to(device)] = _aggregated(
                    scores, *(both if cross_attn == "t2i" else both[::-1]), opt
                )
    return found


def _known(vectors, are_contexts):
    """What does not depend on the pair: Gram matrices (n, K, K), or the queries' lengths (n, Q)."""
    return vectors @ vectors.mT if are_contexts else torch.linalg.vector_norm(vectors, dim=2)


def _pair_scores(ones, numbers, others, their_numbers):
    """Scores of pairs that are sorted by their first item, which is multiplied with all its others.

    Returns (pairs, vectors of an other, vectors of a one).
    """
    vectors, height, start, parts = others.flatten(0, 1), others.shape[1], 0, []
    rows = (their_numbers.unsqueeze(1) * height + torch.arange(height)).to(others.device)
    for number, count in zip(*(x.tolist() for x in numbers.unique_consecutive(return_counts=True))):
        parts.append(
            vectors.index_select(0, rows[start : start + count].flatten()) @ ones[number].t()
        )
        start += count
    return torch.cat(parts).unflatten(0, (-1, height))


def _aggregated(scores, grams, lengths, opt):
    """Similarities (n,) from scores (n, K, Q), Gram matrices (n, K, K) and lengths (n, Q)."""
    with _plain_products(scores.device):
        weights = _attention(scores, opt.raw_feature_norm, opt.lambda_softmax)
        dots, squares = (weights * scores).sum(1), (grams @ weights).mul_(weights).sum(1)
    relevance = _relevance(dots, squares, lengths).unsqueeze(0)
    return AGGREGATIONS[opt.agg_func](relevance, getattr(opt, "lambda_lse", None)).squeeze(0)


def xattn_score_t2i(images, captions, cap_lens, opt):
    """Similarities with words asking and regions answering: (I, R, D), (C, T, D), (C,) -> (I, C).

    opt: as in `cross_attention_similarities`, without cross_attn.
    """
    return cross_attention_similarities(images, captions, cap_lens, opt, "t2i")


def xattn_score_i2t(images, captions, cap_lens, opt):
    """Similarities with regions asking and words answering: (I, R, D), (C, T, D), (C,) -> (I, C).

    opt: as in `cross_attention_similarities`, without cross_attn.
    """
    return cross_attention_similarities(images, captions, cap_lens, opt, "i2t")


def _sharded(images, captions, caplens, opt, shard_size, cross_attn):
    images, captions = torch.as_tensor(images), torch.as_tensor(captions)
    caplens = np.asarray(caplens)
    order = np.argsort(-caplens, kind="stable")  # captions of one length fall into one shard
    scores = torch.empty(len(images), len(captions), dtype=images.dtype)
    with torch.no_grad():
        for chosen in np.split(order, range(shard_size, len(order), shard_size)):
            words = captions[torch.from_numpy(chosen)][:, : caplens[chosen].max()]
            for rows in (
                slice(start, start + shard_size) for start in range(0, len(images), shard_size)
            ):
                scores[rows, torch.from_numpy(chosen)] = cross_attention_similarities(
                    images[rows], words, caplens[chosen], opt, cross_attn
                ).cpu()
    return scores.numpy()


def shard_xattn_t2i(images, captions, caplens, opt, shard_size=128):
    """`xattn_score_t2i` without gradients, in shards of images and captions.

    Takes arrays or tensors, returns a NumPy array.
    """
    return _sharded(images, captions, caplens, opt, shard_size, "t2i")


def shard_xattn_i2t(images, captions, caplens, opt, shard_size=128):
    """`xattn_score_i2t` without gradients, in shards of images and captions.

    Takes arrays or tensors, returns a NumPy array.
    """
    return _sharded(images, captions, caplens, opt, shard_size, "i2t")
