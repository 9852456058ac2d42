"""Photo files in folders: their names, their paths, and the transforms of the models' CNNs."""

import os
import sys

from inputs.decoding import HEIC_REMEDY, reads_heic
from runtime.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PHOTO_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".jp2",
)
HEIC_ENDINGS = (".heic", ".heif")  # read if pillow-heif is installed

# Photos that Pillow cannot read, or of which it reads only a preview.
UNREAD_ENDINGS = (".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd")


def photo_names(folder):
    """The paths of all photo files in and below a folder, relative to it, sorted by their bytes.

    Hidden files and folders are skipped. So are photos of unreadable kinds and links to folders,
    with a note. Raises InputError if the folder, or one in it, is missing or cannot be read.
    """

    def refuse(error):
        raise InputError(
            f"photo folder {error.filename} cannot be read ({error.strerror}): check the path"
        ) from error

    files, links = [], []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [
            os.path.join(place, name)
            for name in folders
            if os.path.islink(os.path.join(place, name))
        ]
        below = os.path.relpath(place, folder)
        files += [
            os.path.normpath(os.path.join(below, name))
            for name in names
            if not name.startswith(".")
        ]
    endings = PHOTO_ENDINGS + HEIC_ENDINGS * reads_heic()
    unread, heic = (
        [name for name in files if name.lower().endswith(kinds)]
        for kinds in (UNREAD_ENDINGS, () if reads_heic() else HEIC_ENDINGS)
    )
    for passed_over, kind, instead in (
        (heic, "HEIC photos", HEIC_REMEDY),
        (unread, "photos of a kind that cannot be read", "save them as JPEGs"),
        (links, "links to folders", "copy these, or name each in turn"),
    ):
        if passed_over:
            print(
                f"note: {len(passed_over)} {kind} are skipped, such as {ascii(min(passed_over))}: "
                f"{instead}",
                file=sys.stderr,
            )
    return sorted((name for name in files if name.lower().endswith(endings)), key=os.fsencode)


def image_path(root, name, source):
    """The path of an image below `root`; raises InputError if it lies outside or is no valid name.

    source: the file that names the image, for messages.
    """
    if (
        not name
        or os.path.isabs(name)
        or ".." in name.replace("\\", "/").split("/")
        or "\0" in name
    ):
        raise InputError(
            f"{source} names the image {name!r}, which lies outside {root}: mend that file"
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source} names the image {name!r}, which is no valid file name: mend that file"
        ) from error
    return os.path.join(root, name)


def _tell_of_restval(photos, json):
    """Print how many photos of split restval training leaves out unless --use_restval is given."""
    captions = [len(photo.captions) for photo in photos if photo.split == "restval"]
    if captions:
        print(
            f"note: {len(captions)} images of split restval of {json}, with {sum(captions)} "
            "captions, are left out: --use_restval trains on them, too",
            file=sys.stderr,
        )


def image_transform(train, crop_size):
    """The CNNs' transform: random crop and flip for training, else the centre 224 of 256 pixels.

    Both then normalise by ImageNet's mean and deviation.
    """
    from torchvision import transforms

    crop = (
        [transforms.RandomResizedCrop(crop_size), transforms.RandomHorizontalFlip()]
        if train
        else [transforms.Resize(256), transforms.CenterCrop(224)]
    )
    return transforms.Compose(
        [*crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
