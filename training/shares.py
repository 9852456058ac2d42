"""A batch in parts, with the gradients of the whole: the shares of several processes, and pieces for --micro_batch.

The losses need a batch's whole similarity matrix. So each part is encoded by itself, all embeddings are gathered, and
the loss' gradient with respect to them is taken of the whole matrix, on every process; each part's slice of it then
goes through the part's own graph. With pieces, which are first encoded without a graph and again with one, this is
gradient caching (Gao et al., RepL4NLP 2021).
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

import distributed
from errors import InputError
from memory_bank import MemoryBank, build_bank
from model import no_embeddings
from scan import SCAN
from word_ids import by_length, seed_for

PAIR_WORDS = 1  # what a pair's features cost a CPU, in words


class Share(NamedTuple):
    """One process's part of a batch; places are those of the one-process order, longest caption first."""

    pieces: list  # batches as a data set loads them; None where other processes have a piece more
    places: list  # of each process, (n,) places of its pairs
    order: torch.Tensor  # (B,) where each pair of the batch stands among the gathered ones
    error: object  # the InputError that loading a piece ended with, or None
    lengths: torch.Tensor  # (B,) words of the whole batch's captions, longest first
    regions: object  # what the batch's images are left with at most, where regions are dropped; else None
    indices: torch.Tensor  # (B,) the whole batch's caption indices


# Sharing out ------------------------------------------------------------------------------------

def shares(lengths, n, words=None):
    """Places 0, 1, ... of a batch for n processes, balanced by words: a list of n ascending tensors.

    lengths: (B,) words a caption, longest first. words: (B, T) word ids where captions that begin alike share their
    states, as on a CPU: they go together, and what counts is the words that are not shared.
    """
    if words is None:  # dealt out 0, 1, 2, 2, 1, 0, 0, ...
        turn = torch.arange(len(lengths)) % (2 * n)
        owner = torch.minimum(turn, 2 * n - 1 - turn)
        return [(owner == process).nonzero().flatten() for process in range(n)]
    alike = torch.sort(torch.unique(words, dim=0, return_inverse=True)[1], stable=True).indices
    shared = (words[alike[1:]] == words[alike[:-1]]).cumprod(1).sum(1)
    costs = lengths[alike] + PAIR_WORDS
    costs[1:] -= torch.minimum(shared, lengths[alike[1:]])
    middles = costs.cumsum(0) - costs / 2
    owner = (middles * n / costs.sum()).long().clamp(max=n - 1)
    return [alike[owner == process].sort().values for process in range(n)]


def shared_batches(loader, batches, micro_batch=None, device="cpu"):
    """For each (B,) tensor of caption indices this process's Share, in pieces of at most `micro_batch` pairs.

    device: that of the model, where the Share's order and indices are.
    """
    dataset, rank, n = loader.dataset, distributed.rank(), distributed.size()
    plans, words, left = [], dataset.word_ids, [None] * len(batches)
    if hasattr(dataset, "augment"):
        words, _ = dataset.epoch_words(loader.epoch, augmented=True)
        left = dataset.regions_left(batches, loader.epoch)
    all_lengths = words.lengths
    for indices, regions in zip(batches, left):
        longest_first = by_length(all_lengths[indices])
        indices, lengths = (x[longest_first] for x in (indices, all_lengths[indices]))
        alike = n > 1 and _shares_states(dataset)
        places = shares(lengths, n, words.padded(indices, int(lengths[0])) if alike else None)
        plans.append((indices, places, _pieces(places, rank, micro_batch), lengths, regions))
    if not plans:
        return
    sizes = [len(indices) for indices, *_ in plans]
    everyone = torch.cat([indices for indices, *_ in plans]).to(device).split(sizes)
    orders = torch.cat([torch.cat(places).argsort() for _, places, *_ in plans]).to(device).split(sizes)
    own = loader.load([indices[piece] for indices, _, pieces, *_ in plans for piece in pieces if len(piece)],
                      augmented=True)
    for (_, places, pieces, lengths, regions), indices, order in zip(plans, everyone, orders):
        loaded, error = [], None
        try:
            for piece in pieces:
                loaded.append(next(own) if len(piece) else None)
        except InputError as failure:  # told to the others, if any, with what this step gathers
            if not distributed.launched():
                raise
            loaded, error = loaded + [None] * (len(pieces) - len(loaded)), failure
        yield Share(loaded, places, order, error, lengths, regions, indices)


def _shares_states(dataset):
    """Whether captions that begin alike share their states, and cost more than images do."""
    return getattr(dataset, "device", None) == torch.device("cpu")


def _pieces(places, rank, micro_batch):
    """This process's places in pieces, as many as any process has."""
    if not micro_batch:
        return [places[rank]]
    count = max(-(-len(one) // micro_batch) for one in places)
    return list(places[rank].tensor_split(count))  # of nearly one size: a single image may be too few for batch norm


def shared_bank(model, loader, batches):
    """The MemoryBank of batches of caption indices, in their order, each embedded by one process."""
    own = batches[distributed.rank()::distributed.size()]
    none = no_embeddings(model)
    nothing = MemoryBank(none, none, torch.empty(0, dtype=torch.int64, device=model.device))
    bank, sizes = build_bank(model, loader.load(own)) if own else nothing, [len(batch) for batch in batches]
    if distributed.size() == 1:
        return bank
    split = [part.split(sizes[distributed.rank()::distributed.size()]) for part in bank]
    return MemoryBank(*(distributed.gather_batches(part, sizes, like) for part, like in zip(split, nothing)))


# Gradients --------------------------------------------------------------------------------------

def gradients(model, share, criterion, similarity, bank, scale, parameters, no_image, flag=0):
    """The whole batch's loss and similarities; leaves its gradients, added up over processes, in the parameters.

    similarity: of images, captions and, of SCAN, lengths, whose rows (images) several processes share; bank: a
    MemoryBank or None; scale: what the loss is multiplied by on the way back, and gradients divided by; no_image: an
    empty batch of images. Returns (loss, similarities, (size, 2) flags as `distributed.agree` takes them).
    """
    cached = len(share.pieces) > 1
    before = _random_state(model.device) if cached else None
    with torch.set_grad_enabled(not cached):
        pieces = [_encode(model, piece, share, no_image) for piece in share.pieces]
    rows, flags = _gathered(torch.cat([_flat(pair) for pair in pieces]).detach(), share, flag)
    images, captions = (half.requires_grad_() for half in _pair(rows[share.order], pieces[0]))
    if isinstance(model, SCAN):
        scores, similarities, mine = _shared_scores(similarity, images, captions, share.lengths)
    else:
        scores, mine = similarity(images, captions), slice(None)
        similarities = scores.detach()
    similarities.requires_grad_()
    loss = criterion.of_similarities(similarities, images, captions, *(bank or (None,) * 3), share.indices)
    slope, = torch.autograd.grad(loss * scale, similarities)
    slopes = torch.autograd.grad(scores, (images, captions), slope[mine])
    if isinstance(model, SCAN):
        distributed.add_up(slopes)
    slopes = torch.empty_like(rows).index_copy_(0, share.order, _flat(slopes))
    _send_back(model, share, pieces, slopes[_own_rows(share)], before, no_image)
    _add_up(model, parameters, scale)
    return loss, similarities.detach(), flags


def _shared_scores(similarity, images, captions, lengths):
    """Cross attention of this process's images with all captions, in their graph; of all images, without; which
    images are this process's."""
    edges = [len(images) * number // distributed.size() for number in range(distributed.size() + 1)]
    mine = slice(*edges[distributed.rank():][:2])
    scores = similarity(images[mine], captions, lengths)
    return scores, distributed.gather(scores, [b - a for a, b in zip(edges, edges[1:])]).detach(), mine


def _send_back(model, share, pieces, slopes, before, no_image):
    """Each piece's rows of slopes go through its graph, for which it is encoded again where it has none.

    before: the random state before the pieces were encoded without a graph, or None where they have one.
    """
    if before:
        _set_random_state(before, model.device)
        moved = [buffer.clone() for buffer in model.buffers()]
    sizes = [len(pair[1]) for pair in pieces]  # fewer than all where a piece could not be loaded
    for piece, pair, own in zip(share.pieces, pieces, slopes[:sum(sizes)].split(sizes)):
        own = _pair(own, pair)
        pair = _encode(model, piece, share, no_image) if before else pair
        with_graph = [both for both in zip(pair, own) if both[0].requires_grad]
        if with_graph:
            torch.autograd.backward(*zip(*with_graph))
    if before:  # the second pass has moved them once more
        for buffer, value in zip(model.buffers(), moved):
            buffer.copy_(value)


def _own_rows(share):
    """Which of the gathered rows are this process's."""
    start = sum(len(places) for places in share.places[:distributed.rank()])
    return slice(start, start + len(share.places[distributed.rank()]))


def _flat(pair):
    """Embeddings of n images and n captions -> (n, numbers of both)."""
    return torch.cat([part.flatten(1) for part in pair], 1)


def _pair(rows, like):
    """`_flat`'s rows as the embeddings that they were made of; like: any such embeddings."""
    shapes = [part.shape[1:] for part in like]
    halves = rows.split([shape.numel() for shape in shapes], 1)
    return [half.contiguous().view(len(half), *shape) for half, shape in zip(halves, shapes)]


def _add_up(model, parameters, scale):
    """Each parameter's gradient, divided by `scale`, summed over the processes."""
    if distributed.launched():  # where another process may have what this one lacks
        mlp = getattr(model.img_enc, "mlp", None)
        unused = set(mlp.bns[1].parameters()) if mlp else ()  # of any process: weight decay passes them over
        for parameter in (one for one in parameters if one.grad is None and one not in unused):
            parameter.grad = torch.zeros_like(parameter)
    own = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1:
        for gradient in own:
            gradient /= scale
    distributed.add_up(own)


def _encode(model, piece, share, no_image):
    """A piece's image and caption embeddings, of SCAN all as long as the batch's longest; without a pair, (0, ...)
    each, but batch norm is gone through."""
    longest, attends = int(share.lengths[0]), isinstance(model, SCAN)
    if piece is not None:
        images, captions, lengths = piece[:3]
        if share.regions:
            images = pad(images, (0, 0, 0, share.regions - images.shape[1]))
        images, captions = model.forward_emb(images, captions, lengths)[:2]
        return images, pad(captions, (0, 0, 0, longest - captions.shape[1])) if attends else captions
    width = model.txt_enc.rnn.hidden_size
    if attends:
        return [no_image.new_empty(0, n, width) for n in (share.regions or no_image.shape[1], longest)]
    none = no_image.new_empty(0, width)
    if not any(isinstance(module, _SharedBatchNorm) for module in model.modules()):
        return none, none
    with model._autocast():
        return model.img_enc(no_image), none


def _gathered(rows, share, flag):
    """Every process's rows, and flags which travel with them in a row of their own."""
    sizes = [len(places) for places in share.places]
    if not distributed.launched():
        return rows, None
    own = sizes[distributed.rank()]
    first = rows.new_zeros(1, rows.shape[1])
    first[0, 0], first[0, 1] = float(share.error is not None), float(flag)
    rows = rows if len(rows) == own else rows.new_zeros(own, rows.shape[1])  # what could not be loaded
    rows = distributed.gather(torch.cat([first, rows]), [n + 1 for n in sizes]).split([n + 1 for n in sizes])
    return torch.cat([part[1:] for part in rows]), torch.stack([part[0, :2] for part in rows])


def own_draws(seed, step):
    """Where there are several processes, let dropout's draws follow from the seed, the step and the process."""
    if distributed.size() > 1:
        torch.manual_seed(seed_for(seed, step, distributed.rank()))


def _random_state(device):
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return torch.get_rng_state(), own.get(device.type, lambda: None)()


def _set_random_state(state, device):
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state[1])


# Batch norm -------------------------------------------------------------------------------------

class _Sum(torch.autograd.Function):
    """The sum over all processes, which is in the graph of each of them."""

    @staticmethod
    def forward(ctx, tensor):
        """The total, on every process."""
        total = tensor.clone()
        distributed.add_up([total])
        return total

    @staticmethod
    def backward(ctx, gradient):
        """The gradient of all processes' losses, each of which has seen the total."""
        return _Sum.forward(ctx, gradient)


class _SharedBatchNorm:
    """Batch norm whose statistics in training are those of all processes' rows (SyncBatchNorm takes no CPU tensors)."""

    def forward(self, rows):
        """(B, C) or (B, C, ...) -> the same, of which B may be 0."""
        if not self.training:
            return super().forward(rows)
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        axes, shape = [axis for axis in range(rows.dim()) if axis != 1], [1, -1] + [1] * (rows.dim() - 2)
        totals = _Sum.apply(torch.cat([exact.sum(axes), exact.new_full((1,), rows.numel() // rows.shape[1])]))
        count, mean = totals[-1], totals[:-1] / totals[-1]
        centred = exact - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), self.momentum)
        slope = (variance + self.eps).rsqrt() * self.weight
        return (centred * slope.view(shape) + self.bias.view(shape)).to(rows.dtype)


def share_batch_norm(model):
    """Make batch norm's statistics in training those of all processes' rows, where there are several."""
    for module in model.modules() if distributed.size() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = type(f"Shared{type(module).__name__}", (_SharedBatchNorm, type(module)), {})
