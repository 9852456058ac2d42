"""Time the loader, the training step, the bank, and a step shared by several processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.made_up import made_up_model, make_captions, make_data
from benchmarks.timing import Timer, gru_operations, resident_memory, row, spread
from data import Loader, PrecompDataset
from inputs.tokenizer import nltk_words
from inputs.word_ids import number_words
from loss import ContrastiveLoss
from memory_bank import build_bank, draw_batches, in_batch
from model import l2norm
from runtime import distributed
from training.run_record import step_log
from training.shares import gradients, shared_batches
from training.watch import StepFigures, figures_of

FLOOR_BATCHES = 8  # on which a step's operations are counted
BANK_ENTRIES = 28_000  # about 5 % of COCO's training pairs
COCO_IMAGES, COCO_CAPTIONS, COCO_WIDTH = 113_287, 566_435, 2048
# benchmark.py's flags of a step's size, which its processes under torchrun share.
SIZES = ("images", "captions_per_image", "img_dim", "embed_size", "batch_size", "step_batch")


def reference_batches(dataset, vocab, batch_size):
    """Yield batches as the original does: tokenized one by one, samples joined in Python."""
    order, features = torch.randperm(len(dataset)).tolist(), dataset.images.cpu().numpy()
    captions_per_row = len(dataset) // len(features)
    for start in range(0, len(order), batch_size):
        samples = []
        for index in order[start : start + batch_size]:
            caption = nltk_words(dataset.captions[index].lower())
            words = [vocab("<start>"), *(vocab(word) for word in caption), vocab("<end>")]
            samples.append(
                (torch.Tensor(features[index // captions_per_row]), torch.Tensor(words), index)
            )
        samples.sort(key=lambda sample: len(sample[1]), reverse=True)
        images, captions, indices = zip(*samples)
        lengths = [len(caption) for caption in captions]
        padded = torch.zeros(len(captions), max(lengths)).long()
        for place, caption in enumerate(captions):
            padded[place, : lengths[place]] = caption[: lengths[place]]
        yield torch.stack(images, 0), padded, lengths, indices, indices


class ReferenceModel(nn.Module):
    """The same two encoders in the original style: all GRU outputs unpacked, the last gathered."""

    def __init__(self, model):
        super().__init__()
        self.fc, self.embed, self.rnn = (
            nn.Linear(*reversed(model.img_enc.fc.weight.shape)),
            nn.Embedding(*model.txt_enc.embed.weight.shape),
            nn.GRU(model.txt_enc.rnn.input_size, model.txt_enc.rnn.hidden_size, batch_first=True),
        )

    def forward(self, images, captions, lengths):
        """As `VSE.forward_emb`."""
        packed = pack_padded_sequence(
            self.embed(captions), torch.as_tensor(lengths).cpu(), batch_first=True
        )
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        last = (
            (torch.as_tensor(lengths, device=captions.device) - 1)
            .view(-1, 1, 1)
            .expand(-1, 1, outputs.shape[2])
        )
        return l2norm(self.fc(images)), l2norm(outputs.gather(1, last).squeeze(1))


def bench_loader(options, timer, dataset, vocab, speeds):
    """Time batches of numbered captions against the reference's, and numbering the captions."""
    loader = Loader(dataset, options.batch_size, shuffle=True)
    batches = len(loader)
    reference = endless(lambda: reference_batches(dataset, vocab, options.batch_size))
    loader_times, reference_times = timer.turns(
        lambda: list_nothing(loader), lambda: next(reference)
    )
    per_batch = [seconds / batches for seconds in loader_times]
    floor = 2 * options.batch_size * dataset.images.shape[1] * 4 / speeds["copied_bytes_per_second"]
    yield {
        f"loader, batch of {options.batch_size} (ms)": row(per_batch, reference_times, 1e-3, floor)
    }

    def tokenize_all():
        for caption in dataset.captions:
            [vocab(word) for word in nltk_words(caption.lower())]

    build_times, epoch_times = timer.turns(
        lambda: number_words(dataset.captions, vocab), tokenize_all
    )
    yield {
        f"caption cache, first build of {len(dataset)} (s; reference: one epoch's tokenizing / "
        f"{os.cpu_count()} cores)": row(
            build_times, [seconds / os.cpu_count() for seconds in epoch_times], 1
        )
    }


def endless(make):
    """Yield batches of epoch after epoch; each `make()` is one epoch."""
    while True:
        yield from make()


def list_nothing(iterable):
    """Take all items, and drop them."""
    for _ in iterable:
        pass


def step_parts(timer, batches, forward, optimizer, parameters, criterion):
    """Seconds of [data, forward, backward, optimizer] in a step on the next batch."""
    held = {}

    def data():
        held["batch"] = next(batches)

    def run_forward():
        images, captions, lengths, _, _ = held["batch"]
        held["loss"] = criterion(*forward(images, captions, lengths))

    def backward():
        optimizer.zero_grad()
        held["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)

    return [timer.seconds(part) for part in (data, run_forward, backward, optimizer.step)]


def step_operations(model, batch):
    """Operations of a step's products on a loaded batch, forward and backward.

    Features need no gradients.
    """
    images, captions, lengths = batch[:3]
    weight, rnn = model.img_enc.fc.weight, model.txt_enc.rnn
    gru = gru_operations(captions, torch.as_tensor(lengths), rnn.input_size, rnn.hidden_size)
    return 2 * 2 * len(images) * weight.numel() + 3 * 2 * len(images) ** 2 * len(weight) + gru


def bench_step(options, timer, dataset, vocab, model, speeds):
    """Time the parts of a training step with each --amp, against the original style's."""
    criterion = ContrastiveLoss(options)
    chosen, default = torch.get_float32_matmul_precision(), "highest"
    reference = ReferenceModel(model).to(timer.device)

    reference_optimizer = torch.optim.Adam(reference.parameters(), lr=2e-4, foreach=False)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=2e-4, fused=timer.device.type in ("cpu", "cuda")
    )
    reference_data = endless(lambda: reference_batches(dataset, vocab, options.step_batch))
    loader = Loader(dataset, options.step_batch, shuffle=True)
    data = endless(lambda: loader)
    floor = (
        median(step_operations(model, batch) for batch in islice(data, FLOOR_BATCHES))
        / speeds["operations_per_second"]
    )

    def timed(kind):
        """The parts' seconds of one step: the reference's, or ours by --amp."""
        torch.set_float32_matmul_precision(default if kind == "reference" else chosen)
        model.amp = kind == "bf16"
        how = (data, model.forward_emb, optimizer, list(model.parameters()), criterion)
        if kind == "reference":
            how = (
                reference_data,
                lambda i, c, n: reference(i.to(timer.device), c.to(timer.device), n),
                reference_optimizer,
                list(reference.parameters()),
                criterion,
            )
        step_parts(timer, *how)  # a second warm-up, since the last step was of another kind
        return step_parts(timer, *how)

    rounds = timer.rounds(lambda: {kind: timed(kind) for kind in ("reference", *options.amp)})
    torch.set_float32_matmul_precision(chosen)
    model.amp = False
    yield step_lines(options, {kind: [one[kind] for one in rounds] for kind in rounds[0]}, floor)


def step_lines(options, kinds, floor):
    """The table's lines of a step and its parts.

    kinds: {"reference" or --amp: [parts' seconds] of each round}.
    floor: seconds of the products in float32.
    """
    lines = {}
    for kind in options.amp:
        name = f"step, batch of {options.step_batch}, {'float32' if kind == 'off' else 'bf16'}"
        whole = [[sum(parts) for parts in kinds[which]] for which in (kind, "reference")]
        lines[f"{name} (ms)"] = row(*whole, 1e-3, floor if kind == "off" else None)
        for part, title in enumerate(("data", "forward", "backward", "optimizer")):
            lines[f"{name}: {title} (ms)"] = row(
                *([parts[part] for parts in kinds[which]] for which in (kind, "reference")), 1e-3
            )
    return lines


def timed_steps(options, timer, dataset, model, micro_batch=None, plain=False):
    """[seconds of each step]: plain ones, or shared ones in pieces of `micro_batch` pairs."""
    criterion, parameters = ContrastiveLoss(options), list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=timer.device.type in ("cpu", "cuda"))
    loader = Loader(dataset, options.step_batch, shuffle=True)
    batches = [batch for batch in loader.batches() if len(batch) == options.step_batch]
    batches = (batches * (timer.repeats + 1))[: timer.repeats + 1]
    no_image = dataset.images[:0].float().to(timer.device)

    def step(batch):
        optimizer.zero_grad()
        if plain:
            criterion(*model.forward_emb(*batch[:3])).backward()
        else:
            gradients(model, batch, criterion, criterion.similarity, None, 1, parameters, no_image)
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()

    loaded = iter(
        loader.load(batches)
        if plain
        else shared_batches(loader, batches, micro_batch, timer.device)
    )
    return timer.rounds(lambda: timer.seconds(partial(step, next(loaded))))


class Traffic:
    """Counts what collectives do within a `with` block: bytes, and seconds with waiting."""

    def __enter__(self):
        self.bytes, self.seconds, self.true_call = 0, 0.0, distributed._call
        distributed._call = self.call
        return self

    def call(self, collective, *arguments):
        """Stands for `distributed._call`."""
        start = time.perf_counter()
        self.true_call(collective, *arguments)
        self.seconds += time.perf_counter() - start
        sent = next(
            argument for argument in reversed(arguments) if isinstance(argument, torch.Tensor)
        )
        self.bytes += sent.numel() * sent.element_size()

    def __exit__(self, *_):
        distributed._call = self.true_call


def as_one_of_many(options, timer, dataset, model):
    """Time steps in each process that `bench_distributed` starts; the first prints them as JSON."""
    distributed.sync()
    with Traffic() as traffic:
        seconds = timed_steps(options, timer, dataset, model)
    if distributed.is_first():
        steps = len(seconds) + 1
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "bytes": traffic.bytes / steps,
                    "share": traffic.seconds / steps / median(seconds),
                }
            )
        )


def bench_distributed(options, timer, dataset, model):
    """Time shared steps against plain ones: two processes, on a CPU, and --micro_batch.

    Two processes of one thread are compared with one process of two.
    """
    size = f"step, batch of {options.step_batch}"
    if timer.device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        one = timed_steps(options, timer, dataset, model, plain=True)
        found = figures_of_two(options, timer.repeats)
        torch.set_num_threads(threads)
        yield {
            f"{size}, two processes of one thread (ms; reference: one process of two)": row(
                found["seconds"], one, 1e-3
            ),
            f"{size}, two processes: bytes handed to collectives (MB)": {
                "ours": spread([found["bytes"]], 1e6)
            },
            f"{size}, two processes: share of a step in collectives": {
                "ours": spread([found["share"]])
            },
        }
    piece = -(-options.step_batch // 4)
    whole, pieces = (
        timed_steps(
            options, timer, dataset, model, plain=plain, micro_batch=None if plain else piece
        )
        for plain in (True, False)
    )
    yield {
        f"{size}, --micro_batch {piece} (ms; reference: the whole batch)": row(pieces, whole, 1e-3)
    }


def figures_of_two(options, repeats):
    """Run benchmark.py with torchrun in two processes of one thread; returns what they print."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--parts", "distributed", "--device", "cpu", "--amp", "off", "--repeats", str(repeats)]
    for name in SIZES:
        flags += [f"--{name}", str(getattr(options, name))]
    flags += ["--captions", options.captions] if options.captions else []
    child = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", os.path.join(folder, "benchmark.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def bench_watch(options, timer):
    """Time what the watch and the log add to a step: its figures, and one line of log.jsonl."""
    loss, norm = torch.zeros((), device=timer.device), torch.ones((), device=timer.device)
    similarities = torch.randn(options.step_batch, options.step_batch, device=timer.device)
    with tempfile.TemporaryDirectory() as folder:
        log = step_log(folder, 0)
        (times,) = timer.turns(
            lambda: log.write(
                step=1, **StepFigures(*figures_of(loss, norm, similarities).tolist())._asdict()
            )
        )
    yield {"a step's figures and log line (ms)": row(times, unit=1e-3)}


def bench_bank(options, timer, dataset, model):
    """Time leaving out a batch's entries against a Python loop, and a bank against all pairs."""
    generator = torch.Generator().manual_seed(2)
    entries = torch.randperm(COCO_CAPTIONS, generator=generator)[:BANK_ENTRIES].to(timer.device)
    indices = torch.randperm(COCO_CAPTIONS, generator=generator)[: options.batch_size].to(
        timer.device
    )
    listed, batch = entries.tolist(), indices.tolist()
    exclusion = timer.turns(
        lambda: in_batch(entries, indices), lambda: [entry in batch for entry in listed]
    )
    yield {
        f"bank exclusion, {BANK_ENTRIES} entries, batch of {options.batch_size} (ms)": row(
            *exclusion, 1e-3
        )
    }
    loader = Loader(dataset, options.step_batch, shuffle=True)

    def build(rate):
        batches = draw_batches(loader.batches(), rate, torch.Generator().manual_seed(0))
        return build_bank(model, loader.load(batches))

    drawn = len(build(0.05).indices) / len(dataset)
    yield {
        f"bank build at mb_rate 0.05, drew {drawn:.1%} (s; reference: encoding all pairs)": row(
            *Timer(timer.device, 3).turns(lambda: build(0.05), lambda: build(1.0))
        )
    }


def bench_coco_memory(options, timer, vocab):
    """Measure training's memory on data of COCO's size, the memory-mapped features aside."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(3)
        make_data(folder, make_captions(COCO_CAPTIONS, rng), COCO_IMAGES, COCO_WIDTH, rng)
        start = time.perf_counter()
        dataset = PrecompDataset(folder, "train", vocab, cache_dir=folder)
        opened = time.perf_counter() - start
        model = made_up_model(options, COCO_WIDTH, vocab).to(timer.device)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=True)
        batches = iter(Loader(dataset, options.batch_size, shuffle=True))
        for _ in range(4):
            step_parts(
                timer, batches, model.forward_emb, optimizer, parameters, ContrastiveLoss(options)
            )
        yield {
            "COCO-sized training: resident memory beyond the features (MB)": {
                "ours": spread([resident_memory("RssAnon")], 1e6)
            },
            "COCO-sized training: first start, captions tokenized (s)": {"ours": spread([opened])},
        }
