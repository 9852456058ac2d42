"""Pool regions or words into one vector: mean, max, k-max, or VSE-infinity's learned pooling.

Chen et al., "Learning the Best Pooling Strategy for Visual Semantic Embedding", CVPR 2021,
section 3.

Everywhere here features are (B, K, D) and lengths (B,): item b has the first lengths[b] rows, and
the rows behind them never influence the result. lengths are integers from 1 to K, on the CPU or
on the features' device. On a GPU they are neither checked nor used to cut the features to the
longest item, because reading them would make the CPU wait for the GPU.
"""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from runtime.device import to_device

K_LARGEST = 5  # k-max pooling averages this many values of each feature
TEMPERATURE = 0.1  # of GPO's softmax


def region_lengths(images):
    """Count each image's regions: (B, K, D) -> (B,) on the same device.

    Zero rows at the end are padding. An image of zeros only counts as one region.
    """
    places = torch.arange(1, images.shape[1] + 1, device=images.device)
    return (images.any(2) * places).amax(1).clamp(min=1)


def mean_pool(features, lengths):
    """The mean over each item's rows: (B, K, D), (B,) -> (B, D)."""
    return _rows(features, lengths, 0).sum(1) / to_device(lengths.unsqueeze(1), features.device)


def max_pool(features, lengths):
    """The largest value of each feature: (B, K, D), (B,) -> (B, D). Ties share the gradient."""
    return _rows(features, lengths, -math.inf).amax(1)


def kmax_pool(features, lengths, k=K_LARGEST):
    """The mean of the k largest values of each feature: (B, K, D), (B,) -> (B, D).

    Items with fewer than k rows: the mean of all of them.
    """
    rows = _rows(features, lengths, -math.inf)
    return mean_pool(rows.topk(min(k, rows.shape[1]), dim=1).values, lengths.clamp(max=k))


POOLINGS = {"mean": mean_pool, "max": max_pool, "kmax": kmax_pool}


def _rows(features, lengths, filler):
    """Overwrite the rows behind each item's own with `filler`; on the CPU also cut to the longest.

    Raises ValueError for lengths below 1 or above K.
    """
    if lengths.device.type == "cpu":
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 1 <= shortest <= longest <= features.shape[1]:
            raise ValueError(
                f"lengths go from {shortest} to {longest}: each item must have from 1 to "
                f"{features.shape[1]} rows"
            )
        features = features[:, :longest]
        if shortest == longest:
            return features
    padding = torch.arange(features.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
    return features.masked_fill(to_device(padding.unsqueeze(2), features.device), filler)


def positional_encoding(n, width):
    """Sines and cosines of the positions, (n, width) float32.

    Row p has sin(p w_i) in column 2i and cos(p w_i) in column 2i + 1; w_i = 10000 ** (-2i / width).
    """
    frequencies = torch.exp(torch.arange(0, width, 2).float() * -(math.log(10000) / width))
    angles = torch.arange(n).float().unsqueeze(1) * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class GPO(nn.Module):
    """Generalized pooling: learned weights for each feature's largest value, second largest, ...

    pooled_d = sum_p theta_p * (p-th largest value of feature d) with theta = softmax(v . u / 0.1),
    where u is the mean of both directions of a GRU over the encoded positions. So theta depends
    only on the number of rows. State names and initial draws match the released code.
    """

    def __init__(self, d_pe, d_hidden):
        """d_pe: width of the positional encoding, even; d_hidden: of the GRU in each direction."""
        super().__init__()
        if d_pe % 2:
            raise ValueError(f"d_pe is {d_pe}: the encoding's sines and cosines need an even width")
        self.gru = nn.GRU(d_pe, d_hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(d_hidden, 1, bias=False)

    def forward(self, features, lengths):
        """Return the pooled vectors (B, D) and theta (B, longest, 1), 0 past each length."""
        lengths = torch.as_tensor(lengths).long()  # VSE++ code passes floats
        rows = _rows(features, lengths, -math.inf)
        weights = self.pool_weights(lengths, rows.shape[1])
        ranked = rows.transpose(1, 2).contiguous().sort(dim=2, descending=True).values
        # The -inf that sorted padding to the end becomes 0: times a weight of 0 it would give NaN.
        ranked = _rows(ranked.transpose(1, 2), lengths, 0)
        return (ranked.transpose(1, 2) @ weights.to(ranked.dtype)).squeeze(2), weights

    def pool_weights(self, lengths, longest):
        """theta (B, longest, 1) for lengths (B,); the GRU runs once per distinct length."""
        if lengths.device.type == "cpu":
            distinct, row_of = torch.unique(lengths, return_inverse=True)
        else:
            distinct, row_of = torch.arange(1, longest + 1), lengths - 1
        device, dtype = self.linear.weight.device, self.linear.weight.dtype
        table = to_device(positional_encoding(longest, self.gru.input_size).to(dtype), device)
        distinct = distinct.flip(0)  # packed longest first
        packed = pack_padded_sequence(
            table.expand(len(distinct), -1, -1), distinct, batch_first=True
        )
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        ahead, back = states.chunk(2, dim=2)
        scores = self.linear((ahead + back) / 2) / TEMPERATURE
        theta = _rows(scores, distinct, -math.inf).softmax(1)
        return theta.index_select(0, to_device(len(distinct) - 1 - row_of, device))
