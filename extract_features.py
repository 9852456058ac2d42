"""A folder of photos, with captions or without, in; a `_precomp` data set or a gallery out.

    python3 extract_features.py --images photos/ --captions captions.csv --output data/mine_precomp
    python3 train.py --data_path data --data_name mine_precomp

Captions come from a table (columns image, caption and, if there is one, split), from Karpathy's or COCO's JSON, or
from text files of the photos' names; without any, all photos become a gallery (`gallery_ims.npy`,
`gallery_ids.txt`). Killed and called again it goes on where it stopped. Under torchrun each process takes its share.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; run_script takes it back

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys

import numpy as np

import distributed
import run_record
from caption_files import SPLITS, CaptionedPhoto, read_caption_texts, read_photo_captions
from device import choose_device
from errors import ArgumentParser, InputError, number, replacing, run_script
from features import POOLINGS, build_encoder, read_features_json, refuse_other
from images import image_path, photo_names
from photo_blocks import BLOCK_PHOTOS, BLOCKS, encode_blocks, plan_blocks, read_notes, read_rows
from word_ids import CAPTIONS_PER_IMAGE

DEFAULT_SHARE, DEFAULT_MOST = 10, 1000  # dev and test: a tenth of the photos each, and no more than so many
GALLERY = "gallery"
SPLIT_FILES = [f"{split}_{part}" for split in {*SPLITS.values(), GALLERY}
               for part in ("ims.npy", "caps.txt", "ids.txt")]
OURS = {"broken.txt", *SPLIT_FILES}  # what an extraction leaves beside features.json
MEETING_TIME = 30 * 24 * 3600  # seconds: the processes' shares may take long


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Make a data set of features, or a gallery, out of a folder of photos.")
    count = number(int, 1)

    data = parser.add_argument_group("data")
    data.add_argument("--images", required=True, metavar="FOLDER", help="the photos, in folders of any depth")
    data.add_argument("--captions", metavar="FILE|FOLDER|none",
                      help="table (.csv, .tsv), Karpathy or COCO JSON, or folder of text files; none: a gallery "
                           "(default: text files beside the photos, if there are any)")
    data.add_argument("--output", required=True, metavar="FOLDER", help="gets the features; such as data/mine_precomp")
    data.add_argument("--dev", type=number(int, 0), help="photos drawn for dev, where the captions give no splits "
                                                         "(default: a tenth, at most 1000)")
    data.add_argument("--test", type=number(int, 0), help="photos drawn for test (default: as for dev)")
    data.add_argument("--seed", default=0, type=number(int, 0, 2**63 - 1), help="decides the drawn splits")

    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--encoder", default="resnet152", help="a torchvision classification CNN, timm/<name>, a "
                                                                "torchvision detector (with --regions), or sample")
    encoder.add_argument("--encoder_weights", default="imagenet", metavar="imagenet|none|FILE",
                         help="none: random ones, the same every time; a detector's imagenet is COCO")
    encoder.add_argument("--pooling", default="pooled", choices=POOLINGS,
                         help="pooled: one row a photo; grid: 36 rows, of 6 x 6 cells; 10crop: the mean of ten crops")
    encoder.add_argument("--regions", type=count, help="rows a photo of a detector: its surest boxes, such as 36")
    encoder.add_argument("--normalise", action="store_true", help="scale each row to length one, as train.py does with "
                                                                  "raw images' features")
    encoder.add_argument("--dtype", default="float32", choices=["float16", "float32"], help="numbers of the features")

    computing = parser.add_argument_group("computing")
    computing.add_argument("--batch_size", default=32, type=number(int, 1, BLOCK_PHOTOS),
                           help="photos encoded at a time (detectors take one)")
    computing.add_argument("--workers", default=min(os.cpu_count(), 8), type=number(int, 0),
                           help="processes that decode photos")
    computing.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    computing.add_argument("--amp", default="off", choices=["off", "bf16"], help="bf16: products in bf16")
    return parser.parse_args(argv)


def main(argv=None):
    """Make what the flags say, on this process or on all that torchrun has started."""
    with distributed.session():
        distributed.wait_at_most(MEETING_TIME)
        carry_out(parse_args(argv))


def carry_out(args):
    """Photos and captions, encoder, blocks of features, files."""
    photos = find_photos(args)
    check_splits(args, photos)
    device = choose_device(args.device)
    encoder = build_encoder(args.encoder, args.encoder_weights, args.pooling, args.regions, args.normalise, device)
    description = {**encoder.description, "dtype": args.dtype, "amp": args.amp}
    check_output(args.output, description)
    with the_only_one(args.output):
        blocks = plan_blocks(args, photos, description)
        encode_blocks(args, photos, blocks, encoder)
        distributed.sync()
        if distributed.is_first():
            write_all(args, photos, blocks, encoder.row_shape, description)


# Photos, captions, splits -----------------------------------------------------------------------

def find_photos(args):
    """The photos to encode, as CaptionedPhotos; a gallery's have no captions and that split."""
    if args.captions == "none":
        return gallery_of(photo_names(args.images))
    if args.captions is None:
        names = photo_names(args.images)
        photos = read_caption_texts(args.images, names)
        if not any(photo.captions for photo in photos):
            return gallery_of(names)
    elif os.path.isdir(args.captions):
        photos = read_caption_texts(args.captions, photo_names(args.images))
    else:
        photos = read_photo_captions(args.captions)
        if not os.path.isdir(args.images):
            raise InputError(f"photo folder {args.images} is not there: check --images")
    captioned = [photo for photo in photos if photo.captions]
    if not captioned:
        raise InputError(f"{args.captions} has no caption of a photo: check --captions, or leave it out for a gallery")
    if len(captioned) < len(photos):
        print(f"note: {len(photos) - len(captioned)} photos have no caption and are left out", file=sys.stderr)
    for photo in captioned:
        image_path(args.images, photo.name, args.captions)
    return captioned


def gallery_of(names):
    """Photos without captions; raises InputError if there are none."""
    if not names:
        raise InputError("there is no photo in --images: its files must end in .jpg, .png, or such")
    return [CaptionedPhoto(name, [], GALLERY) for name in names]


def check_splits(args, photos):
    """Raise InputError where --dev and --test are given for splits that are not drawn, or leave nothing to train on."""
    if photos[0].split is None:
        draw_splits(args, [photo.name for photo in photos])
    elif args.dev is not None or args.test is not None:
        raise InputError("--dev and --test draw splits, but " + (
            "a gallery has none" if photos[0].split == GALLERY else f"{args.captions} gives them") + ": leave them out")


def draw_splits(args, photos):
    """The split of each of these photos, by their names, as many of them dev and test as the flags say.

    Seed and name alone draw a photo's place, so that further photos move few of the others to another split.
    """
    n = len(photos)
    usual = min(DEFAULT_MOST, max(n // DEFAULT_SHARE, 1 if n > 2 else 0))
    dev, test = (usual if given is None else given for given in (args.dev, args.test))
    if dev + test >= n:
        raise InputError(f"--dev {dev} and --test {test} leave none of {n} photos to train on: ask for fewer")
    drawn = [hashlib.sha256(f"{args.seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in photos]
    order = sorted(range(n), key=drawn.__getitem__)
    splits = dict.fromkeys(order[:dev], "dev") | dict.fromkeys(order[n - test:], "test")
    return [splits.get(number, "train") for number in range(n)]


# The output folder ------------------------------------------------------------------------------

@contextlib.contextmanager
def the_only_one(output):
    """Keep other runs out of the output folder while the block runs; a killed run's hold is gone with it."""
    path, was_there = os.path.join(output, BLOCKS), os.path.exists(output)
    held = run_record.lock(path, "--output") if distributed.is_first() else None
    try:
        distributed.sync()
        yield
    finally:
        if held is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(held.name)
            held.close()
            for made in [path] if was_there else [path, output]:
                with contextlib.suppress(OSError):  # only an empty one goes: nothing has come of the run
                    os.rmdir(made)


# The data set -----------------------------------------------------------------------------------

def check_output(output, description):
    """Raise InputError if the output folder holds features of another kind, or somebody else's."""
    found = read_features_json(output)
    if found is not None:
        refuse_other(found, description, f"--output {output}", "this run")
    elif os.path.isdir(output) and not os.path.isdir(os.path.join(output, BLOCKS)):
        foreign = [name for name in sorted(os.listdir(output)) if name in OURS or name.endswith("_ims.npy")]
        if foreign:
            raise InputError(f"--output {output} holds {foreign[0]}, which this script has not made: name another "
                             "folder")


def write_all(args, photos, blocks, row_shape, description):
    """Every split's files, broken.txt and features.json, first beside the blocks, then all of them in their places;
    what an earlier extraction has left of other splits goes."""
    notes = [read_notes(block) for block in blocks]
    whole = [number for note in notes for number in note.numbers]
    broken = {number: why for note in notes for number, why in note.broken.items()}
    scratch = os.path.join(args.output, BLOCKS)
    if not whole:
        shutil.rmtree(scratch)
        number, why = min(broken.items())
        raise InputError(f"none of {len(photos)} photos can be read, such as {photos[number].name} ({why}): check "
                         f"--images {args.images}")
    splits = splits_of(args, photos, whole)
    names = [name for split, numbers in splits.items()
             for name in write_texts(scratch, split, [photos[number] for number in numbers])]
    names += write_features(scratch, splits, blocks, row_shape, args.dtype)
    names += write_lines(scratch, "broken.txt", [on_one_line(photos[number].name) + f"\t{on_one_line(why)}"
                                                 for number, why in sorted(broken.items())]) if broken else []
    names += write_lines(scratch, "features.json", [json.dumps(description, indent=1)])
    for name in names:
        os.replace(os.path.join(scratch, name), os.path.join(args.output, name))
    for name in OURS - set(names):  # an earlier extraction's, which may have split otherwise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(args.output, name))
    shutil.rmtree(scratch)
    report(args, photos, splits, broken, sum(note.small for note in notes), description)


def splits_of(args, photos, whole):
    """{split: numbers of its photos, in order}, of the photos that could be read."""
    names = [photos[number].split for number in whole]
    if names[0] is None:
        names = draw_splits(args, [photos[number].name for number in whole])
    splits = {}
    for photo, name in zip(whole, names):
        splits.setdefault(name, []).append(photo)
    return splits


def write_texts(folder, split, photos):
    """A split's captions and ids; returns the files' names.

    An id a photo where each has five captions, as the family's data has it, and for a gallery; else an id a caption,
    so that equal neighbours tell which captions are of one photo.
    """
    if split == GALLERY:
        return write_lines(folder, f"{split}_ids.txt", [photo.name for photo in photos])
    five_each = all(len(photo.captions) == CAPTIONS_PER_IMAGE for photo in photos)
    captions = write_lines(folder, f"{split}_caps.txt", [caption for photo in photos for caption in photo.captions])
    return captions + write_lines(folder, f"{split}_ids.txt", [
        photo.name for photo in photos for _ in range(1 if five_each else len(photo.captions))])


def write_features(folder, splits, blocks, row_shape, dtype):
    """All splits' features, in one pass over the blocks; returns the files' names."""
    names = {split: f"{split}_ims.npy" for split in splits}
    split_of = np.empty(blocks[-1].end, f"<U{max(map(len, splits))}")
    for split, photos in splits.items():
        split_of[photos] = split
    with contextlib.ExitStack() as files:
        targets = {split: files.enter_context(replacing(os.path.join(folder, name))) for split, name in names.items()}
        for split, target in targets.items():
            np.lib.format.write_array_header_1_0(target, {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                "shape": (len(splits[split]), *row_shape)})
        for block in blocks:
            rows, in_split = read_rows(block), split_of[read_notes(block).numbers]
            for split, target in targets.items():
                target.write(rows[in_split == split].tobytes())
    return list(names.values())


def write_lines(folder, name, lines):
    """A text file, names in the bytes that they have on disk; returns [name]."""
    with replacing(os.path.join(folder, name)) as file:
        file.writelines(line.encode("utf-8", "surrogateescape") + b"\n" for line in lines)
    return [name]


def on_one_line(text):
    """The text with its line breaks, and what no file name can hold, as \\n, \\r and \\ud800."""
    return re.sub("[\n\r\ud800-\udc7f\udd00-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def report(args, photos, splits, broken, small, description):
    """Say what was written, and what was left out."""
    counts = ", ".join(f"{len(numbers)} {split}" for split, numbers in splits.items())
    captions = sum(len(photos[number].captions) for numbers in splits.values() for number in numbers)
    print(f"{args.output}: {counts} photos with {captions} captions, features of width {description['width']}")
    if broken:
        print(f"{len(broken)} of {len(photos)} photos could not be read: {os.path.join(args.output, 'broken.txt')} "
              "lists them")
    if small:
        print(f"{small} photos are smaller than the {description['resize']} pixels that {args.encoder} has them "
              "resized to")


if __name__ == "__main__":
    run_script(main)
