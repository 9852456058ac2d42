"""The memory bank: embeddings of a sample of training pairs, and HAL's global weights from them.

Liu et al., AAAI 2020, section 3.3. The bank is drawn anew for each epoch but the first. How near
its nearest entries are to an item of a batch shows how much of a hub that item is. P_i are the k
largest similarities of image i to the bank's captions, Q_j those of caption j to the bank's images.
With n_i = sum_k exp(beta P_ik - epsilon), and m_j likewise from Q, the weights of a batch are

    W_ij = (n_i + m_j) / (n_i + m_j + exp(beta S_ii) + exp(beta S_jj)), W_ii = 0
    w_i = 1 - exp(alpha S_ii) / (exp(alpha S_ii) + sum_k exp(alpha P_ik) + sum_k exp(alpha Q_ik))
"""

from typing import NamedTuple

import torch

LARGEST_TABLE = 2**24  # entries of the look-up table in `in_batch`: 16 MB


class MemoryBank(NamedTuple):
    """n training pairs: image and caption embeddings (n, D), and the captions' indices (n,)."""

    image_embeddings: torch.Tensor
    caption_embeddings: torch.Tensor
    indices: torch.Tensor


def draw_batches(batches, rate, generator):
    """Keep each batch with probability `rate`, at least one; returns those kept, in order."""
    kept = torch.rand(len(batches), generator=generator) < rate
    if not kept.any():
        kept[torch.randint(len(batches), (), generator=generator)] = True
    return [batch for batch, keep in zip(batches, kept.tolist()) if keep]


@torch.no_grad()
def build_bank(model, batches):
    """Embed batches in eval mode into a MemoryBank, in their order.

    batches: of (images, captions, lengths, ids, indices), as `model.forward_emb` takes the first
    three.
    """
    model.val_start()
    embedded = [
        (*model.forward_emb(images, captions, lengths), torch.as_tensor(indices))
        for images, captions, lengths, _, indices in batches
    ]
    images, captions, indices = map(torch.cat, zip(*embedded))
    return MemoryBank(images, captions, indices.to(images.device))


def numbers_on(device, numbers):
    """Whole numbers, a tensor, list or tuple, as an int64 tensor on a device, without waiting."""
    return torch.as_tensor(numbers).to(device, torch.int64, non_blocking=True)


def in_batch(entries, indices):
    """(n,) bool: which entries (n,) are among a batch's indices (B,); never waits for a GPU."""
    if entries.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = (int(x) for x in torch.cat([entries, indices]).aminmax())
        if 0 <= smallest and largest < LARGEST_TABLE:  # a look-up is faster than a search
            member = torch.zeros(largest + 1, dtype=torch.bool)
            member[indices] = True
            return member[entries]
    # On a GPU, the table's size would have to be waited for; a search needs none.
    ordered = indices.sort().values
    places = torch.searchsorted(ordered, entries, out_int32=True).clamp_(max=len(ordered) - 1)
    return ordered.index_select(0, places) == entries


def _exact(part):
    """Half precision as float32; detached, since no_grad lets forward-mode derivatives through."""
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


@torch.no_grad()
def global_weights(
    im, s, similarities, bank, indices, similarity=None, k=250, alpha=40.0, beta=40.0, epsilon=0.1
):
    """HAL's weights of a batch's pairs: (W (B, B), w (B,)), detached, for `loss.hal_loss`.

    im, s, similarities: (B, D) embeddings and their (B, B) similarities.
    bank, indices: a MemoryBank, and (B,) the batch's caption indices, which are left out of it;
        both indices may be any whole numbers, also as lists or tuples.
    similarity: of embeddings (n, D) and (m, D); None is the cosine of L2-normalised ones.
    k: neighbours that count, at most the batch size (as released) and the bank's entries. If none
        is left, all weights are 1, those of the local loss.
    """
    if indices is None or bank.indices is None:
        raise ValueError(
            "global_weights needs the captions' indices, the bank's and the batch's, so that no "
            "pair is compared with itself: give any numbers that name the captions"
        )
    similarity = similarity or (lambda queries, entries: queries @ entries.t())
    im, s, similarities, images, captions = map(
        _exact, (im, s, similarities, bank.image_embeddings, bank.caption_embeddings)
    )
    k = min(k, len(similarities), len(bank.indices))
    excluded = in_batch(*(numbers_on(im.device, part) for part in (bank.indices, indices)))
    # P and Q. Order similarity is not symmetric: as released, captions are its first argument in Q.
    with torch.autocast(im.device.type, enabled=False):
        nearest_captions, nearest_images = (
            similarity(queries, entries).masked_fill_(excluded, -torch.inf).topk(k, dim=1).values
            for queries, entries in ((im, captions), (s, images))
        )
    pairs = similarities.diagonal()

    # Logarithms of sums, since exp(beta S) overflows for a large beta. W is then a sigmoid of their
    # difference. epsilon is not multiplied by beta, as in the released code.
    image_hubness = (beta * nearest_captions).logsumexp(1) - epsilon  # log n
    caption_hubness = (beta * nearest_images).logsumexp(1) - epsilon  # log m
    hubness = torch.logaddexp(image_hubness.unsqueeze(1), caption_hubness.unsqueeze(0))
    own = torch.logaddexp(beta * pairs.unsqueeze(1), beta * pairs.unsqueeze(0))
    pair_weights = (hubness - own).sigmoid().fill_diagonal_(0)

    neighbours = torch.logaddexp(
        (alpha * nearest_captions).logsumexp(1), (alpha * nearest_images).logsumexp(1)
    )
    positive_weights = (neighbours - alpha * pairs).sigmoid()
    empty = excluded.all()  # stays on the device: looking at it here would wait for the GPU
    return torch.where(empty, 1.0, pair_weights), torch.where(empty, 1.0, positive_weights)
