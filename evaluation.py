"""Retrieval evaluation: embed a split, name its recalls, evaluate a checkpoint.

Ranks are 0-based (see `retrieval.ranking`), and R@K is the percentage of queries with rank < K.
Models and data sets are imported only when a checkpoint is evaluated, so this file also works
beside somebody's own `model.py` and `data.py`.

"VSE++ code" below means VSE++ and the codes derived from it (SCAN, HAL and others). Their calls
work here with the same arguments.

A model to be evaluated is any object with these five attributes. `Checkpoint`,
`retrieval.ensemble.Ensemble` and those of `embeddings.as_model` are some; `evaluate_model` takes
any.

    loader(split)       What `embed` takes, for "train", "dev", "test" or "testall". It has a
                        `dataset` with len() = C captions, `n_images` = N, and `image_of`, (C,)
                        int64 on the CPU: each caption's image, ascending from 0. The report and
                        --eccv also read `captions` (C texts), `names` (N, or None) and, if it is
                        there, `ids_file`, where the names come from; --save_embeddings reads
                        `lines` (C,): each caption's line in its file.
    embed(loader, stride=1)
                        (images, captions) of every `stride`-th image and its captions: tensors
                        (N, ...) and (C, ...), or anything else with len(), `[chosen]` for a slice
                        or numbers, and `chunk(n)`, such as `retrieval.similarity.Words`.
    similarities(images, captions)
                        The source of similarities (see `retrieval.ranking`) between images and
                        captions that `embed` returned, or parts of them. The two may come from
                        different splits.
    members             The models that it consists of: `[self]`, if it is one.
    opt                 Has `data_path` and `data_name` (the data set's folder and name),
                        `logger_name` (the run's name in the CSV file), `measure` (the similarity's
                        name in the report) and `cross_attn` (SCAN's direction; None for a model
                        with one vector per item).

If it has `facts`, {name: text}, the report shows them instead of a checkpoint's path and data.
"""

import argparse
import json
import numbers
import os
import sys
from typing import NamedTuple

import numpy as np
import torch

from features.files import CAPTIONS_PER_IMAGE, five_each
from features.layout import in_fives
from layers.cross_attention import shard_xattn_i2t, shard_xattn_t2i  # noqa: F401 (re-exported)
from loss import order_sim  # noqa: F401 (re-exported)
from retrieval.encoding import compute_sim, encode, shard_attn_scores  # noqa: F401 (re-exported)
from retrieval.ensemble import Ensemble
from retrieval.metrics import Metrics, as_dict, mean_metrics, metrics_of, recall_of
from retrieval.ranking import image_numbers, rank_shifted
from retrieval.similarity import (
    SOURCES,
    CrossAttention,
    Matrix,
    Words,
    filled,
    packed,
    similarity_source,
)
from runtime import distributed
from runtime.device import choose_device, choose_products
from runtime.errors import InputError, left_out
from runtime.files import append, replacing
from runtime.finite import BrokenModel, check_size, checked
from training.meters import (
    AverageMeter,  # noqa: F401 (re-exported)
    LogCollector,  # noqa: F401 (re-exported)
)

FOLDS = 5
COCO_FOLD = 1000  # images
# Most images in a correction's bank by default; fewer with cross attention, which is slow.
BANK_IMAGES, BANK_REGION_IMAGES = 10_000, 1_000


def embed(model, loader, stride=1):
    """A split's embeddings on the model's device: images (N, D), each once, and captions (C, D).

    SCAN gives regions (N, R, D) and `retrieval.similarity.Words`.
    Raises BrokenModel if an embedding is not finite.

    model: `model.VSE`, `model.SCAN`, or one with their methods
    loader: has `dataset`, `batch_size` and `workers`
    stride: only every stride-th image is embedded, with its captions
    """
    model.val_start()
    dataset, batch_size = loader.dataset, loader.batch_size
    n_images = -(-dataset.n_images // stride)
    own = [
        model.embed_images(filled(batch, min(batch_size, n_images)) if batch.dim() < 4 else batch)[
            : len(batch)
        ]
        for batch in dataset.load_images(batch_size, loader.workers, stride, _part())
    ]
    like = model.no_embeddings()
    if model.attends:
        like = like.unsqueeze(1).expand(0, dataset.images.shape[1], -1)
    images = distributed.gather_batches(
        own, [len(one) for one in torch.arange(n_images).split(batch_size)], like
    )
    (images,) = checked([images], "images")
    return images, embed_texts(model, dataset.word_ids, batch_size, dataset.image_of % stride == 0)


def embed_texts(model, word_ids, batch_size, chosen=None):
    """Captions' embeddings (C, D) on the model's device; for SCAN, `retrieval.similarity.Words`.

    Equal captions are encoded once, so their embeddings are equal to the bit.

    word_ids: n captions as `inputs.word_ids.WordIds`
    chosen: (n,) bool, which captions are embedded; None: all
    """
    model.val_start()
    numbers = torch.arange(len(word_ids))
    distinct, place_of = _distinct(word_ids, numbers if chosen is None else numbers[chosen])
    lengths, of_words = word_ids.lengths[distinct], model.attends
    first, distance = _part()
    batches = list(zip(distinct.split(batch_size), lengths.split(batch_size)))
    own = [
        model.embed_captions(word_ids.padded(batch, int(long[0])), long)
        for batch, long in batches[first::distance]
    ]
    if of_words:
        own = [packed(states, long) for states, (_, long) in zip(own, batches[first::distance])]
    sizes = [int(long.sum()) if of_words else len(long) for _, long in batches]
    texts = distributed.gather_batches(own, sizes, model.no_embeddings())
    (texts,) = checked([texts], "words" if of_words else "captions")
    return Words.of(texts, lengths)[place_of] if of_words else texts[place_of.to(texts.device)]


def _distinct(word_ids, chosen):
    """The numbers of distinct captions, longest first, and each caption's place among them (n,).

    chosen: (n,) numbers of captions. Each length is handled by itself: padding all captions to the
    longest one would take too much memory.
    """
    lengths, found = word_ids.lengths[chosen], 0
    distinct, place_of = [], torch.empty_like(chosen)
    for length in lengths.unique().flip(0).tolist():
        places = (lengths == length).nonzero().squeeze(1)
        rows, kind = torch.unique(
            word_ids.padded(chosen[places], length), dim=0, return_inverse=True
        )
        place_of[places] = found + kind
        distinct.append(chosen.new_empty(len(rows)).scatter_(0, kind, chosen[places]))
        found += len(rows)
    return torch.cat(distinct), place_of


def _part():
    """(first batch that this process embeds, distance to its next)."""
    return distributed.rank(), distributed.size()


def encode_data(model, data_loader, log_step=10, logging=print, backbone=False):
    """Image and caption embeddings as arrays (C, D), one row per caption: the call of VSE++ code.

    SCAN gives (C, R, D), (C, longest, D) and the captions' lengths (C,).

    model: one of `model.py`, or any with `forward_emb(images, captions, lengths)`
    data_loader: one of `data.py`, or any that gives batches (see `retrieval.encoding`)
    log_step: batches between the lines passed to `logging`; with model and loader of this code,
        which embed each image once, one line comes at the end
    backbone: ignored; VSE-infinity code passes it
    """
    # A subclass may embed otherwise, so that it goes through its forward_emb.
    model_is_ours = type(model).__module__ == "model" and hasattr(model, "embed_images")
    dataset = getattr(data_loader, "dataset", None)
    if not (model_is_ours and hasattr(data_loader, "workers") and hasattr(dataset, "load_images")):
        return encode(model, data_loader, log_step, logging)
    images, captions = embed(model, data_loader)
    logging(f"Images: {len(images)}, Captions: {len(captions)}")
    if isinstance(captions, Words):
        return (
            images.cpu()[data_loader.dataset.image_of].numpy(),
            captions.padded().cpu().numpy(),
            captions.lengths.numpy(),
        )
    return images.cpu()[data_loader.dataset.image_of].numpy(), captions.cpu().numpy()


def _unique_images(images, n_captions):
    """A tensor of N unique images that have one or five captions each; InputError if they don't.

    images: (N, K), or as VSE++ code passes them, one row per caption; rows of one image may differ
        by rounding
    """
    images = torch.as_tensor(images).detach()
    if len(images) == n_captions > 0:
        if in_fives(images):
            images = images[::CAPTIONS_PER_IMAGE]
        else:
            print(
                f"note: {len(images)} rows of images for as many captions are taken for one "
                f"caption an image, since they don't come in {CAPTIONS_PER_IMAGE} of the same: "
                "otherwise give one row per image",
                file=sys.stderr,
            )
    each = n_captions // max(len(images), 1)
    if not len(images) or each not in (1, CAPTIONS_PER_IMAGE) or n_captions != len(images) * each:
        raise InputError(
            f"{n_captions} captions for {len(images)} images: there must be "
            f"{CAPTIONS_PER_IMAGE} for each image, or one"
        )
    return images


def _by_embeddings(images, captions, npts=None, measure="cosine", return_ranks=False):
    """VSE++'s and HAL's call of i2t and t2i: (source of similarities, npts, return_ranks)."""
    if npts is not None and not isinstance(npts, numbers.Integral):
        raise InputError(
            f"npts is {type(npts).__name__}, not a number of images: SCAN's call has similarities "
            "in the fourth place, i2t(images, captions, caplens, sims)"
        )
    captions = torch.as_tensor(captions).detach()
    source = SOURCES[measure](_unique_images(images, len(captions)), captions)
    return source, npts, return_ranks


def _by_scan(images, captions, caplens, sims, npts=None, return_ranks=False):
    """SCAN's call of i2t and t2i, which reads nothing but the similarities."""
    return _by_table(sims, npts, return_ranks)


def _by_count(npts, sims, return_ranks=False, mode="coco"):
    """VSE-infinity's call of i2t and t2i."""
    return _by_table(sims, npts, return_ranks)


def _by_table(sims, npts=None, return_ranks=False):
    """The call of i2t and t2i with similarities alone."""
    sims = torch.as_tensor(sims).detach()
    if sims.ndim != 2:
        raise InputError(
            f"the similarities have the shape {tuple(sims.shape)}: they must be a matrix with a "
            "row for each image and a column for each caption"
        )
    sims = _unique_images(sims if sims.is_floating_point() else sims.double(), sims.shape[1])
    rows, columns = map(torch.arange, sims.shape)
    return Matrix(sims, rows, columns, sims.device), npts, return_ranks


def _is_array(value):
    return getattr(value, "ndim", 0) > 0 or isinstance(value, (list, tuple))


def _recognised(*arguments, **named):
    """Whose call of i2t and t2i this is: one of the four functions above."""
    if arguments and isinstance(arguments[0], numbers.Integral):
        return _by_count
    if "caplens" in named or len(arguments) > 3 and _is_array(arguments[3]):
        return _by_scan
    if "sims" in named:
        return _by_scan if len(arguments) > 2 else _by_count if "npts" in named else _by_table
    alone = len(arguments) > 1 and not _is_array(arguments[1]) or len(arguments) == 1
    return _by_table if alone and "captions" not in named else _by_embeddings


def _directed(direction, arguments, named):
    call = _recognised(*arguments, **named)
    source, npts, return_ranks = call(*arguments, **named)
    if npts is not None and not 1 <= npts <= source.n_images:
        raise InputError(
            f"npts is {npts} for {source.n_images} images: it must be from 1 to their number"
        )
    ranking = rank_shifted(source)[0][direction]
    queries = None if npts is None else npts * len(ranking.ranks) // source.n_images
    ranks, top1 = (part[:queries].cpu().numpy() for part in (ranking.ranks, ranking.top1))
    recall = recall_of(ranks)
    return (recall, (ranks, top1)) if return_ranks else recall


def i2t(*arguments, **named):
    """Image-to-text Recall; with return_ranks, (Recall, (ranks (N,), top-1 captions (N,))).

    VSE++, HAL: (images, captions, npts=None, measure="cosine", return_ranks=False)
    SCAN: (images, captions, caplens, sims, npts=None, return_ranks=False)
    VSE-infinity: (npts, sims, return_ranks=False)
    or the similarities alone: (sims, npts=None, return_ranks=False)

    images: (N, K), or (5N, K) with one row per caption, as VSE++ code passes them. As many rows as
        captions that do not repeat five times each mean one caption per image.
    captions: (5N, K), in the order of the images
    npts: only the first npts images are queries, among all captions, as in the released code
    measure: "cosine" or "order"
    sims: (N, 5N) similarities; SCAN's images, captions and caplens are not read then
    """
    return _directed(0, arguments, named)


def t2i(*arguments, **named):
    """Text-to-image Recall, as `i2t`: ranks and top-1 images have one entry per caption."""
    return _directed(1, arguments, named)


@torch.no_grad()
def split_loss(images, captions, criterion, batch_size, bank=None, image_of=None):
    """Mean loss over a split's captions in batches, in file order, as validation logs it.

    Several processes share the batches.

    images, captions: as `embed` returns them
    image_of: (C,), each caption's image; None: equally many captions per image
    """
    image_of = image_numbers(image_of, len(images), len(captions)).to(captions.device)
    parts = [slice(start, start + batch_size) for start in range(0, len(captions), batch_size)]
    indices = torch.arange(len(captions), device=captions.device)
    losses = images.new_zeros(len(parts))
    is_scan = isinstance(captions, Words)
    attention = CrossAttention(images, captions, criterion.opt) if is_scan else None
    for place in range(distributed.rank(), len(parts), distributed.size()):
        part = parts[place]
        own = images[image_of[part]], captions[part]
        losses[place] = (
            criterion.of_similarities(attention.of(*own), None, None)
            if attention
            else criterion(*own, *(bank or (None,) * 3), indices[part])
        )
    distributed.add_up([losses])
    total = sum(loss * len(indices[part]) for loss, part in zip(losses.tolist(), parts))
    return total / len(captions)


# A model's evaluation ---------------------------------------------------------------------------


def print_metrics(metrics):
    """Print the five lines of a whole split."""
    print(f"rsum: {metrics.rsum:.1f}")
    print(f"Average i2t Recall: {metrics.ar:.1f}")
    print(f"Image to text: {metrics.i2t}")
    print(f"Average t2i Recall: {metrics.ari:.1f}")
    print(f"Text to image: {metrics.t2i}")


class Checkpoint(NamedTuple):
    """A checkpoint ready for evaluation: its model on the device, its options, its vocabulary."""

    model: object  # model.VSE or model.SCAN
    opt: object
    vocabulary: object
    path: str = ""
    features: dict | None = None  # description of the features that it was trained on

    reads_words = reads_photos = True  # questions may be of both kinds

    @property
    def members(self):
        """Itself alone; an Ensemble has several."""
        return [self]

    @property
    def name(self):
        """What messages call it."""
        return f"checkpoint {self.path}"

    def embed_questions(self, questions):
        """Embeddings (q, D) of texts on the model's device; for SCAN, `similarity.Words`."""
        from features.texts import read_texts

        words = read_texts(questions, self.vocabulary, self.opt.caption_reading)
        return embed_texts(self.model, words, self.opt.batch_size)

    def embed(self, loader, stride=1):
        """(images, captions) of a loader's split, as `evaluation.embed` returns them."""
        return embed(self.model, loader, stride)

    def similarities(self, images, captions):
        """The source of similarities (see `retrieval.ranking`) of embeddings."""
        return similarity_source(self.opt, images, captions)

    def loader(self, split):
        """The loader of a split of its data set; prints the split's unknown words on stderr.

        Raises InputError if the split's features are of another kind than the checkpoint's.
        """
        from data import get_test_loader
        from features.description import features_of
        from inputs.word_ids import unknown_in_words

        opt = self.opt

        def load():
            features_of(opt.data_path, opt.data_name, self.features, self.path)
            return get_test_loader(
                split,
                opt.data_name,
                self.vocabulary,
                opt.crop_size,
                opt.batch_size,
                min(opt.workers, os.cpu_count()),
                opt,
            )

        loader = distributed.machine_by_machine(load)
        print(unknown_in_words(loader.dataset.word_ids, split, self.path), file=sys.stderr)
        return loader


def load_for_evaluation(opt_eval):
    """The Checkpoint in the file opt_eval.model_path.

    opt_eval may also have data_path, data_name, vocab_path, device, batch_size, caption_reading and
    skip_broken_images; what is absent or None is the checkpoint's own.
    Raises InputError if checkpoint and vocabulary do not fit each other.
    """
    from inputs.captions import is_precomputed
    from model import build
    from training import checkpoint

    path = opt_eval.model_path
    content = distributed.from_first(lambda: checkpoint.load(path), checkpoint.ADMITTED)
    opt = content["opt"]
    for name in ("data_path", "vocab_path", "batch_size"):
        if getattr(opt_eval, name, None):
            setattr(opt, name, getattr(opt_eval, name))
    opt.caption_reading = getattr(opt_eval, "caption_reading", None) or checkpoint.caption_reading(
        content
    )
    # Never a folder that a stranger's checkpoint names: it would be written to.
    opt.cache_dir = os.path.join(opt.data_path, ".cache")
    opt.skip_broken_images = getattr(opt_eval, "skip_broken_images", False)
    opt.cnn_weights = "none"  # the checkpoint's own weights are loaded instead
    vocabulary = checkpoint.vocabulary(content, path, getattr(opt_eval, "vocab_path", None))
    data_name = getattr(opt_eval, "data_name", None) or opt.data_name
    if is_precomputed(data_name) != is_precomputed(opt.data_name):
        raise InputError(
            f"--data_name {data_name}: the checkpoint {path} was trained on {opt.data_name}, and "
            "one of them is of photos, the other of features: name a data set of the same kind"
        )
    opt.data_name = data_name
    model = build(opt)
    checkpoint.load_weights(model, content, path)
    try:
        check_size(model)
    except BrokenModel as error:
        raise InputError(f"{path}: {error}") from error
    device = choose_device(getattr(opt_eval, "device", "auto"))
    choose_products(device, content.get("float32_products"))
    return Checkpoint(model.to(device), opt, vocabulary, path, content.get("features"))


def bank_stride(opt, n_images, limit=None):
    """The stride by which a split's images are thinned out to a correction's bank.

    limit: most images in the bank; 0: all; None: BANK_IMAGES, or BANK_REGION_IMAGES for SCAN
    """
    most = BANK_REGION_IMAGES if opt.cross_attn else BANK_IMAGES
    return -(-n_images // (most if limit is None else limit or n_images))


def load_members(opt_eval):
    """The Checkpoint opt_eval.model_path, or the Ensemble of several if that is a list of paths.

    opt_eval: as for `load_for_evaluation`; data_name and vocab_path may be lists, too, with one
        value per path
    """
    paths = opt_eval.model_path
    if not isinstance(paths, list):
        return load_for_evaluation(opt_eval)
    given = {name: getattr(opt_eval, name, None) for name in ("data_name", "vocab_path")}
    each = {
        name: value if isinstance(value, list) else [value] * len(paths)
        for name, value in given.items()
    }
    return Ensemble(
        [
            load_for_evaluation(
                argparse.Namespace(
                    **{**vars(opt_eval), "model_path": path, **dict(zip(each, values))}
                )
            )
            for path, *values in zip(paths, *each.values(), strict=True)
        ]
    )


class Evaluation(NamedTuple):
    """A model's figures on a split: of all of it (one fold), or of five folds and their mean."""

    checkpoint: Checkpoint  # or another model to be evaluated
    dataset: object
    images: torch.Tensor  # (N, D), or what else the model's `embed` returns
    captions: torch.Tensor  # (C, D), likewise
    rankings: list  # for each fold, (i2t Ranking, t2i Ranking)
    folds: list  # for each fold, Metrics
    metrics: Metrics  # of the whole split, or the mean over folds

    def parts(self):
        """Each fold's (images, captions, image_of)."""
        parts = [
            part.chunk(len(self.folds))
            for part in (self.images, self.captions, self.dataset.image_of)
        ]
        return [
            (images, captions, image_of - image_of[0]) for images, captions, image_of in zip(*parts)
        ]

    def ranked(self, rankings):
        """The same Evaluation with these rankings, one pair per fold, and their figures."""
        folds = [metrics_of(pair) for pair in rankings]
        return self._replace(rankings=rankings, folds=folds, metrics=mean_metrics(folds))


def evaluate(opt_eval, split, top=1, check=None):
    """The Evaluation of a checkpoint, or of several as one, on a split; prints its recalls.

    opt_eval: as for `load_members`; may have fold5 and save_embeddings
    top: first items kept per query
    check: called with the model and the data set before anything is computed, so that it can refuse
    """
    loaded = load_members(opt_eval)
    if loaded.opt.cross_attn and getattr(opt_eval, "save_embeddings", False):
        raise InputError(
            "--save_embeddings is for models with one vector an item, and this one is SCAN, with "
            "one for each region and word: leave it out"
        )
    return evaluate_model(loaded, split, getattr(opt_eval, "fold5", False), top, check)


def evaluate_model(loaded, split, fold5=False, top=1, check=None):
    """The Evaluation of a model (see the module's text) on a split; prints its recalls.

    fold5: mean over five equal folds, as for COCO's 1K figures
    top, check: as for `evaluate`
    """
    result = embedded(loaded, split, fold5, check)
    rankings = []
    for images, captions, image_of in result.parts():
        source = loaded.similarities(images, captions)
        rankings += rank_shifted(source, top=top, image_of=image_of)
    result = result.ranked(rankings)
    print_evaluation(result)
    return result


def embedded(loaded, split, fold5=False, check=None):
    """The Evaluation of a model on a split, with embeddings but without rankings and figures.

    loaded: a model to be evaluated, such as a Checkpoint or an Ensemble
    check: as for `evaluate`
    """
    loader, opt, n_folds = loaded.loader(split), loaded.opt, FOLDS if fold5 else 1
    n_images = loader.dataset.n_images
    if n_folds > 1 and not five_each(loader.dataset.image_of):
        raise InputError(
            f"--fold5 needs {CAPTIONS_PER_IMAGE} captions for each image, and split {split} has "
            f"{len(loader.dataset)} for {n_images} images: leave it out"
        )
    if n_images % n_folds:
        testall = os.path.join(opt.data_path, opt.data_name, "testall_ims.npy")
        hint = (
            "try --split testall"
            if split != "testall" and os.path.exists(testall)
            else "leave --fold5 out"
        )
        raise InputError(
            f"--fold5 needs five equal folds, and split {split} has {n_images} images: {hint}"
        )
    if n_folds > 1 and n_images != n_folds * COCO_FOLD:
        print(
            f"note: five folds of {n_images // n_folds} images each, where COCO's have "
            f"{COCO_FOLD}: their recalls do not compare",
            file=sys.stderr,
        )
    if check:
        check(loaded, loader.dataset)
    images, captions = loaded.embed(loader)
    print(f"Images: {len(images)}, Captions: {len(captions)}", file=sys.stderr)
    return Evaluation(loaded, loader.dataset, images, captions, [], [None] * n_folds, None)


def print_evaluation(result):
    """Print the lines of the whole split, or of each fold and their means."""
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


def _by_path(model_path, data_path=None, split="dev", fold5=False, save_path=None, cxc=False):
    """VSE++'s, SCAN's and VSE-infinity's call of evalrank: the options and the split."""
    if save_path or cxc:
        raise InputError(
            "evalrank takes no save_path and no cxc here: run compute_results.py, with "
            "--save_embeddings or --eccv"
        )
    return argparse.Namespace(
        model_path=os.fspath(model_path), data_path=data_path, fold5=fold5
    ), split


def evalrank(*arguments, **named):
    """The Metrics of a checkpoint on a split; prints the recalls and writes what was asked for.

    HAL's call: `evalrank(opt_eval, split="test")`, with opt_eval as for `evaluate`, `write_results`
    and `write_csv`. VSE++'s, SCAN's and VSE-infinity's call, recognised by a path as the first
    argument: `evalrank(model_path, data_path=None, split="dev", fold5=False)`; data_path defaults
    to the checkpoint's.
    """
    by_path = "model_path" in named or arguments and isinstance(arguments[0], (str, os.PathLike))
    opt_eval, split = (_by_path if by_path else _by_options)(*arguments, **named)
    result = evaluate(opt_eval, split)
    write_results(opt_eval, split, result)
    write_csv(opt_eval, result)
    return result.metrics


def write_results(opt_eval, split, result, more=None):
    """Write the files of an Evaluation.

    `ranks.pth.tar`, of the first fold, goes into the current folder, as in the released code.
    opt_eval's save_json and save_embeddings name or ask for further files.

    more: further entries of the JSON file
    """
    # A clone of top1, since torch.save would write the storage of all first items with a view.
    ranks = {
        name: (ranking.ranks.cpu(), ranking.top1.cpu().clone())
        for name, ranking in zip(("rt", "rti"), result.rankings[0])
    }
    folds = result.folds if len(result.folds) > 1 else []
    try:
        with replacing("ranks.pth.tar") as file:
            torch.save(ranks, file)
    except InputError as error:  # nobody asked for this file by a flag
        print(f"note: {error}", file=sys.stderr)
    if getattr(opt_eval, "save_json", None):
        with replacing(opt_eval.save_json, "w", encoding="utf-8") as file:
            names = [member.opt.data_name for member in result.checkpoint.members]
            json.dump(
                {
                    "model_path": opt_eval.model_path,
                    "data_name": names if names[1:] else names[0],
                    "split": split,
                    "images": len(result.images),
                    "captions": len(result.captions),
                    "folds": [as_dict(fold) for fold in folds],
                    **as_dict(result.metrics),
                    **(more or {}),
                },
                file,
                indent=1,
            )
    if getattr(opt_eval, "save_embeddings", False):
        run = os.path.basename(os.path.dirname(os.path.abspath(opt_eval.model_path)))
        with replacing(f"{run}_img_and_cap_embeddings.npz") as file:
            in_file = result.dataset.lines.argsort()
            np.savez(
                file,
                img_embs=result.images.cpu()[result.dataset.image_of[in_file]].numpy(),
                cap_embs=result.captions.cpu()[in_file].numpy(),
            )


def write_csv(opt_eval, result):
    """Append the figures to the table opt_eval.save_csv, if any; with folds, to two tables."""
    if not getattr(opt_eval, "save_csv", None):
        return
    folds = (
        {"_fold1": result.folds[0], "_fold5": result.metrics}
        if len(result.folds) > 1
        else {"": result.metrics}
    )
    for suffix, row in folds.items():
        figures = ", ".join(f"{value:.1f}" for value in (*row.i2t, *row.t2i, row.rsum))
        append(opt_eval.save_csv + suffix, f"{result.checkpoint.opt.logger_name}, {figures}\n")


__getattr__ = left_out(
    __name__,
    {
        "eval_ensemble": "compute_results.py takes several checkpoints as --model_path, and "
        "evaluates the mean of their similarities",
        "softmax": "use torch.softmax",
    },
)
