"""Retrieval evaluation: embed a split, rank both ways, name the recalls.

Image i's captions are 5i..5i+4. Image to text ranks an image's best caption, text to image a
caption's image among the unique images; ranks are 0-based, and R@K is the percentage of
queries with rank < K. Equal scores count against the model.
"""

import json
import os
import sys
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
from captions import by_length
from data import CAPTIONS_PER_IMAGE, get_test_loader
from device import choose_device, choose_matmul_precision
from errors import InputError, replacing
from loss import SIMILARITIES
from model import VSE
from vocab import find_vocabulary, vocabulary_path

FOLDS = 5
TILE_IMAGES = {"cosine": 256, "order": 16}  # at most, of a tile of the similarity matrix; with five times the captions


class AverageMeter:
    """The latest value, and the mean weighted by the counts given with `update`."""

    def __init__(self):
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=0):
        """Take in `val`, the mean of `n` items; n = 0 only shows it."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else val

    def __str__(self):
        return f"{self.val:.4f} ({self.avg:.4f})" if self.count else str(self.val)


class LogCollector:
    """Meters by name, printed on one line in the order in which they came."""

    def __init__(self):
        self.meters = {}

    def update(self, k, v, n=0):
        """Take in value `v` of meter `k`; see AverageMeter."""
        self.meters.setdefault(k, AverageMeter()).update(v, n)

    def state(self):
        """{name: the meter's values}, for a checkpoint."""
        return {name: vars(meter) for name, meter in self.meters.items()}

    def restore(self, state):
        """Take up `state()`."""
        for name, values in state.items():
            vars(self.meters.setdefault(name, AverageMeter())).update(values)

    def __str__(self):
        return "  ".join(f"{name} {meter}" for name, meter in self.meters.items())


# Embedding --------------------------------------------------------------------------------------

def embed(model, loader):
    """A split's embeddings on the model's device: (N, D), each image once, and (5N, D), one a caption.

    Equal captions are encoded once, so that they get equal embeddings to the bit.
    """
    model.val_start()
    dataset, batch_size, n_images = loader.dataset, loader.batch_size, len(loader.dataset) // CAPTIONS_PER_IMAGE
    images = torch.cat([model.embed_images(_filled(batch, min(batch_size, n_images)) if batch.dim() == 2 else batch)
                        for batch in dataset.load_images(batch_size, loader.workers)])[:n_images]
    every = torch.arange(len(dataset))
    padded = dataset.word_ids.padded(every, int(dataset.word_ids.lengths.max()))
    padded, caption_of = torch.unique(padded, dim=0, return_inverse=True)
    lengths = (padded != 0).sum(1)
    order = by_length(lengths)
    captions = torch.cat([model.embed_captions(padded[batch, :int(lengths[batch[0]])], lengths[batch])
                          for batch in order.split(batch_size)])
    place_of = torch.empty_like(order)
    place_of[order] = torch.arange(len(order))
    return images, captions[place_of[caption_of].to(captions.device)]


def encode_data(model, data_loader, log_step=10, logging=print):
    """The family's call: image and caption embeddings as arrays (5N, D), one row a caption each."""
    images, captions = embed(model, data_loader)
    logging(f"Images: {len(images)}, Captions: {len(captions)}")
    return images.repeat_interleave(CAPTIONS_PER_IMAGE, 0).cpu().numpy(), captions.cpu().numpy()


# Ranks ------------------------------------------------------------------------------------------

class Ranking(NamedTuple):
    """0-based ranks of n queries and, where asked for, the item that came first for each: (n,) int64."""

    ranks: torch.Tensor
    top1: torch.Tensor | None


def _just_below(scores):
    """Two units in the last place lower: what is above this is a tie or better."""
    lowest = torch.full_like(scores, -torch.inf)
    return scores.nextafter(lowest).nextafter(lowest)


def rank_both_ways(images, captions, measure="cosine", top1=True):
    """(N, D) unique images and (5N, D) captions -> (image-to-text Ranking, text-to-image Ranking).

    An item that is not the query's own and scores at least as high as its own best, less two units in the
    last place, stands before it; so does one whose comparison is NaN. The similarity matrix is made in
    tiles that stay in cache and serve both directions: nothing of its size is kept. Without `top1`
    the first items are not looked for (None), which is a little faster.
    """
    tiles = _Tiles(images, captions, measure)
    own_tiles = [tiles.scores(block, block).clone() for block in range(tiles.count)]
    own = torch.cat([_own_scores(scores) for scores in own_tiles])
    image_bars, caption_bars = _just_below(own.amax(1, keepdim=True)), _just_below(own.reshape(1, -1))

    lower_captions, lower_images = own.new_zeros(len(images)), own.new_zeros(len(captions))
    best_caption, best_image = (_Best(len(queries), own) if top1 else None for queries in (images, captions))
    below = torch.empty_like(own_tiles[0])
    for i in range(tiles.count):
        for c in range(tiles.count):
            scores = own_tiles[i] if i == c else tiles.scores(i, c)
            rows, columns = tiles.image_rows(i), tiles.caption_rows(c)
            flags = below[:len(scores), :scores.shape[1]]
            if top1:
                best_caption.update(rows, scores, 1, columns.start)
                best_image.update(columns, scores, 0, rows.start)
            if i == c:
                _own_scores(scores).fill_(-torch.inf)
            # Comparing into floats is several times faster than into bools that are then counted.
            lower_captions[rows] += torch.lt(scores, image_bars[rows], out=flags).sum(1)
            lower_images[columns] += torch.lt(scores, caption_bars[:, columns], out=flags).sum(0)
    # Own pairs were counted as lower; where even they were not (NaN), nothing is.
    image_ranks = (len(captions) - lower_captions).clamp(max=len(captions) - CAPTIONS_PER_IMAGE)
    caption_ranks = (len(images) - lower_images).clamp(max=len(images) - 1)
    return (Ranking(image_ranks.long(), best_caption.item if top1 else None),
            Ranking(caption_ranks.long(), best_image.item if top1 else None))


class _Tiles:
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
        torch.mm(_filled(images, self.size), _filled(captions, self.size * CAPTIONS_PER_IMAGE).t(), out=self.buffer)
        return self.buffer[:len(images), :len(captions)]


def _filled(rows, n):
    """Zeros added up to n rows, so that all products have one shape, and equal rows equal results."""
    return rows if len(rows) == n else torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def _own_scores(scores):
    """(n, 5n) scores -> the (n, 5) view of each image with its own captions."""
    return scores.unflatten(1, (len(scores), CAPTIONS_PER_IMAGE)).diagonal().t()


class _Best:
    """The best item of each query over the tiles seen so far."""

    def __init__(self, n, like):
        self.score = torch.full((n,), -torch.inf, dtype=like.dtype, device=like.device)
        self.item = torch.zeros(n, dtype=torch.int64, device=like.device)

    def update(self, queries, scores, dim, first):
        score, item = scores.max(dim)
        better = score > self.score[queries]
        self.score[queries] = torch.where(better, score, self.score[queries])
        self.item[queries] = torch.where(better, item + first, self.item[queries])


# Recalls ----------------------------------------------------------------------------------------

class Recall(NamedTuple):
    """Recalls in percent, median and mean rank counted from 1."""

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    def __str__(self):
        return " ".join(f"{value:.1f}" for value in self)


class Metrics(NamedTuple):
    """Both directions' recalls."""

    i2t: Recall
    t2i: Recall

    @property
    def ar(self):
        """Mean of the three image-to-text recalls."""
        return sum(self.i2t[:3]) / 3

    @property
    def ari(self):
        """Mean of the three text-to-image recalls."""
        return sum(self.t2i[:3]) / 3

    @property
    def rsum(self):
        """Sum of the six recalls."""
        return sum(self.i2t[:3]) + sum(self.t2i[:3])


def recall_of(ranks):
    """0-based ranks (n,) -> Recall; medr is floor(median) + 1, as in the released code.

    >>> print(recall_of([0, 0, 4, 9]))
    50.0 75.0 100.0 3.0 4.2
    """
    ranks = np.asarray(ranks)
    return Recall(*(100.0 * np.count_nonzero(ranks < k) / len(ranks) for k in (1, 5, 10)),
                  float(np.floor(np.median(ranks)) + 1), float(ranks.mean() + 1))


def _unique_images(images, captions, npts):
    """Tensors of N unique images and 5N captions from what the family's code passes."""
    images, captions = torch.as_tensor(images), torch.as_tensor(captions)
    if len(images) == len(captions):
        images = images[::CAPTIONS_PER_IMAGE]
    if npts is not None:
        images, captions = images[:npts], captions[:npts * CAPTIONS_PER_IMAGE]
    if not len(images) or len(captions) != len(images) * CAPTIONS_PER_IMAGE:
        raise InputError(f"{len(captions)} captions for {len(images)} images: evaluation needs "
                         f"{CAPTIONS_PER_IMAGE} captions for each image")
    return images, captions


def _directed(direction, images, captions, npts, measure, return_ranks):
    ranking = rank_both_ways(*_unique_images(images, captions, npts), measure)[direction]
    recall = recall_of(ranking.ranks)
    return (recall, tuple(part.cpu().numpy() for part in ranking)) if return_ranks else recall


def i2t(images, captions, npts=None, measure="cosine", return_ranks=False):
    """Image to text, the family's call: images (5N, K) one row a caption, or (N, K); captions (5N, K).

    Returns a Recall; with return_ranks, (Recall, (ranks (N,), top-1 caption indices (N,))).
    """
    return _directed(0, images, captions, npts, measure, return_ranks)


def t2i(images, captions, npts=None, measure="cosine", return_ranks=False):
    """Text to image, as `i2t`: ranks and top-1 image indices have one entry a caption."""
    return _directed(1, images, captions, npts, measure, return_ranks)


def metrics_of(images, captions, measure="cosine", top1=False):
    """(N, D) images and (5N, D) captions -> (Metrics, the two Rankings)."""
    rankings = rank_both_ways(images, captions, measure, top1)
    return Metrics(*(recall_of(ranking.ranks) for ranking in rankings)), rankings


def mean_metrics(folds):
    """The mean of each figure over the folds."""
    return Metrics(*(Recall(*np.mean([fold[side] for fold in folds], axis=0).tolist()) for side in (0, 1)))


def split_loss(images, captions, criterion, batch_size, bank=None):
    """Mean loss over a split's captions in batches of `batch_size`, in file order, as validation logs it."""
    total = 0.0
    for indices in torch.arange(len(captions), device=captions.device).split(batch_size):
        batch = criterion(images[indices // CAPTIONS_PER_IMAGE], captions[indices], *(bank or (None,) * 3), indices)
        total += float(batch) * len(indices)
    return total / len(captions)


# A checkpoint's evaluation ----------------------------------------------------------------------

def print_metrics(metrics):
    """The five lines of a whole split."""
    print(f"rsum: {metrics.rsum:.1f}")
    print(f"Average i2t Recall: {metrics.ar:.1f}")
    print(f"Image to text: {metrics.i2t}")
    print(f"Average t2i Recall: {metrics.ari:.1f}")
    print(f"Text to image: {metrics.t2i}")


def load_for_evaluation(opt_eval, split):
    """(model, loader of the split, checkpoint's options) for evaluation.

    opt_eval: model_path and, where given, data_path, vocab_path, device, batch_size, caption_reading.
    Raises InputError where checkpoint, vocabulary and data do not fit each other.
    """
    path = opt_eval.model_path
    content = checkpoint.load(path)
    opt = content["opt"]
    for name in ("data_path", "vocab_path", "batch_size"):
        if getattr(opt_eval, name, None):
            setattr(opt, name, getattr(opt_eval, name))
    opt.caption_reading = getattr(opt_eval, "caption_reading", None) or checkpoint.caption_reading(content)
    opt.cache_dir = os.path.join(opt.data_path, ".cache")  # never one that a stranger's checkpoint names
    opt.skip_broken_images = getattr(opt_eval, "skip_broken_images", False)
    opt.cnn_weights = "none"  # the checkpoint's own take their place
    vocabulary = None if getattr(opt_eval, "vocab_path", None) else checkpoint.vocabulary(content, path)
    vocabulary = vocabulary or find_vocabulary(opt.vocab_path, opt.data_name)
    if vocabulary is None:
        raise InputError(f"no vocabulary {vocabulary_path(opt.vocab_path, opt.data_name)} (or .pkl): name its folder "
                         "with --vocab_path")
    if len(vocabulary) != opt.vocab_size:
        raise InputError(f"the vocabulary for {opt.data_name} in {opt.vocab_path} has {len(vocabulary)} words, the "
                         f"checkpoint {path} was trained with {opt.vocab_size}: name the right one with --vocab_path")
    loader = get_test_loader(split, opt.data_name, vocabulary, opt.crop_size, opt.batch_size,
                             min(opt.workers, os.cpu_count()), opt)
    model = VSE(opt)
    checkpoint.load_weights(model, content, path)
    device = choose_device(getattr(opt_eval, "device", "auto"))
    choose_matmul_precision(device)
    return model.to(device), loader, opt


def evalrank(opt_eval, split="test"):
    """Evaluate a checkpoint on a split: print the recalls, write what was asked for, return the Metrics.

    opt_eval: as for `load_for_evaluation`, and fold5, save_csv, save_json, save_embeddings. Writes
    `ranks.pth.tar` (of the first fold, with fold5) into the current folder, as the released code does.
    """
    model, loader, opt = load_for_evaluation(opt_eval, split)
    n_images = len(loader.dataset) // CAPTIONS_PER_IMAGE
    if getattr(opt_eval, "fold5", False) and n_images % FOLDS:
        testall = os.path.join(opt.data_path, opt.data_name, "testall_ims.npy")
        hint = "try --split testall" if split != "testall" and os.path.exists(testall) else "leave --fold5 out"
        raise InputError(f"--fold5 needs five equal folds, and split {split} has {n_images} images: {hint}")
    images, captions = embed(model, loader)
    print(f"Images: {len(images)}, Captions: {len(captions)}", file=sys.stderr)
    if getattr(opt_eval, "fold5", False):
        folds, rankings = _evaluate_folds(images, captions, opt.measure)
        metrics = mean_metrics(folds)
        print("-----------------------------------")
        print("Mean metrics: ")
    else:
        metrics, rankings = metrics_of(images, captions, opt.measure, top1=True)
        folds = []
    print_metrics(metrics)
    _write_results(opt_eval, opt, split, metrics, folds, rankings, images, captions)
    return metrics


def _evaluate_folds(images, captions, measure):
    """Print five folds; returns their Metrics and the first one's Rankings."""
    results = []
    size = len(images) // FOLDS
    for fold_images, fold_captions in zip(images.split(size), captions.split(size * CAPTIONS_PER_IMAGE)):
        metrics, rankings = metrics_of(fold_images, fold_captions, measure, top1=True)
        results.append((metrics, rankings))
        print("Image to text: " + ", ".join(f"{value:.1f}" for value in metrics.i2t))
        print("Text to image: " + ", ".join(f"{value:.1f}" for value in metrics.t2i))
        print(f"rsum: {metrics.rsum:.1f} ar: {metrics.ar:.1f} ari: {metrics.ari:.1f}")
    return [metrics for metrics, _ in results], results[0][1]


def as_dict(metrics):
    """Metrics as plain names and numbers, for JSON."""
    return {"i2t": metrics.i2t._asdict(), "t2i": metrics.t2i._asdict(),
            "ar": metrics.ar, "ari": metrics.ari, "rsum": metrics.rsum}


def _write_results(opt_eval, opt, split, metrics, folds, rankings, images, captions):
    """ranks.pth.tar and, where asked for, CSV, JSON and embeddings."""
    ranks = {name: tuple(part.cpu() for part in ranking) for name, ranking in zip(("rt", "rti"), rankings)}
    try:
        checkpoint.save("ranks.pth.tar", ranks)
    except InputError as error:  # nobody asked for this file by a flag
        print(f"note: {error}", file=sys.stderr)
    if getattr(opt_eval, "save_csv", None):
        rows = {"_fold1": folds[0], "_fold5": metrics} if folds else {"": metrics}
        for suffix, row in rows.items():
            figures = ", ".join(f"{value:.1f}" for value in (*row.i2t, *row.t2i, row.rsum))
            append(opt_eval.save_csv + suffix, f"{opt.logger_name}, {figures}\n")
    if getattr(opt_eval, "save_json", None):
        with replacing(opt_eval.save_json, "w", encoding="utf-8") as file:
            json.dump({"model_path": opt_eval.model_path, "data_name": opt.data_name, "split": split,
                       "images": len(images), "captions": len(captions), "folds": [as_dict(f) for f in folds],
                       **as_dict(metrics)}, file, indent=1)
    if getattr(opt_eval, "save_embeddings", False):
        run = os.path.basename(os.path.dirname(os.path.abspath(opt_eval.model_path)))
        with replacing(f"{run}_img_and_cap_embeddings.npz") as file:
            np.savez(file, img_embs=images.repeat_interleave(CAPTIONS_PER_IMAGE, 0).cpu().numpy(),
                     cap_embs=captions.cpu().numpy())


def append(path, line):
    """Add a line to a text file; raises InputError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror}): name another file") from error
