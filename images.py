"""Photo files with their captions: decoding, transforms, and the raw-image data sets."""

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

from caption_files import COCO_ANNOTATIONS, read_flickr_json, read_json
from errors import InputError, check_regular
from word_ids import DEV_CAPTIONS, by_length, number_words, seed_for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
                 ".avif", ".jp2")
# Photos of which Pillow reads none, or a preview only.
UNREAD_ENDINGS = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd")
# Pillow's names of what these hold; others (EPS in a .jpg) would start other programs, or are no photos.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
WORKER_GRACE = 20  # seconds


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
        self.image_files, self.captions, self.image_of = image_files, captions, torch.as_tensor(image_of)
        self.n_images = len(image_files)
        self.word_ids = number_words(captions, vocab, reading, cache_dir)
        self.transform, self.seed, self.epoch = transform, seed, 0

    def __len__(self):
        return len(self.word_ids)

    def __getitem__(self, index):
        """(image (3, H, W), word ids (T,), caption index, image index) of one caption.

        Random transforms draw from the seed, the epoch and the caption: workers do not change them.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, self.epoch, index))  # the CPU's alone
            image = self.image(int(self.image_of[index]))
        return image, self.word_ids[index], index, int(self.image_of[index])

    def place(self, device, features_on_device=None):
        """Nothing moves: images are decoded on the CPU and taken to the device batch by batch."""

    def image(self, number):
        """One image, decoded and transformed. Raises InputError if it cannot be decoded."""
        picture = decode_image(self.image_files[number])
        return self.transform(picture) if self.transform else picture

    def load(self, batches, workers=0, epoch=0, augmented=False):
        """For each (B,) tensor of caption indices a batch as `collate_fn` makes it; photos are always augmented."""
        self.epoch = epoch
        return _from_workers(torch.utils.data.DataLoader(
            self, batch_sampler=[batch.tolist() for batch in batches], collate_fn=collate_fn,
            pin_memory=torch.cuda.is_initialized(), **_worker_options(workers)))

    def load_images(self, batch_size, workers=0, stride=1, part=(0, 1)):
        """Each image (each so manieth, with a stride) once, in order, in batches (B, 3, H, W); part: (the first batch,
        the distance to the next), where other processes load the others."""
        batches = torch.arange(0, len(self.image_files), stride).split(batch_size)[part[0]::part[1]]
        return _from_workers(torch.utils.data.DataLoader(
            _Images(self), batch_sampler=[batch.tolist() for batch in batches], **_worker_options(workers)))


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
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # killed by it, it would take the main process along


def open_photo(file):
    """A PIL picture, not decoded yet, of a path or an open file.

    Raises InputError for more pixels than Pillow's limit, and what Pillow does where it is no photo of PHOTO_FORMATS.
    """
    from PIL import Image
    warnings.filterwarnings("ignore", module=r"PIL\.")  # for good: to take it back is not safe beside other threads
    try:
        picture = Image.open(file, formats=PHOTO_FORMATS)
        too_large = picture.width * picture.height > Image.MAX_IMAGE_PIXELS
    except Image.DecompressionBombError:  # of twice as many
        too_large = True
    if too_large:
        raise InputError(f"it has more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
    return picture


def decode_image(path, as_seen=False, least_side=None):
    """A PIL picture in RGB; raises InputError if it cannot be decoded or is absurdly large (Pillow's limit).

    path: of a file, or an open one. as_seen: as a viewer shows it, turned as its EXIF data says, the clear parts
    white, 16-bit greys scaled to 8 bits. The released code does none of this, so data sets of raw images don't, either.
    least_side: pixels that are enough for both sides; of a JPEG, no more is decoded than that takes.
    """
    if not hasattr(path, "read"):
        check_regular(path)
    try:
        with open_photo(path) as file:
            if least_side:
                file.draft(None, (least_side, least_side))
            return _as_seen(file) if as_seen else file.convert("RGB")
    except Exception as error:  # decoders raise many kinds on broken files
        if hasattr(path, "read"):
            raise InputError(f"this photo cannot be read ({error}): give another copy of it") from error
        raise InputError(f"image {path} cannot be read ({error}): fetch it again, or leave such images out with "
                         "--skip_broken_images") from error


def _as_seen(picture):
    """A PIL picture -> one in RGB that looks like what a viewer shows."""
    from PIL import Image, ImageOps
    picture.load()
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # EXIF data may be torn in a picture that is whole: it has no orientation then
        pass
    if picture.mode.startswith("I"):
        greys = np.array(picture, np.int32)
        np.clip(greys, 0, 65535, out=greys)
        greys += 128  # rounds to the nearest: no grey lies between two
        picture = Image.fromarray(np.floor_divide(greys, 257, out=greys).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def thumbnail(path, side):
    """A photo, as a viewer shows it, as the bytes of a JPEG of at most side x side pixels; InputError if it cannot be
    decoded."""
    picture = decode_image(path, as_seen=True, least_side=2 * side)
    picture.thumbnail((side, side))
    picture.info.clear()  # comments, which would be written, too
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def photo_names(folder):
    """Paths, relative to the folder, of the photo files in it and below, by their bytes' order.

    Hidden files and folders are passed over, and so are, with a note, photos of other kinds and links to folders.
    Raises InputError if the folder, or one in it, is not there or not to be read.
    """
    def refuse(error):
        raise InputError(f"photo folder {error.filename} cannot be read ({error.strerror}): check the path") from error

    files, links = [], []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [os.path.join(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        below = os.path.relpath(place, folder)
        files += [os.path.normpath(os.path.join(below, name)) for name in names if not name.startswith(".")]
    unread = [name for name in files if name.lower().endswith(UNREAD_ENDINGS)]
    for passed_over, kind, instead in ((unread, "photos of a kind that is not read", "save them as JPEGs"),
                                       (links, "links to folders", "copy these, or name each in turn")):
        if passed_over:
            print(f"note: {len(passed_over)} {kind} passed over, such as {ascii(min(passed_over))}: {instead}",
                  file=sys.stderr)
    return sorted((name for name in files if name.lower().endswith(PHOTO_ENDINGS)), key=os.fsencode)


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


def image_path(root, name, source):
    """A path inside `root`; raises InputError for a file name that reaches outside it, or that no file can have."""
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise InputError(f"{source} names the image {name!r}, which lies outside {root}: mend that file")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise InputError(f"{source} names the image {name!r}, which no file can be called: mend that file") from error
    return os.path.join(root, name)


class FlickrDataset(ImageDataset):
    """One split of a Karpathy-layout JSON file (Flickr8k, Flickr30k, own photos), images below `root`."""

    def __init__(self, root, json, split, vocab, transform=None, **options):
        images = [image for image in read_flickr_json(json) if image["split"] == split and image["sentences"]]
        if not images:
            raise InputError(f"{json} has no image of split {split!r} with a caption")
        files = [image_path(root, image["filename"], json) for image in images]
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
                path = image_path(folder, names[image_id], annotation_file)
                image_of.append(numbers.setdefault(path, len(numbers)))
                captions.append(caption)
        super().__init__(list(numbers), captions, image_of, vocab, transform, **options)


def _read_coco(path):
    """{caption id: (caption, image id)} and {image id: file name} of a COCO caption file."""
    from pycocotools.coco import COCO
    content = read_json(path)
    try:
        with redirect_stdout(io.StringIO()):
            coco = COCO()  # given the path, it would read in the locale's encoding
            coco.dataset = content
            coco.createIndex()
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


def image_transform(train, crop_size):
    """Random crop and flip for training, else the centre 224 of 256; then ImageNet's mean and deviation."""
    from torchvision import transforms
    crop = [transforms.RandomResizedCrop(crop_size), transforms.RandomHorizontalFlip()] if train else [
        transforms.Resize(256), transforms.CenterCrop(224)]
    return transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _coco_ids(folder, split):
    path = os.path.join(folder, "annotations", f"coco_{split}_ids.npy")
    check_regular(path)
    try:
        ids = np.load(path, allow_pickle=False)
    except Exception as error:  # missing, torn, or holding objects
        raise InputError(f"caption ids {path} cannot be read ({error}): check --data_path") from error
    if ids.dtype.kind not in "iu":
        raise InputError(f"caption ids {path} hold {ids.dtype}, not integers")
    return ids.ravel()


def coco_dataset(folder, split, vocab, transform, use_restval, **options):
    """The CocoDataset of a split below `folder`; train takes the restval captions, too, where `use_restval` says so."""
    source = {"train": "train"}.get(split, "val")
    parts = [(source, _coco_ids(folder, split))]
    if split == "dev":
        parts = [(source, parts[0][1][:DEV_CAPTIONS])]
    if split == "train" and use_restval:
        parts.append(("val", _coco_ids(folder, "restval")))
    roots, jsons, ids = zip(*[(os.path.join(folder, "images", f"{part}2014"),
                               os.path.join(folder, COCO_ANNOTATIONS[part]), part_ids) for part, part_ids in parts])
    return CocoDataset(roots, jsons, vocab, transform, ids, **options)
