"""Images with their captions, and how batches are made of them.

A batch of precomputed features is one gather from the captions' flat array of word ids and one from
the features, on the device where they live. The order of an epoch follows from the seed and the
epoch's number alone.

Every data set has `n_images` and `image_of`: for each caption its image's number, (C,) int64 on the CPU.
"""

import os
import sys

import numpy as np
import torch

from caption_files import ASCII_SPACE, flickr_json_name, is_precomputed, read_captions
from device import to_device
from errors import InputError, check_regular
from images import (  # noqa: F401 (handed on: the family imports them from here)
    CocoDataset,
    FlickrDataset,
    ImageDataset,
    coco_dataset,
    collate_fn,
    image_transform,
)
from pooling import drop_regions, kept_regions, region_lengths
from vocab import MASK
from word_ids import CAPTIONS_PER_IMAGE, DEV_CAPTIONS, by_length, drop_words, five_each, number_words, seed_for

FULL_IMG_DIM = 4096  # the released default, without effect on raw images
LARGEST = 1e15  # number in features: the squares of larger ones overflow where they are added up
CHECKED_BYTES = 2**26  # of a feature file, looked at at a time
WORD_DRAW, REGION_DRAW = 3, 4  # of size augmentation, beside the orders' 0 to 2


# Data sets --------------------------------------------------------------------------------------

class PrecompDataset:
    """Precomputed features: `<data_path>/<split>_ims.npy` (n_images, img_dim) or, of regions, (n_images, regions,
    img_dim), and `<split>_caps.txt`.

    Which captions belong to which image tells `caption_layout`. Features stay memory-mapped unless `place` moves
    them. Raises InputError if a file is missing or broken, they do not match, or the width is not `img_dim`.
    """

    def __init__(self, data_path, data_split, vocab, reading="text", img_dim=None, cache_dir=None):
        caption_file = os.path.join(data_path, f"{data_split}_caps.txt")
        feature_file = os.path.join(data_path, f"{data_split}_ims.npy")
        if not os.path.isdir(data_path):
            raise InputError(f"data folder {data_path} is not there: check --data_path and --data_name")
        self.captions = read_captions(caption_file)
        self.images = open_features(feature_file)
        ids_file = os.path.join(data_path, f"{data_split}_ids.txt")
        self.image_of, self.row_of = caption_layout(self.images, len(self.captions), feature_file, ids_file)
        if img_dim is not None and self.images.shape[-1] != img_dim:
            raise InputError(f"{feature_file} has features of width {self.images.shape[-1]}, but {img_dim} was "
                             "expected: check --img_dim, or the checkpoint against the data")
        if data_split == "dev" and len(self.captions) > DEV_CAPTIONS:
            cap = DEV_CAPTIONS
            if not five_each(self.image_of):  # not through an image's captions, but where all are of one image
                cap = int((self.image_of < self.image_of[cap]).sum()) or cap
            self.captions, self.image_of, self.row_of = (
                x[:cap] for x in (self.captions, self.image_of, self.row_of))
        self.n_images = int(self.image_of[-1]) + 1
        self.word_ids = self.placed_word_ids = number_words(self.captions, vocab, reading, cache_dir)
        self.lengths = self.word_ids.lengths
        self.device, self.placed_row_of = torch.device("cpu"), self.row_of
        self.drops_words = self.drops_regions = self.region_counts = None

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """(image (img_dim,) or (regions, img_dim), word ids (T,), caption index, image index) of one caption."""
        return self.images[self.row_of[index]].float(), self.word_ids[index], index, int(self.image_of[index])

    def place(self, device, features_on_device=None):
        """Batches come on `device` from now on: word ids move there, and features if told to.

        features_on_device: None moves them to a CUDA device where they fit in half of its free memory.
        """
        self.device, self.placed_word_ids = device, self.word_ids.to(device)
        if features_on_device is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            features_on_device = self.images.numel() * self.images.element_size() <= free / 2
        if features_on_device:
            self.images = self.images.to(device)
        self.placed_row_of = self.row_of.to(self.images.device)

    def augment(self, drop_words, drop_regions, vocab, seed):
        """From now on `load` leaves out words and regions at these rates where it is told to (VSE-infinity's size
        augmentation); what is left out follows from seed and epoch alone. Raises InputError for a vocabulary that lacks
        the word of what is left out."""
        if drop_words:
            if MASK not in vocab.word2idx:
                raise InputError(f"--drop_words needs the word {MASK}, and the model to start from has no place for "
                                 "it: leave it out, or start from a model that was trained with it")
            self.drops_words = drop_words, len(vocab), vocab(MASK), seed
        if drop_regions:
            self.drops_regions = drop_regions, seed
            self.region_counts = torch.cat([region_lengths(block) for block in self.images.split(_block(self.images))])

    def epoch_words(self, epoch, augmented):
        """(WordIds on the CPU, the same on the device) of an epoch."""
        if not augmented or not self.drops_words:
            return self.word_ids, self.placed_word_ids
        *how, seed = self.drops_words
        words = drop_words(self.word_ids, *how, torch.Generator().manual_seed(seed_for(seed, epoch, WORD_DRAW)))
        return words, words.to(self.device)

    def _region_draws(self, epoch, augmented):
        """(captions, regions) of an epoch, uniform in [0, 1), or None."""
        if not augmented or not self.drops_regions:
            return None
        generator = torch.Generator().manual_seed(seed_for(self.drops_regions[1], epoch, REGION_DRAW))
        return torch.rand(len(self), self.images.shape[1], generator=generator)

    def regions_left(self, batches, epoch):
        """For each batch of caption indices the most regions that an image is left with; None: none are dropped."""
        draws = self._region_draws(epoch, True)
        if draws is None:
            return [None] * len(batches)
        return [int(kept_regions(self.region_counts[self.row_of[batch]], self.drops_regions[0], draws[batch])
                    .sum(1).max()) for batch in batches]

    def _rows(self, rows, counts=None, draws=None):
        """Feature rows (float32) on the device; from the feature file through pinned memory, without waiting.

        counts and draws: of these rows, where regions are to be left out.
        """
        features = self.images.index_select(0, to_device(rows, self.images.device))
        if draws is not None:
            features = drop_regions(features, counts, self.drops_regions[0], draws)
        if self.device.type == "cuda" and not features.is_cuda:
            features = features.pin_memory()
        return to_device(features, self.device).float()

    def load(self, batches, workers=0, epoch=0, augmented=False):
        """For each (B,) tensor of caption indices: images, captions, lengths, ids, indices, longest caption first.

        lengths stay on the CPU, the others are on the data set's device. augmented: whether to do what `augment` set.
        """
        if not len(batches):
            return
        (words, placed_words), draws = self.epoch_words(epoch, augmented), self._region_draws(epoch, augmented)
        all_lengths = words.lengths
        batches = [indices[by_length(all_lengths[indices])] for indices in batches]
        placed = torch.cat(batches).to(self.device)  # at once: a copy a step would wait for the GPU each time
        for indices, there in zip(batches, placed.split([len(indices) for indices in batches])):
            lengths = all_lengths[indices]
            rows = self.placed_row_of[indices if self.images.device.type == "cpu" else there]
            dropped = () if draws is None else (self.region_counts[self.row_of[indices]], draws[indices])
            yield self._rows(rows, *dropped), placed_words.padded(there, int(lengths[0])), lengths, there, there

    def load_images(self, batch_size, workers=0, stride=1, part=(0, 1)):
        """The features of each image (each so manieth, with a stride) once, in order, in batches; part: (the first
        batch, the distance to the next), where other processes load the others."""
        first = torch.searchsorted(self.image_of, torch.arange(0, self.n_images, stride))
        for batch in self.row_of[first].split(batch_size)[part[0]::part[1]]:
            yield self._rows(batch)


def caption_layout(features, n_captions, feature_file, ids_file):
    """Which image and which feature row each caption belongs to: two (C,) int64 tensors.

    With as many lines in `ids_file` as captions, equal neighbours are one image, and features have a row an image or
    a caption. Otherwise (the file is not there, or has a line a row) features have a row for five captions in turn;
    or a row a caption, which is five equal rows an image (VSE++'s habit), else one caption an image.
    Raises InputError where the numbers do not fit.
    """
    rows, each = len(features), torch.arange(n_captions)
    ids = read_ids(ids_file) if os.path.exists(ids_file) else None
    if ids is not None and len(ids) not in (rows, n_captions):
        raise InputError(f"{ids_file} has {len(ids)} lines for {rows} feature rows and {n_captions} captions: it needs "
                         "one for each row, or for each caption; mend it, or remove it where captions are "
                         f"{CAPTIONS_PER_IMAGE} an image in turn")
    if ids is not None and len(ids) == n_captions:
        image_of = torch.tensor([False, *(a != b for a, b in zip(ids, ids[1:]))]).cumsum(0)
        n_images, hint = int(image_of[-1]) + 1, f", of which {ids_file} makes {int(image_of[-1]) + 1} images"
    else:
        image_of, hint = each // CAPTIONS_PER_IMAGE, ""
        n_images = -(-n_captions // CAPTIONS_PER_IMAGE)
        if rows == n_captions and not _five_equal(features):
            image_of, n_images = each, rows
        elif rows != n_captions and rows * CAPTIONS_PER_IMAGE != n_captions:
            n_images = None
    if rows not in (n_images, n_captions):
        raise InputError(f"{feature_file} has {rows} rows for {n_captions} captions{hint}: there must be a row an "
                         f"image, with {CAPTIONS_PER_IMAGE} captions each unless {ids_file} has a line a caption, or a "
                         "row a caption")
    return image_of, image_of if rows == n_images else each


def _five_equal(features):
    """Whether rows come in fives that are equal."""
    if len(features) % CAPTIONS_PER_IMAGE:
        return False
    return all(bool((five == five[:1]).all()) for five in features.split(CAPTIONS_PER_IMAGE))


def read_ids(path):
    """The lines of an ids file, a name or number each, as str; bytes that are no UTF-8 stay what they are."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return [line.strip(ASCII_SPACE) for line in file.read().rstrip("\n").split("\n")]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def image_names(dataset, ids_file):
    """The names of a data set's N images, str: raw images' file names, else what the ids file has, a name or number
    for each feature row or each caption. Raises InputError where it can't be read."""
    if hasattr(dataset, "image_files"):
        return [os.path.basename(path) for path in dataset.image_files]
    names, first = read_ids(ids_file), torch.searchsorted(dataset.image_of, torch.arange(dataset.n_images))
    return [names[place] for place in (dataset.row_of[first] if len(names) == len(dataset.images) else first)]


def open_features(path):
    """The (n, width) or (n, regions, width) features in a .npy file as a memory-mapped tensor, checked to be finite
    numbers. Of regions, a few images of nothing but zeros are counted in one line, a file of them is refused."""
    check_regular(path)
    try:
        features = np.load(path, mmap_mode="c", allow_pickle=False)  # private pages: the file is never written to
    except OSError as error:
        raise InputError(f"feature file {path} cannot be read ({error.strerror or error}): check --data_path and "
                         "--data_name") from error
    except Exception as error:  # a torn header may raise anything
        raise InputError(f"feature file {path} is not a whole .npy array of numbers ({error}): fetch or make it "
                         "again") from error
    if not isinstance(features, np.ndarray) or features.dtype.kind not in "fiu":
        kind = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
        raise InputError(f"feature file {path} holds {kind}, not numbers: save float16 or float32 features")
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise InputError(f"feature file {path} has shape {features.shape}: it must be (images, feature width) or "
                         "(images, regions, feature width)")
    if features.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)  # other kinds are rare enough to be held in memory
    _check_numbers(features, path)
    return torch.from_numpy(features)


def _block(features):
    """How many rows of features to look at at a time."""
    return max(1, CHECKED_BYTES * len(features) // features.nbytes)


def _check_numbers(features, path):
    """Raise InputError where features are not finite, or so large that lengths are not, or regions all zeros."""
    block, axes, empty = _block(features), tuple(range(1, features.ndim)), 0
    largest = min(LARGEST, float(np.finfo(features.dtype).max))
    for start in range(0, len(features), block):
        rows = features[start:start + block]
        whole = (np.abs(rows) <= largest).all(axis=axes)  # so NaN is not
        if not whole.all():
            raise InputError(f"feature file {path} has NaN, infinity or a number beyond {LARGEST:g} in row "
                             f"{start + int(whole.argmin())}: make the features again")
        if features.ndim == 3:
            empty += int(np.count_nonzero(~rows.any(axis=axes)))
    if empty == len(features):
        raise InputError(f"feature file {path} holds nothing but zeros: make the features again")
    if empty:
        print(f"Warning: {path} has {empty} images whose regions are all zero", file=sys.stderr)


# Loaders ----------------------------------------------------------------------------------------

class Loader:
    """Batches of a data set; `epoch` and the seed decide a shuffled order, whatever came before."""

    def __init__(self, dataset, batch_size, shuffle=False, workers=0, seed=0):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.workers, self.seed, self.epoch = workers, seed, 0

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def batches(self, draw=0):
        """This epoch's caption indices, batch by batch; another `draw` is another order."""
        if not self.shuffle:
            return torch.arange(len(self.dataset)).split(self.batch_size)
        generator = torch.Generator().manual_seed(seed_for(self.seed, self.epoch, draw))
        return torch.randperm(len(self.dataset), generator=generator).split(self.batch_size)

    def load(self, batches, **options):
        """Iterate over the batches of the given caption indices; options: for the data set's `load`."""
        return self.dataset.load(batches, self.workers, self.epoch, **options)

    def __iter__(self):
        return self.load(self.batches())


def get_dataset(split, data_name, vocab, crop_size, opt):
    """One split of a data set; opt: data_path and, where there, use_restval, img_dim, caption_reading, cache_dir, seed.

    train, dev, test, testall; the JSON sets call dev val, and COCO's test is all of its test.
    """
    folder = os.path.join(opt.data_path, data_name)
    options = {"reading": getattr(opt, "caption_reading", None) or "text", "cache_dir": getattr(opt, "cache_dir", None)}
    if is_precomputed(data_name):
        return PrecompDataset(folder, "dev" if split == "val" else split, vocab, img_dim=getattr(opt, "img_dim", None),
                              **options)
    options |= {"seed": getattr(opt, "seed", 0), "skip_broken": getattr(opt, "skip_broken_images", False)}
    transform = image_transform(split == "train", crop_size)
    if not os.path.isdir(folder):
        raise InputError(f"data folder {folder} is not there: check --data_path and --data_name")
    if data_name == "coco":
        split = {"val": "dev", "testall": "test"}.get(split, split)
        return coco_dataset(folder, split, vocab, transform, getattr(opt, "use_restval", False), **options)
    split = {"dev": "val"}.get(split, split)
    return FlickrDataset(os.path.join(folder, "images"), os.path.join(folder, flickr_json_name(data_name)), split,
                         vocab, transform, **options)


def get_loaders(data_name, vocab, crop_size, batch_size, workers, opt):
    """The shuffled training loader and the dev loader.

    Sets opt.img_dim and, for regions, opt.image_pooling where they are None, and opt.regions to their number.
    """
    train = get_dataset("train", data_name, vocab, crop_size, opt)
    precomputed = is_precomputed(data_name)
    if getattr(opt, "img_dim", None) is None:
        opt.img_dim = train.images.shape[-1] if precomputed else FULL_IMG_DIM
    if precomputed and train.images.dim() == 3:
        opt.regions = train.images.shape[1]
        if not getattr(opt, "cross_attn", None):
            opt.image_pooling = getattr(opt, "image_pooling", None) or "mean"
    check_form(train, opt)
    if getattr(opt, "drop_words", 0) or getattr(opt, "drop_regions", 0):
        if not precomputed:
            raise InputError(f"--drop_words and --drop_regions are for precomputed features, and {data_name} holds "
                             "photos: leave them out")
        train.augment(opt.drop_words, opt.drop_regions, vocab, opt.seed)
    return (Loader(train, batch_size, shuffle=True, workers=workers, seed=getattr(opt, "seed", 0)),
            get_test_loader("dev", data_name, vocab, crop_size, batch_size, workers, opt))


def check_form(dataset, opt):
    """Raise InputError where a data set has regions and the model that the options describe has none, or other ones."""
    shape, expected = getattr(getattr(dataset, "images", None), "shape", ()), getattr(opt, "regions", None)
    over_regions = (bool(getattr(opt, "image_pooling", None) or getattr(opt, "cross_attn", None))
                    or getattr(opt, "precomp_enc_type", "basic") == "mlp")
    if len(shape) == 3 and not over_regions:
        raise InputError(f"the model is over vectors, and the features are {shape[1]} regions an image, of shape "
                         f"{tuple(shape)}: evaluate it on those that it was trained on")
    if len(shape) != 3 and (over_regions or getattr(opt, "drop_regions", 0)):
        raise InputError("the model is over regions (--image_pooling, --precomp_enc_type mlp, --drop_regions or "
                         f"--cross_attn), and the features are of shape {tuple(shape)}: it needs (images, regions, "
                         "width)")
    if len(shape) == 3 and expected not in (None, shape[1]):
        raise InputError(f"the features have {shape[1]} regions an image, and the model was trained on {expected}: "
                         "evaluate it on those that it was trained on")


def get_test_loader(split_name, data_name, vocab, crop_size, batch_size, workers, opt):
    """A loader of one split in its own order, an image's captions together."""
    dataset = get_dataset(split_name, data_name, vocab, crop_size, opt)
    if (dataset.image_of.diff() < 0).any():
        raise InputError(f"split {split_name} of {data_name} does not have the captions of an image together, as "
                         "evaluation needs them: sort its caption ids by image")
    check_form(dataset, opt)
    if isinstance(dataset, ImageDataset):
        dataset.transform = image_transform(False, crop_size)  # the training split's, too, is not augmented here
    return Loader(dataset, batch_size, workers=workers)
