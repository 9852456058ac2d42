"""Gradients of a whole batch that is encoded in parts: by several processes, or by --micro_batch.

The losses need the batch's whole similarity matrix. So each part is encoded by itself, all
embeddings are gathered, and every process computes the gradient of the loss with respect to all
embeddings. Each part's slice of it then goes back through that part's graph. With --micro_batch the
pieces are encoded twice, first without a graph and then with one: this is gradient caching (Gao et
al., RepL4NLP 2021).
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from features.texts import TextRows
from inputs.word_ids import by_length
from layers.batch_norm import _SharedBatchNorm
from memory_bank import MemoryBank, build_bank
from runtime import distributed
from runtime.errors import InputError
from runtime.seeds import _random_state, _set_random_state

PAIR_WORDS = 1  # time that a pair's features take on a CPU, in words of the GRU


class Share(NamedTuple):
    """One process's part of a batch; a place is a pair's position in the batch, longest first.

    pieces: batches as a data set loads them; None if only other processes have another piece.
    places: for each process, the places (n,) of its pairs.
    order: (B,) the row of each place among the gathered embeddings.
    error: the InputError that loading a piece raised, or None.
    lengths: (B,) words of the whole batch's captions, longest first.
    regions: with --drop_regions, the most regions that an image of the batch keeps; else None.
    indices: (B,) the whole batch's caption indices.
    """

    pieces: list
    places: list
    order: torch.Tensor
    error: object
    lengths: torch.Tensor
    regions: object
    indices: torch.Tensor


# Sharing out ------------------------------------------------------------------------------------


def shares(lengths, n, words=None):
    """Divide a batch among n processes, balanced by words: n ascending tensors of places.

    lengths: (B,) words of each caption, longest first.
    words: (B, T) word ids, if captions that begin alike share GRU states, as on a CPU. Such
        captions then go to one process, and shared words are counted once.
    """
    if words is None:
        # Dealt out 0, 1, 2, 2, 1, 0, 0, ...: turning round at the ends evens out the lengths.
        turn = torch.arange(len(lengths)) % (2 * n)
        owner = torch.minimum(turn, 2 * n - 1 - turn)
        return [(owner == process).nonzero().flatten() for process in range(n)]
    # Sorted by their words, captions with a common beginning are neighbours; the batch is cut into
    # n stretches of equal cost.
    alike = torch.sort(torch.unique(words, dim=0, return_inverse=True)[1], stable=True).indices
    shared = (words[alike[1:]] == words[alike[:-1]]).cumprod(1).sum(1)
    costs = lengths[alike] + PAIR_WORDS
    costs[1:] -= torch.minimum(shared, lengths[alike[1:]])
    middles = costs.cumsum(0) - costs / 2
    owner = (middles * n / costs.sum()).long().clamp(max=n - 1)
    return [alike[owner == process].sort().values for process in range(n)]


def shared_batches(loader, batches, micro_batch=None, device="cpu"):
    """Yield this process's Share of each batch, loaded, in pieces of at most `micro_batch` pairs.

    batches: (B,) tensors of caption indices.
    device: the model's, for the Share's order and indices.
    """
    dataset, rank, n = loader.dataset, distributed.rank(), distributed.size()
    plans, words, left = [], dataset.word_ids, [None] * len(batches)
    if hasattr(dataset, "augment"):
        words, _ = dataset.epoch_words(loader.epoch or 0, augmented=True)
        left = dataset.regions_left(batches, loader.epoch or 0)
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
    # All batches' indices and orders in one copy each: a copy for each step would cost a GPU time.
    everyone = torch.cat([indices for indices, *_ in plans]).to(device).split(sizes)
    orders = (
        torch.cat([torch.cat(places).argsort() for _, places, *_ in plans]).to(device).split(sizes)
    )
    own = loader.load(
        [indices[piece] for indices, _, pieces, *_ in plans for piece in pieces if len(piece)],
        augmented=True,
    )
    for (_, places, pieces, lengths, regions), indices, order in zip(plans, everyone, orders):
        loaded, error = [], None
        try:
            for piece in pieces:
                loaded.append(next(own) if len(piece) else None)
        except InputError as failure:
            # Raised here it would leave the others waiting: it reaches them with what is gathered.
            if not distributed.launched():
                raise
            loaded, error = loaded + [None] * (len(pieces) - len(loaded)), failure
        yield Share(loaded, places, order, error, lengths, regions, indices)


def _shares_states(dataset):
    """Whether captions that begin alike share GRU states: on a CPU, with precomputed features."""
    words = not isinstance(dataset.word_ids, TextRows)
    return words and getattr(dataset, "device", None) == torch.device("cpu")


def _pieces(places, rank, micro_batch):
    """This process's places in pieces, as many as the process with the most needs."""
    if not micro_batch:
        return [places[rank]]
    count = max(-(-len(one) // micro_batch) for one in places)
    # Nearly equal ones, for batch norm cannot work on a last piece of one image.
    return list(places[rank].tensor_split(count))


def shared_bank(model, loader, batches):
    """The MemoryBank of batches of caption indices, in their order; each process embeds some."""
    own = batches[distributed.rank() :: distributed.size()]
    none = model.no_embeddings()
    nothing = MemoryBank(none, none, torch.empty(0, dtype=torch.int64, device=model.device))
    bank, sizes = (
        build_bank(model, loader.load(own)) if own else nothing,
        [len(batch) for batch in batches],
    )
    if distributed.size() == 1:
        return bank
    split = [part.split(sizes[distributed.rank() :: distributed.size()]) for part in bank]
    return MemoryBank(
        *(distributed.gather_batches(part, sizes, like) for part, like in zip(split, nothing))
    )


# Gradients --------------------------------------------------------------------------------------


def gradients(model, share, criterion, similarity, bank, scale, parameters, no_image, flag=0):
    """(Loss, similarities (B, B), flags) of a whole batch; leaves its gradients in the parameters.

    similarity: a function of images, captions and, for SCAN, lengths.
    bank: a MemoryBank or None.
    scale: multiplies the loss before the backward pass and divides the gradients after it.
    no_image: an empty batch of images.
    flag: this process's signal number, or 0.
    Returned flags: (processes, 2), each one's error and signal, as `distributed.agree` takes them.
    """
    cached = len(share.pieces) > 1
    before = _random_state(model.device) if cached else None
    with torch.set_grad_enabled(not cached):
        pieces = [_encode(model, piece, share, no_image) for piece in share.pieces]
    # The gathered embeddings are leaves: autograd stops here, and `_send_back` goes on from here.
    rows, flags = _gathered(torch.cat([_flat(pair) for pair in pieces]).detach(), share, flag)
    images, captions = (half.requires_grad_() for half in _pair(rows[share.order], pieces[0]))
    # Cross attention is most of SCAN's work, so the processes share it. VSE's one product is cheap,
    # and each process computes all of it.
    if model.attends:
        scores, similarities, mine = _shared_scores(similarity, images, captions, share.lengths)
    else:
        scores, mine = similarity(images, captions), slice(None)
        similarities = scores.detach()
    similarities.requires_grad_()
    loss = criterion.of_similarities(
        similarities, images, captions, *(bank or (None,) * 3), share.indices
    )
    own = [one for one in criterion.parameters() if one.requires_grad]
    slope, *own_slopes = torch.autograd.grad(loss * scale, (similarities, *own), allow_unused=True)
    slopes = torch.autograd.grad(scores, (images, captions), slope[mine])
    if model.attends:
        distributed.add_up(slopes)
    slopes = torch.empty_like(rows).index_copy_(0, share.order, _flat(slopes))
    _send_back(model, share, pieces, slopes[_own_rows(share)], before, no_image)
    of_model = set(model.parameters())
    _add_up(model, [one for one in parameters if one in of_model], scale)
    # The loss's weights see the whole batch on every process, so their gradients are not added up.
    for parameter, own_slope in zip(own, own_slopes):
        parameter.grad = None if own_slope is None else own_slope / scale
    return loss, similarities.detach(), flags


def _shared_scores(similarity, images, captions, lengths):
    """(This process's scores, all scores, which images are its own), by cross attention.

    The first are of its images with all captions, in their graph; the second (B, B) without one.
    """
    edges = [len(images) * number // distributed.size() for number in range(distributed.size() + 1)]
    mine = slice(*edges[distributed.rank() :][:2])
    scores = similarity(images[mine], captions, lengths)
    return (
        scores,
        distributed.gather(scores, [b - a for a, b in zip(edges, edges[1:])]).detach(),
        mine,
    )


def _send_back(model, share, pieces, slopes, before, no_image):
    """Send each piece's slopes back through its graph.

    slopes: (n, numbers) the gradients of this process's embeddings.
    before: the random state before the pieces were encoded without a graph, so that they are
        encoded again here with the same dropout; None if they have a graph.
    """
    if before:
        _set_random_state(before, model.device)
        moved = [buffer.clone() for buffer in model.buffers()]
    sizes = [len(pair[1]) for pair in pieces]  # fewer than all if a piece could not be loaded
    for piece, pair, own in zip(share.pieces, pieces, slopes[: sum(sizes)].split(sizes)):
        own = _pair(own, pair)
        pair = _encode(model, piece, share, no_image) if before else pair
        with_graph = [both for both in zip(pair, own) if both[0].requires_grad]
        if with_graph:
            torch.autograd.backward(*zip(*with_graph))
    if before:  # the second pass has updated batch norm's running statistics once more
        for buffer, value in zip(model.buffers(), moved):
            buffer.copy_(value)


def _own_rows(share):
    """Which of the gathered rows are this process's."""
    start = sum(len(places) for places in share.places[: distributed.rank()])
    return slice(start, start + len(share.places[distributed.rank()]))


def _flat(pair):
    """Embeddings of n images and n captions -> (n, numbers), each pair in a row."""
    return torch.cat([part.flatten(1) for part in pair], 1)


def _pair(rows, like):
    """The inverse of `_flat`; like: embeddings of the same shape but for n."""
    shapes = [part.shape[1:] for part in like]
    halves = rows.split([shape.numel() for shape in shapes], 1)
    return [half.contiguous().view(len(half), *shape) for half, shape in zip(halves, shapes)]


def _add_up(model, parameters, scale):
    """Divide the parameters' gradients by `scale` and add them up over the processes."""
    if distributed.launched():
        # All processes must add up the same tensors, also one that had no pair, hence no gradient.
        # Parameters that no process uses get none, so that weight decay leaves them alone.
        mlp = getattr(model.img_enc, "mlp", None)
        unused = set(mlp.bns[1].parameters()) if mlp else ()
        for parameter in (one for one in parameters if one.grad is None and one not in unused):
            parameter.grad = torch.zeros_like(parameter)
    own = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1:
        for gradient in own:
            gradient /= scale
    distributed.add_up(own)


def _encode(model, piece, share, no_image):
    """A piece's image and caption embeddings; (0, ...) each for a process that lacks this piece.

    SCAN's are padded to the batch's longest caption and most regions, so that they can be gathered.
    """
    longest, attends = int(share.lengths[0]), model.attends
    if piece is not None:
        images, captions, lengths = piece[:3]
        if share.regions:
            images = pad(images, (0, 0, 0, share.regions - images.shape[1]))
        images, captions = model.forward_emb(images, captions, lengths)[:2]
        return images, pad(
            captions, (0, 0, 0, longest - captions.shape[1])
        ) if attends else captions
    width = model.txt_enc.width
    if attends:
        return [
            no_image.new_empty(0, n, width) for n in (share.regions or no_image.shape[1], longest)
        ]
    none = no_image.new_empty(0, width)
    if not any(isinstance(module, _SharedBatchNorm) for module in model.modules()):
        return none, none
    with model._autocast():  # batch norm waits for the statistics of every process
        return model.img_enc(no_image), none


def _gathered(rows, share, flag):
    """(The rows of all processes, their flags); the flags travel in an extra row of each one's."""
    sizes = [len(places) for places in share.places]
    if not distributed.launched():
        return rows, None
    own = sizes[distributed.rank()]
    first = rows.new_zeros(1, rows.shape[1])
    first[0, 0], first[0, 1] = float(share.error is not None), float(flag)
    # If a piece could not be loaded, zeros stand in until all processes know of the error.
    rows = rows if len(rows) == own else rows.new_zeros(own, rows.shape[1])
    rows = distributed.gather(torch.cat([first, rows]), [n + 1 for n in sizes]).split(
        [n + 1 for n in sizes]
    )
    return torch.cat([part[1:] for part in rows]), torch.stack([part[0, :2] for part in rows])
