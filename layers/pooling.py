"""Regions or words -> one vector: mean, max, k-max, and the generalized pooling of VSE-infinity.

Chen et al., "Learning the Best Pooling Strategy for Visual Semantic Embedding", CVPR 2021, section 3. Features
are (B, K, D), of which item b has the first lengths[b] rows; what stands behind them never matters. lengths (B,)
are whole numbers from 1 to K, on the CPU, or where the features are: on a GPU nothing waits to look at them,
so that they are not checked there, and nothing is cut to the longest.
"""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from device import to_device

K_LARGEST = 5  # values of each feature that k-max pooling takes the mean of
TEMPERATURE = 0.1  # of GPO's softmax


def region_lengths(images):
    """(B, K, D) regions -> (B,) their number, on the images' device: zero rows at the end are padding.

    An image of nothing but zeros counts as one region, of zeros.
    """
    places = torch.arange(1, images.shape[1] + 1, device=images.device)
    return (images.any(2) * places).amax(1).clamp(min=1)


def kept_regions(lengths, rate, draws):
    """Which regions `drop_regions` keeps: (B, K) bool."""
    draws = draws.masked_fill(torch.arange(draws.shape[1]) >= lengths.unsqueeze(1), -1)
    return (draws >= rate) | (draws == draws.amax(1, keepdim=True))


def drop_regions(images, lengths, rate, draws):
    """Size augmentation: (B, K, D) regions -> (B, K', D), each region left out with probability `rate`.

    The order is kept, and at least one region of each image; images are padded with zero rows to the longest.
    lengths: (B,) regions of each image; draws: (B, K) uniform in [0, 1); both on the CPU, so that no GPU is waited for.
    (VSE-infinity's; its own draws are NumPy's, so that any others agree with it in distribution only.)
    """
    kept, places = kept_regions(lengths, rate, draws), torch.arange(images.shape[1])
    left = kept.sum(1, keepdim=True)
    order = kept.byte().sort(dim=1, descending=True, stable=True).indices[:, :int(left.max())]
    item, order, gone = (to_device(x, images.device) for x in (
        torch.arange(len(images)).unsqueeze(1), order, (places[:order.shape[1]] >= left).unsqueeze(2)))
    return images[item, order].masked_fill_(gone, 0)


def mean_pool(features, lengths):
    """(B, K, D), (B,) -> (B, D), the mean over each item's rows."""
    return _rows(features, lengths, 0).sum(1) / to_device(lengths.unsqueeze(1), features.device)


def max_pool(features, lengths):
    """(B, K, D), (B,) -> (B, D), the largest value of each feature; ties share its gradient."""
    return _rows(features, lengths, -math.inf).amax(1)


def kmax_pool(features, lengths, k=K_LARGEST):
    """(B, K, D), (B,) -> (B, D), the mean of the k largest values of each feature (of all, where there are fewer)."""
    rows = _rows(features, lengths, -math.inf)
    return mean_pool(rows.topk(min(k, rows.shape[1]), dim=1).values, lengths.clamp(max=k))


POOLINGS = {"mean": mean_pool, "max": max_pool, "kmax": kmax_pool}


def _rows(features, lengths, filler):
    """The features up to the longest item's last row, with `filler` behind each item's own. Raises ValueError."""
    if lengths.device.type == "cpu":
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 1 <= shortest <= longest <= features.shape[1]:
            raise ValueError(f"lengths go from {shortest} to {longest}: each item must have from 1 to "
                             f"{features.shape[1]} rows")
        features = features[:, :longest]
        if shortest == longest:
            return features
    padding = torch.arange(features.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
    return features.masked_fill(to_device(padding.unsqueeze(2), features.device), filler)


def positional_encoding(n, width):
    """(n, width) float32: sin(p w_i) at 2i and cos(p w_i) at 2i + 1 of row p, with w_i = exp(-2i ln(10000) / width)."""
    frequencies = torch.exp(torch.arange(0, width, 2).float() * -(math.log(10000) / width))
    angles = torch.arange(n).float().unsqueeze(1) * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class GPO(nn.Module):
    """Generalized pooling: a learned weight for the largest value of each feature, for the second largest, ...

    pooled_d = sum_p theta_p * (p-th largest of feature d), theta = softmax(v . u / 0.1), u = mean of both directions of
    a GRU over the positions' encoding: theta depends on the number of rows alone. State names and draws are those of
    the released code.
    """

    def __init__(self, d_pe, d_hidden):
        """d_pe: width of the positional encoding, even; d_hidden: of the GRU, each way."""
        super().__init__()
        if d_pe % 2:
            raise ValueError(f"d_pe is {d_pe}: the encoding's sines and cosines need an even width")
        self.gru = nn.GRU(d_pe, d_hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(d_hidden, 1, bias=False)

    def forward(self, features, lengths):
        """(B, K, D), (B,) -> pooled (B, D), and the pool weights theta (B, longest, 1), 0 past each length."""
        lengths = torch.as_tensor(lengths).long()  # the family hands floats over
        rows = _rows(features, lengths, -math.inf)
        weights = self.pool_weights(lengths, rows.shape[1])
        ranked = rows.transpose(1, 2).contiguous().sort(dim=2, descending=True).values
        ranked = _rows(ranked.transpose(1, 2), lengths, 0)  # -inf has done its work, and times 0 would be NaN
        return (ranked.transpose(1, 2) @ weights.to(ranked.dtype)).squeeze(2), weights

    def pool_weights(self, lengths, longest):
        """(B,) lengths -> theta (B, longest, 1): one run of the GRU for each distinct length."""
        if lengths.device.type == "cpu":
            distinct, row_of = torch.unique(lengths, return_inverse=True)
        else:
            distinct, row_of = torch.arange(1, longest + 1), lengths - 1
        device, dtype = self.linear.weight.device, self.linear.weight.dtype
        table = to_device(positional_encoding(longest, self.gru.input_size).to(dtype), device)
        distinct = distinct.flip(0)  # packed longest first
        packed = pack_padded_sequence(table.expand(len(distinct), -1, -1), distinct, batch_first=True)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        ahead, back = states.chunk(2, dim=2)
        scores = self.linear((ahead + back) / 2) / TEMPERATURE
        theta = _rows(scores, distinct, -math.inf).softmax(1)
        return theta.index_select(0, to_device(len(distinct) - 1 - row_of, device))
