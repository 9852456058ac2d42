"""SCAN: an image encoder that keeps every region, and a text encoder that keeps every word.

Stacked Cross Attention (Lee et al., ECCV 2018). Similarities are those of `cross_attention.py`, losses those of
`loss.py`. State names, the order of random draws and the calls are the released code's, so that its checkpoints
load here, ours load there, and one seed gives the same initial weights.
"""

from argparse import Namespace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from cross_attention import (  # noqa: F401 (handed on: the family imports them from here)
    EPS,
    choice,
    cross_attention_similarities,
    flat_similarities,
    func_attention,
    pair_similarities,
    shard_xattn_i2t,
    shard_xattn_t2i,
    xattn_score_i2t,
    xattn_score_t2i,
)
from model import VSE, EncoderImagePrecomp, EncoderText, _init_fc


def l2norm(X):
    """Vectors (..., D) scaled to length 1 as released, X / (|X| + eps); zero stays zero, its gradient finite."""
    lengths = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return X / (lengths.masked_fill(lengths == 0, 1) + EPS)


class _WeightNormLinear(nn.Module):
    """A linear layer of weight g V / |V|, |V| over the whole matrix, with the released code's state names."""

    def __init__(self, in_features, out_features):
        super().__init__()
        drawn = nn.Linear(in_features, out_features)
        self.bias, self.weight_g = drawn.bias, nn.Parameter(drawn.weight.detach().norm())
        self.weight_v = drawn.weight

    def forward(self, X):
        return linear(X, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class RegionEncoder(EncoderImagePrecomp):
    """Region features (B, R, img_dim) -> regions (B, R, embed_size); precomp_enc_type: basic or weight_norm."""

    def __init__(self, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False):
        nn.Module.__init__(self)
        self.no_imgnorm = no_imgnorm
        self.fc = {"basic": nn.Linear, "weight_norm": _WeightNormLinear}[precomp_enc_type](img_dim, embed_size)
        if precomp_enc_type == "basic":
            _init_fc(self.fc)

    def load_state_dict(self, state_dict, strict=True):
        """Load the state; PyTorch 0.3's files have the one scalar of weight_norm as (1,)."""
        scalar = {name: value.reshape(()) for name, value in state_dict.items() if name == "fc.weight_g"}
        return super().load_state_dict({**state_dict, **scalar}, strict)

    def forward(self, images):
        """images: (B, R, img_dim); a region of zeros is mapped like every other."""
        regions = self.fc(images)
        regions = regions.to(self.fc.bias.dtype)  # autocast's products may be in bf16
        return regions if self.no_imgnorm else l2norm(regions)


class WordEncoder(EncoderText):
    """Word ids -> every word's state of the GRU's top layer, with bi_gru the mean of both directions'."""

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, bi_gru=False, no_txtnorm=False):
        super().__init__(vocab_size, word_dim, embed_size, num_layers, bi_gru=bi_gru, no_txtnorm=no_txtnorm)

    def forward(self, captions, lengths):
        """captions: (B, T) word ids, longest caption first; lengths: (B,) -> (B, T, embed_size), 0 past a length."""
        states = self._by(self._states, captions, lengths)
        return states if self.no_txtnorm else l2norm(states)


class SCAN(VSE):
    """Both encoders, as `VSE` has them, of which `img_enc` gives every region and `txt_enc` every word.

    opt needs what builds them: img_dim, embed_size, precomp_enc_type, no_imgnorm, vocab_size, word_dim, num_layers,
    bi_gru, no_txtnorm; and amp, as in `VSE`. Raises InputError for an unknown precomp_enc_type.
    """

    def __init__(self, opt):
        nn.Module.__init__(self)
        self.amp = getattr(opt, "amp", "off") == "bf16"
        self.img_enc = RegionEncoder(opt.img_dim, opt.embed_size,
                                     choice(opt, "precomp_enc_type", ("basic", "weight_norm")), opt.no_imgnorm)
        self.txt_enc = WordEncoder(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru,
                                   opt.no_txtnorm)

    def forward_emb(self, images, captions, lengths, *rest, volatile=False):
        """A batch, longest caption first -> regions (B, R, D), words (B, T, D), and the lengths as they came."""
        return *super().forward_emb(images, captions, lengths, *rest, volatile=volatile), lengths

    forward = forward_emb


def build(opt):
    """The model that options describe, SCAN with cross_attn, else VSE."""
    return (SCAN if getattr(opt, "cross_attn", None) else VSE)(opt)


def packed(words, lengths):
    """(B, T, D) of captions of these lengths (B,), on the CPU -> (all words, D)."""
    return torch.cat([caption[:length] for caption, length in zip(words, lengths.tolist())])


class Words(NamedTuple):
    """n captions by their words' embeddings, in one flat array: vectors[starts[c]:starts[c] + lengths[c]]."""

    vectors: torch.Tensor  # (words of distinct captions, D)
    starts: torch.Tensor  # (n,) on the CPU
    lengths: torch.Tensor  # (n,) on the CPU

    @classmethod
    def of(cls, vectors, lengths):
        """Of captions of these lengths, one after the other."""
        return cls(vectors, lengths.cumsum(0) - lengths, lengths)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, chosen):
        """Some of the captions."""
        return Words(self.vectors, self.starts[chosen], self.lengths[chosen])

    @property
    def device(self):
        """Where the vectors are."""
        return self.vectors.device

    def chunk(self, n):
        """In n parts."""
        return [Words(self.vectors, *part) for part in zip(self.starts.chunk(n), self.lengths.chunk(n))]

    def flat(self):
        """The vectors, and as arrays where each caption starts and its length."""
        return self.vectors, self.starts.numpy(), self.lengths.numpy()

    def padded(self):
        """(n, longest, D): what stands past a caption's end is not its own."""
        places = self.starts.unsqueeze(1) + torch.arange(int(self.lengths.max()))
        return self.vectors[places.clamp_(max=len(self.vectors) - 1).to(self.device)]


class CrossAttention:
    """Cross-attention scores of (N, R, D) images and Words, as a source of similarities (see `ranking`).

    opt: as for `cross_attention_similarities`; products are in the embeddings' own precision, whatever amp says. Equal
    captions in different tiles may score apart in the last bits, where words ask.
    """

    tile_images, width = 64, 64

    def __init__(self, images, captions, opt):
        self.images, self.captions, self.opt = images, captions, Namespace(**{**vars(opt), "amp": "off"})
        self.n_images, self.n_captions = len(images), len(captions)

    def of(self, images, captions):
        """(n, m) scores of some regions (n, R, D) with some Words."""
        with torch.no_grad():
            return flat_similarities(images, *captions.flat(), self.opt)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices."""
        return self.of(self.images[images], self.captions[captions])

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        if side == "i2t":
            return self.of(self.images, self.captions[targets]).t().contiguous()
        return self.of(self.images[targets], self.captions)

    def pairs(self, images, captions):
        """(n,) scores of pairs, given by the numbers of their images and captions; equal captions score alike."""
        images, captions = images.cpu(), captions.cpu()
        starts, which = self.captions.starts.unique(return_inverse=True)
        distinct, place = (images * len(starts) + which[captions]).unique(return_inverse=True)
        pairs = torch.stack((distinct // len(starts), distinct % len(starts)))
        lengths = self.captions.lengths.new_empty(len(starts)).scatter_(0, which, self.captions.lengths)
        with torch.no_grad():
            scores = pair_similarities(self.images, self.captions.vectors, starts, lengths, pairs, self.opt)
        return scores[place.to(scores.device)]
