"""Ranks and nearest items from tiles of similarities: nothing of the matrix' size is kept."""

from typing import NamedTuple

import torch

from loss import SIMILARITIES
from word_ids import CAPTIONS_PER_IMAGE

TILE_IMAGES = {"cosine": 512, "order": 16}  # at most, of a tile of the similarity matrix; with five times the captions


class Ranking(NamedTuple):
    """0-based ranks of n queries (n,), and the items that came first for each, best first (n, top): int64."""

    ranks: torch.Tensor
    items: torch.Tensor

    @property
    def top1(self):
        """The item that came first for each query: (n,)."""
        return self.items[:, 0]


def _just_below(scores):
    """Two units in the last place lower: what is above this is a tie or better."""
    lowest = torch.full_like(scores, -torch.inf)
    return scores.nextafter(lowest).nextafter(lowest)


def rank_both_ways(images, captions, measure="cosine", top=1):
    """(N, D) unique images and (5N, D) captions -> (image-to-text Ranking, text-to-image Ranking).

    An item that is not the query's own and scores at least as high as its own best, less two units in the
    last place, stands before it; so does one whose comparison is NaN. The `top` first items of each query
    are kept; with 0 they are not looked for, which is a little faster.
    """
    return rank_shifted(images, captions, [None], measure, top)[0]


def rank_shifted(images, captions, shifts, measure="cosine", top=1):
    """As `rank_both_ways`, once for each of `shifts`: None, or (captions' (5N,), images' (N,)) similarities that are
    taken off those targets' before ranking.

    The similarity matrix is made in tiles that stay in cache and serve all: nothing of its size is kept.
    """
    tiles = Tiles(images, captions, measure)
    own_tiles = [tiles.scores(block, block).clone() for block in range(tiles.count)]
    own = torch.cat([_own_scores(scores) for scores in own_tiles])
    sides = [_Side(dim, own, None if shift is None else shift[1 - dim], top)
             for shift in shifts for dim in (1, 0)]  # targets along dim: captions of images, images of captions
    for i in range(tiles.count):
        for c in range(tiles.count):
            scores = own_tiles[i] if i == c else tiles.scores(i, c)
            for side in sides:
                side.see(scores, tiles.image_rows(i), tiles.caption_rows(c))
    rankings = [side.ranking() for side in sides]
    return list(zip(rankings[::2], rankings[1::2]))


class _Side:
    """One direction's ranks and first items over the tiles seen so far."""

    def __init__(self, dim, own, shift, top):
        """own: (N, 5) similarities of each image with its captions; shift: (targets,) or None."""
        self.dim, self.shift = dim, shift
        if shift is not None:
            self.shift = shift.unsqueeze(1 - dim)
            own = own - (shift.view_as(own) if dim == 1 else self.shift)
        self.bars = _just_below(own.amax(1, keepdim=True) if dim == 1 else own.reshape(1, -1))
        self.n_targets = own.numel() if dim == 1 else len(own)
        self.lower = own.new_zeros(self.bars.numel())
        self.best = Best(len(self.lower), min(top, self.n_targets), own) if top else None
        self.buffer = own.new_empty(0)

    def see(self, scores, images, captions):
        """Take in a tile (images, captions) of the similarity matrix; it is left as it is."""
        queries, targets = (images, captions) if self.dim == 1 else (captions, images)
        bars = self.bars[images] if self.dim == 1 else self.bars[:, captions]
        buffer = self.buffer.resize_(scores.shape)
        if self.shift is not None:
            shift = self.shift[:, captions] if self.dim == 1 else self.shift[images]
            scores = torch.sub(scores, shift, out=buffer)
        if self.best:
            self.best.update(queries, scores, self.dim, targets.start)
        # Comparing into floats is several times faster than into bools that are then counted.
        torch.lt(scores, bars, out=buffer)
        if images.start * CAPTIONS_PER_IMAGE == captions.start:
            _own_scores(buffer).fill_(1)  # a query's own stand before nothing
        self.lower[queries] += buffer.sum(self.dim)

    def ranking(self):
        """The Ranking, once all tiles were seen."""
        ranks = (self.n_targets - self.lower).long()
        return Ranking(ranks, self.best.items if self.best else ranks.new_empty(len(ranks), 0))


class Tiles:
    """The similarity matrix in tiles of n images and 5n captions, all products of one shape.

    Libraries compute small products in another order: with a ragged last tile, equal embeddings would
    not get equal scores. So both sides are filled up with zeros, and tiles cut to what is real.
    """

    def __init__(self, images, captions, measure):
        self.measure, self.images, self.captions = measure, images, captions
        self.count = -(-len(images) // TILE_IMAGES[measure])
        self.size = -(-len(images) // self.count)
        self.buffer = images.new_empty(self.size, self.size * CAPTIONS_PER_IMAGE)

    def image_rows(self, block):
        """The images of a block."""
        return slice(block * self.size, min((block + 1) * self.size, len(self.images)))

    def caption_rows(self, block):
        """The captions of a block: those of its images."""
        rows = self.image_rows(block)
        return slice(rows.start * CAPTIONS_PER_IMAGE, rows.stop * CAPTIONS_PER_IMAGE)

    def scores(self, image_block, caption_block):
        """A tile (images, captions); valid until the next one is asked for."""
        images, captions = self.images[self.image_rows(image_block)], self.captions[self.caption_rows(caption_block)]
        if self.measure != "cosine":
            return SIMILARITIES[self.measure](images, captions)
        torch.mm(filled(images, self.size), filled(captions, self.size * CAPTIONS_PER_IMAGE).t(), out=self.buffer)
        return self.buffer[:len(images), :len(captions)]


def filled(rows, n):
    """Zeros added up to n rows, so that all products have one shape, and equal rows equal results."""
    return rows if len(rows) == n else torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def _own_scores(scores):
    """(n, 5n) scores -> the (n, 5) view of each image with its own captions."""
    return scores.unflatten(1, (len(scores), CAPTIONS_PER_IMAGE)).diagonal().t()


class Best:
    """The k best items of each query over the blocks seen so far, best first: `.scores` and `.items`, (n, k)."""

    def __init__(self, n, k, like):
        self.scores = torch.full((n, k), -torch.inf, dtype=like.dtype, device=like.device)
        self.items = torch.zeros(n, k, dtype=torch.int64, device=like.device)

    def update(self, queries, scores, dim, first):
        """Take in the scores of the slice `queries` and the items from number `first` on, these along `dim`."""
        k = min(self.items.shape[1], scores.shape[dim])
        if k == 1:  # several times faster than topk
            scores, items = (part.flatten().unsqueeze(1) for part in scores.max(dim))
        else:
            scores, items = scores.topk(k, 1) if dim == 1 else _column_topk(scores, k)
        scores = torch.cat([self.scores[queries], scores], 1)
        items = torch.cat([self.items[queries], items + first], 1)
        self.scores[queries], places = scores.topk(self.items.shape[1], 1)
        self.items[queries] = items.gather(1, places)


def _column_topk(scores, k):
    """scores.t().topk(k), several times faster: the k best are among the k groups of rows with the largest maxima."""
    size = 4
    missing = max(k * size - len(scores), -len(scores) % size)
    padded = torch.nn.functional.pad(scores, (0, 0, 0, missing), value=-torch.inf) if missing else scores
    groups = padded.unflatten(0, (size, -1))  # (place in the group, group, column)
    best = groups.amax(0).t().contiguous().topk(k, sorted=False).indices
    candidates = groups.gather(1, best.t().unsqueeze(0).expand(size, -1, -1)).permute(2, 0, 1).flatten(1)
    values, places = candidates.topk(k)
    return values, best.gather(1, places % k) + places // k * groups.shape[1]
