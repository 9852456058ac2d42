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


def _log_neighbours(similarities, excluded, k, scale):
    """log sum_k exp(scale * similarity) over each row's k largest bank entries that are not excluded: (B,)."""
    nearest = similarities.masked_fill(excluded, -torch.inf).topk(k, dim=1).values
    return (scale * nearest).logsumexp(1)


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
    k = min(k if batch >= k else batch, len(bank.indices))
    excluded = torch.isin(bank.indices, indices)
    # The released code calls the order similarity with the caption in the first place here.
    to_captions, to_images = similarity(im, bank.caption_embeddings), similarity(s, bank.image_embeddings)
    pairs = similarities.diagonal()

    image_hubness = _log_neighbours(to_captions, excluded, k, beta) - epsilon  # log n
    caption_hubness = _log_neighbours(to_images, excluded, k, beta) - epsilon  # log m
    own = torch.logaddexp(beta * pairs.unsqueeze(1), beta * pairs.unsqueeze(0))
    pair_weights = (torch.logaddexp(image_hubness.unsqueeze(1), caption_hubness.unsqueeze(0)) - own).sigmoid()
    pair_weights.fill_diagonal_(0)

    neighbours = torch.logaddexp(_log_neighbours(to_captions, excluded, k, alpha),
                                 _log_neighbours(to_images, excluded, k, alpha))
    positive_weights = (neighbours - alpha * pairs).sigmoid()

    empty = excluded.all()  # stays on the device: looking at it here would wait for the GPU
    return (torch.where(empty, 1.0, pair_weights), torch.where(empty, 1.0, positive_weights))
