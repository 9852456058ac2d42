"""The data sets, and how batches are made of them.

A batch of precomputed features is one gather from the captions' flat array of word ids and one
from the features, on the device that holds them. The order of an epoch depends only on the seed
and the epoch's number.

Every data set has `n_images` and `image_of`: each caption's image number, (C,) int64 on the CPU.

"VSE++ code" below means VSE++ and the codes derived from it. `get_loaders` and the others work as
each of them calls them, and a loop over a loader gets that code's batches (see `HANDED`).
"""

import contextlib
import copy
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from features.files import (
    CAPTIONS_PER_IMAGE,
    map_array,
    open_features,
    read_ids,
    rows_at_a_time,
)
from features.layout import caption_layout, first_of, image_by_image, within_cap
from features.texts import FrozenTexts, TextRows
from inputs.augmentation import drop_regions, drop_words, kept_regions
from inputs.captions import (
    COCO_ANNOTATIONS,
    SPLITS,
    flickr_json_name,
    is_precomputed,
    read_captions,
    read_json,
    read_karpathy,
    refuse_features,
)
from inputs.decoding import decode_image
from inputs.photos import (
    _tell_of_restval,
    image_path,
    image_transform,  # noqa: F401 (re-exported)
)
from inputs.word_ids import by_length, number_words
from layers.pooling import region_lengths
from runtime.device import to_device
from runtime.errors import InputError, left_out
from runtime.seeds import seed_for
from vocab import MASK

FULL_IMG_DIM = 4096  # the released code's default; unused with raw images
CROP_SIZE = 224  # SCAN's calls name none
DROPPED = 0.2  # the share of words and regions that VSE-infinity's training loader leaves out
WORD_DRAW, REGION_DRAW = 3, 4  # seed size augmentation; 0 to 2 seed the orders (Loader.batches)
WORKER_GRACE = 20  # seconds that a worker outlives SIGTERM
DEV_CAPTIONS = 5000  # the released code's cap on the dev split

# Data sets --------------------------------------------------------------------------------------


class PrecompDataset(torch.utils.data.Dataset):
    """Precomputed features `<data_path>/<split>_ims.npy` with captions `<split>_caps.txt`.

    Features are (n_images, img_dim), or (n_images, regions, img_dim). They stay memory-mapped
    unless `place` moves them. `features.layout.caption_layout` finds out which captions belong to
    an image.

    reading: how captions are read (see `inputs.tokenizer.tokenize`), or options that may say so.
    img_dim: the expected width (default: any).
    cache_dir: see `inputs.word_ids.number_words`.
    together: order captions image by image, instead of as in the file.
    Attributes: names, the images' names or None; lines, the captions' positions in the file; and
    those that VSE++ code reads: vocab, captions, images (a tensor), length (captions), im_div
    (caption c has the row c // im_div; None if no number says it).
    Raises InputError if a file is missing or broken, the files do not fit each other, or the width
    is not `img_dim`.
    """

    def __init__(
        self,
        data_path,
        data_split,
        vocab,
        reading="text",
        img_dim=None,
        cache_dir=None,
        together=False,
    ):
        if not isinstance(reading, str):  # VSRN code passes its options in this place
            reading = getattr(reading, "caption_reading", None) or "text"
        caption_file = os.path.join(data_path, f"{data_split}_caps.txt")
        feature_file = os.path.join(data_path, f"{data_split}_ims.npy")
        if not os.path.isdir(data_path):
            raise InputError(
                f"data folder {data_path} is not there: check --data_path and --data_name"
            )
        captions = read_captions(caption_file)
        self.images = open_features(feature_file)
        ids_file = os.path.join(data_path, f"{data_split}_ids.txt")
        ids = read_ids(ids_file) if os.path.exists(ids_file) else None
        with _blank_end_named(captions, caption_file):
            found = caption_layout(self.images, len(captions), feature_file, ids_file, ids)
        if img_dim is not None and self.images.shape[-1] != img_dim:
            raise InputError(
                f"{feature_file} has features of width {self.images.shape[-1]}, but {img_dim} was "
                "expected: check --img_dim, or the checkpoint against the data"
            )
        self.lines = within_cap(
            found.image_of, DEV_CAPTIONS if data_split == "dev" else len(captions)
        )
        if together:
            self.lines = self.lines[image_by_image(found.image_of[self.lines])]
        self.left_out = len(captions) - len(self.lines)
        self.captions = [captions[line] for line in self.lines.tolist()]
        self.image_of, self.row_of = found.image_of[self.lines], found.row_of[self.lines]
        self.n_images = int(self.image_of.max()) + 1
        self.names = found.names and found.names[: self.n_images]
        if isinstance(vocab, FrozenTexts):
            self.word_ids = vocab.read(data_path, data_split, captions, self.lines)
        else:
            self.word_ids = number_words(self.captions, vocab, reading, cache_dir)
        self.placed_word_ids, self.lengths = self.word_ids, self.word_ids.lengths
        self.vocab, self.length = vocab, len(self.captions)
        self.im_div = _divisor(self.row_of)
        self.device, self.placed_row_of = torch.device("cpu"), self.row_of
        self.drops_words = self.drops_regions = self.region_counts = None

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """One caption: (image, word ids (T,), caption index, image index).

        The image is (img_dim,) or (regions, img_dim).
        """
        return (
            self.images[self.row_of[index]].float(),
            self.word_ids[index],
            index,
            int(self.image_of[index]),
        )

    def place(self, device, features_on_device=None):
        """Let batches come on `device`: word ids move there, and the features if asked for.

        features_on_device: None moves them to a CUDA device if they fit in half of its free memory.
        """
        self.device, self.placed_word_ids = device, self.word_ids.to(device)
        if features_on_device is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            features_on_device = self.images.numel() * self.images.element_size() <= free / 2
        if features_on_device:
            self.images = self.images.to(device)
        self.placed_row_of = self.row_of.to(self.images.device)

    def augment(self, drop_words, drop_regions, vocab, seed):
        """From now on, `load` can leave out words and regions at these rates.

        This is VSE-infinity's size augmentation; what is left out depends only on seed and epoch.
        Raises InputError if the vocabulary has no word to stand for masked ones.
        """
        if drop_words:
            if MASK not in vocab.word2idx:
                raise InputError(
                    f"--drop_words needs the word {MASK}, but the model to start from was trained "
                    "without it: leave the flag out, or start from a model that was trained with "
                    "it"
                )
            self.drops_words = drop_words, len(vocab), vocab(MASK), seed
        if drop_regions:
            self.drops_regions = drop_regions, seed
            blocks = self.images.split(rows_at_a_time(self.images))
            self.region_counts = torch.cat([region_lengths(block) for block in blocks])

    def epoch_words(self, epoch, augmented):
        """An epoch's WordIds: (on the CPU, on the device)."""
        if not augmented or not self.drops_words:
            return self.word_ids, self.placed_word_ids
        *how, seed = self.drops_words
        words = drop_words(
            self.word_ids, *how, torch.Generator().manual_seed(seed_for(seed, epoch, WORD_DRAW))
        )
        return words, words.to(self.device)

    def _region_draws(self, epoch, augmented):
        """An epoch's draws, uniform in [0, 1): (captions, regions); None if none are dropped."""
        if not augmented or not self.drops_regions:
            return None
        generator = torch.Generator().manual_seed(
            seed_for(self.drops_regions[1], epoch, REGION_DRAW)
        )
        return torch.rand(len(self), self.images.shape[1], generator=generator)

    def regions_left(self, batches, epoch):
        """The most regions that an image of each batch keeps; None for each if none are dropped.

        batches: tensors of caption indices.
        """
        draws = self._region_draws(epoch, True)
        if draws is None:
            return [None] * len(batches)
        return [
            int(
                kept_regions(
                    self.region_counts[self.row_of[batch]], self.drops_regions[0], draws[batch]
                )
                .sum(1)
                .max()
            )
            for batch in batches
        ]

    def _rows(self, rows, counts=None, draws=None):
        """Feature rows, float32, on the device; to a GPU through pinned memory, without waiting.

        counts, draws: of these rows, if regions are to be dropped.
        """
        features = self.images.index_select(0, to_device(rows, self.images.device))
        if draws is not None:
            features = drop_regions(features, counts, self.drops_regions[0], draws)
        if self.device.type == "cuda" and not features.is_cuda:
            features = features.pin_memory()
        return to_device(features, self.device).float()

    def load(self, batches, workers=0, epoch=0, augmented=False):
        """Yield images, captions, lengths, ids and indices for each (B,) tensor of caption indices.

        Each batch has its longest caption first. lengths stay on the CPU; the others are on the
        data set's device. augmented: whether to drop what `augment` said.
        """
        if not len(batches):
            return
        words, placed_words = self.epoch_words(epoch, augmented)
        draws = self._region_draws(epoch, augmented)
        all_lengths = words.lengths
        batches = [indices[by_length(all_lengths[indices])] for indices in batches]
        # In one copy: a copy per step would wait for the GPU each time.
        placed = torch.cat(batches).to(self.device)
        for indices, there in zip(batches, placed.split([len(indices) for indices in batches])):
            lengths = all_lengths[indices]
            rows = self.placed_row_of[indices if self.images.device.type == "cpu" else there]
            dropped = (
                () if draws is None else (self.region_counts[self.row_of[indices]], draws[indices])
            )
            yield (
                self._rows(rows, *dropped),
                placed_words.padded(there, int(lengths[0])),
                lengths,
                there,
                there,
            )

    def load_images(self, batch_size, workers=0, stride=1, part=(0, 1)):
        """Yield batches of the features of each image, once and in order.

        stride: only every `stride`-th image is embedded.
        part: (first batch, step to the next), if other processes load the others.
        """
        rows = self.row_of[first_of(self.image_of)[::stride]]
        for batch in rows.split(batch_size)[part[0] :: part[1]]:
            yield self._rows(batch)


@contextlib.contextmanager
def _blank_end_named(captions, caption_file):
    """Let an InputError of the block mention a blank last caption, which is its likely cause."""
    try:
        yield
    except InputError as error:
        if captions[-1]:
            raise
        raise InputError(
            f"caption file {caption_file}, line {len(captions)}: the last line is "
            f"blank, and counts as a caption: remove it (with it, {error})"
        ) from error


def _divisor(row_of):
    """The number d for which caption c has the row c // d: 1 or 5; None if neither fits."""
    each = torch.arange(len(row_of))
    fitting = (d for d in (1, CAPTIONS_PER_IMAGE) if torch.equal(row_of, each // d))
    return next(fitting, None)


# Batches as other codes take them ---------------------------------------------------------------


def _four(batch):
    """VSE++'s and SCAN's parts: images, captions, lengths, ids; the last two as lists of int."""
    images, captions, lengths, ids, _ = batch
    return images, captions, lengths.tolist(), ids.tolist()


def _five(batch):
    """HAL's parts: images, captions, lengths, ids, indices; the last three as lists of int."""
    return *_four(batch), batch[4].tolist()


def _with_image_lengths(batch):
    """VSE-infinity's parts: images, image lengths (B,) float, captions, lengths, ids.

    Photos have no lengths, and come in four parts.
    """
    images, *rest = _four(batch)
    counts = (region_lengths(images).float(),) if images.dim() == 3 else ()
    return images, *counts, *rest


# How each code's loader hands over a batch that `load` gives. Lists of int work wherever the
# released tuples do, and index an array as well.
HANDED = {"vsepp": _four, "hal": _five, "vse_infty": _with_image_lengths}


def _code_of(opt):
    """Whose batches go with the options: HAL's have `local_alpha`, VSE-infinity's a warm-up."""
    if hasattr(opt, "local_alpha"):
        return "hal"
    return "vse_infty" if hasattr(opt, "vse_mean_warmup_epochs") else "vsepp"


class _Call(NamedTuple):
    """What a call of `get_loaders` or `get_test_loader` asks for."""

    data_name: str
    vocab: object
    crop_size: int
    batch_size: int
    workers: int
    opt: object
    code: str  # one of HANDED


def _as_vsepp(data_name, vocab, crop_size, batch_size, workers, opt):
    code = "hal" if _code_of(opt) == "hal" else "vsepp"
    return _Call(data_name, vocab, crop_size, batch_size, workers, opt, code)


def _as_scan(data_name, vocab, batch_size, workers, opt):
    if _code_of(opt) == "vse_infty":
        return _as_vse_infty(opt.data_path, data_name, vocab, batch_size, workers, opt)
    return _Call(data_name, vocab, CROP_SIZE, batch_size, workers, opt, "vsepp")


def _as_vse_infty(data_path, data_name, vocab, batch_size, workers, opt):
    if getattr(opt, "precomp_enc_type", "basic") == "backbone":
        raise InputError(
            "VSE-infinity's grid branch (precomp_enc_type backbone) has no loader here: extract "
            "features with extract_features.py, or call get_loaders(data_name, vocab, crop_size, "
            "batch_size, workers, opt) for photos"
        )
    own = is_precomputed(data_name) and os.path.isdir(os.path.join(data_path, data_name))
    opt = with_found(opt, data_path=data_path)
    name = data_name if own else "precomp"
    return _Call(name, vocab, CROP_SIZE, batch_size, workers, opt, "vse_infty")


def _call(*arguments, **named):
    """Recognise whose call this is: by a path in front, or by the number of arguments."""
    if "data_path" in named or len(arguments) > 1 and isinstance(arguments[1], str):
        return _as_vse_infty(*arguments, **named)
    with_crop = "crop_size" in named or len(arguments) + len(named) == 6
    return (_as_vsepp if with_crop else _as_scan)(*arguments, **named)


def with_found(opt, **found):
    """A copy of the options with what was found out after they were parsed."""
    opt = copy.copy(opt)
    vars(opt).update(found)
    return opt


# Loaders ----------------------------------------------------------------------------------------


class Loader:
    """Batches of a data set; seed and epoch alone decide the order if it is shuffled.

    Each pass over a shuffled loader is the next epoch, from 0, and augmented if the data set is.
    Once `epoch` is set, each pass is that epoch.

    code: whose batches a pass gives, one of HANDED (default: those of `load`, as tensors).
    """

    def __init__(self, dataset, batch_size, shuffle=False, workers=0, seed=0, code=None):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.workers, self.seed, self.epoch, self.passes = workers, seed, None, 0
        self.code = code

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def batches(self, draw=0, epoch=None):
        """An epoch's caption indices, batch by batch; another `draw` gives another order.

        epoch: None means the one that was set, or 0.
        """
        if not self.shuffle:
            return torch.arange(len(self.dataset)).split(self.batch_size)
        epoch = (self.epoch or 0) if epoch is None else epoch
        generator = torch.Generator().manual_seed(seed_for(self.seed, epoch, draw))
        return torch.randperm(len(self.dataset), generator=generator).split(self.batch_size)

    def load(self, batches, epoch=None, **options):
        """Iterate over the batches of these caption indices.

        epoch: as for `batches`; options: for the data set's `load`.
        """
        epoch = (self.epoch or 0) if epoch is None else epoch
        return self.dataset.load(batches, self.workers, epoch, **options)

    def __iter__(self):
        epoch = self.epoch
        if epoch is None:
            epoch, self.passes = self.passes, self.passes + 1
        batches = self.load(self.batches(epoch=epoch), epoch, augmented=self.shuffle)
        return map(HANDED[self.code], batches) if self.code else batches


def get_dataset(split, data_name, vocab, crop_size, opt, together=False):
    """One split of a data set: train, dev, test or testall; val means dev.

    opt: data_path and, if they are there, use_restval, img_dim, caption_reading, cache_dir, seed
    and skip_broken_images.
    together: order captions image by image, instead of as in the file.
    For COCO's photos, testall is test.
    """
    folder, split = os.path.join(opt.data_path, data_name), "dev" if split == "val" else split
    options = {
        "reading": getattr(opt, "caption_reading", None) or "text",
        "cache_dir": getattr(opt, "cache_dir", None),
        "together": together,
    }
    if is_precomputed(data_name):
        return PrecompDataset(
            folder,
            split,
            vocab,
            img_dim=getattr(opt, "img_dim", None),
            **options,
        )
    options |= {
        "seed": getattr(opt, "seed", 0),
        "skip_broken": getattr(opt, "skip_broken_images", False),
    }
    transform = image_transform(split == "train", crop_size)
    if not os.path.isdir(folder):
        raise InputError(f"data folder {folder} is not there: check --data_path and --data_name")
    refuse_features(folder, data_name)
    if data_name == "coco":
        split = "test" if split == "testall" else split
        return coco_dataset(
            folder, split, vocab, transform, getattr(opt, "use_restval", False), **options
        )
    return FlickrDataset(
        os.path.join(folder, "images"),
        os.path.join(folder, flickr_json_name(data_name)),
        split,
        vocab,
        transform,
        getattr(opt, "use_restval", False),
        **options,
    )


def get_loaders(*arguments, **named):
    """The shuffled training loader and the dev loader, as any of these codes calls it.

    VSE++, HAL: (data_name, vocab, crop_size, batch_size, workers, opt). A pass gives HAL's batches
        of five parts if opt has `local_alpha`, else VSE++'s of four.
    SCAN: (data_name, vocab, batch_size, workers, opt), batches of four parts.
    VSE-infinity: (data_path, data_name, vocab, batch_size, workers, opt), its batches of five, and
        its augmentation of the training set. The features are those in `<data_path>/precomp`.
    """
    call = _call(*arguments, **named)
    train = get_dataset("train", call.data_name, call.vocab, call.crop_size, call.opt)
    opt = with_found(call.opt, **found_form(train, call.opt))
    check_form(train, opt)
    _augment(train, call, opt)
    return (
        Loader(
            train,
            call.batch_size,
            shuffle=True,
            workers=call.workers,
            seed=getattr(opt, "seed", 0),
            code=call.code,
        ),
        _test_loader("dev", call._replace(opt=opt)),
    )


def _augment(train, call, opt):
    """Augment the training set as the options say; as VSE-infinity calls it, at its rates."""
    usual = DROPPED if call.code == "vse_infty" else 0
    words, regions = (getattr(opt, name, usual) for name in ("drop_words", "drop_regions"))
    if not words and not regions:
        return
    if not is_precomputed(call.data_name):
        raise InputError(
            f"--drop_words and --drop_regions are for precomputed features, and {call.data_name} "
            "holds photos: leave them out"
        )
    if usual and MASK not in call.vocab.word2idx:
        raise InputError(
            f"VSE-infinity's loader hides words behind {MASK}, which the vocabulary lacks: call "
            f"vocab.add_word('{MASK}') first, as its train.py does"
        )
    train.augment(words, regions, call.vocab, getattr(opt, "seed", 0))


def found_form(dataset, opt):
    """{option: value} that the training data decide: widths, and the pooling of regions.

    opt's own img_dim and image_pooling stay, if it has them.
    """
    features = getattr(dataset, "images", None)
    width = FULL_IMG_DIM if features is None else features.shape[-1]
    found = {} if getattr(opt, "img_dim", None) else {"img_dim": width}
    if features is not None and features.dim() == 3:
        found["regions"] = features.shape[1]
        if not getattr(opt, "cross_attn", None):
            found["image_pooling"] = getattr(opt, "image_pooling", None) or "mean"
    if isinstance(dataset.word_ids, TextRows):
        found["word_dim"] = dataset.word_ids.rows.shape[1]
    return found


def check_form(dataset, opt):
    """Raise InputError if the data set's features are not of the form that the model takes.

    The options describe the model: over vectors, or over a number of regions. Those of other codes
    may say nothing of it, and then features of any form will do.
    """
    texts = getattr(dataset, "word_ids", None)
    if isinstance(texts, TextRows) and texts.rows.shape[1] != opt.word_dim:
        raise InputError(
            f"the text vectors have width {texts.rows.shape[1]}, but the model takes {opt.word_dim}"
            ": make them with the text model of its training"
        )
    says = hasattr(opt, "image_pooling") or hasattr(opt, "cross_attn")
    shape = getattr(getattr(dataset, "images", None), "shape", ())
    expected = getattr(opt, "regions", None)
    over_regions = (
        bool(getattr(opt, "image_pooling", None) or getattr(opt, "cross_attn", None))
        or getattr(opt, "precomp_enc_type", "basic") == "mlp"
    )
    if len(shape) == 3 and says and not over_regions:
        raise InputError(
            f"the model works over vectors, but the features are {shape[1]} regions per image, of "
            f"shape {tuple(shape)}: evaluate it on features like those of its training"
        )
    if len(shape) != 3 and (over_regions or getattr(opt, "drop_regions", 0)):
        raise InputError(
            "the model works over regions (--image_pooling, --precomp_enc_type mlp, "
            f"--drop_regions or --cross_attn), but the features are of shape {tuple(shape)}: it "
            "needs (images, regions, width)"
        )
    if len(shape) == 3 and expected not in (None, shape[1]):
        raise InputError(
            f"the features have {shape[1]} regions per image, but the model was trained on "
            f"{expected}: evaluate it on features like those of its training"
        )


def get_test_loader(split_name, *arguments, **named):
    """An unshuffled loader of one split, with the captions image by image.

    The further arguments are those of `get_loaders`, as any of the codes has them. VSE-infinity's
    data_path may be left out, as in its code: opt has it.
    """
    return _test_loader(split_name, _call(*arguments, **named))


def _test_loader(split, call):
    dataset = get_dataset(
        split, call.data_name, call.vocab, call.crop_size, call.opt, together=True
    )
    check_form(dataset, call.opt)
    if isinstance(dataset, ImageDataset):
        # Evaluation of the training split is not augmented either.
        dataset.transform = image_transform(False, call.crop_size)
    return Loader(dataset, call.batch_size, workers=call.workers, code=call.code)


def get_precomp_loader(
    data_path, data_split, vocab, opt, batch_size=100, shuffle=True, num_workers=2
):
    """A loader of one split of the features in the folder `data_path`, as VSE++ code calls it."""
    reading, cache_dir = (getattr(opt, name, None) for name in ("caption_reading", "cache_dir"))
    dataset = PrecompDataset(
        data_path, data_split, vocab, reading or "text", getattr(opt, "img_dim", None), cache_dir
    )
    seed = getattr(opt, "seed", 0)
    return Loader(dataset, batch_size, shuffle, num_workers, seed, _code_of(opt))


def get_loader_single(
    data_name,
    split,
    root,
    json,
    vocab,
    transform,
    batch_size=100,
    shuffle=True,
    num_workers=2,
    ids=None,
    collate_fn=None,
):
    """PyTorch's loader of photos, as VSE++ code calls it; data_name: coco, or a Karpathy file's.

    collate_fn: default `data.collate_fn`.
    """
    if "coco" in data_name:
        dataset = CocoDataset(root, json, vocab, transform, ids)
    else:
        dataset = FlickrDataset(root, json, split, vocab, transform)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle,
        num_workers=num_workers,
        collate_fn=collate_fn or globals()["collate_fn"],
        pin_memory=torch.cuda.is_initialized(),
    )


def get_transform(data_name, split_name, opt):
    """The photos' transform of a split, as VSE++ code calls it; opt: crop_size."""
    return image_transform(split_name == "train", opt.crop_size)


def get_paths(path, name="coco", use_restval=False):
    """Where a data set of photos lies, as VSE++ code asks: (roots, ids).

    path: the data set's folder
    roots: {split: {"img": folder, "cap": annotation file}} of train, val and test
    ids: {split: caption ids of COCO, else None}; with use_restval, train has pairs of all of them
    """
    if name != "coco":
        where = {
            "img": os.path.join(path, "images"),
            "cap": os.path.join(path, flickr_json_name(name)),
        }
        splits = "train", "val", "test"
        return {split: dict(where) for split in splits}, dict.fromkeys(splits)
    roots, ids = {}, {}
    for split, own in (("train", "train"), ("val", "dev"), ("test", "test")):
        parts = _coco_sources(path, own, use_restval)
        images, captions, ids[split] = (part[0] if len(part) == 1 else part for part in parts)
        roots[split] = {"img": images, "cap": captions}
    ids["val"] = ids["val"][:DEV_CAPTIONS]
    return roots, ids


class ImageDataset(torch.utils.data.Dataset):
    """Image files and their captions, decoded and transformed on request.

    image_files: (n_images,) paths; captions: list of str; image_of: each caption's image.
    together: order captions image by image, instead of as given.
    most: keep this many captions at most, of whole images.
    Attribute: lines, the captions' positions among those given.
    """

    def __init__(
        self,
        image_files,
        captions,
        image_of,
        vocab,
        transform=None,
        reading="text",
        seed=0,
        cache_dir=None,
        skip_broken=False,
        together=False,
        most=None,
    ):
        if not captions:
            raise InputError(
                "no captions for this split were found: check the annotation file and --data_name"
            )
        image_of = torch.as_tensor(image_of)
        if most is not None:
            kept = within_cap(image_of, most)
            captions, image_of = [captions[place] for place in kept.tolist()], image_of[kept]
            image_files = image_files[: int(image_of.max()) + 1]
        if skip_broken:
            image_files, captions, image_of = _without_broken(
                image_files, captions, image_of.tolist()
            )
            image_of = torch.as_tensor(image_of)
        self.lines = image_by_image(image_of) if together else torch.arange(len(captions))
        self.captions = [captions[line] for line in self.lines.tolist()]
        self.image_of = image_of[self.lines]
        self.image_files, self.n_images = image_files, len(image_files)
        self.names = [os.path.basename(path) for path in image_files]
        self.vocab, self.length = vocab, len(self.captions)
        self.word_ids = number_words(self.captions, vocab, reading, cache_dir)
        self.transform, self.seed, self.epoch = transform, seed, None
        # In shared memory, so that the workers' requests count.
        self.asked = torch.zeros(len(captions), dtype=torch.int32).share_memory_()

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """One caption: (image (3, H, W), word ids (T,), caption index, image index).

        Random transforms draw from the seed, the epoch and the caption, so that the number of
        workers does not matter. Until `epoch` is set, it is how often the caption was requested
        before: in a loop written elsewhere, the pass over the data.
        """
        epoch = self.epoch
        if epoch is None:
            epoch = int(self.asked[index])
            self.asked[index] += 1
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator only: torch.manual_seed would touch the GPU's.
            torch.default_generator.manual_seed(seed_for(self.seed, epoch, index))
            image = self.image(int(self.image_of[index]))
        return image, self.word_ids[index], index, int(self.image_of[index])

    def place(self, device, features_on_device=None):
        """Move nothing: images are decoded on the CPU, and go to the device batch by batch."""

    def image(self, number):
        """One image, decoded and transformed. Raises InputError if it cannot be decoded."""
        picture = decode_image(self.image_files[number])
        return self.transform(picture) if self.transform else picture

    def load(self, batches, workers=0, epoch=0, augmented=False):
        """Yield a batch from `_collate` for each (B,) tensor of caption indices.

        augmented: ignored, since the photos' transform decides.
        """
        self.epoch = epoch
        return _from_workers(
            torch.utils.data.DataLoader(
                self,
                batch_sampler=[batch.tolist() for batch in batches],
                collate_fn=_collate,
                pin_memory=torch.cuda.is_initialized(),
                **_worker_options(workers),
            )
        )

    def load_images(self, batch_size, workers=0, stride=1, part=(0, 1)):
        """Yield batches (B, 3, H, W) of each image, once and in order.

        stride, part: as in `PrecompDataset.load_images`.
        """
        batches = torch.arange(0, len(self.image_files), stride).split(batch_size)[
            part[0] :: part[1]
        ]
        return _from_workers(
            torch.utils.data.DataLoader(
                _Images(self),
                batch_sampler=[batch.tolist() for batch in batches],
                **_worker_options(workers),
            )
        )


def _from_workers(loader):
    """Yield the loader's batches; a worker's InputError loses DataLoader's traceback."""
    batches = iter(loader)
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).split("errors.InputError: ")[-1]) from None
    finally:
        # Otherwise exiting waits for the workers, as the error still refers to them.
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _worker_options(workers):
    """DataLoader's options: it does not touch the run's random state, and leaves signals alone."""
    return {
        "num_workers": workers,
        "generator": torch.Generator(),
        "worker_init_fn": _outlive_signals,
    }


def _outlive_signals(worker):
    """Let a worker outlive a signal that all processes of a pre-empted job receive.

    The main process needs its workers until it has finished its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
        # Exit normally: DataLoader ends the main process if a worker is killed.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


def _is_whole(path):
    try:
        decode_image(path)
        return True
    except InputError:
        return False


def _without_broken(image_files, captions, image_of):
    """Drop the images that cannot be decoded, with their captions, and print how many."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        done = pool.map(_is_whole, image_files)
        whole = list(tqdm(done, "Checking images", len(image_files), leave=False, disable=None))
    if not any(whole):
        raise InputError(
            f"none of {len(image_files)} images can be read, such as {image_files[0]}: check the "
            "folder"
        )
    if all(whole):
        return image_files, captions, image_of
    first_broken = image_files[whole.index(False)]
    tqdm.write(
        f"{whole.count(False)} broken images left out, such as {first_broken}", file=sys.stderr
    )
    renumbered = np.cumsum(whole) - 1
    kept = [place for place, image in enumerate(image_of) if whole[image]]
    return (
        [path for path, good in zip(image_files, whole) if good],
        [captions[place] for place in kept],
        [int(renumbered[image_of[place]]) for place in kept],
    )


class _Images(torch.utils.data.Dataset):
    """The images of an ImageDataset, one by one, without their captions."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.image_files)

    def __getitem__(self, number):
        return self.dataset.image(number)


class FlickrDataset(ImageDataset):
    """One split of a Karpathy-layout JSON file (Flickr8k, Flickr30k, own photos).

    root: the folder of the images, or of the folders that `filepath` names.
    use_restval: add the photos of restval to train; otherwise a note says how many they are.
    Raises InputError if the split has no image with a caption.
    """

    def __init__(self, root, json, split, vocab, transform=None, use_restval=False, **options):
        photos = [photo for photo in read_karpathy(json, root) if photo.captions]
        split = SPLITS.get(split, split)
        wanted = [split]
        if split == "train" and use_restval:
            wanted.append("restval")
        chosen = [photo for photo in photos if photo.split in wanted]
        if not chosen:
            raise InputError(f"{json} has no image of split {split!r} with a caption")
        if split == "train" and not use_restval:
            _tell_of_restval(photos, json)
        files = [image_path(root, photo.name, json) for photo in chosen]
        captions = [caption for photo in chosen for caption in photo.captions]
        image_of = [number for number, photo in enumerate(chosen) for _ in photo.captions]
        super().__init__(files, captions, image_of, vocab, transform, **options)


class CocoDataset(ImageDataset):
    """COCO captions by their ids, in the order of the ids.

    root, json, ids: may be tuples, to join several sources.
    """

    def __init__(self, root, json, vocab, transform=None, ids=None, **options):
        sources = zip(root, json, ids) if isinstance(root, (list, tuple)) else [(root, json, ids)]
        captions, image_of, numbers = [], [], {}
        for folder, annotation_file, caption_ids in sources:
            annotations, names = _read_coco(annotation_file)
            for caption_id in annotations if caption_ids is None else caption_ids.tolist():
                if caption_id not in annotations:
                    raise InputError(
                        f"caption id {caption_id} is not in {annotation_file}: the id arrays "
                        "belong to other annotations"
                    )
                caption, image_id = annotations[caption_id]
                if image_id not in names:
                    raise InputError(
                        f"{annotation_file} has no image {image_id} for caption {caption_id}"
                    )
                path = image_path(folder, names[image_id], annotation_file)
                image_of.append(numbers.setdefault(path, len(numbers)))
                captions.append(caption)
        super().__init__(list(numbers), captions, image_of, vocab, transform, **options)


def _read_coco(path):
    """Read a COCO caption file: {caption id: (caption, image id)} and {image id: file name}."""
    from pycocotools.coco import COCO

    content = read_json(path)
    try:
        with redirect_stdout(io.StringIO()):
            coco = COCO()  # given a path, it would read in the locale's encoding
            coco.dataset = content
            coco.createIndex()
        for kind, numbered in (("annotations", coco.anns), ("images", coco.imgs)):
            if len(numbered) < len(content[kind]):
                raise ValueError(f"two of its {kind} have one id")
        annotations = {
            number: (str(entry["caption"]), entry["image_id"])
            for number, entry in coco.anns.items()
        }
        return annotations, {number: str(entry["file_name"]) for number, entry in coco.imgs.items()}
    except Exception as error:  # COCO checks nothing, so a wrong file may raise anything
        raise InputError(
            f"{path} is not a COCO caption file ({type(error).__name__}: {error})"
        ) from error


def _collate(samples):
    """Make a batch of samples (image, word ids, caption index, image index), longest caption first.

    Returns tensors: images, captions (B, T) padded with 0, lengths (B,), ids (B,) and indices (B,).
    The last two are the same, the captions' positions in their file.
    """
    lengths = torch.tensor([len(words) for _, words, *_ in samples])
    order = by_length(lengths)
    images, words, indices, *_ = zip(*[samples[number] for number in order.tolist()])
    words = [torch.as_tensor(one).long() for one in words]  # other codes keep them as floats
    captions = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
    indices = torch.tensor(indices)
    return torch.stack([*map(torch.as_tensor, images)]), captions, lengths[order], indices, indices


def collate_fn(samples, code="hal"):
    """Make a batch for PyTorch's own loader, of a data set of this file or one like it.

    samples: (image, word ids, caption index, image index) each
    code: whose batch, one of HANDED. Samples do not tell, so VSE++'s and SCAN's of four parts come
        by `collate_fn=functools.partial(collate_fn, code="vsepp")`.
    """
    return HANDED[code](_collate(samples))


def _coco_ids(folder, split):
    path = os.path.join(folder, "annotations", f"coco_{split}_ids.npy")
    ids = map_array(path, "caption ids", "--data_path")
    if ids.dtype.kind not in "iu":
        raise InputError(f"caption ids {path} hold {ids.dtype}, not integers")
    return ids.ravel()


def _coco_sources(folder, split, use_restval):
    """(image folders, annotation files, arrays of caption ids) of a split, usually one of each."""
    source = {"train": "train"}.get(split, "val")
    parts = [(source, _coco_ids(folder, split))]
    if split == "train" and use_restval:
        parts.append(("val", _coco_ids(folder, "restval")))
    return zip(
        *[
            (
                os.path.join(folder, "images", f"{part}2014"),
                os.path.join(folder, COCO_ANNOTATIONS[part]),
                part_ids,
            )
            for part, part_ids in parts
        ]
    )


def coco_dataset(folder, split, vocab, transform, use_restval, **options):
    """The CocoDataset of a split below `folder`.

    use_restval: add the restval captions to train; otherwise a note says how many they are.
    """
    roots, jsons, ids = _coco_sources(folder, split, use_restval)
    if split == "dev":
        options["most"] = DEV_CAPTIONS
    restval = f"{folder}/annotations/coco_restval_ids.npy"
    if split == "train" and not use_restval and os.path.exists(restval):
        print(
            f"note: {len(_coco_ids(folder, 'restval'))} captions of split restval of {folder} are "
            "left out: --use_restval trains on them, too",
            file=sys.stderr,
        )
    return CocoDataset(roots, jsons, vocab, transform, ids, **options)


__getattr__ = left_out(
    __name__,
    {
        "PrecompRegionDataset": "use PrecompDataset(folder, split, vocab), or get_loaders, which "
        "augments as VSE-infinity does",
        "RawImageDataset": "use FlickrDataset or CocoDataset, or get_loaders of a data set of "
        "photos",
        "get_loader": "use get_loaders, get_test_loader or get_precomp_loader",
        "process_caption": "use inputs.tokenizer.tokenize, and number the words by the Vocabulary",
    },
)
