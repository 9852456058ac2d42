"""Ranks and nearest items from tiles of similarities: the whole matrix is never held.

Tiles come from a source of similarities, such as `similarity.Cosine` or `similarity.Order` of two
embedding matrices. A source is anything with

    n_images, n_captions    size of the whole matrix
    tile_images             most images in a tile, which has up to five times as many captions
    width                   numbers held in memory to compute one similarity
    tile(images, captions, shape)
                            (images, captions) scores of two slices, valid until the next call. No
                            tile of a ranking is larger than `shape`. Equal embeddings must get
                            equal scores in any of them.
    across(side, targets)   (targets, all queries) scores of a slice of targets: captions in "i2t",
                            images in "t2i". Valid until the next call.
    pairs(images, captions) (n,) scores of pairs, listed by number

Scores are float32 or float64.

`image_of` says which captions belong to which image: for each caption its image's number, from 0
on, with an image's captions next to each other. None means equally many captions per image, in the
order of the images; the field's layout has five.

Image to text ranks an image's best own caption; text to image ranks a caption's image. Ranks are
0-based. Equal scores count against the model, so a model that gives every pair the same score ranks
last, not first.
"""

from typing import NamedTuple

import torch

from retrieval.similarity import SOURCES
from runtime import distributed

TILE_ASPECT = 5  # a tile has about five captions for each image, as the field's data sets do


class Ranking(NamedTuple):
    """Ranks (n,), 0-based, and the first items (n, top), best first, of n queries: both int64."""

    ranks: torch.Tensor
    items: torch.Tensor

    @property
    def top1(self):
        """Each query's first item: (n,)."""
        return self.items[:, 0]


def rank_both_ways(images, captions, measure="cosine", top=1, image_of=None):
    """(image-to-text Ranking, text-to-image Ranking) of unique images and their captions.

    An item that is not the query's own ranks before the query's best own item if it scores at
    least as high, within two units in the last place, or if the comparison involves NaN.

    images, captions: (N, D) and (C, D) embeddings
    measure: "cosine" or "order"
    top: first items kept per query; 0 skips finding them, which is a little faster
    image_of: (C,), see the module's text
    """
    return rank_shifted(SOURCES[measure](images, captions), [None], top, image_of)[0]


def rank_shifted(source, shifts=(None,), top=1, image_of=None, ties_win=False):
    """Pairs of Rankings as of `rank_both_ways`, from any source, one pair for each of `shifts`.

    Each tile is computed once, for all shifts. With several processes, each computes the tiles of
    its own blocks of images, so all of them must call this. Each returns the whole result, equal to
    that of a single process to the bit.
    Raises ValueError if `image_of` is not as the module's text says.

    shifts: None, or (shifts of captions (C,), shifts of images (N,)), which are subtracted from the
        similarities of these targets before ranking
    ties_win: ties count for the model instead of against it (see `retrieval.ties`)
    """
    tiles, first, processes = Tiles(source, image_of), distributed.rank(), distributed.size()
    # A rank is a count of better targets, so each query's own score must be known before any other
    # tile is looked at. Own scores lie in the diagonal tiles, which are computed first and kept.
    mine = range(first, tiles.count, processes)
    own_tiles = {block: tiles.scores(block, block).clone() for block in mine or [0]}
    tiles.place(own_tiles[first if mine else 0].device)
    own = own_tiles[first if mine else 0].new_zeros(source.n_captions)
    for block in mine:
        own[tiles.caption_rows[block]] = (
            own_tiles[block].gather(0, tiles.own_rows(block)).squeeze(0)
        )
    distributed.add_up([own])
    sides = [
        _Side(dim, own, tiles, None if shift is None else shift[1 - dim], top, ties_win)
        for shift in shifts
        for dim in (1, 0)
    ]  # targets along dim: captions of images, images of captions
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
    """`image_of` as a (C,) int64 tensor on the CPU; ValueError if not as the module's text says."""
    if image_of is None:
        if not n_images or not n_captions or n_captions % n_images:
            raise ValueError(
                f"{n_captions} captions for {n_images} images: which belong together must be given"
            )
        return torch.arange(n_images).repeat_interleave(n_captions // n_images)
    image_of = torch.as_tensor(image_of).cpu().long()
    steps = image_of.diff()
    if (
        len(image_of) != n_captions
        or not n_captions
        or image_of[0] != 0
        or image_of[-1] != n_images - 1
        or ((steps < 0) | (steps > 1)).any()
    ):
        raise ValueError(
            f"image_of must go through the {n_images} images in order, with a number for each of "
            f"the {n_captions} captions"
        )
    return image_of


class Tiles:
    """The similarity matrix, cut into blocks of images and the captions of those images.

    Cut this way, each query's own items lie in the diagonal tiles.
    """

    def __init__(self, source, image_of):
        n_images, n_captions = source.n_images, source.n_captions
        self.source, self.image_of = source, image_numbers(image_of, n_images, n_captions)
        # Captions count, too: with many per image, a full block of images would be too wide a tile.
        blocks = -(-max(n_images, n_captions / TILE_ASPECT) // source.tile_images)
        size = int(-(-n_images // blocks))
        self.image_rows = [
            slice(start, min(start + size, n_images)) for start in range(0, n_images, size)
        ]
        self.count = len(self.image_rows)
        edges = torch.tensor([0, *(rows.stop for rows in self.image_rows)])
        edges = torch.searchsorted(self.image_of, edges).tolist()
        self.caption_rows = [slice(*pair) for pair in zip(edges, edges[1:])]
        self.shape = (size, max(rows.stop - rows.start for rows in self.caption_rows))

    def place(self, device):
        """Move `image_of` to the device of the scores."""
        self.image_of = self.image_of.to(device)

    def own_rows(self, block):
        """For each caption of a block, its image's place in the block: (1, captions)."""
        return (self.image_of[self.caption_rows[block]] - self.image_rows[block].start).unsqueeze(0)

    def scores(self, image_block, caption_block):
        """A tile (images, captions), valid until the next call."""
        return self.source.tile(
            self.image_rows[image_block], self.caption_rows[caption_block], self.shape
        )


class _Side:
    """One direction's ranks and first items, accumulated over tiles."""

    def __init__(self, dim, own, tiles, shift, top, ties_win):
        """dim: the tiles' dimension that targets lie along: 1 for captions, 0 for images
        own: (C,) similarity of each caption with its image
        shift: (targets,) or None
        """
        self.dim, self.tiles, self.shift = dim, tiles, shift
        n_images, n_captions = tiles.source.n_images, tiles.source.n_captions
        if shift is not None:
            self.shift = shift.unsqueeze(1 - dim)
            own = own - (shift if dim == 1 else shift[tiles.image_of])
        if dim == 1:
            own = own.new_full((n_images,), -torch.inf).scatter_reduce_(
                0, tiles.image_of, own, "amax"
            )
        self.bars = (above_ties(own) if ties_win else just_below(own)).unsqueeze(dim)
        self.n_targets = n_captions if dim == 1 else n_images
        # How many targets score lower than a query's own best. Counting these, not the better ones,
        # makes a NaN count against the model: no comparison with it is true.
        self.lower = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        self.best = Best(len(own), min(top, self.n_targets), own) if top else None
        self.buffer, self.found = own.new_empty(0), []

    def see(self, scores, image_block, caption_block):
        """Count a tile (images, captions) of the similarity matrix, which is not changed."""
        images, captions = (
            self.tiles.image_rows[image_block],
            self.tiles.caption_rows[caption_block],
        )
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
            # A query's other own items never rank before its best one, so they count as lower.
            buffer.scatter_(0, self.tiles.own_rows(image_block), 1)
        self.lower[queries] += buffer.sum(self.dim).long()

    def _shared(self):
        """Whether other processes see other targets of the same queries."""
        return self.dim == 0 and distributed.size() > 1

    def meet(self, blocks):
        """Exchange the best items of these blocks of images, one of which each process has seen.

        They are merged in the order of the blocks, as one process would, so ties end alike.
        """
        if not self.best or not self._shared():
            return
        own, self.found = [torch.cat(parts).t() for parts in zip(*self.found)], []
        rows = [self.tiles.image_rows[block] for block in blocks]
        sizes = [min(self.best.items.shape[1], row.stop - row.start) for row in rows]
        like = [kept.new_empty(0, len(kept)) for kept in (self.best.scores, self.best.items)]
        gathered = [
            distributed.gather_batches(own[side : side + 1], sizes, like[side]).split(sizes)
            for side in (0, 1)
        ]
        for scores, items in zip(*gathered):
            for captions in self.tiles.caption_rows:
                self.best.take(captions, scores[:, captions].t(), items[:, captions].t())

    def parts(self):
        """What has to be added up over processes: zeros stand for what others have counted."""
        # In i2t, one process sees all targets of a query, so its items are final; in t2i `meet`
        # has already given the items to every process.
        return [self.lower, self.best.items] if self.best and self.dim == 1 else [self.lower]

    def ranking(self):
        """The Ranking, after all tiles."""
        ranks = self.n_targets - self.lower
        return Ranking(ranks, self.best.items if self.best else ranks.new_empty(len(ranks), 0))


def just_below(scores):
    """Scores lowered by two units in the last place: anything not below them is a tie or better.

    Libraries round equal products differently, so exact comparison would break some ties.
    """
    lowest = torch.full_like(scores, -torch.inf)
    return scores.nextafter(lowest).nextafter(lowest)


def above_ties(scores):
    """The least scores that are better, not tied: three units in the last place higher."""
    highest = torch.full_like(scores, torch.inf)
    return scores.nextafter(highest).nextafter(highest).nextafter(highest)


class Best:
    """Each query's k best items over blocks, best first: `.scores` and `.items`, (n, k)."""

    def __init__(self, n, k, like):
        self.scores = torch.full((n, k), -torch.inf, dtype=like.dtype, device=like.device)
        self.items = torch.zeros(n, k, dtype=torch.int64, device=like.device)

    def update(self, queries, scores, dim, first):
        """Merge the scores of the slice `queries` with items number `first` on, along `dim`."""
        self.take(queries, *self.among(scores, dim, first))

    def among(self, scores, dim, first):
        """Scores and items of the k best among these scores alone: (queries, k or all)."""
        k = min(self.items.shape[1], scores.shape[dim])
        if k == 1:  # several times faster than topk
            scores, items = (part.unsqueeze(1) for part in scores.max(dim))
        else:
            scores, items = scores.topk(k, 1) if dim == 1 else _column_topk(scores, k)
        return scores, items + first

    def take(self, queries, scores, items):
        """Merge what `among` returned for the slice `queries`."""
        scores = torch.cat([self.scores[queries], scores], 1)
        items = torch.cat([self.items[queries], items], 1)
        self.scores[queries], places = scores.topk(self.items.shape[1], 1)
        self.items[queries] = items.gather(1, places)


def _column_topk(scores, k):
    """scores.t().topk(k), several times faster.

    A column's k best lie in the k groups of rows with the largest maxima: topk first chooses among
    maxima, then among the k * size scores of those groups.
    """
    size = 4  # rows per group
    missing = max(k * size - len(scores), -len(scores) % size)
    padded = (
        torch.nn.functional.pad(scores, (0, 0, 0, missing), value=-torch.inf) if missing else scores
    )
    groups = padded.unflatten(0, (size, -1))  # (place in the group, group, column)
    best = groups.amax(0).t().contiguous().topk(k, sorted=False).indices
    candidates = (
        groups.gather(1, best.t().unsqueeze(0).expand(size, -1, -1)).permute(2, 0, 1).flatten(1)
    )
    values, places = candidates.topk(k)
    return values, best.gather(1, places % k) + places // k * groups.shape[1]
