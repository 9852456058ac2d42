"""How fast this machine trains and evaluates, against plain loops in the style of the original pipeline.

    python3 benchmark.py                       # made-up data of COCO's shape, a few minutes on two cores
    python3 benchmark.py --json benchmark.json --coco_memory
    python3 benchmark.py --parts scan --repeats 5    # SCAN's scores and training step, six minutes on two cores
    python3 benchmark.py --parts extract --repeats 5 # photos to features: whether the encoder is kept busy

Each part is timed in turn with its reference, after a warm-up; figures are medians with minimum and
maximum. The floor of a part is what its operations would take at the speed of one large
product, or its bytes at the speed of one large copy, both measured here.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import distributed
from benchmark_extract import bench_extract
from benchmark_scan import bench_scan
from benchmark_search import bench_search
from caption_files import read_captions
from corrections import METHODS, corrections_of, parameters_of, rank_corrected
from data import Loader, PrecompDataset
from device import choose_device, choose_matmul_precision
from errors import ArgumentParser, InputError, number, replacing, run_script
from evaluation import FOLDS, metrics_of
from hubness import DEPTHS, hubness_both_ways
from loss import ContrastiveLoss, cosine_sim
from memory_bank import build_bank, draw_batches, in_batch
from model import VSE, l2norm
from ranking import Cosine, rank_both_ways
from run_record import Log
from shares import gradients, shared_batches
from timing import Timer, machine_speeds, peak_extra_memory, ratio, resident_memory, row, spread
from vocab import SPECIAL_WORDS, nltk_words, tokenize, vocabulary_of
from watch import StepFigures, figures_of
from word_ids import CAPTIONS_PER_IMAGE, number_words

PARTS = ["loader", "step", "distributed", "bank", "evaluation", "hubs"]
WORDS = 3000  # of the made-up captions
HARD_SCORES = 1e-6  # float64 scores further apart than this must be ranked alike
BANK_ENTRIES = 28_000  # about 5 % of COCO's training pairs
COCO_IMAGES, COCO_CAPTIONS, COCO_WIDTH = 113_287, 566_435, 2048


# Data -------------------------------------------------------------------------------------------

def make_captions(n, rng):
    """n captions of 8 to 15 made-up words, as COCO's are long, and a full stop."""
    return [" ".join(f"w{word}" for word in rng.zipf(1.3, rng.integers(8, 16)) % WORDS) + " ." for _ in range(n)]


def make_data(folder, lines, images, width, rng):
    """Write a `train` split of made-up features and the given captions."""
    features = np.lib.format.open_memmap(os.path.join(folder, "train_ims.npy"), "w+", np.float32, (images, width))
    for start in range(0, images, 4096):
        block = features[start:start + 4096]
        block[:] = rng.standard_normal(block.shape, np.float32)
    features.flush()
    with open(os.path.join(folder, "train_caps.txt"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def made_up_vocabulary():
    """The special words and all words of `make_captions`."""
    return vocabulary_of([*SPECIAL_WORDS, ".", *(f"w{word}" for word in range(WORDS))])


def made_up_embeddings(images, size, device):
    """L2-normalised (N, D) images and (5N, D) captions near them."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(images, size, generator=generator)
    captions = base.repeat_interleave(CAPTIONS_PER_IMAGE, 0) + 4 * torch.randn(
        images * CAPTIONS_PER_IMAGE, size, generator=generator)
    return l2norm(base).to(device), l2norm(captions).to(device)


def captions_and_words(options, rng):
    """The training set's captions, made up or those of --captions, and their Vocabulary."""
    count = options.images * options.captions_per_image
    if not options.captions:
        return make_captions(count, rng), made_up_vocabulary()
    captions = read_captions(options.captions)[:count]
    if len(captions) < count:
        raise InputError(f"--captions {options.captions} has {len(captions)} captions, {count} are needed: give fewer "
                         "--images")
    words = Counter(word for caption in captions for word in tokenize(caption))
    return captions, vocabulary_of([*SPECIAL_WORDS, *(word for word in words if words[word] >= 4)])


# The original style -----------------------------------------------------------------------------

def reference_batches(dataset, vocab, batch_size):
    """Batches as the original makes them: each caption tokenized when asked for, samples joined in Python."""
    order, features = torch.randperm(len(dataset)).tolist(), dataset.images.cpu().numpy()
    captions_per_row = len(dataset) // len(features)
    for start in range(0, len(order), batch_size):
        samples = []
        for index in order[start:start + batch_size]:
            caption = nltk_words(dataset.captions[index].lower())
            words = [vocab("<start>"), *(vocab(word) for word in caption), vocab("<end>")]
            samples.append((torch.Tensor(features[index // captions_per_row]), torch.Tensor(words), index))
        samples.sort(key=lambda sample: len(sample[1]), reverse=True)
        images, captions, indices = zip(*samples)
        lengths = [len(caption) for caption in captions]
        padded = torch.zeros(len(captions), max(lengths)).long()
        for place, caption in enumerate(captions):
            padded[place, :lengths[place]] = caption[:lengths[place]]
        yield torch.stack(images, 0), padded, lengths, indices, indices


class ReferenceModel(nn.Module):
    """The same two encoders, with all GRU outputs unpacked and the last ones gathered."""

    def __init__(self, model):
        super().__init__()
        self.fc, self.embed, self.rnn = (nn.Linear(*reversed(model.img_enc.fc.weight.shape)),
                                         nn.Embedding(*model.txt_enc.embed.weight.shape),
                                         nn.GRU(model.txt_enc.rnn.input_size, model.txt_enc.rnn.hidden_size,
                                                batch_first=True))

    def forward(self, images, captions, lengths):
        """As VSE.forward_emb."""
        packed = pack_padded_sequence(self.embed(captions), torch.as_tensor(lengths).cpu(), batch_first=True)
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        last = (torch.as_tensor(lengths, device=captions.device) - 1).view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
        return l2norm(self.fc(images)), l2norm(outputs.gather(1, last).squeeze(1))


def reference_ranks(images, captions):
    """Ranks by argsort in float64, row by row, from one image row a caption: image to text, text to image."""
    images, captions = (x.cpu().numpy().astype(np.float64) for x in (images, captions))
    images = images.repeat(CAPTIONS_PER_IMAGE, 0)
    n = len(captions) // CAPTIONS_PER_IMAGE
    to_text, to_image = np.zeros(n), np.zeros(len(captions))
    for i in range(n):
        order = np.argsort(images[CAPTIONS_PER_IMAGE * i] @ captions.T)[::-1]
        own = range(CAPTIONS_PER_IMAGE * i, CAPTIONS_PER_IMAGE * (i + 1))
        to_text[i] = min(np.where(order == c)[0][0] for c in own)
    unique = images[::CAPTIONS_PER_IMAGE]
    for i in range(n):
        scores = captions[CAPTIONS_PER_IMAGE * i:CAPTIONS_PER_IMAGE * (i + 1)] @ unique.T
        for c, own_scores in enumerate(scores):
            to_image[CAPTIONS_PER_IMAGE * i + c] = np.where(np.argsort(own_scores)[::-1] == i)[0][0]
    return to_text, to_image


# Parts ------------------------------------------------------------------------------------------

def bench_loader(options, timer, dataset, vocab, speeds):
    """Batches a second, captions cached, against one-by-one samples; and the caption cache's first build."""
    loader = Loader(dataset, options.batch_size, shuffle=True)
    batches = len(loader)
    reference = endless(lambda: reference_batches(dataset, vocab, options.batch_size))
    loader_times, reference_times = timer.turns(lambda: list_nothing(loader), lambda: next(reference))
    per_batch = [seconds / batches for seconds in loader_times]
    floor = 2 * options.batch_size * dataset.images.shape[1] * 4 / speeds["copied_bytes_per_second"]

    def tokenize_all():
        for caption in dataset.captions:
            [vocab(word) for word in nltk_words(caption.lower())]
    build_times, epoch_times = timer.turns(lambda: number_words(dataset.captions, vocab), tokenize_all)
    return {
        f"loader, batch of {options.batch_size} (ms)": row(per_batch, reference_times, 1e-3, floor),
        f"caption cache, first build of {len(dataset)} (s; reference: one epoch's tokenizing / {os.cpu_count()} cores)":
            row(build_times, [seconds / os.cpu_count() for seconds in epoch_times], 1),
    }


def endless(make):
    """Epoch after epoch of batches; each `make()` is one."""
    while True:
        yield from make()


def list_nothing(iterable):
    """Walk through it."""
    for _ in iterable:
        pass


def step_parts(timer, loader, forward, optimizer, parameters, criterion):
    """[[data, forward, backward, optimizer] seconds of each of `repeats` steps]."""
    batches, rounds = iter(loader), []
    for _ in range(timer.repeats + 1):
        parts, held = [], {}

        def data(held=held):
            held["batch"] = next(batches)

        def run_forward(held=held):
            images, captions, lengths, _, _ = held["batch"]
            held["loss"] = criterion(*forward(images, captions, lengths))

        def backward(held=held):
            optimizer.zero_grad()
            held["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 2.0)

        for part in (data, run_forward, backward, optimizer.step):
            parts.append(timer.seconds(part))
        rounds.append(parts)
    return rounds[1:]


def bench_step(options, timer, dataset, vocab, model, speeds):
    """A training step's parts, as each --amp has it, against the original style's."""
    criterion = ContrastiveLoss(options)
    chosen, default = torch.get_float32_matmul_precision(), "highest"
    reference = ReferenceModel(model).to(timer.device)
    words = float(dataset.lengths.float().mean()) * options.step_batch
    hidden, word_dim = options.embed_size, model.txt_enc.rnn.input_size
    floor = 6 * words * 3 * hidden * (hidden + word_dim) / speeds["operations_per_second"]

    reference_optimizer = torch.optim.Adam(reference.parameters(), lr=2e-4, foreach=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=timer.device.type in ("cpu", "cuda"))
    reference_data = endless(lambda: reference_batches(dataset, vocab, options.step_batch))
    loader = Loader(dataset, options.step_batch, shuffle=True)
    data = endless(lambda: loader)
    kinds, single = {"reference": [], **{amp: [] for amp in options.amp}}, Timer(timer.device, 1)
    for _ in range(timer.repeats):  # in turn, so that a noisy machine is noisy for all
        for kind in kinds:
            torch.set_float32_matmul_precision(default if kind == "reference" else chosen)
            model.amp = kind == "bf16"
            if kind == "reference":
                parts = step_parts(single, reference_data, lambda i, c, n: reference(i.to(timer.device), c.to(
                    timer.device), n), reference_optimizer, list(reference.parameters()), criterion)
            else:
                parts = step_parts(single, data, model.forward_emb, optimizer, list(model.parameters()), criterion)
            kinds[kind].append(parts[0])
    torch.set_float32_matmul_precision(chosen)
    model.amp = False
    return step_lines(options, kinds, floor)


def step_lines(options, kinds, floor):
    """The table's lines of a step and its parts; kinds: {"reference" or --amp: parts' seconds of each round}."""
    lines = {}
    for kind in options.amp:
        name = f"step, batch of {options.step_batch}, {'float32' if kind == 'off' else 'bf16'}"
        whole = [[sum(parts) for parts in kinds[which]] for which in (kind, "reference")]
        lines[f"{name} (ms)"] = row(*whole, 1e-3, floor)
        for part, title in enumerate(("data", "forward", "backward", "optimizer")):
            lines[f"{name}: {title} (ms)"] = row(*([parts[part] for parts in kinds[which]] for which in
                                                   (kind, "reference")), 1e-3)
    return lines


# Parts of a batch -------------------------------------------------------------------------------

def timed_steps(options, timer, dataset, model, micro_batch=None, plain=False):
    """[seconds of each step]: plain ones, or those of the processes' shares, of `micro_batch` pairs a piece."""
    criterion, parameters = ContrastiveLoss(options), list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=timer.device.type in ("cpu", "cuda"))
    loader = Loader(dataset, options.step_batch, shuffle=True)
    batches = [batch for batch in loader.batches() if len(batch) == options.step_batch]
    batches = (batches * (timer.repeats + 1))[:timer.repeats + 1]
    no_image = dataset.images[:0].float().to(timer.device)

    def step(batch):
        optimizer.zero_grad()
        if plain:
            criterion(*model.forward_emb(*batch[:3])).backward()
        else:
            gradients(model, batch, criterion, criterion.similarity, None, 1, parameters, no_image)
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
    loaded = loader.load(batches) if plain else shared_batches(loader, batches, micro_batch, timer.device)
    return [timer.seconds(partial(step, batch)) for batch in loaded][1:]


class Traffic:
    """What `distributed` hands to collectives within the block: bytes, and seconds, waits for each other included."""

    def __enter__(self):
        self.bytes, self.seconds, self.true_call = 0, 0.0, distributed._call
        distributed._call = self.call
        return self

    def call(self, collective, *arguments):
        """One collective."""
        start = time.perf_counter()
        self.true_call(collective, *arguments)
        self.seconds += time.perf_counter() - start
        sent = next(argument for argument in reversed(arguments) if isinstance(argument, torch.Tensor))
        self.bytes += sent.numel() * sent.element_size()

    def __exit__(self, *_):
        distributed._call = self.true_call


def as_one_of_many(options, timer, dataset, model):
    """What each process that `bench_distributed` starts does; the first one prints its figures as JSON."""
    distributed.sync()
    with Traffic() as traffic:
        seconds = timed_steps(options, timer, dataset, model)
    if distributed.is_first():
        steps = len(seconds) + 1
        print(json.dumps({"seconds": seconds, "bytes": traffic.bytes / steps,
                          "share": traffic.seconds / steps / median(seconds)}))


def bench_distributed(options, timer, dataset, model):
    """A step of one process with two threads against two with one each, on CPUs, and one in pieces against whole."""
    size = f"step, batch of {options.step_batch}"
    flags = ["--parts", "distributed", "--device", "cpu", "--repeats", str(timer.repeats)]
    for name in ("images", "captions_per_image", "img_dim", "embed_size", "batch_size", "step_batch"):
        flags += [f"--{name}", str(getattr(options, name))]
    flags += ["--captions", options.captions] if options.captions else []
    lines, threads = {}, torch.get_num_threads()
    if timer.device.type == "cpu":
        torch.set_num_threads(2)
        one = timed_steps(options, timer, dataset, model, plain=True)
        child = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                                os.path.abspath(__file__), *flags], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(child.stdout.splitlines()[-1])
        torch.set_num_threads(threads)
        lines = {f"{size}, two processes of one thread (ms; reference: one process of two)": row(
                     found["seconds"], one, 1e-3),
                 f"{size}, two processes: bytes handed to collectives (MB)": {"ours": spread([found["bytes"]], 1e6)},
                 f"{size}, two processes: share of a step in collectives": {"ours": spread([found["share"]])}}
    piece = -(-options.step_batch // 4)
    whole, pieces = (timed_steps(options, timer, dataset, model, plain=plain, micro_batch=None if plain else piece)
                     for plain in (True, False))
    return lines | {f"{size}, --micro_batch {piece} (ms; reference: the whole batch)": row(pieces, whole, 1e-3)}


def bench_watch(options, timer):
    """What watching and recording add to a step: its figures, and one line of log.jsonl."""
    loss, norm = torch.zeros((), device=timer.device), torch.ones((), device=timer.device)
    similarities = torch.randn(options.step_batch, options.step_batch, device=timer.device)
    with tempfile.TemporaryDirectory() as folder:
        log = Log(folder, 0)
        times, = timer.turns(lambda: log.write(step=1, **StepFigures(*figures_of(
            loss, norm, similarities).tolist())._asdict()))
    return {"a step's figures and log line (ms)": row(times, unit=1e-3)}


def bench_bank(options, timer, dataset, model):
    """Leaving out a batch's own entries, against a Python scan; building a bank, against encoding everything."""
    generator = torch.Generator().manual_seed(2)
    entries = torch.randperm(COCO_CAPTIONS, generator=generator)[:BANK_ENTRIES].to(timer.device)
    indices = torch.randperm(COCO_CAPTIONS, generator=generator)[:options.batch_size].to(timer.device)
    listed, batch = entries.tolist(), indices.tolist()
    exclusion = timer.turns(lambda: in_batch(entries, indices), lambda: [entry in batch for entry in listed])
    loader = Loader(dataset, options.step_batch, shuffle=True)

    def build(rate):
        batches = draw_batches(loader.batches(), rate, torch.Generator().manual_seed(0))
        return build_bank(model, loader.load(batches))
    drawn = len(build(0.05).indices) / len(dataset)
    lines = {f"bank exclusion, {BANK_ENTRIES} entries, batch of {options.batch_size} (ms)": row(*exclusion, 1e-3)}
    lines[f"bank build at mb_rate 0.05, drew {drawn:.1%} (s; reference: encoding all pairs)"] = row(
        *Timer(timer.device, 3).turns(lambda: build(0.05), lambda: build(1.0)))
    return lines


def bench_evaluation(options, timer, n_images):
    """Ranks both ways from given embeddings, against the product alone and against argsort."""
    images, captions = made_up_embeddings(n_images, options.embed_size, timer.device)
    fold = n_images // FOLDS
    fold_images, fold_captions = images.split(fold), captions.split(fold * CAPTIONS_PER_IMAGE)

    def product():
        return images @ captions.t()

    def fold_products():
        for pair in zip(fold_images, fold_captions):
            cosine_sim(*pair)

    def folds():
        for pair in zip(fold_images, fold_captions):
            metrics_of(rank_both_ways(*pair, top=0))
    floor_times, times = timer.turns(product, lambda: rank_both_ways(images, captions, top=0))
    fold_floor, fold_times = timer.turns(fold_products, folds)
    start = time.perf_counter()
    expected = reference_ranks(images, captions)
    reference_seconds = time.perf_counter() - start
    ranked = rank_both_ways(images, captions)
    check_ranks(images, captions, ranked, expected)
    memory = peak_extra_memory(lambda: rank_both_ways(images, captions))
    name = f"evaluation, {n_images} x {len(captions)}"
    return {f"{name} (s; reference: argsort)": row(times, [reference_seconds] * len(times), 1, median(floor_times)),
            f"{name}: times the product alone": {"ours": ratio(times, floor_times)},
            f"{name}: peak extra memory (MB)": {"ours": spread([memory], 1e6)} if memory is not None else {},
            f"five folds of {fold}: times their products alone": {"ours": ratio(fold_times, fold_floor)}}


def bench_hubs(options, timer, n_images):
    """The hubness table and each correction, with a bank as large as the split, against one product."""
    images, captions = made_up_embeddings(n_images, options.embed_size, timer.device)
    bank_images, bank_captions = images.flip(1), captions.flip(1)
    plain = rank_both_ways(images, captions, top=max(DEPTHS))

    def product():
        return images @ captions.t()

    def hubness():
        hubness_both_ways(rank_both_ways(images, captions, top=max(DEPTHS)))

    def corrected(name):
        wanted = [(name, parameters_of(name))]
        pairs = zip(corrections_of("i2t", Cosine(bank_images, captions), wanted),
                    corrections_of("t2i", Cosine(images, bank_captions), wanted))
        rank_corrected(Cosine(images, captions), plain, list(pairs))
    floor, table, *times = timer.turns(product, hubness, *(partial(corrected, name) for name in METHODS))
    memory, size = peak_extra_memory(hubness), f"{n_images} x {len(captions)}"
    peak = {"ours": spread([memory], 1e6)} if memory is not None else {}
    return {f"hubness table, {size}: times the product alone": {"ours": ratio(table, floor)},
            f"hubness table, {size}: peak extra memory (MB)": peak,
            **{f"{name}, {size}, bank as large, both ways: times the product alone": {"ours": ratio(own, floor)}
               for name, own in zip(METHODS, times)}}


def check_ranks(images, captions, ranked, expected):
    """Raise AssertionError unless ranks equal the reference's wherever float64 scores are not within HARD_SCORES."""
    scores = images.cpu().double() @ captions.cpu().double().t()
    own = scores.unflatten(1, (len(images), CAPTIONS_PER_IMAGE)).diagonal().t()
    for ranking, ranks, pairs, matrix in ((ranked[0], expected[0], own.amax(1), scores),
                                          (ranked[1], expected[1], own.flatten(), scores.t())):
        near = torch.cat([((rows - bars.unsqueeze(1)).abs() < HARD_SCORES).sum(1)
                          for rows, bars in zip(matrix.split(500), pairs.split(500))]) > 1
        differ = torch.from_numpy(ranks).long() != ranking.ranks.cpu()
        assert not (differ & ~near).any(), "ranks differ from the reference's"
        assert differ.float().mean() < 0.01, "too many near ties to compare"


def bench_coco_memory(options, timer, vocab):
    """Resident memory of training on data of COCO's size beyond the memory-mapped features."""
    with tempfile.TemporaryDirectory() as folder:
        shape = (COCO_IMAGES, COCO_WIDTH)
        np.lib.format.open_memmap(os.path.join(folder, "train_ims.npy"), "w+", np.float32, shape).flush()
        with open(os.path.join(folder, "train_caps.txt"), "w", encoding="utf-8") as file:
            file.write("\n".join(make_captions(COCO_CAPTIONS, np.random.default_rng(3))))
        start = time.perf_counter()
        dataset = PrecompDataset(folder, "train", vocab, cache_dir=folder)
        opened = time.perf_counter() - start
        model = made_up_model(options, COCO_WIDTH, vocab).to(timer.device)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=True)
        step_parts(Timer(timer.device, 3), Loader(dataset, options.batch_size, shuffle=True), model.forward_emb,
                   optimizer, parameters, ContrastiveLoss(options))
        return {"COCO-sized training: resident memory beyond the features (MB)": {
                    "ours": spread([resident_memory("RssAnon")], 1e6)},
                "COCO-sized training: first start, captions tokenized (s)": {"ours": spread([opened])}}


def made_up_model(options, width, vocab):
    """A model for the made-up data."""
    torch.manual_seed(0)
    return VSE(argparse.Namespace(data_name="made_precomp", img_dim=width, embed_size=options.embed_size, word_dim=300,
                                  num_layers=1, vocab_size=len(vocab), use_abs=False, no_imgnorm=False, finetune=False,
                                  cnn_type="vgg19"))


# Script -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Measure training and evaluation on this machine, in ratios to the original style.")
    count = number(int, 1)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--parts", default=PARTS, nargs="+", choices=[*PARTS, "scan", "extract", "search"],
                      help="only these (default: all but scan, SCAN's scores and training step over regions, extract, "
                           "features out of photos, and search, galleries of made-up photos)")
    what.add_argument("--photos", metavar="FOLDER", help="extract: these photos instead of made-up ones")
    what.add_argument("--amp", default=["off", "bf16"], nargs="+", choices=["off", "bf16"],
                      help="kinds of training step")
    what.add_argument("--coco_memory", action="store_true",
                      help="also measure the memory of training on a set of COCO's size (1 GB of disk, minutes)")
    size = parser.add_argument_group("its size")
    size.add_argument("--images", default=2048, type=count, help="images of the made-up training set")
    size.add_argument("--captions_per_image", default=CAPTIONS_PER_IMAGE, type=int, choices=[1, CAPTIONS_PER_IMAGE],
                      help="captions a feature row")
    size.add_argument("--captions", metavar="FILE", help="take captions from this file instead of making them up: "
                                                         "real ones begin more alike")
    size.add_argument("--img_dim", default=2048, type=count, help="width of the features")
    size.add_argument("--embed_size", default=1024, type=count, help="width of the joint embedding")
    size.add_argument("--batch_size", default=512, type=count, help="batch of the loader and the bank's exclusion")
    size.add_argument("--step_batch", default=128, type=count, help="batch of the training step")
    size.add_argument("--eval_images", default=[1000, 5000], type=number(int, FOLDS), nargs="+",
                      help="images of the evaluations, a multiple of five")
    size.add_argument("--search_sizes", default=[10_000, 100_000, 1_000_000], type=number(int, 1000), nargs="+",
                      help="search: photos of the galleries (1024 numbers each: 4 GB of disk, twice, for a million)")
    size.add_argument("--search_quantizer", action="store_true",
                      help="search: the largest of them with a product quantizer, too")
    size.add_argument("--search_folder", metavar="FOLDER", help="search: where they are built (default: the system's "
                                                                "for temporary files)")
    how = parser.add_argument_group("how, and what to write")
    how.add_argument("--repeats", default=7, type=count, help="timed rounds of each part")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    how.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(argv)
    check_sizes(options)
    loss = {"measure": "cosine", "margin": 0.2, "max_violation": False, "sum_violation": False, "local_alpha": 30.0,
            "local_ep": 0.3}
    return argparse.Namespace(**vars(options), **loss)


def check_sizes(options):
    """Raise InputError where folds or batches do not fit the made-up data."""
    if any(images % FOLDS for images in options.eval_images):
        raise InputError(f"--eval_images must be multiples of {FOLDS}, for the folds")
    if options.images * options.captions_per_image < (largest := max(options.batch_size, options.step_batch)):
        raise InputError(f"--images {options.images} do not fill a batch of {largest}: give more")
    if options.search_folder and not os.path.isdir(options.search_folder):
        raise InputError(f"--search_folder {options.search_folder} is not there: make it, or name another")


def measure(options, timer):
    """All parts that were asked for: {title: line}."""
    speeds, lines, rng = machine_speeds(timer), {}, np.random.default_rng(0)
    captions, vocab = captions_and_words(options, rng)
    with tempfile.TemporaryDirectory() as folder:
        if {"loader", "step", "distributed", "bank"} & set(options.parts):
            make_data(folder, captions, options.images, options.img_dim, rng)
            dataset = PrecompDataset(folder, "train", vocab)
            dataset.place(timer.device)
            model = made_up_model(options, options.img_dim, vocab).to(timer.device)
        if "loader" in options.parts:
            lines |= bench_loader(options, timer, dataset, vocab, speeds)
        if "step" in options.parts:
            lines |= bench_step(options, timer, dataset, vocab, model, speeds) | bench_watch(options, timer)
        if "distributed" in options.parts:
            lines |= (as_one_of_many if distributed.launched() else bench_distributed)(
                options, timer, dataset, model) or {}
        if "bank" in options.parts:
            lines |= bench_bank(options, timer, dataset, model)
    if "evaluation" in options.parts:
        for images in options.eval_images:
            lines |= bench_evaluation(options, timer, images)
    if "hubs" in options.parts:
        for images in options.eval_images:
            lines |= bench_hubs(options, Timer(timer.device, min(timer.repeats, 3)), images)
    if "scan" in options.parts:
        lines |= bench_scan(options, timer, captions, vocab, speeds)
    if "extract" in options.parts:
        lines |= bench_extract(options, timer)
    if "search" in options.parts:
        lines |= bench_search(options)
    if options.coco_memory:
        lines |= bench_coco_memory(options, timer, made_up_vocabulary())
    return {"speeds": speeds, "parts": lines}


def print_table(result):
    """The figures as a Markdown table: medians, with minimum and maximum."""
    speeds = result["speeds"]
    print(f"Product: {speeds['operations_per_second'] / 1e9:.0f} GFLOP/s, "
          f"copy: {speeds['copied_bytes_per_second'] / 1e9:.1f} GB/s (bytes read and written)\n")
    print("| part | here | reference | times faster | floor | share of the floor |\n|---|---|---|---|---|---|")
    for title, line in result["parts"].items():
        cells = ["{median:.4g} ({min:.4g}-{max:.4g})".format(**line[key]) if key in line else ""
                 for key in ("ours", "reference", "ratio")]
        cells += [f"{line['floor']:.4g}", f"{line['floor share']:.0%}"] if "floor" in line else ["", ""]
        print(f"| {title} | {' | '.join(cells)} |")


def main(argv=None):
    """Measure, print, and keep."""
    with distributed.session():
        carry_out(parse_args(argv))


def carry_out(options):
    """Measure as the options say."""
    device = choose_device(options.device)
    precision = choose_matmul_precision(device).kind
    result = {"machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                          "device": str(device), "torch": torch.__version__, "python": platform.python_version(),
                          "float32 products": precision},
              "options": {name: value for name, value in vars(options).items() if name != "json"}}
    print(", ".join(f"{name}: {value}" for name, value in result["machine"].items()), file=sys.stderr)
    result |= measure(options, Timer(device, options.repeats))
    if distributed.launched():  # as_one_of_many has printed what is wanted
        return
    print_table(result)
    if options.json:
        with replacing(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    run_script(main)
