"""Ranks and nearest items from tiles of similarities: nothing of the matrix' size is kept.

Tiles come from a source of similarities, `Cosine` or `Order` of two embedding matrices for example: anything with
    n_images, n_captions    the sizes of the whole matrix
    tile_images             images of a tile at most; a tile has up to five times as many captions
    width                   numbers held to make one similarity
    tile(images, captions, shape)  (images, captions) scores of two slices, valid until the next call; all tiles of a
                            ranking are at most of `shape`, and what is alike in any of them must score alike
    across(side, targets)   (targets, all queries) scores of a slice of targets, captions in "i2t", images in "t2i";
                            valid until the next call, too
    pairs(images, captions) (n,) scores of listed pairs
Scores are float32 or float64.

Which captions belong to which image is `image_of`: for each caption its image's number, from 0 on, the captions of
an image together. None means as many captions for each image, in image order: five in the field's layout. Image to
text ranks an image's best caption, text to image a caption's image; ranks are 0-based, and equal scores count
against the model.
"""

from typing import NamedTuple

import torch

import distributed
from loss import cosine_sim, order_sim

TILE_ASPECT = 5  # captions of a tile for each of its images, about


# Sources ----------------------------------------------------------------------------------------

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
    """Products of (N, D) images and (C, D) captions, as a source: cosines where these are normalised.

    Libraries compute small products in another order: with a ragged last tile, equal embeddings would
    not get equal scores. So both sides are filled up with zeros, and tiles cut to what is real.
    """

    similarity, tile_images = staticmethod(cosine_sim), 512

    def __init__(self, images, captions):
        super().__init__(images, captions)
        self.width, self.buffer = 1, self.images.new_empty(0)

    def tile(self, images, captions, shape):
        """(images, captions) scores of two slices, in a block of memory that the next tile overwrites."""
        images, captions = self.images[images], self.captions[captions]
        buffer = self.buffer.resize_(shape)
        torch.mm(filled(images, shape[0]), filled(captions, shape[1]).t(), out=buffer)
        return buffer[:len(images), :len(captions)]

    def across(self, side, targets):
        """(targets, queries) scores of a slice of targets with all queries."""
        if side == "i2t":
            return self.similarity(self.captions[targets], self.images)  # rows of targets lie together in memory
        return super().across(side, targets)


SOURCES = {"cosine": Cosine, "order": Order}


def _comparable(images, captions):
    """Both as tensors of one float type without gradients: of the wider one where they differ, float32 for half
    precision (whose products would be rounded), float64 for integers where the device has it."""
    both = [torch.as_tensor(x).detach() for x in (images, captions)]
    kind = torch.promote_types(*(x.dtype for x in both))
    if not kind.is_floating_point:
        kind = torch.float32 if both[0].device.type == "mps" else torch.float64
    return [x.to(torch.promote_types(kind, torch.float32)) for x in both]


def filled(rows, n):
    """Zeros added up to n rows, so that all products have one shape, and equal rows equal results."""
    return rows if len(rows) == n else torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


# Ranks ------------------------------------------------------------------------------------------

class Ranking(NamedTuple):
    """0-based ranks of n queries (n,), and the items that came first for each, best first (n, top): int64."""

    ranks: torch.Tensor
    items: torch.Tensor

    @property
    def top1(self):
        """The item that came first for each query: (n,)."""
        return self.items[:, 0]


def rank_both_ways(images, captions, measure="cosine", top=1, image_of=None):
    """(N, D) unique images and (C, D) captions -> (image-to-text Ranking, text-to-image Ranking).

    An item that is not the query's own and scores at least as high as its own best, less two units in the
    last place, stands before it; so does one whose comparison is NaN. The `top` first items of each query
    are kept; with 0 they are not looked for, which is a little faster.
    """
    return rank_shifted(SOURCES[measure](images, captions), [None], top, image_of)[0]


def rank_shifted(source, shifts=(None,), top=1, image_of=None):
    """As `rank_both_ways` from any source, once for each of `shifts`: None, or (captions' (C,), images' (N,))
    similarities that are taken off those targets' before ranking.

    The similarity matrix is made in tiles that stay in cache and serve all. Of several processes each makes the tiles
    of its blocks of images, so that all must call this; each has the whole result, that of one process to the bit.
    Raises ValueError where `image_of` does not give each image captions of its own, one beside the other.
    """
    tiles, first, processes = Tiles(source, image_of), distributed.rank(), distributed.size()
    mine = range(first, tiles.count, processes)
    own_tiles = {block: tiles.scores(block, block).clone() for block in mine or [0]}
    tiles.place(own_tiles[first if mine else 0].device)
    own = own_tiles[first if mine else 0].new_zeros(source.n_captions)
    for block in mine:
        own[tiles.caption_rows[block]] = own_tiles[block].gather(0, tiles.own_rows(block)).squeeze(0)
    distributed.add_up([own])
    sides = [_Side(dim, own, tiles, None if shift is None else shift[1 - dim], top)
             for shift in shifts for dim in (1, 0)]  # targets along dim: captions of images, images of captions
    for start in range(0, tiles.count, processes):
        i = start + first
        for c in range(tiles.count if i < tiles.count else 0):
            scores = own_tiles[i] if i == c else tiles.scores(i, c)
            for side in sides:
                side.see(scores, i, c)
        for side in sides:
            side.meet(range(start, min(start + processes, tiles.count)))
    distributed.add_up([part for side in sides for part in side.parts()])
    rankings = [side.ranking() for side in sides]
    return list(zip(rankings[::2], rankings[1::2]))


def image_numbers(image_of, n_images, n_captions):
    """`image_of` as a (C,) int64 tensor on the CPU; raises ValueError where it is not as this module's text says."""
    if image_of is None:
        if not n_images or not n_captions or n_captions % n_images:
            raise ValueError(f"{n_captions} captions for {n_images} images: which belong together must be given")
        return torch.arange(n_images).repeat_interleave(n_captions // n_images)
    image_of = torch.as_tensor(image_of).cpu().long()
    steps = image_of.diff()
    if len(image_of) != n_captions or not n_captions or image_of[0] != 0 or image_of[-1] != n_images - 1 or (
            (steps < 0) | (steps > 1)).any():
        raise ValueError(f"image_of must go through the {n_images} images in order, with a number for each of the "
                         f"{n_captions} captions")
    return image_of


class Tiles:
    """The similarity matrix in blocks of images and of those images' captions."""

    def __init__(self, source, image_of):
        n_images, n_captions = source.n_images, source.n_captions
        self.source, self.image_of = source, image_numbers(image_of, n_images, n_captions)
        blocks = -(-max(n_images, n_captions / TILE_ASPECT) // source.tile_images)
        size = int(-(-n_images // blocks))
        self.image_rows = [slice(start, min(start + size, n_images)) for start in range(0, n_images, size)]
        self.count = len(self.image_rows)
        edges = torch.tensor([0, *(rows.stop for rows in self.image_rows)])
        edges = torch.searchsorted(self.image_of, edges).tolist()
        self.caption_rows = [slice(*pair) for pair in zip(edges, edges[1:])]
        self.shape = (size, max(rows.stop - rows.start for rows in self.caption_rows))

    def place(self, device):
        """Take the images' numbers to the scores' device."""
        self.image_of = self.image_of.to(device)

    def own_rows(self, block):
        """Each caption of a block: its image's place in that block, (1, captions)."""
        return (self.image_of[self.caption_rows[block]] - self.image_rows[block].start).unsqueeze(0)

    def scores(self, image_block, caption_block):
        """A tile (images, captions); valid until the next one is asked for."""
        return self.source.tile(self.image_rows[image_block], self.caption_rows[caption_block], self.shape)


class _Side:
    """One direction's ranks and first items over the tiles seen so far."""

    def __init__(self, dim, own, tiles, shift, top):
        """own: (C,) similarities of each caption with its image; shift: (targets,) or None."""
        self.dim, self.tiles, self.shift = dim, tiles, shift
        n_images, n_captions = tiles.source.n_images, tiles.source.n_captions
        if shift is not None:
            self.shift = shift.unsqueeze(1 - dim)
            own = own - (shift if dim == 1 else shift[tiles.image_of])
        if dim == 1:
            own = own.new_full((n_images,), -torch.inf).scatter_reduce_(0, tiles.image_of, own, "amax")
        self.bars = just_below(own).unsqueeze(dim)
        self.n_targets = n_captions if dim == 1 else n_images
        self.lower = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        self.best = Best(len(own), min(top, self.n_targets), own) if top else None
        self.buffer, self.found = own.new_empty(0), []

    def see(self, scores, image_block, caption_block):
        """Take in a tile (images, captions) of the similarity matrix; it is left as it is."""
        images, captions = self.tiles.image_rows[image_block], self.tiles.caption_rows[caption_block]
        queries, targets = (images, captions) if self.dim == 1 else (captions, images)
        bars = self.bars[images] if self.dim == 1 else self.bars[:, captions]
        buffer = self.buffer.resize_(scores.shape)
        if self.shift is not None:
            shift = self.shift[:, captions] if self.dim == 1 else self.shift[images]
            scores = torch.sub(scores, shift, out=buffer)
        if self.best:
            found = self.best.among(scores, self.dim, targets.start)
            if self._shared():
                self.found.append(found)
            else:
                self.best.take(queries, *found)
        # Comparing into floats is several times faster than into bools that are then counted.
        torch.lt(scores, bars, out=buffer)
        if image_block == caption_block:
            buffer.scatter_(0, self.tiles.own_rows(image_block), 1)  # a query's own stand before nothing
        self.lower[queries] += buffer.sum(self.dim).long()

    def _shared(self):
        """Whether other processes see other targets of the same queries."""
        return self.dim == 0 and distributed.size() > 1

    def meet(self, blocks):
        """Take in the best of these blocks of images, of which each process has seen one, in the blocks' order."""
        if not self.best or not self._shared():
            return
        own, self.found = [torch.cat(parts).t() for parts in zip(*self.found)], []
        rows = [self.tiles.image_rows[block] for block in blocks]
        sizes = [min(self.best.items.shape[1], row.stop - row.start) for row in rows]
        like = [kept.new_empty(0, len(kept)) for kept in (self.best.scores, self.best.items)]
        gathered = [distributed.gather_batches(own[side:side + 1], sizes, like[side]).split(sizes) for side in (0, 1)]
        for scores, items in zip(*gathered):
            for captions in self.tiles.caption_rows:
                self.best.take(captions, scores[:, captions].t(), items[:, captions].t())

    def parts(self):
        """Counts and items of which each process has some, and zeros in place of the others'."""
        return [self.lower, self.best.items] if self.best and self.dim == 1 else [self.lower]

    def ranking(self):
        """The Ranking, once all tiles were seen."""
        ranks = self.n_targets - self.lower
        return Ranking(ranks, self.best.items if self.best else ranks.new_empty(len(ranks), 0))


def just_below(scores):
    """Two units in the last place lower: what is above this is a tie or better."""
    lowest = torch.full_like(scores, -torch.inf)
    return scores.nextafter(lowest).nextafter(lowest)


class Best:
    """The k best items of each query over the blocks seen so far, best first: `.scores` and `.items`, (n, k)."""

    def __init__(self, n, k, like):
        self.scores = torch.full((n, k), -torch.inf, dtype=like.dtype, device=like.device)
        self.items = torch.zeros(n, k, dtype=torch.int64, device=like.device)

    def update(self, queries, scores, dim, first):
        """Take in the scores of the slice `queries` and the items from number `first` on, these along `dim`."""
        self.take(queries, *self.among(scores, dim, first))

    def among(self, scores, dim, first):
        """The best of these alone: scores and items, (queries, k or all)."""
        k = min(self.items.shape[1], scores.shape[dim])
        if k == 1:  # several times faster than topk
            scores, items = (part.unsqueeze(1) for part in scores.max(dim))
        else:
            scores, items = scores.topk(k, 1) if dim == 1 else _column_topk(scores, k)
        return scores, items + first

    def take(self, queries, scores, items):
        """Take in what `among` gave."""
        scores = torch.cat([self.scores[queries], scores], 1)
        items = torch.cat([self.items[queries], items], 1)
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
