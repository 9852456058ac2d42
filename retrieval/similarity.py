"""Sources of similarities (see `retrieval.ranking`): cosine, order, cross attention, means, matrices."""

from argparse import Namespace
from typing import NamedTuple

import torch

from layers.cross_attention import flat_similarities, pair_similarities
from loss import cosine_sim, order_sim
from runtime.device import to_device


class Mean:
    """The mean of several sources' scores, as a source."""

    def __init__(self, sources):
        self.sources = sources
        self.n_images, self.n_captions = sources[0].n_images, sources[0].n_captions
        self.tile_images = min(source.tile_images for source in sources)
        self.width = max(source.width for source in sources)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices."""
        return self._mean(source.tile(images, captions, shape) for source in self.sources)

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        return self._mean(source.across(side, targets) for source in self.sources)

    def pairs(self, images, captions):
        """(n,) scores of pairs, given by the numbers of their images and captions."""
        return self._mean(source.pairs(images, captions) for source in self.sources)

    def _mean(self, scores):
        """The mean of scores (an iterator), in the widest of their types."""
        total = next(scores).clone()  # a source's scores are valid only until its next call
        for one in scores:
            total = total.add_(one) if one.dtype == total.dtype else total + one
        return total.div_(len(self.sources))


def similarity_source(opt, images, captions):
    """The source of similarities of embeddings as `evaluation.embed` returns them.

    opt: has `measure` ("cosine" or "order"), or SCAN's options
    """
    if getattr(opt, "cross_attn", None):
        return CrossAttention(images, captions, opt)
    return SOURCES[opt.measure](images, captions)


class Order:
    """Order similarities of (N, D) images and (C, D) captions, as a source."""

    similarity, tile_images = staticmethod(order_sim), 16

    def __init__(self, images, captions):
        self.images, self.captions = _comparable(images, captions)
        self.n_images, self.n_captions = len(self.images), len(self.captions)
        self.width = self.images.shape[1]

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices."""
        return self.similarity(self.images[images], self.captions[captions])

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        if side == "i2t":
            return self.similarity(self.images, self.captions[targets]).t()
        return self.similarity(self.images[targets], self.captions)

    def pairs(self, images, captions):
        """(n,) scores of pairs, given by the numbers of their images and captions."""
        images, captions = self.images[images], self.captions[captions]
        return torch.vmap(self.similarity)(images.unsqueeze(1), captions.unsqueeze(1)).flatten()


class Cosine(Order):
    """Products of (N, D) images and (C, D) captions, as a source: cosines, if these have length 1.

    Libraries sum small products in another order, so equal embeddings would get different scores in
    a smaller last tile. Both sides are therefore padded with zeros, and the padding is cut off.
    """

    similarity, tile_images = staticmethod(cosine_sim), 512

    def __init__(self, images, captions):
        super().__init__(images, captions)
        self.width, self.buffer = 1, self.images.new_empty(0)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices, in memory that the next call overwrites."""
        images, captions = self.images[images], self.captions[captions]
        buffer = self.buffer.resize_(shape)
        torch.mm(filled(images, shape[0]), filled(captions, shape[1]).t(), out=buffer)
        return buffer[: len(images), : len(captions)]

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        if side == "i2t":  # not a transposed view: rows of targets are contiguous in memory
            return self.similarity(self.captions[targets], self.images)
        return super().across(side, targets)


class Matrix:
    """Scores that somebody else has computed, as a source: chosen rows and columns of a matrix.

    matrix: (rows, columns) of a float type, on the CPU; it may be memory-mapped
    rows: (N,) the images' rows; columns: (C,) the captions' columns
    device: of the scores
    """

    tile_images, width = 512, 1

    def __init__(self, matrix, rows, columns, device):
        self.matrix, self.rows, self.columns, self.device = matrix, rows, columns, device
        self.n_images, self.n_captions = len(rows), len(columns)
        kind = torch.float32 if device.type == "mps" else matrix.dtype
        self.dtype = torch.promote_types(kind, torch.float32)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices."""
        return self._part(self.rows[images], self.columns[captions])

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        if side == "i2t":
            return self._part(self.rows, self.columns[targets]).t().contiguous()
        return self._part(self.rows[targets], self.columns)

    def pairs(self, images, captions):
        """(n,) scores of pairs, given by the numbers of their images and captions."""
        return self._placed(self.matrix[self.rows[images.cpu()], self.columns[captions.cpu()]])

    def _part(self, rows, columns):
        """The scores of rows (n,) with columns (m,)."""
        return self._placed(_chosen(_chosen(self.matrix, rows, 0), columns, 1))

    def _placed(self, scores):
        return to_device(scores.to(self.dtype), self.device)


def _chosen(matrix, numbers, dim):
    """The rows or columns of these numbers (n,); a view if they follow one another."""
    if torch.equal(numbers, torch.arange(len(numbers)) + numbers[:1]):
        return matrix.narrow(dim, int(numbers[0]), len(numbers))
    return matrix.index_select(dim, numbers)


SOURCES = {"cosine": Cosine, "order": Order}


def _comparable(images, captions):
    """Both as tensors without gradients, of one float type: the wider one if they differ.

    Half precision becomes float32, because its products would be rounded; integers become float64,
    if the device has it.
    """
    both = [torch.as_tensor(x).detach() for x in (images, captions)]
    kind = torch.promote_types(*(x.dtype for x in both))
    if not kind.is_floating_point:
        kind = torch.float32 if both[0].device.type == "mps" else torch.float64
    return [x.to(torch.promote_types(kind, torch.float32)) for x in both]


def filled(rows, n):
    """Rows padded with zeros to n of them, so that equal rows get equal results in every batch."""
    return (
        rows
        if len(rows) == n
        else torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])
    )


def packed(words, lengths):
    """(all words, D): the words of captions one after the other, without padding.

    words: (B, T, D) padded captions; lengths: (B,) on the CPU
    """
    return torch.cat([caption[:length] for caption, length in zip(words, lengths.tolist())])


class Words(NamedTuple):
    """n captions as embeddings of their words: vectors[starts[c] : starts[c] + lengths[c]]."""

    vectors: torch.Tensor  # (words of distinct captions, D)
    starts: torch.Tensor  # (n,) on the CPU
    lengths: torch.Tensor  # (n,) on the CPU

    @classmethod
    def of(cls, vectors, lengths):
        """Captions that lie one after the other in `vectors`, with these lengths (n,)."""
        return cls(vectors, lengths.cumsum(0) - lengths, lengths)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, chosen):
        """The chosen captions: a slice, or numbers (m,)."""
        return Words(self.vectors, self.starts[chosen], self.lengths[chosen])

    @property
    def device(self):
        """The vectors' device."""
        return self.vectors.device

    def chunk(self, n):
        """In n parts."""
        return [
            Words(self.vectors, *part) for part in zip(self.starts.chunk(n), self.lengths.chunk(n))
        ]

    def flat(self):
        """(vectors, starts, lengths), the last two as arrays."""
        return self.vectors, self.starts.numpy(), self.lengths.numpy()

    def padded(self):
        """(n, longest, D); past a caption's end stand other captions' words, not zeros."""
        places = self.starts.unsqueeze(1) + torch.arange(int(self.lengths.max()))
        return self.vectors[places.clamp_(max=len(self.vectors) - 1).to(self.device)]


class CrossAttention:
    """Cross-attention scores of (N, R, D) images and Words, as a source.

    Products have the embeddings' precision, whatever `opt.amp` says. If words attend to regions,
    equal captions in different tiles may differ in the last bits.

    opt: SCAN's options, as `layers.cross_attention.flat_similarities` takes them
    """

    tile_images, width = 64, 64

    def __init__(self, images, captions, opt):
        self.images, self.captions, self.opt = (
            images,
            captions,
            Namespace(**{**vars(opt), "amp": "off"}),
        )
        self.n_images, self.n_captions = len(images), len(captions)

    def of(self, images, captions):
        """(n, m) scores of n images' regions (n, R, D) with m captions' Words."""
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
        """(n,) scores of pairs, by number; captions that share their Words score exactly alike."""
        images, captions = images.cpu(), captions.cpu()
        starts, which = self.captions.starts.unique(return_inverse=True)
        distinct, place = (images * len(starts) + which[captions]).unique(return_inverse=True)
        pairs = torch.stack((distinct // len(starts), distinct % len(starts)))
        lengths = self.captions.lengths.new_empty(len(starts)).scatter_(
            0, which, self.captions.lengths
        )
        with torch.no_grad():
            scores = pair_similarities(
                self.images, self.captions.vectors, starts, lengths, pairs, self.opt
            )
        return scores[place.to(scores.device)]
