"""The memory bank: embeddings of a sample of training pairs, and HAL's global weights from them.

Liu et al., AAAI 2020, section 3.3. The bank is drawn afresh for each epoch but the first; its
nearest neighbours tell how much of a hub each item of a batch is.
"""

from typing import NamedTuple

import torch


class MemoryBank(NamedTuple):
    """n training pairs: image and caption embeddings (n, D), and the captions' indices (n,)."""

    image_embeddings: torch.Tensor
    caption_embeddings: torch.Tensor
    indices: torch.Tensor


def draw_batches(batches, rate, generator):
    """Keep each batch with probability `rate`, and always at least one: their list, in order."""
    kept = torch.rand(len(batches), generator=generator) < rate
    if not kept.any():
        kept[torch.randint(len(batches), (), generator=generator)] = True
    return [batch for batch, keep in zip(batches, kept.tolist()) if keep]


@torch.no_grad()
def build_bank(model, batches):
    """Embed batches `(images, captions, lengths, ids, indices)` in eval mode into a MemoryBank, in batch order."""
    model.val_start()
    embedded = [(*model.forward_emb(images, captions, lengths), torch.as_tensor(indices))
                for images, captions, lengths, _, indices in batches]
    images, captions, indices = map(torch.cat, zip(*embedded))
    return MemoryBank(images, captions, indices.to(images.device))


def in_batch(entries, indices):
    """Which entries (n,) are among a batch's indices (B,): (n,) bool, without a wait for a GPU."""
    if entries.device.type == "cpu":
        member = torch.zeros(int(torch.maximum(entries.max(), indices.max())) + 1, dtype=torch.bool)
        member[indices] = True
        return member[entries]
    ordered = indices.sort().values
    places = torch.searchsorted(ordered, entries, out_int32=True).clamp_(max=len(ordered) - 1)
    return ordered.index_select(0, places) == entries


@torch.no_grad()
def global_weights(im, s, similarities, bank, indices, similarity, k, alpha, beta, epsilon):
    """HAL's weights of a batch's pairs: (W (B, B), w (B,)), detached.

    With P_i the k largest similarities of image i to the bank's captions, Q_j those of caption j to
    the bank's images, n_i = sum_k exp(beta P_ik - epsilon) and m_j likewise of Q:
    W_ij = (n_i + m_j) / (n_i + m_j + exp(beta S_ii) + exp(beta S_jj)), W_ii = 0, and
    w_i = 1 - exp(alpha S_ii) / (exp(alpha S_ii) + sum_k exp(alpha P_ik) + sum_k exp(alpha Q_ik)).
    epsilon is not multiplied by beta, as in the released code. All in log space, where no scale overflows.

    Entries whose index is in `indices` are left out. k is the batch size B where B < k, and the entries
    there are where those are fewer; with none left, the weights are those of the local loss, 1.
    """
    batch = len(similarities)
    k = min(k, batch, len(bank.indices))
    excluded = in_batch(bank.indices, indices)
    # P and Q; the released code calls the order similarity with the caption in the first place here.
    nearest_captions, nearest_images = (
        similarity(queries, entries).masked_fill_(excluded, -torch.inf).topk(k, dim=1).values
        for queries, entries in ((im, bank.caption_embeddings), (s, bank.image_embeddings)))
    pairs = similarities.diagonal()

    image_hubness = (beta * nearest_captions).logsumexp(1) - epsilon  # log n
    caption_hubness = (beta * nearest_images).logsumexp(1) - epsilon  # log m
    own = torch.logaddexp(beta * pairs.unsqueeze(1), beta * pairs.unsqueeze(0))
    pair_weights = (torch.logaddexp(image_hubness.unsqueeze(1), caption_hubness.unsqueeze(0)) - own).sigmoid()
    pair_weights.fill_diagonal_(0)

    neighbours = torch.logaddexp((alpha * nearest_captions).logsumexp(1), (alpha * nearest_images).logsumexp(1))
    positive_weights = (neighbours - alpha * pairs).sigmoid()

    empty = excluded.all()  # stays on the device: looking at it here would wait for the GPU
    return (torch.where(empty, 1.0, pair_weights), torch.where(empty, 1.0, positive_weights))
