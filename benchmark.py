"""Measure how fast this machine trains and evaluates, against loops in the original's style.

    python3 benchmark.py                             # made-up data of COCO's shape
    python3 benchmark.py --json benchmark.json --coco_memory
    python3 benchmark.py --parts scan --repeats 5    # SCAN's scores and training step
    python3 benchmark.py --parts extract --repeats 5 # photos to features: is the encoder kept busy?

On two cores the first takes a few minutes, SCAN six. Each part is timed in turn with its reference,
after a warm-up, and printed at once; figures are medians with minimum and maximum. A part's floor
is the time that its operations would take at the speed of one large product, or its bytes at the
speed of one large copy; both speeds are measured here. Processors without bf16 emulate it, so it is
left out if a probe finds it no faster than float32, unless --amp names it.
"""

import argparse
import json
import os
import platform
import tempfile
from itertools import chain

import numpy as np
import torch

from benchmarks.extract import bench_extract
from benchmarks.made_up import captions_and_words, made_up_model, made_up_vocabulary, make_data
from benchmarks.retrieval import bench_evaluation, bench_hubs
from benchmarks.scan import bench_scan
from benchmarks.search import bench_search
from benchmarks.timing import Timer, machine_speeds, say
from benchmarks.training import (
    as_one_of_many,
    bench_bank,
    bench_coco_memory,
    bench_distributed,
    bench_loader,
    bench_step,
    bench_watch,
)
from data import PrecompDataset
from evaluation import FOLDS
from features.files import CAPTIONS_PER_IMAGE
from runtime import distributed
from runtime.device import amp_in_words, choose_device, choose_matmul_precision
from runtime.errors import ArgumentParser, InputError, number, path_type, run_script
from runtime.files import replacing

PARTS = ["loader", "step", "distributed", "bank", "evaluation", "hubs"]  # without --parts
COUNT = number(int, 1)
LOSS = {  # options of the training step's loss, train.py's defaults
    "measure": "cosine",
    "margin": 0.2,
    "max_violation": False,
    "sum_violation": False,
    "local_alpha": 30.0,
    "local_ep": 0.3,
}


def parse_args(argv=None):
    """The script's options."""
    parser = ArgumentParser(
        "Measure training and evaluation on this machine, in comparison with the original's style."
    )
    add_what(parser.add_argument_group("what to measure"))
    add_sizes(parser.add_argument_group("the sizes"))
    add_search_sizes(parser.add_argument_group("the sizes of search"))
    how = parser.add_argument_group("how, and what to write")
    how.add_argument("--repeats", default=7, type=COUNT, help="timed rounds of each part")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    how.add_argument("--json", type=path_type, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(argv)
    check_sizes(options)
    return argparse.Namespace(**vars(options), **LOSS)


def add_what(what):
    """Add the flags that say what is measured."""
    what.add_argument(
        "--parts",
        default=PARTS,
        nargs="+",
        choices=[*PARTS, "scan", "extract", "search"],
        help="measure only these (default: all but scan, SCAN's scores and training step over "
        "regions; extract, features from photos; and search, galleries of made-up photos)",
    )
    what.add_argument(
        "--photos",
        type=path_type,
        metavar="FOLDER",
        help="extract: these photos instead of made-up ones",
    )
    what.add_argument(
        "--amp",
        nargs="+",
        choices=["off", "bf16"],
        help="kinds of training step (default: off, and bf16 if its products are faster)",
    )
    what.add_argument(
        "--coco_memory",
        action="store_true",
        help="also measure the memory of training on a set of COCO's size (1 GB of disk, minutes)",
    )


def add_sizes(size):
    """Add the flags for the sizes of the made-up data and of the model."""
    size.add_argument(
        "--images", default=2048, type=COUNT, help="images of the made-up training set"
    )
    size.add_argument(
        "--captions_per_image",
        default=CAPTIONS_PER_IMAGE,
        type=int,
        choices=[1, CAPTIONS_PER_IMAGE],
        help="captions of each image",
    )
    size.add_argument(
        "--captions",
        type=path_type,
        metavar="FILE",
        help="take captions from this file instead of made-up ones: more of the real ones begin "
        "alike",
    )
    size.add_argument("--img_dim", default=2048, type=COUNT, help="width of the features")
    size.add_argument("--embed_size", default=1024, type=COUNT, help="width of the joint embedding")
    size.add_argument(
        "--batch_size",
        default=512,
        type=COUNT,
        help="pairs in a batch of the loader and of the bank's exclusion",
    )
    size.add_argument(
        "--step_batch", default=128, type=COUNT, help="pairs in a batch of the training step"
    )
    size.add_argument(
        "--eval_images",
        default=[1000, 5000],
        type=number(int, FOLDS),
        nargs="+",
        help="images of the evaluations, a multiple of five",
    )


def add_search_sizes(size):
    """Add the flags for the galleries of the part "search"."""
    size.add_argument(
        "--search_sizes",
        default=[10_000, 100_000, 1_000_000],
        type=number(int, 1000),
        nargs="+",
        help="photos of the galleries; a million take 8 GB of disk at an --embed_size of 1024",
    )
    size.add_argument(
        "--search_quantizer",
        action="store_true",
        help="also build the largest one with a product quantizer",
    )
    size.add_argument(
        "--search_folder",
        type=path_type,
        metavar="FOLDER",
        help="where the galleries are built (default: the system's folder for temporary files)",
    )


def check_sizes(options):
    """Raise InputError if folds or batches do not fit the made-up data."""
    if any(images % FOLDS for images in options.eval_images):
        raise InputError(f"--eval_images must be multiples of {FOLDS}, for the folds")
    if options.images * options.captions_per_image < (
        largest := max(options.batch_size, options.step_batch)
    ):
        raise InputError(f"--images {options.images} does not fill a batch of {largest}: give more")
    if options.search_folder and not os.path.isdir(options.search_folder):
        raise InputError(
            f"--search_folder {options.search_folder} is not there: make it, or name another"
        )


def kinds_of_step(wanted, device, products):
    """The kinds of --amp to measure.

    wanted: those of --amp; None leaves out bf16 if its products are no faster.
    products: what `choose_matmul_precision` returned.
    """
    how = amp_in_words("bf16", device, products)
    if "WARNING" not in how or wanted == ["off"]:
        return wanted or ["off", "bf16"]
    say(
        f"note: {how}"
        if wanted
        else f"note: left out is {how}; --amp off bf16 measures it all the same"
    )
    return wanted or ["off"]


def parts_of(options, timer, speeds, folder):
    """{part: an iterator of its lines, which measures them} for the parts of --parts, in order."""
    rng, single = np.random.default_rng(0), Timer(timer.device, min(timer.repeats, 3))
    captions, vocab = captions_and_words(options, rng)
    parts = {}
    if {"loader", "step", "distributed", "bank"} & set(options.parts):
        make_data(folder, captions, options.images, options.img_dim, rng)
        dataset = PrecompDataset(folder, "train", vocab)
        dataset.place(timer.device)
        model = made_up_model(options, options.img_dim, vocab).to(timer.device)
        parts = {
            "loader": bench_loader(options, timer, dataset, vocab, speeds),
            "step": chain(
                bench_step(options, timer, dataset, vocab, model, speeds),
                bench_watch(options, timer),
            ),
            "distributed": bench_distributed(options, timer, dataset, model),
            "bank": bench_bank(options, timer, dataset, model),
        }
        if distributed.launched():
            as_one_of_many(options, timer, dataset, model)
            return {}
    parts |= {
        "evaluation": chain.from_iterable(
            bench_evaluation(options, timer, n) for n in options.eval_images
        ),
        "hubs": chain.from_iterable(bench_hubs(options, single, n) for n in options.eval_images),
        "scan": bench_scan(options, timer, captions, vocab, speeds),
        "extract": bench_extract(options, timer),
        "search": bench_search(options),
    }
    parts = {part: lines for part, lines in parts.items() if part in options.parts}
    if options.coco_memory:
        parts["memory on COCO's size"] = bench_coco_memory(options, timer, made_up_vocabulary())
    return parts


def measure(options, timer):
    """Measure the parts of --parts, printing each line at once.

    Returns {"speeds": ..., "parts": {title: line}}.
    """
    speeds, found = machine_speeds(timer), {}
    if not distributed.launched():  # under torchrun, as_one_of_many prints its JSON alone
        print_head(speeds)
    with tempfile.TemporaryDirectory() as folder:
        for part, lines in parts_of(options, timer, speeds, folder).items():
            say(f"measuring: {part}")
            for measured in lines:
                found |= measured
                print_lines(measured)
    return {"speeds": speeds, "parts": found}


def print_head(speeds):
    """Print the machine's speeds and the head of the Markdown table."""
    print(
        f"Product: {speeds['operations_per_second'] / 1e9:.0f} GFLOP/s, "
        f"copy: {speeds['copied_bytes_per_second'] / 1e9:.1f} GB/s (bytes read and written)\n"
    )
    print(
        "| part | here | reference | times faster | floor | share of the floor |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )


def print_lines(lines):
    """Print lines of the table: medians, with minimum and maximum."""
    for title, line in lines.items():
        cells = [
            "{median:.4g} ({min:.4g}-{max:.4g})".format(**line[key]) if key in line else ""
            for key in ("ours", "reference", "ratio")
        ]
        cells += (
            [f"{line['floor']:.4g}", f"{line['floor share']:.0%}"] if "floor" in line else ["", ""]
        )
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main(argv=None):
    """Measure as the flags say, in this process or as one of torchrun's."""
    with distributed.session():
        carry_out(parse_args(argv))


def carry_out(options):
    """Choose the device, measure, print, and write --json."""
    device = choose_device(options.device)
    products = choose_matmul_precision(
        device,
        amp="off" if options.amp == ["off"] else "bf16",
        rows=options.step_batch,
        width=options.embed_size,
    )
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": str(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "float32 products": products.kind,
        }
    }
    say(", ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    options.amp = kinds_of_step(options.amp, device, products)
    result["options"] = {name: value for name, value in vars(options).items() if name != "json"}
    result |= measure(options, Timer(device, options.repeats))
    if options.json and not distributed.launched():
        with replacing(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
