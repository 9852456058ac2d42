"""Images with their captions, and how batches are made of them.

A batch of precomputed features is one gather from the captions' flat array of word ids and one from
the features, on the device where they live. The order of an epoch follows from the seed and the
epoch's number alone.

Every data set has five captions an image, in image order, unless it says otherwise.
"""

import io
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import numpy as np
import torch
from tqdm import tqdm

from captions import by_length, number_words
from errors import InputError
from vocab import COCO_ANNOTATIONS, flickr_json_name, read_captions, read_flickr_json

CAPTIONS_PER_IMAGE = 5
DEV_CAPTIONS = 5000  # the released code's cap on the dev split
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKER_GRACE = 20  # seconds
FULL_IMG_DIM = 4096  # the released default, without effect on raw images
FEATURE_BLOCK = 4096  # rows of a feature file checked at a time


def seed_for(*numbers):
    """A seed for torch that is a function of the given non-negative integers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# Data sets --------------------------------------------------------------------------------------

class PrecompDataset:
    """Precomputed features: `<data_path>/<split>_ims.npy` (n_images, img_dim) and `<split>_caps.txt`.

    A feature file with as many rows as there are captions has row c for caption c (and image i's
    row is 5i where each image is wanted once), otherwise row c // 5. Features stay memory-mapped
    unless `place` moves them. Raises InputError if a file is missing or broken, the two do not match, or the
    width is not `img_dim`.
    """

    def __init__(self, data_path, data_split, vocab, reading="text", img_dim=None, cache_dir=None):
        caption_file = os.path.join(data_path, f"{data_split}_caps.txt")
        feature_file = os.path.join(data_path, f"{data_split}_ims.npy")
        if not os.path.isdir(data_path):
            raise InputError(f"data folder {data_path} is not there: check --data_path and --data_name")
        self.captions = read_captions(caption_file)
        self.images = open_features(feature_file)
        rows, captions = len(self.images), len(self.captions)
        if captions not in (rows, rows * CAPTIONS_PER_IMAGE):
            raise InputError(f"{feature_file} has {rows} rows and {caption_file} has {captions} captions: "
                             f"there must be {CAPTIONS_PER_IMAGE} captions a row, or one")
        if img_dim is not None and self.images.shape[1] != img_dim:
            raise InputError(f"{feature_file} has features of width {self.images.shape[1]}, but {img_dim} was "
                             "expected: check --img_dim, or the checkpoint against the data")
        self.captions_per_row = captions // rows
        if data_split == "dev":
            self.captions = self.captions[:DEV_CAPTIONS]
        self.word_ids = self.placed_word_ids = number_words(self.captions, vocab, reading, cache_dir)
        self.lengths = self.word_ids.lengths
        self.device = torch.device("cpu")

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """(image (img_dim,), word ids (T,), caption index, image index) of one caption."""
        image = self.images[index // self.captions_per_row].float()
        return image, self.word_ids[index], index, index // CAPTIONS_PER_IMAGE

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

    def _rows(self, rows):
        """Feature rows (float32) on the device; from the feature file through pinned memory, without waiting."""
        features = self.images.index_select(0, rows.to(self.images.device))
        if self.device.type == "cuda" and not features.is_cuda:
            features = features.pin_memory()
        return features.to(self.device, non_blocking=True).float()

    def load(self, batches, workers=0, epoch=0):
        """For each (B,) tensor of caption indices: images, captions, lengths, ids, indices, longest caption first.

        lengths stay on the CPU, the others are on the data set's device.
        """
        if not len(batches):
            return
        batches = [indices[by_length(self.lengths[indices])] for indices in batches]
        placed = torch.cat(batches).to(self.device)  # at once: a copy a step would wait for the GPU each time
        for indices, there in zip(batches, placed.split([len(indices) for indices in batches])):
            lengths = self.lengths[indices]
            rows = (indices if self.images.device.type == "cpu" else there) // self.captions_per_row
            yield self._rows(rows), self.placed_word_ids.padded(there, int(lengths[0])), lengths, there, there

    def load_images(self, batch_size, workers=0, stride=1):
        """The features of each image (each so manieth, with a stride) once, in order, in batches."""
        rows = torch.arange(0, len(self), CAPTIONS_PER_IMAGE * stride) // self.captions_per_row
        for batch in rows.split(batch_size):
            yield self._rows(batch)


def open_features(path):
    """The (n, width) features in a .npy file as a memory-mapped tensor, checked to be finite numbers."""
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
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"feature file {path} has shape {features.shape}: it must be (images, feature width)")
    if features.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)  # other kinds are rare enough to be held in memory
    for start in range(0, len(features), FEATURE_BLOCK):
        finite = np.isfinite(features[start:start + FEATURE_BLOCK]).all(axis=1)
        if not finite.all():
            raise InputError(f"feature file {path} has NaN or infinity in row {start + int(finite.argmin())}: "
                             "make the features again")
    return torch.from_numpy(features)


class ImageDataset(torch.utils.data.Dataset):
    """Image files and their captions, decoded and transformed when asked for.

    image_files: (n_images,) paths; captions: list of str; image_of: for each caption its image.
    """

    def __init__(self, image_files, captions, image_of, vocab, transform=None, reading="text", seed=0, cache_dir=None,
                 skip_broken=False):
        if not captions:
            raise InputError("no captions for this split were found: check the annotation file and --data_name")
        if skip_broken:
            image_files, captions, image_of = _without_broken(image_files, captions, image_of)
        self.image_files, self.captions, self.image_of = image_files, captions, image_of
        self.word_ids = number_words(captions, vocab, reading, cache_dir)
        self.transform, self.seed, self.epoch = transform, seed, 0

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """(image (3, H, W), word ids (T,), caption index, image index) of one caption.

        Random transforms draw from the seed, the epoch and the caption: workers do not change them.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, self.epoch, index))
            image = self.image(self.image_of[index])
        return image, self.word_ids[index], index, self.image_of[index]

    def place(self, device, features_on_device=None):
        """Nothing moves: images are decoded on the CPU and taken to the device batch by batch."""

    def image(self, number):
        """One image, decoded and transformed. Raises InputError if it cannot be decoded."""
        picture = decode_image(self.image_files[number])
        return self.transform(picture) if self.transform else picture

    def load(self, batches, workers=0, epoch=0):
        """For each (B,) tensor of caption indices a batch as `collate_fn` makes it."""
        self.epoch = epoch
        return _from_workers(torch.utils.data.DataLoader(
            self, batch_sampler=[batch.tolist() for batch in batches], collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(), **_worker_options(workers)))

    def load_images(self, batch_size, workers=0, stride=1):
        """Each image (each so manieth, with a stride) once, in order, in batches (B, 3, H, W)."""
        images = torch.utils.data.Subset(_Images(self), range(0, len(self.image_files), stride))
        return _from_workers(torch.utils.data.DataLoader(images, batch_size=batch_size, **_worker_options(workers)))


def _from_workers(loader):
    """The loader's batches; a worker's InputError comes without the traceback that DataLoader wraps it in."""
    batches = iter(loader)
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).split("errors.InputError: ")[-1]) from None
    finally:
        if hasattr(batches, "_shutdown_workers"):  # or they would be waited for at exit, still holding the error
            batches._shutdown_workers()


def _worker_options(workers):
    """DataLoader's options: draws of its own kept out of the run's, signals left to the main process."""
    return {"num_workers": workers, "generator": torch.Generator(), "worker_init_fn": _outlive_signals}


def _outlive_signals(worker):
    """A pre-empted job's processes all get the signal; workers give the main one time to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


def decode_image(path):
    """A PIL picture in RGB; raises InputError if it cannot be decoded or is absurdly large (Pillow's limit)."""
    from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return file.convert("RGB")
    except Exception as error:  # decoders raise many kinds on broken files
        raise InputError(f"image {path} cannot be read ({error}): fetch it again, or leave such images out with "
                         "--skip_broken_images") from error


def _is_whole(path):
    try:
        decode_image(path)
        return True
    except InputError:
        return False


def _without_broken(image_files, captions, image_of):
    """The images that can be decoded with their captions; says how many are left out."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets other threads run
        whole = list(tqdm(pool.map(_is_whole, image_files), "Checking images", len(image_files), leave=False,
                          disable=None))
    if not any(whole):
        raise InputError(f"none of {len(image_files)} images can be read, such as {image_files[0]}: check the folder")
    if all(whole):
        return image_files, captions, image_of
    first_broken = image_files[whole.index(False)]
    tqdm.write(f"{whole.count(False)} broken images left out, such as {first_broken}", file=sys.stderr)
    renumbered = np.cumsum(whole) - 1
    kept = [place for place, image in enumerate(image_of) if whole[image]]
    return ([path for path, good in zip(image_files, whole) if good], [captions[place] for place in kept],
            [int(renumbered[image_of[place]]) for place in kept])


class _Images(torch.utils.data.Dataset):
    """The images of an ImageDataset, one by one, without their captions."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.image_files)

    def __getitem__(self, number):
        return self.dataset.image(number)


def _image_path(root, name, source):
    """A path inside `root`; raises InputError for a file name that reaches outside it."""
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise InputError(f"{source} names the image {name!r}, which lies outside {root}: mend that file")
    return os.path.join(root, name)


class FlickrDataset(ImageDataset):
    """One split of a Karpathy-layout JSON file (Flickr8k, Flickr30k, own photos), images below `root`."""

    def __init__(self, root, json, split, vocab, transform=None, **options):
        images = [image for image in read_flickr_json(json) if image["split"] == split]
        if not images:
            raise InputError(f"{json} has no image of split {split!r}")
        files = [_image_path(root, image["filename"], json) for image in images]
        captions = [sentence["raw"] for image in images for sentence in image["sentences"]]
        image_of = [number for number, image in enumerate(images) for _ in image["sentences"]]
        super().__init__(files, captions, image_of, vocab, transform, **options)


class CocoDataset(ImageDataset):
    """COCO captions by their ids, in the ids' order; `root`, `json` and `ids` may be tuples of sources to join."""

    def __init__(self, root, json, vocab, transform=None, ids=None, **options):
        sources = zip(root, json, ids) if isinstance(root, (list, tuple)) else [(root, json, ids)]
        captions, image_of, numbers = [], [], {}
        for folder, annotation_file, caption_ids in sources:
            annotations, names = _read_coco(annotation_file)
            for caption_id in annotations if caption_ids is None else caption_ids.tolist():
                if caption_id not in annotations:
                    raise InputError(f"caption id {caption_id} is not in {annotation_file}: the id arrays belong to "
                                     "other annotations")
                caption, image_id = annotations[caption_id]
                if image_id not in names:
                    raise InputError(f"{annotation_file} has no image {image_id} for caption {caption_id}")
                path = _image_path(folder, names[image_id], annotation_file)
                image_of.append(numbers.setdefault(path, len(numbers)))
                captions.append(caption)
        super().__init__(list(numbers), captions, image_of, vocab, transform, **options)


def _read_coco(path):
    """{caption id: (caption, image id)} and {image id: file name} of a COCO caption file."""
    from pycocotools.coco import COCO
    if not os.path.exists(path):
        raise InputError(f"{path} is not there: check --data_path")
    try:
        with redirect_stdout(io.StringIO()):
            coco = COCO(path)
        annotations = {number: (str(entry["caption"]), entry["image_id"]) for number, entry in coco.anns.items()}
        return annotations, {number: str(entry["file_name"]) for number, entry in coco.imgs.items()}
    except Exception as error:  # COCO raises whatever its parsing meets
        raise InputError(f"{path} is not a COCO caption file ({type(error).__name__}: {error})") from error


def collate_fn(samples):
    """Samples (image, word ids, caption index, image index) -> a batch sorted by caption length, longest first.

    Returns images, captions (B, T) padded with 0, lengths (B,), ids (B,) and indices (B,); the last two are
    both the captions' positions in their file.
    """
    lengths = torch.tensor([len(words) for _, words, _, _ in samples])
    order = by_length(lengths)
    images, words, indices, _ = zip(*[samples[number] for number in order.tolist()])
    captions = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
    indices = torch.tensor(indices)
    return torch.stack(images), captions, lengths[order], indices, indices


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

    def load(self, batches):
        """Iterate over the batches of the given caption indices."""
        return self.dataset.load(batches, self.workers, self.epoch)

    def __iter__(self):
        return self.load(self.batches())


def image_transform(train, crop_size):
    """Random crop and flip for training, else the centre 224 of 256; then ImageNet's mean and deviation."""
    from torchvision import transforms
    crop = [transforms.RandomResizedCrop(crop_size), transforms.RandomHorizontalFlip()] if train else [
        transforms.Resize(256), transforms.CenterCrop(224)]
    return transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _coco_ids(folder, split):
    path = os.path.join(folder, "annotations", f"coco_{split}_ids.npy")
    try:
        ids = np.load(path, allow_pickle=False)
    except Exception as error:  # missing, torn, or holding objects
        raise InputError(f"caption ids {path} cannot be read ({error}): check --data_path") from error
    if ids.dtype.kind not in "iu":
        raise InputError(f"caption ids {path} hold {ids.dtype}, not integers")
    return ids.ravel()


def _coco_dataset(folder, split, vocab, transform, use_restval, **options):
    source = {"train": "train"}.get(split, "val")
    parts = [(source, _coco_ids(folder, split))]
    if split == "dev":
        parts = [(source, parts[0][1][:DEV_CAPTIONS])]
    if split == "train" and use_restval:
        parts.append(("val", _coco_ids(folder, "restval")))
    roots, jsons, ids = zip(*[(os.path.join(folder, "images", f"{part}2014"),
                               os.path.join(folder, COCO_ANNOTATIONS[part]), part_ids) for part, part_ids in parts])
    return CocoDataset(roots, jsons, vocab, transform, ids, **options)


def get_dataset(split, data_name, vocab, crop_size, opt):
    """One split of a data set; opt: data_path and, where there, use_restval, img_dim, caption_reading, cache_dir, seed.

    train, dev, test, testall; the JSON sets call dev val, and COCO's test is all of its test.
    """
    folder = os.path.join(opt.data_path, data_name)
    options = {"reading": getattr(opt, "caption_reading", None) or "text", "cache_dir": getattr(opt, "cache_dir", None)}
    if data_name.endswith("_precomp"):
        return PrecompDataset(folder, "dev" if split == "val" else split, vocab, img_dim=getattr(opt, "img_dim", None),
                              **options)
    options |= {"seed": getattr(opt, "seed", 0), "skip_broken": getattr(opt, "skip_broken_images", False)}
    transform = image_transform(split == "train", crop_size)
    if not os.path.isdir(folder):
        raise InputError(f"data folder {folder} is not there: check --data_path and --data_name")
    if data_name == "coco":
        split = {"val": "dev", "testall": "test"}.get(split, split)
        return _coco_dataset(folder, split, vocab, transform, getattr(opt, "use_restval", False), **options)
    split = {"dev": "val"}.get(split, split)
    return FlickrDataset(os.path.join(folder, "images"), os.path.join(folder, flickr_json_name(data_name)), split,
                         vocab, transform, **options)


def get_loaders(data_name, vocab, crop_size, batch_size, workers, opt):
    """The shuffled training loader and the dev loader; sets opt.img_dim where it is None."""
    train = get_dataset("train", data_name, vocab, crop_size, opt)
    if getattr(opt, "img_dim", None) is None:
        opt.img_dim = train.images.shape[1] if data_name.endswith("_precomp") else FULL_IMG_DIM
    return (Loader(train, batch_size, shuffle=True, workers=workers, seed=getattr(opt, "seed", 0)),
            get_test_loader("dev", data_name, vocab, crop_size, batch_size, workers, opt))


def get_test_loader(split_name, data_name, vocab, crop_size, batch_size, workers, opt):
    """A loader of one split in its own order, checked to have five captions an image."""
    dataset = get_dataset(split_name, data_name, vocab, crop_size, opt)
    images = getattr(dataset, "image_of", [index // CAPTIONS_PER_IMAGE for index in range(len(dataset))])
    if len(dataset) % CAPTIONS_PER_IMAGE or images != [i // CAPTIONS_PER_IMAGE for i in range(len(dataset))]:
        raise InputError(f"split {split_name} of {data_name} has {len(dataset)} captions that are not "
                         f"{CAPTIONS_PER_IMAGE} for each image in turn: evaluation needs that")
    if isinstance(dataset, ImageDataset):
        dataset.transform = image_transform(False, crop_size)  # the training split's, too, is not augmented here
    return Loader(dataset, batch_size, workers=workers)
