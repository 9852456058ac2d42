"""Make a `_precomp` data set, or a gallery, from a folder of photos.

    python3 extract_features.py --images photos/ --captions captions.csv --output data/mine_precomp
    python3 train.py --data_path data --data_name mine_precomp

Captions come from a table (columns image, caption and optionally split; or Flickr's token file),
from Karpathy's or COCO's JSON, or from text files with the photos' names. Without captions all
photos become a gallery (`gallery_ims.npy`, `gallery_ids.txt`). Called again after it was killed, it
goes on where it stopped. Under torchrun each process takes its share.

    python3 extract_features.py --from trainval.tsv --captions coco.json --output data/coco_precomp

makes a data set of bottom-up attention's regions, from tables (TSV) or HDF5 files (see
features/bottom_up.py).

    python3 extract_features.py --images photos/ --output part1 --part 1/2
    python3 extract_features.py --merge part1 part2 --output data/mine_precomp

divide the work between machines without a shared folder (see features/parts.py).

    python3 extract_features.py --texts data/f8k_precomp --text_encoder sentence_transformers/all-MiniLM-L6-v2

writes a frozen text model's vectors of a data set's captions, for `train.py --text_features`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the script quietly; run_script restores the usual handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
import shutil
import sys

import numpy as np

from features import parts
from features.blocks import (
    BLOCK_PHOTOS,
    BLOCKS,
    encode_blocks,
    plan_blocks,
    read_notes,
    read_rows,
    the_only_one,
)
from features.bottom_up import convert
from features.description import read_features_json, refuse_other
from features.encoders import add_flags, build_encoder
from features.splits import (
    GALLERY,
    OURS,
    check_splits,
    gallery_of,
    install,
    on_one_line,
    splits_of,
    with_restval_in_train,
    write_lines,
    write_rows,
    write_texts,
)
from inputs.captions import (
    ASCII_SPACE,
    is_precomputed,
    read_caption_texts,
    read_photo_captions,
)
from inputs.photos import image_path, photo_names
from runtime import distributed
from runtime.device import choose_device
from runtime.errors import ArgumentParser, InputError, number, path_type, run_script

MEETING_TIME = 30 * 24 * 3600  # seconds; a process may need long for its share


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Make a data set of features, or a gallery, out of a folder of photos.")
    add_data_flags(parser.add_argument_group("data"))
    encoder = parser.add_argument_group("encoder")
    add_flags(encoder)
    encoder.add_argument(
        "--dtype", default="float32", choices=["float16", "float32"], help="type of the features"
    )
    add_computing_flags(parser.add_argument_group("computing"))
    add_text_flags(parser.add_argument_group("captions as vectors"))
    args = parser.parse_args(argv)
    check_text_flags(args)
    of_photos = ["encoder", "encoder_weights", "pooling", "regions", "amp"]
    if args.merge:
        of_photos += ["normalise", "dtype", "captions", "dev", "test", "seed"]
    for name in of_photos if args.sources or args.merge else ():
        if getattr(args, name) != parser.get_default(name):
            raise InputError(
                f"--{name} is for photos, and {'--merge' if args.merge else '--from'} has features "
                "already: leave it out"
            )
    if args.part and args.images is None:
        raise InputError("--part divides the photos of --images: leave it out")
    return args


def add_data_flags(group):
    """What the features are made from, and where they go."""
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", type=path_type, metavar="FOLDER", help="the photos, in folders of any depth"
    )
    source.add_argument(
        "--from",
        dest="sources",
        type=path_type,
        nargs="+",
        metavar="FILE",
        help="bottom-up attention's features, as TSV or HDF5, instead of photos",
    )
    source.add_argument(
        "--texts",
        type=path_type,
        metavar="FOLDER",
        help="a data set whose captions a text model turns into vectors",
    )
    source.add_argument(
        "--merge",
        type=path_type,
        nargs="+",
        metavar="FOLDER",
        help="the parts that --part made, to be joined",
    )
    group.add_argument(
        "--part",
        type=parts.share_type,
        metavar="i/n",
        help="with --images: encode the i-th of n shares of the photos, for --merge",
    )
    group.add_argument(
        "--captions",
        type=path_type,
        metavar="FILE|FOLDER|none",
        help="table (.csv, .tsv), Karpathy or COCO JSON, or folder of text files; none: a gallery "
        "(default: text files beside the photos, if there are any)",
    )
    group.add_argument(
        "--output",
        type=path_type,
        metavar="FOLDER",
        help="where the features go, such as data/mine_precomp (default, with --texts: beside the "
        "captions)",
    )
    group.add_argument(
        "--dev",
        type=number(int, 0),
        help="photos drawn for dev if the captions give no splits (default: a tenth, at most 1000)",
    )
    group.add_argument(
        "--test", type=number(int, 0), help="photos drawn for test (default: as for dev)"
    )
    group.add_argument(
        "--seed", default=0, type=number(int, 0, 2**63 - 1), help="decides the drawn splits"
    )


def add_computing_flags(group):
    """How fast, and on what."""
    group.add_argument(
        "--batch_size",
        default=32,
        type=number(int, 1, BLOCK_PHOTOS),
        help="photos or captions encoded at a time (detectors take one)",
    )
    group.add_argument(
        "--workers",
        default=min(os.cpu_count(), 8),
        type=number(int, 0),
        help="processes that decode photos",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument(
        "--amp", default="off", choices=["off", "bf16"], help="bf16: matrix products in bf16"
    )


def add_text_flags(group):
    """The text model for --texts."""
    group.add_argument(
        "--text_encoder",
        metavar="NAME",
        help="open_clip/<name>, or sentence_transformers/<name or folder>",
    )
    group.add_argument(
        "--text_weights",
        type=path_type,
        metavar="TAG|FILE|none",
        help="open_clip's weights: a pretrained tag, a file, or none (random)",
    )


def check_text_flags(args):
    """Raise InputError if the flags of photos and those of texts do not go together."""
    if args.texts is None and args.output is None:
        raise InputError("--output is missing: name the folder where the features go")
    if (args.texts is None) != (args.text_encoder is None):
        raise InputError("--texts and --text_encoder go together: give both, or neither")
    if args.texts and args.captions:
        raise InputError("--captions is for photos, and --texts names captions: leave one out")


def main(argv=None):
    """Make what the flags ask for, in this process or in all that torchrun started."""
    with distributed.session():
        distributed.wait_at_most(MEETING_TIME)
        carry_out(parse_args(argv))


def carry_out(args):
    """Find photos and captions, build the encoder, encode blocks of photos, write the data set."""
    if args.sources:
        return convert(args)
    if args.texts:
        return write_text_vectors(args)
    if args.merge:
        return merge_parts(args)
    photos = find_photos(args)
    check_splits(args, photos)
    device = choose_device(args.device)
    encoder = build_encoder(
        args.encoder, args.encoder_weights, args.pooling, args.regions, args.normalise, device
    )
    description = {**encoder.description, "dtype": args.dtype, "amp": args.amp}
    check_output(args.output, description)
    if args.part:
        parts.refuse_output(args.output, args.part)
    with the_only_one(args.output):
        blocks = plan_blocks(args, photos, description)
        blocks = parts.blocks_of(args.part, blocks) if args.part else blocks
        encode_blocks(args, photos, blocks, encoder)
        distributed.sync()
        if distributed.is_first():
            write_all(args, photos, blocks, encoder.row_shape, description)


def merge_parts(args):
    """Join parts that --part made."""
    if distributed.is_first():
        found = parts.read_parts(args.merge)
        description = found[0].content["description"]
        check_output(args.output, description)
        parts.refuse_output(args.output)
        done = parts.merge(found, args.output)
        total = found[0].content["photos"]
        report(args.output, done.splits, done.broken, total, done.small, description)
    distributed.sync()


def write_text_vectors(args):
    """Write the text model's vectors of a data set's captions."""
    from features import text_models

    device, output = choose_device(args.device), args.output or args.texts
    with the_only_one(output, text_models.BLOCKS):
        if distributed.is_first():
            model = text_models.text_model(args.text_encoder, args.text_weights, device)
            text_models.write_texts(args.texts, output, model, args.batch_size, args.dtype)
        distributed.sync()


# Photos and captions ----------------------------------------------------------------------------


def find_photos(args):
    """The photos to encode, as CaptionedPhotos; those of a gallery have no captions."""
    photos = named_photos(args)
    lost = [photo.name for photo in photos if photo.name != photo.name.strip(ASCII_SPACE)]
    if lost:
        raise InputError(
            f"photo {ascii(lost[0])} has white space at an end of its name, which an ids file "
            "cannot keep: rename it"
        )
    return photos


def named_photos(args):
    """The photos that --captions and --images name, as CaptionedPhotos."""
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
        if not os.path.isdir(args.images):
            raise InputError(f"photo folder {args.images} is not there: check --images")
        photos = with_restval_in_train(read_photo_captions(args.captions, args.images))
        tell_of_unnamed(args, photos)
    captioned = [photo for photo in photos if photo.captions]
    if not captioned:
        raise InputError(
            f"{args.captions} has no caption of a photo: check --captions, or leave it out for a "
            "gallery"
        )
    if len(captioned) < len(photos):
        print(
            f"note: {len(photos) - len(captioned)} photos have no caption and are left out",
            file=sys.stderr,
        )
    for photo in captioned:
        image_path(args.images, photo.name, args.captions)
    return captioned


def tell_of_unnamed(args, photos):
    """Print how many photos of the folder the captions do not name."""
    try:
        unnamed = set(photo_names(args.images)) - {photo.name for photo in photos}
    except InputError:  # the folder cannot be read, so nothing is known of its photos
        return
    if unnamed:
        print(
            f"note: {len(unnamed)} photos in {args.images} are not named in {args.captions} and "
            f"are left out, such as {ascii(min(unnamed))}",
            file=sys.stderr,
        )


# The data set -----------------------------------------------------------------------------------


def check_output(output, description):
    """Raise InputError if --output holds features of another kind, or not from this script."""
    found = read_features_json(output)
    if found is not None:
        refuse_other(found, description, f"--output {output}", "this run")
    elif os.path.isdir(output) and not os.path.isdir(os.path.join(output, BLOCKS)):
        foreign = [
            name for name in sorted(os.listdir(output)) if name in OURS or name.endswith("_ims.npy")
        ]
        if foreign:
            raise InputError(
                f"--output {output} holds {foreign[0]}, which is not from this script: name "
                "another folder"
            )


def write_all(args, photos, blocks, row_shape, description):
    """Write all splits' files, broken.txt and features.json, then move them to their places.

    Until then they are in the blocks' folder. Files of other splits that an earlier extraction left
    are removed.
    """
    notes = [read_notes(block) for block in blocks]
    whole = [number for note in notes for number in note.numbers]
    broken = {number: why for note in notes for number, why in note.broken.items()}
    small = sum(note.small for note in notes)
    scratch = os.path.join(args.output, BLOCKS)
    if not whole and not args.part:
        shutil.rmtree(scratch)
        number, why = min(broken.items())
        raise InputError(
            f"none of {len(photos)} photos can be read, such as {photos[number].name} ({why}): "
            f"check --images {args.images}"
        )
    splits = splits_of(args, parts.undrawn(photos) if args.part else photos, whole)
    chosen = {split: [photos[number] for number in own] for split, own in splits.items()}
    names = []
    for split, own in chosen.items():
        names += write_texts(scratch, split, own)
    names += write_features(args, splits, blocks, row_shape)
    if broken:
        names += write_lines(scratch, "broken.txt", broken_lines(photos, broken))
    names += write_lines(scratch, "features.json", [json.dumps(description, indent=1)])
    if args.part:
        about = parts.about_features(args, photos, blocks, description, small, splits)
        names += parts.write_part(scratch, about, names)
    install(scratch, args.output, names)
    total = blocks[-1].end - blocks[0].first
    report(args.output, chosen, len(broken), total, small, description, args.part)


def broken_lines(photos, broken):
    """The lines of broken.txt: a photo's name, and what is wrong with it."""
    return [
        f"{on_one_line(photos[number].name)}\t{on_one_line(why)}"
        for number, why in sorted(broken.items())
    ]


def write_features(args, splits, blocks, row_shape):
    """Write all splits' features in one pass over the blocks; return the files' names.

    Raises InputError, and removes the blocks, if all of a split's features are zero.
    """
    split_of = np.empty(blocks[-1].end, f"<U{max(map(len, splits), default=1)}")
    for split, numbers in splits.items():
        split_of[numbers] = split
    return write_rows(
        os.path.join(args.output, BLOCKS),
        args.output,
        {split: len(numbers) for split, numbers in splits.items()},
        row_shape,
        args.dtype,
        ((read_rows(block), split_of[read_notes(block).numbers]) for block in blocks),
        check=not args.part,
    )


def report(output, splits, broken, total, small, description, part=None):
    """Print what was written, and what was left out.

    splits: {split: its CaptionedPhotos}; broken, total, small: numbers of photos
    """
    counts = ", ".join(f"{len(photos)} {split}" for split, photos in splits.items()) or "no"
    captions = sum(len(photo.captions) for photos in splits.values() for photo in photos)
    print(
        f"{output}: {f'{part}, ' if part else ''}{counts} photos with {captions} captions, "
        f"features of width {description['width']}"
    )
    if not part and GALLERY not in splits and not is_precomputed(os.path.abspath(output)):
        print(
            f"note: train.py takes a folder as features only if its name ends in precomp: rename "
            f"{output} before training on it",
            file=sys.stderr,
        )
    if broken:
        print(
            f"{broken} of {total} photos could not be read: {os.path.join(output, 'broken.txt')} "
            "lists them"
        )
    if small:
        print(
            f"{small} photos are smaller than the {description['resize']} pixels to which "
            f"{description['encoder']} resizes them"
        )


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
