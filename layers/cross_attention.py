"""Cross attention: the similarity of an image and a caption by their regions and words.

Pure functions of regions, words and options: the scores of SCAN (Lee et al., ECCV 2018), on which HAL (Liu et al.,
AAAI 2020) was tried, too. Calls, options and numbers are the released code's; docs/deviations.md lists deviations.

One side asks (queries), the other answers (contexts): with t2i words ask and regions answer, with i2t regions ask
and words answer. A query q attends to the contexts V with weights a; its relevance is the cosine of q and V'a.
No such V'a is made: with the scores s = V q and the Gram matrix G = V V', q.V'a = a.s and |V'a|^2 = a' G a. So a
batch is one product, a softmax and one small product. Captions of one length are taken together, unpadded.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from device import to_device
from errors import InputError, check_choice

EPS = 1e-8  # the released code's, wherever it divides
SLOPE = 0.1  # "clipped" norms are leaky ones
LARGEST = 2 ** 27  # scores region x word held at once; more images than that are taken in turns
CACHED = 2 ** 20  # scores worked on in turn on a CPU, whose caches they should fit
FEW, PAIRS = 0.1, 16  # where less than this part of all pairs has gradients, only theirs are made, so many at a time
PAIRED = 256  # images whose Gram matrices are made at a time, where pairs are scored
ROUNDED = 64  # rows of the large product's captions, whose number would be another one for every batch (see gru.py)

NORMS = ("clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "no_norm", "softmax")
AGGREGATIONS = {  # of (n, m, queries)
    "LogSumExp": lambda relevance, sharpness: (sharpness * relevance).logsumexp(2) / sharpness,
    "Mean": lambda relevance, _: relevance.mean(2),
    "Sum": lambda relevance, _: relevance.sum(2),
    "Max": lambda relevance, _: relevance.max(2).values,
}


def choice(opt, flag, choices):
    """The option's value; raises InputError where it is none of the choices."""
    return check_choice(flag, getattr(opt, flag), choices)


def _attention(scores, norm, smooth):
    """Scores (n, contexts, ..., queries) -> weights over the contexts, of that shape; the norm is over the queries."""
    if norm.startswith("clipped"):
        scores = leaky_relu(scores, SLOPE)
    if norm == "softmax":
        scores = smooth * scores.softmax(-1)
    elif norm.endswith("l1norm"):
        scores = scores * (smooth / (scores.abs().sum(-1, keepdim=True) + EPS))
    elif norm.endswith("l2norm"):
        squares = scores.square().sum(-1, keepdim=True)
        # A context of zeros has no direction: its scores stay zero, with a gradient that stays finite.
        scores = scores * (smooth / (squares.masked_fill(squares == 0, 1).sqrt() + EPS))
    else:
        scores = smooth * scores
    return scores.softmax(1)


def func_attention(query, context, opt, smooth):
    """(n, queries, D) and (n, contexts, D) -> attended contexts (n, queries, D), weights (n, contexts, queries).

    opt: raw_feature_norm; smooth: the inverse temperature of the softmax over the contexts.
    """
    weights = _attention(context @ query.mT, choice(opt, "raw_feature_norm", NORMS), smooth)
    return weights.mT @ context, weights


@contextmanager
def _plain_products(device):
    """Small products without oneDNN, which keeps code for each of their many shapes, and without autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _product(one, other, dtype):
    """In this type, whatever autocast says."""
    with torch.autocast(one.device.type, enabled=False):
        return one.to(dtype) @ other.to(dtype)


class _Group(NamedTuple):
    """Images, or captions, of equally many vectors each."""

    length: int  # vectors each
    count: int
    rows: slice  # of all vectors
    members: slice  # of all images or captions


def _grouped(shapes):
    """[(length, count)] -> groups that follow each other."""
    groups, row, member = [], 0, 0
    for length, count in shapes:
        groups.append(_Group(length, count, slice(row, row + length * count), slice(member, member + count)))
        row, member = row + length * count, member + count
    return groups


def _vectors(rows, group):
    """The group's vectors: (members, vectors each, D)."""
    return rows[group.rows].unflatten(0, (-1, group.length))


def _scores(scores, group, asking):
    """The scores of two groups: (owners, K, askers, Q)."""
    return scores[group.rows, asking.rows].unflatten(0, (-1, group.length)).unflatten(2, (-1, asking.length))


def _terms(terms, group, asking):
    """The terms of two groups: (owners, askers, Q)."""
    return terms[group.members, asking.rows].unflatten(1, (-1, asking.length))


def _blocks(owners, askers, device):
    """Blocks of scores: (the owners' group's number, their group, the askers' group, which of the group's owners)."""
    size = CACHED if device.type == "cpu" else LARGEST
    for number, group in enumerate(owners):
        for asking in askers:
            step = max(1, size // max(1, group.length * asking.length * asking.count))  # of no images nothing to do
            for start in range(0, group.count, step):
                yield number, group, asking, slice(start, start + step)


def _gradients(scores, gram, grad_dots, grad_squares, norm, smooth):
    """Of scores (n, K, ..., Q) and Gram matrices (n, K, K), given those of both terms (n, ..., Q)."""
    scores, grad_dots = scores.detach().requires_grad_(), grad_dots.unsqueeze(1)
    with torch.enable_grad():
        weights = _attention(scores, norm, smooth)
    flat = weights.detach().flatten(2)
    scaled = flat * grad_squares.flatten(1).unsqueeze(1)
    grad_weights = (scores.detach() * grad_dots).flatten(2).baddbmm_(gram, scaled, alpha=2)
    grad, = torch.autograd.grad(weights, scores, grad_weights.view_as(weights))
    return grad.addcmul_(weights.detach(), grad_dots), scaled @ flat.mT


class _Terms(torch.autograd.Function):
    """a.s and a' G a of every query towards every owner of contexts, each (owners, queries).

    contexts, queries: (rows, D), in the groups that owners and askers list; rows beyond these count for nothing.
    Backward computes each block again, where autograd would keep many times the scores.
    """

    @staticmethod
    def forward(ctx, contexts, queries, owners, askers, norm, smooth, dtype):
        """dtype: of the product of both sides, and of its gradients'."""
        scores = _product(contexts, queries.t(), dtype)
        dots = contexts.new_empty(owners[-1].members.stop, askers[-1].rows.stop)
        squares = torch.empty_like(dots)
        with _plain_products(contexts.device):
            grams = [vectors @ vectors.mT for vectors in (_vectors(contexts, group) for group in owners)]
            for number, group, asking, some in _blocks(owners, askers, contexts.device):
                part = _scores(scores, group, asking)[some].to(contexts.dtype)
                weights = _attention(part, norm, smooth)
                mixed = (grams[number][some] @ weights.flatten(2)).view_as(weights)
                _terms(dots, group, asking)[some] = (weights * part).sum(1)
                _terms(squares, group, asking)[some] = mixed.mul_(weights).sum(1)
        ctx.save_for_backward(contexts, queries, scores, *grams)
        ctx.groups, ctx.how = (owners, askers), (norm, smooth)
        return dots, squares

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_terms):
        contexts, queries, scores, *grams = ctx.saved_tensors
        known = contexts, queries, scores, grams, grad_terms, ctx.how
        pairs = _few_pairs(grad_terms, *ctx.groups)
        gradients = _gradients_of_all(*known, *ctx.groups) if pairs is None else _gradients_of_pairs(*known, pairs)
        return *gradients, None, None, None, None, None


def _gradients_of_all(contexts, queries, scores, grams, grad_terms, how, owners, askers):
    """Gradients of contexts and queries."""
    grad_scores, grad_grams = torch.empty_like(scores), [torch.zeros_like(gram) for gram in grams]
    grad_scores[owners[-1].rows.stop:] = grad_scores[:, askers[-1].rows.stop:] = 0
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
        for group, grad_gram in zip(owners, grad_grams):  # symmetric, as V V' is: twice the one side's
            _vectors(grad_contexts, group).baddbmm_(grad_gram, _vectors(contexts, group), alpha=2)
    return grad_contexts, grad_queries


def _few_pairs(grad_terms, owners, askers):
    """[(number, group, asking, which owners, which askers)] with a gradient; None where they are many, or on a GPU.

    A max-margin loss has at most three for each of the batch's pairs. To count them a GPU would have to be waited for.
    """
    if grad_terms[0].device.type != "cpu":
        return None
    touched = (grad_terms[0] != 0) | (grad_terms[1] != 0)
    pairs = [(number, group, asking, *_terms(touched, group, asking).any(2).nonzero(as_tuple=True))
             for number, group in enumerate(owners) for asking in askers]
    found = sum(len(pair[-1]) for pair in pairs)
    return pairs if found < FEW * owners[-1].members.stop * askers[-1].members.stop else None


def _gradients_of_pairs(contexts, queries, scores, grams, grad_terms, how, pairs):
    """Gradients of contexts and queries, where only these pairs of an owner and an asker have any."""
    grad_contexts, grad_queries = torch.zeros_like(contexts), torch.zeros_like(queries)
    some = ((*pair[:3], *chunk) for pair in pairs for chunk in zip(*(which.split(PAIRS) for which in pair[3:])))
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
    """Cosines of queries of these lengths and what they attend to, from both terms."""
    # Rounding may make a square negative, and at zero the root has no gradient: EPS is larger than either.
    attended = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
    return dots / (lengths * attended).clamp(min=EPS)


def _by_length(lengths):
    """The captions' order, longest first, and their groups."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    return order, _grouped(zip((-values).tolist(), counts.tolist()))


def _packed(vectors, starts, order, groups):
    """Flat words -> (rows, D): the groups' captions one after the other."""
    places = np.concatenate([(starts[order[group.members], None] + np.arange(group.length)).ravel()
                             for group in groups])
    places = np.pad(places, (0, -len(places) % ROUNDED))  # any word will do: nothing looks at those scores
    return vectors.index_select(0, to_device(torch.from_numpy(places), vectors.device))


def _similarities(images, vectors, starts, lengths, opt, cross_attn):
    """All at once: `flat_similarities` of as many images as that may be."""
    order, captions = _by_length(lengths)
    owners, askers = _grouped([(images.shape[1], len(images))]), captions
    contexts, queries = images.flatten(0, 1), _packed(vectors, starts, order, captions)
    if cross_attn == "i2t":
        owners, askers, contexts, queries = askers, owners, queries, contexts
    dtype = torch.bfloat16 if getattr(opt, "amp", "off") == "bf16" else images.dtype
    dots, squares = _Terms.apply(contexts, queries, owners, askers, opt.raw_feature_norm, opt.lambda_softmax, dtype)
    relevance = _relevance(dots, squares, torch.linalg.vector_norm(queries[:dots.shape[1]], dim=1))
    aggregate = AGGREGATIONS[opt.agg_func]
    scores = torch.cat([aggregate(relevance[:, asking.rows].unflatten(1, (-1, asking.length)),
                                  getattr(opt, "lambda_lse", None)) for asking in askers], 1)
    scores = scores if cross_attn == "t2i" else scores.t()
    return scores[:, to_device(torch.from_numpy(np.argsort(order)), scores.device)]


def _checked(opt, cross_attn=None):
    """Which side asks; raises InputError where opt has a name that is none."""
    choice(opt, "raw_feature_norm", NORMS)
    choice(opt, "agg_func", AGGREGATIONS)
    return cross_attn or choice(opt, "cross_attn", ("t2i", "i2t"))


def cross_attention_similarities(images, words, lengths, opt, cross_attn=None):
    """Regions (I, R, D) and words (C, T, D), of which lengths (C,) count -> similarities S (I, C).

    opt: cross_attn (t2i | i2t, unless given here), raw_feature_norm, lambda_softmax, agg_func, lambda_lse (of
    LogSumExp) and, with bf16 for the large products, amp. LogSumExp is no mean: scores may exceed 1.
    Raises InputError for an unknown name, or lengths that the words do not have.
    """
    lengths = torch.as_tensor(lengths).tolist()
    if len(lengths) != len(words) or not all(1 <= length <= words.shape[1] for length in lengths):
        raise InputError(f"the words of {len(words)} captions, at most {words.shape[1]} each, came with the lengths "
                         f"{', '.join(map(str, lengths[:9])) or '(none)'}: give each caption's own number of words")
    starts = np.arange(len(words)) * words.shape[1]
    return flat_similarities(images, words.flatten(0, 1), starts, np.array(lengths), opt, cross_attn)


def flat_similarities(images, vectors, starts, lengths, opt, cross_attn=None):
    """Regions (I, R, D) and captions, each vectors[start:start + length] -> similarities S (I, C).

    vectors: (rows, D); starts and lengths: (C,) arrays; opt and InputError: as above.
    """
    cross_attn = _checked(opt, cross_attn)
    tiles = images.split(max(1, LARGEST // (images.shape[1] * int(lengths.sum()))))
    if len(tiles) == 1:
        return _similarities(images, vectors, starts, lengths, opt, cross_attn)
    return torch.cat([checkpoint(_similarities, tile, vectors, starts, lengths, opt, cross_attn, use_reentrant=False,
                                 preserve_rng_state=False) for tile in tiles])


def pair_similarities(images, vectors, starts, lengths, pairs, opt):
    """Similarities (n,) of pairs (2, n), each an image's number and a caption's, without gradients.

    As `flat_similarities`, but starts, lengths and pairs are tensors on the CPU. A product is of an image and all its
    captions of one length, or of a caption and all its images where captions are fewer.
    """
    cross_attn, device = _checked(opt), images.device
    by = 0 if len(pairs[0].unique()) <= len(pairs[1].unique()) else 1
    found, length_of = images.new_empty(pairs.shape[1]), lengths[pairs[1]]
    numbers, image_of = pairs[0].unique(return_inverse=True)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        known = torch.cat([_known(images[some.to(device)], cross_attn == "t2i") for some in numbers.split(PAIRED)])
        for length in length_of.unique().tolist():
            places = (length_of == length).nonzero().squeeze(1)
            places = places[pairs[by, places].argsort(stable=True)]
            captions, caption_of = pairs[1, places].unique(return_inverse=True)
            words = vectors[(starts[captions].unsqueeze(1) + torch.arange(length)).to(device)]
            known_words = _known(words, cross_attn == "i2t")
            size = max(1, (CACHED if device.type == "cpu" else LARGEST) // (images.shape[1] * length))
            for some, own in zip(places.split(size), caption_of.split(size)):
                sides = (images, pairs[0, some]), (words, own)
                scores = _pair_scores(*sides[by], *sides[1 - by])
                scores = scores if (by == 0) == (cross_attn == "i2t") else scores.mT  # (pairs, contexts, queries)
                both = known[image_of[some].to(device)], known_words[own.to(device)]
                found[some.to(device)] = _aggregated(scores, *(both if cross_attn == "t2i" else both[::-1]), opt)
    return found


def _known(vectors, are_contexts):
    """Of contexts their Gram matrices (n, K, K), of queries their lengths (n, Q)."""
    return vectors @ vectors.mT if are_contexts else torch.linalg.vector_norm(vectors, dim=2)


def _pair_scores(ones, numbers, others, their_numbers):
    """Products of pairs, those of a number side by side: (pairs, others' vectors each, ones' vectors each)."""
    vectors, height, start, parts = others.flatten(0, 1), others.shape[1], 0, []
    rows = (their_numbers.unsqueeze(1) * height + torch.arange(height)).to(others.device)
    for number, count in zip(*(x.tolist() for x in numbers.unique_consecutive(return_counts=True))):
        parts.append(vectors.index_select(0, rows[start:start + count].flatten()) @ ones[number].t())
        start += count
    return torch.cat(parts).unflatten(0, (-1, height))


def _aggregated(scores, grams, lengths, opt):
    """Scores (n, K, Q), Gram matrices (n, K, K), lengths (n, Q) -> similarities (n,)."""
    with _plain_products(scores.device):
        weights = _attention(scores, opt.raw_feature_norm, opt.lambda_softmax)
        dots, squares = (weights * scores).sum(1), (grams @ weights).mul_(weights).sum(1)
    relevance = _relevance(dots, squares, lengths).unsqueeze(0)
    return AGGREGATIONS[opt.agg_func](relevance, getattr(opt, "lambda_lse", None)).squeeze(0)


def xattn_score_t2i(images, captions, cap_lens, opt):
    """Words ask, regions answer: (I, R, D), (C, T, D), (C,) -> (I, C). opt: as above, without cross_attn."""
    return cross_attention_similarities(images, captions, cap_lens, opt, "t2i")


def xattn_score_i2t(images, captions, cap_lens, opt):
    """Regions ask, words answer: (I, R, D), (C, T, D), (C,) -> (I, C). opt: as above, without cross_attn."""
    return cross_attention_similarities(images, captions, cap_lens, opt, "i2t")


def _sharded(images, captions, caplens, opt, shard_size, cross_attn):
    images, captions, caplens = torch.as_tensor(images), torch.as_tensor(captions), np.asarray(caplens)
    order = np.argsort(-caplens, kind="stable")  # captions of one length belong together
    scores = torch.empty(len(images), len(captions), dtype=images.dtype)
    with torch.no_grad():
        for chosen in np.split(order, range(shard_size, len(order), shard_size)):
            words = captions[torch.from_numpy(chosen)][:, :caplens[chosen].max()]
            for rows in (slice(start, start + shard_size) for start in range(0, len(images), shard_size)):
                scores[rows, torch.from_numpy(chosen)] = cross_attention_similarities(
                    images[rows], words, caplens[chosen], opt, cross_attn).cpu()
    return scores.numpy()


def shard_xattn_t2i(images, captions, caplens, opt, shard_size=128):
    """`xattn_score_t2i` without gradients, in shards of images and captions; arrays or tensors -> a NumPy array."""
    return _sharded(images, captions, caplens, opt, shard_size, "t2i")


def shard_xattn_i2t(images, captions, caplens, opt, shard_size=128):
    """`xattn_score_i2t` without gradients, in shards of images and captions; arrays or tensors -> a NumPy array."""
    return _sharded(images, captions, caplens, opt, shard_size, "i2t")
