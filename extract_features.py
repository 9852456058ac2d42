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
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from caption_files import CaptionedPhoto, read_caption_texts, read_photo_captions
from device import choose_device
from errors import ArgumentParser, InputError, number, replacing, run_script
from features import POOLINGS, build_encoder, check_photo, encode, read_features_json, refuse_other
from images import decode_image, image_path, photo_names
from word_ids import CAPTIONS_PER_IMAGE

BLOCKS = ".blocks"  # below the output folder: what is finished, until all is
BLOCK_PHOTOS = 256
AHEAD = 4  # batches a worker decodes ahead
DEFAULT_SHARE, DEFAULT_MOST = 10, 1000  # dev and test: a tenth of the photos each, and no more than so many
GALLERY = "gallery"
MEETING_TIME = timedelta(days=30)  # the processes' shares may take long


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
    """Photos and captions, encoder, blocks of features, files."""
    args = parse_args(argv)
    photos = find_photos(args)
    check_splits(args, photos)
    device = choose_device(own_device(args.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or every process would hold memory on the first
    encoder = build_encoder(args.encoder, args.encoder_weights, args.pooling, args.regions, args.normalise, device)
    description = {**encoder.description, "dtype": args.dtype, "amp": args.amp}
    check_output(args.output, description)
    rank, processes = meet_others()
    with the_only_one(args.output, rank):
        blocks = plan_blocks(args, photos, description)
        encode_blocks(args, photos, blocks, encoder, rank, processes)
        wait_for_others(processes)
        if rank == 0:
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
        tell(f"note: {len(photos) - len(captioned)} photos have no caption and are left out")
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
        draw_splits(args, len(photos))
    elif args.dev is not None or args.test is not None:
        raise InputError("--dev and --test draw splits, but " + (
            "a gallery has none" if photos[0].split == GALLERY else f"{args.captions} gives them") + ": leave them out")


def draw_splits(args, n):
    """n splits' names, as many of them dev and test as the flags say, drawn by the seed."""
    usual = min(DEFAULT_MOST, max(n // DEFAULT_SHARE, 1 if n > 2 else 0))
    dev, test = (usual if given is None else given for given in (args.dev, args.test))
    if dev + test >= n:
        raise InputError(f"--dev {dev} and --test {test} leave none of {n} photos to train on: ask for fewer")
    order = np.random.default_rng(args.seed).permutation(n)
    splits = np.full(n, "train", "<U5")
    splits[order[:dev]], splits[order[dev:dev + test]] = "dev", "test"
    return splits.tolist()


# One of several processes -----------------------------------------------------------------------

def own_device(name):
    """--device, with `auto` and `cuda` read as this process's own GPU under torchrun."""
    if name in ("auto", "cuda") and torch.cuda.device_count() > 1 and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


def meet_others():
    """This process's number and how many there are: 0 and 1, but for torchrun."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    try:
        torch.distributed.init_process_group("gloo", timeout=MEETING_TIME)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot meet ({error}): start "
                         "them with torchrun") from error
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def wait_for_others(processes):
    """Return once every process has encoded its share."""
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def the_only_one(output, rank):
    """Keep other runs out of the output folder while the block runs; a killed run's hold is gone with it."""
    path, was_there = os.path.join(output, BLOCKS), os.path.exists(output)
    try:
        os.makedirs(path, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}): name another folder") from error
    try:
        if rank == 0:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another run is writing to {output}: wait for it, or name another folder") from error
        yield
    finally:
        os.close(folder)
        if rank == 0:
            for made in [path] if was_there else [path, output]:
                with contextlib.suppress(OSError):  # only an empty one goes: nothing has come of the run
                    os.rmdir(made)


def tell(line):
    """A line for the person at the keyboard, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


# Blocks of features -----------------------------------------------------------------------------

class Block(NamedTuple):
    """Photos that are encoded and kept together, in a file whose name follows from all that decides its content."""

    path: str
    first: int
    end: int


def plan_blocks(args, photos, description):
    """The Blocks of all photos, in order."""
    made_by = json.dumps(description, sort_keys=True)
    blocks = []
    for first in range(0, len(photos), BLOCK_PHOTOS):
        part = photos[first:first + BLOCK_PHOTOS]
        facts = [made_by, first, [(photo.name, *file_facts(os.path.join(args.images, photo.name))) for photo in part]]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        blocks.append(Block(os.path.join(args.output, BLOCKS, f"{digest}.npz"), first, first + len(part)))
    return blocks


def file_facts(path):
    """A file's size and time of change, by which a changed photo is told."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):  # not there; a name that no file can have
        return ()


class Photos(torch.utils.data.Dataset):
    """Photos, decoded and transformed: (i, tensor, whether it is small) or (i, None, what is wrong with it)."""

    def __init__(self, folder, names, encoder):
        self.folder, self.names, self.transform = folder, names, encoder.transform
        self.resize = encoder.description["resize"]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        if "\n" in name or "\r" in name:
            return index, None, "its name has a line break"
        try:
            picture = decode_image(os.path.join(self.folder, name), as_seen=True)
            check_photo(picture)
            return index, self.transform(picture), min(picture.size) < self.resize
        except InputError as error:
            reason = error.__cause__ or error
            return index, None, getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def collate(items):
    """Photos' items -> (numbers of the whole ones, tensors (B, ...), how many are small, {number: what is wrong})."""
    whole = [item for item in items if item[1] is not None]
    return ([index for index, _, _ in whole], torch.stack([tensor for _, tensor, _ in whole]) if whole else None,
            sum(small for _, _, small in whole), {index: reason for index, tensor, reason in items if tensor is None})


class Part(NamedTuple):
    """A batch of photos, encoded."""

    numbers: list  # of those that could be read
    rows: np.ndarray  # (len(numbers), *row_shape) float32
    small: int
    broken: dict  # {number: what is wrong}

    @property
    def photos(self):
        """How many there were."""
        return len(self.numbers) + len(self.broken)


def encode_blocks(args, photos, blocks, encoder, rank, processes):
    """Encode those of this process's blocks that are not there yet, each into its file."""
    mine = [block for block in blocks[rank::processes] if read_notes(block) is None]
    total = sum(block.end - block.first for block in (blocks if processes == 1 else mine))
    todo = sum(block.end - block.first for block in mine)
    loader = load_photos(args, [photo.name for photo in photos], mine, encoder)
    started, ends = time.monotonic(), []  # (time, photos until then) of each batch
    with tqdm(total=total, initial=total - todo, unit="photo", disable=None if rank == 0 else True) as bar:
        for block in mine:
            parts = []
            while sum(part.photos for part in parts) < block.end - block.first:
                parts.append(next_part(loader, encoder, args.amp))
                bar.update(parts[-1].photos)
                ends.append((time.monotonic(), (ends[-1][1] if ends else 0) + parts[-1].photos))
            write_block(block, parts, args, photos)
    if len(ends) > 1:
        (first_end, first), (end, encoded) = ends[0], ends[-1]
        tell(f"{encoded} photos encoded: the first batch took {first_end - started:.1f} s, then "
             f"{(encoded - first) / (end - first_end):.1f} photos a second")


def load_photos(args, names, blocks, encoder):
    """Batches of the blocks' photos as `collate` makes them, decoded ahead by worker processes."""
    step = min(args.batch_size, encoder.batch_limit or args.batch_size)
    batches = [range(start, min(start + step, block.end)) for block in blocks
               for start in range(block.first, block.end, step)]
    workers = min(args.workers, len(batches))
    return iter(torch.utils.data.DataLoader(
        Photos(args.images, names, encoder), batch_sampler=batches, collate_fn=collate,
        num_workers=workers, prefetch_factor=AHEAD if workers else None, worker_init_fn=leave_interrupts,
        pin_memory=encoder.device.type == "cuda"))


def leave_interrupts(worker):
    """Ctrl-C is the first process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def next_part(loader, encoder, amp):
    """The next batch, encoded."""
    try:
        numbers, pictures, small, broken = next(loader)
        rows = encode(encoder, pictures, amp).numpy() if numbers else np.empty((0, *encoder.row_shape), np.float32)
        return Part(numbers, rows, small, broken)
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory does not hold so many photos at once: ask for a smaller --batch_size; "
                         "called again, it goes on") from error
    except RuntimeError as error:  # a process's end is told wherever this one is just then
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(f"a process that decodes photos has ended ({str(error).splitlines()[0]}): where memory is "
                         "short, ask for fewer --workers or a smaller --batch_size; called again, it goes on"
                         ) from error


def write_block(block, parts, args, photos):
    """Keep a block's features; InputError where they are not finite in the chosen numbers."""
    numbers = [number for part in parts for number in part.numbers]
    with np.errstate(over="ignore"):
        rows = np.concatenate([part.rows for part in parts]).astype(args.dtype)
    finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if not finite.all():
        raise InputError(f"photo {photos[numbers[finite.argmin()]].name}: {args.encoder} gives features that are not "
                         f"finite in {args.dtype}: choose --dtype float32 and --amp off, or other weights")
    broken = {number: reason for part in parts for number, reason in part.broken.items()}
    notes = json.dumps({"broken": broken, "small": sum(part.small for part in parts)}).encode()
    with replacing(block.path) as file:
        np.savez(file, rows=rows, numbers=np.array(numbers, np.int64), notes=np.frombuffer(notes, np.uint8))


class Notes(NamedTuple):
    """What a block's file holds beside the features."""

    numbers: list  # of the photos that the rows are of
    broken: dict  # {number: what is wrong with the photo}
    small: int  # photos smaller than what the encoder resizes to


def read_notes(block):
    """A block's Notes, or None where its file is not there, or torn."""
    try:
        with np.load(block.path, allow_pickle=False) as content:
            notes = json.loads(content["notes"].tobytes())
            return Notes(content["numbers"].tolist(), {int(n): why for n, why in notes["broken"].items()},
                         notes["small"])
    except Exception:  # torn in one of many ways: it is made again
        return None


def read_rows(block):
    """A block's features; InputError if they are not as they were written."""
    try:
        with np.load(block.path, allow_pickle=False) as content:
            return content["rows"]
    except Exception as error:
        raise InputError(f"{block.path} is torn ({error}): delete it, and call again to go on") from error


# The data set -----------------------------------------------------------------------------------

def check_output(output, description):
    """Raise InputError if the output folder holds features of another kind, or somebody else's."""
    found = read_features_json(output)
    if found is not None:
        refuse_other(found, description, f"--output {output}", "this run")
    elif os.path.isdir(output) and not os.path.isdir(os.path.join(output, BLOCKS)) and any(
            name.endswith("_ims.npy") for name in os.listdir(output)):
        raise InputError(f"--output {output} holds features that this script has not made: name another folder")


def write_all(args, photos, blocks, row_shape, description):
    """Every split's files, broken.txt and features.json, first beside the blocks, then all of them in their places."""
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
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(args.output, "broken.txt"))
    for name in names:
        os.replace(os.path.join(scratch, name), os.path.join(args.output, name))
    shutil.rmtree(scratch)
    report(args, photos, splits, broken, sum(note.small for note in notes), description)


def splits_of(args, photos, whole):
    """{split: numbers of its photos, in order}, of the photos that could be read."""
    names = [photos[number].split for number in whole]
    if names[0] is None:
        names = draw_splits(args, len(whole))
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
