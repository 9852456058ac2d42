"""Retrieval evaluation: embed a split, name its recalls, evaluate a checkpoint.

Ranks are 0-based (see `ranking`), and R@K is the percentage of queries with rank < K.
"""

import argparse
import json
import os
import stat
import sys
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
import distributed
from caption_files import is_precomputed
from data import get_test_loader
from device import choose_device, choose_products
from ensemble import Ensemble
from errors import InputError, replacing
from features import features_of
from loss import order_sim  # noqa: F401 (handed on: the family imports it from here)
from meters import AverageMeter, LogCollector  # noqa: F401 (handed on: the family imports them from here)
from model import VSE, no_embeddings
from ranking import SOURCES, filled, image_numbers, rank_both_ways, rank_shifted
from scan import SCAN, CrossAttention, Words, build, packed
from word_ids import CAPTIONS_PER_IMAGE, five_each

FOLDS = 5
COCO_FOLD = 1000  # images
BANK_IMAGES, BANK_REGION_IMAGES = 10_000, 1_000  # of a bank at most, unless told; the latter for cross attention


# Embedding --------------------------------------------------------------------------------------

def embed(model, loader, stride=1):
    """A split's embeddings on the model's device: (N, D), each image once, and (C, D), one a caption; of SCAN,
    regions (N, R, D) and `scan.Words`.

    With a stride only each so manieth image is taken, with its captions.
    """
    model.val_start()
    dataset, batch_size = loader.dataset, loader.batch_size
    n_images = -(-dataset.n_images // stride)
    own = [model.embed_images(filled(batch, min(batch_size, n_images)) if batch.dim() < 4 else batch)[:len(batch)]
           for batch in dataset.load_images(batch_size, loader.workers, stride, _part())]
    like = no_embeddings(model)
    if isinstance(model, SCAN):
        like = like.unsqueeze(1).expand(0, dataset.images.shape[1], -1)
    images = distributed.gather_batches(own, [len(one) for one in torch.arange(n_images).split(batch_size)], like)
    return images, embed_texts(model, dataset.word_ids, batch_size, dataset.image_of % stride == 0)


def embed_texts(model, word_ids, batch_size, chosen=None):
    """The embeddings (C, D) of `word_ids.WordIds`, or of SCAN `scan.Words`, on the model's device.

    Equal captions are encoded once, so that they get equal embeddings to the bit. chosen: (n,) bool, which to take.
    """
    model.val_start()
    distinct, place_of = _distinct(word_ids, torch.arange(len(word_ids)) if chosen is None else
                                   torch.arange(len(word_ids))[chosen])
    lengths = word_ids.lengths[distinct]
    first, distance = _part()
    batches, of_words = list(zip(distinct.split(batch_size), lengths.split(batch_size))), isinstance(model, SCAN)
    own = [model.embed_captions(word_ids.padded(batch, int(long[0])), long) for batch, long in batches[first::distance]]
    if of_words:
        own = [packed(states, long) for states, (_, long) in zip(own, batches[first::distance])]
    sizes = [int(long.sum()) if of_words else len(long) for _, long in batches]
    texts = distributed.gather_batches(own, sizes, no_embeddings(model))
    return Words.of(texts, lengths)[place_of] if of_words else texts[place_of.to(texts.device)]


def _distinct(word_ids, chosen):
    """Captions' numbers (n,) -> those of the distinct ones among them, longest first, and each caption's place there.

    One length after the other: padded, all would be as long as the longest.
    """
    lengths, found = word_ids.lengths[chosen], 0
    distinct, place_of = [], torch.empty_like(chosen)
    for length in lengths.unique().flip(0).tolist():
        places = (lengths == length).nonzero().squeeze(1)
        rows, kind = torch.unique(word_ids.padded(chosen[places], length), dim=0, return_inverse=True)
        place_of[places] = found + kind
        distinct.append(chosen.new_empty(len(rows)).scatter_(0, kind, chosen[places]))
        found += len(rows)
    return torch.cat(distinct), place_of


def _part():
    """(the first batch that this process embeds, the distance to the next)."""
    return distributed.rank(), distributed.size()


def similarity_source(opt, images, captions):
    """The source of similarities (see `ranking`) of what `embed` gives; opt: measure, or SCAN's options."""
    if getattr(opt, "cross_attn", None):
        return CrossAttention(images, captions, opt)
    return SOURCES[opt.measure](images, captions)


def encode_data(model, data_loader, log_step=10, logging=print):
    """The family's call: image and caption embeddings as arrays (C, D), one row a caption each; of SCAN (C, R, D),
    (C, longest, D) and the lengths (C,)."""
    images, captions = embed(model, data_loader)
    logging(f"Images: {len(images)}, Captions: {len(captions)}")
    if isinstance(captions, Words):
        return (images.cpu()[data_loader.dataset.image_of].numpy(), captions.padded().cpu().numpy(),
                captions.lengths.numpy())
    return images.cpu()[data_loader.dataset.image_of].numpy(), captions.cpu().numpy()


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
    ranks = torch.as_tensor(ranks).cpu().numpy()
    return Recall(*(100.0 * np.count_nonzero(ranks < k) / len(ranks) for k in (1, 5, 10)),
                  float(np.floor(np.median(ranks)) + 1), float(ranks.mean() + 1))


def _unique_images(images, captions, npts):
    """Tensors of N unique images and their captions, one or five for each in turn, from what the family's code passes:
    images (N, K), or one row a caption, where the rows of one image may differ by rounding."""
    images, captions = (torch.as_tensor(x).detach() for x in (images, captions))
    if len(images) == len(captions) > 0 and len(images) % CAPTIONS_PER_IMAGE == 0:
        rows = images.unflatten(0, (-1, CAPTIONS_PER_IMAGE)).float()
        if torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=0.01, atol=1e-5, equal_nan=True):
            images = images[::CAPTIONS_PER_IMAGE]
    each = len(captions) // max(len(images), 1)
    if not len(images) or each not in (1, CAPTIONS_PER_IMAGE) or len(captions) != len(images) * each:
        raise InputError(f"{len(captions)} captions for {len(images)} images: there must be {CAPTIONS_PER_IMAGE} for "
                         "each image, or one")
    if npts is not None:
        images, captions = images[:npts], captions[:npts * each]
    return images, captions


def _directed(direction, images, captions, npts, measure, return_ranks):
    ranking = rank_both_ways(*_unique_images(images, captions, npts), measure)[direction]
    recall = recall_of(ranking.ranks)
    return (recall, (ranking.ranks.cpu().numpy(), ranking.top1.cpu().numpy())) if return_ranks else recall


def i2t(images, captions, npts=None, measure="cosine", return_ranks=False):
    """Image to text, the family's call: images (5N, K) one row a caption, or (N, K); captions (5N, K). Where the rows
    of images are as many as captions, and those of five captions in turn differ, it is one caption an image.

    Returns a Recall; with return_ranks, (Recall, (ranks (N,), top-1 caption indices (N,))).
    """
    return _directed(0, images, captions, npts, measure, return_ranks)


def t2i(images, captions, npts=None, measure="cosine", return_ranks=False):
    """Text to image, as `i2t`: ranks and top-1 image indices have one entry a caption."""
    return _directed(1, images, captions, npts, measure, return_ranks)


def metrics_of(rankings):
    """(image-to-text Ranking, text-to-image Ranking) -> Metrics."""
    return Metrics(*(recall_of(ranking.ranks) for ranking in rankings))


def mean_metrics(folds):
    """The mean of each figure over the folds."""
    return Metrics(*(Recall(*np.mean([fold[side] for fold in folds], axis=0).tolist()) for side in (0, 1)))


@torch.no_grad()
def split_loss(images, captions, criterion, batch_size, bank=None, image_of=None):
    """Mean loss over a split's captions in batches of `batch_size`, in file order, as validation logs it.

    image_of: for each caption its image's number; None: equally many captions for each image. Several processes share
    the batches.
    """
    image_of = image_numbers(image_of, len(images), len(captions)).to(captions.device)
    parts = [slice(start, start + batch_size) for start in range(0, len(captions), batch_size)]
    indices, losses, attention = torch.arange(len(captions), device=captions.device), images.new_zeros(len(parts)), None
    if isinstance(captions, Words):
        attention = CrossAttention(images, captions, criterion.opt)
    for place in range(distributed.rank(), len(parts), distributed.size()):
        part = parts[place]
        own = images[image_of[part]], captions[part]
        losses[place] = criterion.of_similarities(attention.of(*own), None, None) if attention else criterion(
            *own, *(bank or (None,) * 3), indices[part])
    distributed.add_up([losses])
    return sum(loss * len(indices[part]) for loss, part in zip(losses.tolist(), parts)) / len(captions)


# A checkpoint's evaluation ----------------------------------------------------------------------

def print_metrics(metrics):
    """The five lines of a whole split."""
    print(f"rsum: {metrics.rsum:.1f}")
    print(f"Average i2t Recall: {metrics.ar:.1f}")
    print(f"Image to text: {metrics.i2t}")
    print(f"Average t2i Recall: {metrics.ari:.1f}")
    print(f"Text to image: {metrics.t2i}")


class Checkpoint(NamedTuple):
    """A checkpoint made ready for evaluation: its model on the device, its options and its vocabulary."""

    model: VSE
    opt: object
    vocabulary: object
    path: str = ""
    features: dict | None = None  # what describes those that it was trained on

    @property
    def members(self):
        """Itself, as the one member that an Ensemble has several of."""
        return [self]

    def embed(self, loader, stride=1):
        """(images, captions) of a loader, as `embed` gives them."""
        return embed(self.model, loader, stride)

    def similarities(self, images, captions):
        """The source of similarities of what `embed` gives, for `ranking` and `corrections`."""
        return similarity_source(self.opt, images, captions)

    def loader(self, split):
        """The loader of a split of its data set; raises InputError where that has features of another kind."""
        opt = self.opt

        def load():
            features_of(opt.data_path, opt.data_name, self.features, self.path)
            return get_test_loader(split, opt.data_name, self.vocabulary, opt.crop_size, opt.batch_size,
                                   min(opt.workers, os.cpu_count()), opt)
        return distributed.machine_by_machine(load)


def load_for_evaluation(opt_eval):
    """The Checkpoint opt_eval.model_path.

    opt_eval may also have data_path, data_name, vocab_path, device, batch_size, caption_reading, skip_broken_images.
    Raises InputError where checkpoint and vocabulary do not fit each other.
    """
    path = opt_eval.model_path
    content = distributed.from_first(lambda: checkpoint.load(path), checkpoint.ADMITTED)
    opt = content["opt"]
    for name in ("data_path", "vocab_path", "batch_size"):
        if getattr(opt_eval, name, None):
            setattr(opt, name, getattr(opt_eval, name))
    opt.caption_reading = getattr(opt_eval, "caption_reading", None) or checkpoint.caption_reading(content)
    opt.cache_dir = os.path.join(opt.data_path, ".cache")  # never one that a stranger's checkpoint names
    opt.skip_broken_images = getattr(opt_eval, "skip_broken_images", False)
    opt.cnn_weights = "none"  # the checkpoint's own take their place
    vocabulary = checkpoint.vocabulary(content, path, getattr(opt_eval, "vocab_path", None))
    data_name = getattr(opt_eval, "data_name", None) or opt.data_name
    if is_precomputed(data_name) != is_precomputed(opt.data_name):
        raise InputError(f"--data_name {data_name}: the checkpoint {path} was trained on {opt.data_name}, and one of "
                         "them is of photos, the other of features: name a data set of the same kind")
    opt.data_name = data_name
    model = build(opt)
    checkpoint.load_weights(model, content, path)
    device = choose_device(getattr(opt_eval, "device", "auto"))
    choose_products(device, content.get("float32_products"))
    return Checkpoint(model.to(device), opt, vocabulary, path, content.get("features"))


def bank_stride(opt, n_images, limit=None):
    """Each how manieth image of a split is in the bank by which `corrections` tell hubs.

    limit: so many images at most, evenly spread; 0: all; None: the usual number.
    """
    most = BANK_REGION_IMAGES if opt.cross_attn else BANK_IMAGES
    return -(-n_images // (most if limit is None else limit or n_images))


def load_members(opt_eval):
    """The Checkpoint opt_eval.model_path, or the Ensemble of several, where that is a list of paths.

    opt_eval: as for `load_for_evaluation`; data_name and vocab_path may be lists, too, with a value a path.
    """
    paths = opt_eval.model_path
    if not isinstance(paths, list):
        return load_for_evaluation(opt_eval)
    given = {name: getattr(opt_eval, name, None) for name in ("data_name", "vocab_path")}
    each = {name: value if isinstance(value, list) else [value] * len(paths) for name, value in given.items()}
    return Ensemble([load_for_evaluation(argparse.Namespace(**{**vars(opt_eval), "model_path": path, **dict(
        zip(each, values))})) for path, *values in zip(paths, *each.values(), strict=True)])


class Evaluation(NamedTuple):
    """A checkpoint's figures on a split: over all of it (one fold), or over five folds and their mean.

    Of an Ensemble, images and captions are `ensemble.Together`.
    """

    checkpoint: Checkpoint
    dataset: object
    images: torch.Tensor  # (N, D)
    captions: torch.Tensor  # (C, D)
    rankings: list  # of each fold, (i2t Ranking, t2i Ranking)
    folds: list  # of each fold, Metrics
    metrics: Metrics

    def parts(self):
        """Each fold's (images, captions, image_of)."""
        parts = [part.chunk(len(self.folds)) for part in (self.images, self.captions, self.dataset.image_of)]
        return [(images, captions, image_of - image_of[0]) for images, captions, image_of in zip(*parts)]

    def ranked(self, rankings):
        """The same with each fold's rankings and their figures."""
        folds = [metrics_of(pair) for pair in rankings]
        return self._replace(rankings=rankings, folds=folds, metrics=mean_metrics(folds))


def evaluate(opt_eval, split, top=1, check=None):
    """Evaluate a checkpoint, or several as one, on a split and print its recalls; returns the Evaluation, with `top`
    items a query.

    opt_eval: as for `load_members`, and fold5; check: called with what is loaded and the data set before anything is
    computed, to refuse them.
    """
    loaded = load_members(opt_eval)
    if loaded.opt.cross_attn and getattr(opt_eval, "save_embeddings", False):
        raise InputError("--save_embeddings is for models with one vector an item, and this one is SCAN, with one for "
                         "each region and word: leave it out")
    result = embedded(loaded, split, getattr(opt_eval, "fold5", False), check)
    result = result.ranked([rank_shifted(loaded.similarities(images, captions), top=top, image_of=image_of)[0]
                            for images, captions, image_of in result.parts()])
    print_evaluation(result)
    return result


def embedded(loaded, split, fold5=False, check=None):
    """The Evaluation of a Checkpoint or an Ensemble on a split, its rankings and figures still to come.

    check: as for `evaluate`.
    """
    loader, opt, n_folds = loaded.loader(split), loaded.opt, FOLDS if fold5 else 1
    n_images = loader.dataset.n_images
    if n_folds > 1 and not five_each(loader.dataset.image_of):
        raise InputError(f"--fold5 needs {CAPTIONS_PER_IMAGE} captions for each image, and split {split} has "
                         f"{len(loader.dataset)} for {n_images} images: leave it out")
    if n_images % n_folds:
        testall = os.path.join(opt.data_path, opt.data_name, "testall_ims.npy")
        hint = "try --split testall" if split != "testall" and os.path.exists(testall) else "leave --fold5 out"
        raise InputError(f"--fold5 needs five equal folds, and split {split} has {n_images} images: {hint}")
    if n_folds > 1 and n_images != n_folds * COCO_FOLD:
        print(f"note: five folds of {n_images // n_folds} images each, where COCO's have {COCO_FOLD}: their recalls "
              "do not compare", file=sys.stderr)
    if check:
        check(loaded, loader.dataset)
    images, captions = loaded.embed(loader)
    print(f"Images: {len(images)}, Captions: {len(captions)}", file=sys.stderr)
    return Evaluation(loaded, loader.dataset, images, captions, [], [None] * n_folds, None)


def print_evaluation(result):
    """Each fold's lines, where there are several, and those of the whole split or of the folds' means."""
    if len(result.folds) > 1:
        for metrics in result.folds:
            print("Image to text: " + ", ".join(f"{value:.1f}" for value in metrics.i2t))
            print("Text to image: " + ", ".join(f"{value:.1f}" for value in metrics.t2i))
            print(f"rsum: {metrics.rsum:.1f} ar: {metrics.ar:.1f} ari: {metrics.ari:.1f}")
        print("-----------------------------------")
        print("Mean metrics: ")
    print_metrics(result.metrics)


def _by_options(opt_eval, split="test"):
    """HAL's call of evalrank: the options and the split."""
    return opt_eval, split


def _by_path(model_path, data_path=None, split="dev", fold5=False):
    """VSE++'s and SCAN's call of evalrank: the options and the split."""
    return argparse.Namespace(model_path=os.fspath(model_path), data_path=data_path, fold5=fold5), split


def evalrank(*arguments, **named):
    """The family's calls: evaluate a checkpoint on a split, print the recalls, write what was asked for.

    `evalrank(opt_eval, split="test")`, HAL's: opt_eval as for `evaluate`, `write_results`, `write_csv`.
    `evalrank(model_path, data_path=None, split="dev", fold5=False)`, VSE++'s and SCAN's, where the first argument is
    a path: the data sets' folder is the checkpoint's unless data_path names another. Returns the Metrics.
    """
    by_path = "model_path" in named or arguments and isinstance(arguments[0], (str, os.PathLike))
    opt_eval, split = (_by_path if by_path else _by_options)(*arguments, **named)
    result = evaluate(opt_eval, split)
    write_results(opt_eval, split, result)
    write_csv(opt_eval, result)
    return result.metrics


def as_dict(metrics):
    """Metrics as plain names and numbers, for JSON."""
    return {"i2t": metrics.i2t._asdict(), "t2i": metrics.t2i._asdict(),
            "ar": metrics.ar, "ari": metrics.ari, "rsum": metrics.rsum}


def write_results(opt_eval, split, result, more=None):
    """Write `ranks.pth.tar` (of the first fold) into the current folder, as the released code does, and what
    opt_eval's save_json and save_embeddings ask for; more: further entries of the JSON file.
    """
    ranks = {name: (ranking.ranks.cpu(), ranking.top1.cpu().clone())  # not the storage of all items that came first
             for name, ranking in zip(("rt", "rti"), result.rankings[0])}
    folds = result.folds if len(result.folds) > 1 else []
    try:
        checkpoint.save("ranks.pth.tar", ranks)
    except InputError as error:  # nobody asked for this file by a flag
        print(f"note: {error}", file=sys.stderr)
    if getattr(opt_eval, "save_json", None):
        with replacing(opt_eval.save_json, "w", encoding="utf-8") as file:
            names = [member.opt.data_name for member in result.checkpoint.members]
            json.dump({"model_path": opt_eval.model_path, "data_name": names if names[1:] else names[0], "split": split,
                       "images": len(result.images), "captions": len(result.captions),
                       "folds": [as_dict(fold) for fold in folds], **as_dict(result.metrics), **(more or {})},
                      file, indent=1)
    if getattr(opt_eval, "save_embeddings", False):
        run = os.path.basename(os.path.dirname(os.path.abspath(opt_eval.model_path)))
        with replacing(f"{run}_img_and_cap_embeddings.npz") as file:
            np.savez(file, img_embs=result.images.cpu()[result.dataset.image_of].numpy(),
                     cap_embs=result.captions.cpu().numpy())


def write_csv(opt_eval, result):
    """Add the figures' line to the table that opt_eval's save_csv asks for, or to two of them, with folds."""
    if not getattr(opt_eval, "save_csv", None):
        return
    folds = {"_fold1": result.folds[0], "_fold5": result.metrics} if len(result.folds) > 1 else {"": result.metrics}
    for suffix, row in folds.items():
        figures = ", ".join(f"{value:.1f}" for value in (*row.i2t, *row.t2i, row.rsum))
        append(opt_eval.save_csv + suffix, f"{result.checkpoint.opt.logger_name}, {figures}\n")


def append(path, line):
    """Add a line to a text file; raises InputError where it cannot be written, such as to a pipe, which may wait for
    ever."""
    try:
        if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(0, "it is a pipe")
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror}): name another file") from error
