"""What all parts of benchmark.py measure with: time, in turn, and memory."""

import ctypes
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
from tqdm import tqdm

from layers.gru import prefix_tree

LONG = 300  # seconds after which a user wants to know how long it will take


def say(text):
    """Print a line about the progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def watched(items):
    """Yield a list's items, with a progress bar on a terminal.

    Prints a line once they are expected to take more than LONG seconds.
    """
    start, said = time.perf_counter(), False
    for done, item in enumerate(tqdm(items, disable=None, leave=False)):
        if (
            done
            and not said
            and (expected := (time.perf_counter() - start) / done * len(items)) > LONG
        ):
            say(
                f"  this takes about {expected / 60:.0f} minutes: fewer --repeats or smaller sizes "
                "take less"
            )
            said = True
        yield item


class Timer:
    """Times functions in turn: `repeats` rounds after one to warm up."""

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats

    def wait(self):
        """Wait until the GPU has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def seconds(self, function):
        """The seconds of one call, the GPU's work included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def rounds(self, one):
        """What one() returns in each of `repeats` rounds, after one to warm up."""
        return [one() for _ in watched(range(self.repeats + 1))][1:]

    def turns(self, *functions):
        """[[seconds of each round] for each function]; they take turns, A B A B ..."""
        rounds = self.rounds(lambda: [self.seconds(function) for function in functions])
        return [list(times) for times in zip(*rounds)]


def spread(times, unit=1.0):
    """Median, minimum and maximum of some seconds (or other numbers), in units of `unit`."""
    return {"median": median(times) / unit, "min": min(times) / unit, "max": max(times) / unit}


def ratio(slow, fast):
    """The spread of slow / fast, round by round."""
    return spread([a / b for a, b in zip(slow, fast)])


def row(ours, reference=None, unit=1.0, floor=None):
    """A line of the table: our times, the reference's, their ratio, and floor / our median."""
    line = {"ours": spread(ours, unit)}
    if reference:
        line |= {"reference": spread(reference, unit), "ratio": ratio(reference, ours)}
    if floor:
        line |= {"floor": floor / unit, "floor share": floor / median(ours)}
    return line


def peak_extra_memory(function):
    """Bytes that a call adds to resident memory at its peak; None if that cannot be read."""
    try:
        # Freed memory that the process still holds would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the peak back to what is resident now
        before = resident_memory("VmRSS")
        function()
        return resident_memory("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident_memory(name):
    """Bytes of a line of Linux's /proc/self/status: VmRSS, VmHWM or RssAnon."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def gru_operations(captions, lengths, word_dim, hidden):
    """Operations of one GRU direction over a batch (B, T), forward and backward.

    The first words' products with the zero state are left out. On a CPU, each different word's
    input product counts once, and so do the states of a common beginning of captions.
    """
    words, states = int(lengths.sum()), int(lengths.sum()) - len(lengths)
    if captions.device.type == "cpu":
        tree = prefix_tree(captions, lengths)
        words, states = len(tree.word_of.unique()), sum(tree.sizes[1:])
    return 3 * 2 * 3 * hidden * (words * word_dim + states * hidden)


def machine_speeds(timer):
    """Operations a second of a large product, and bytes a second of a large copy.

    The product is float32, of the kind that the scripts use.
    """
    a, b = (torch.randn(4096, 1024, device=timer.device) for _ in range(2))
    copied = torch.empty_like(source := torch.zeros(64 * 1024 * 1024, device=timer.device))
    products, copies = timer.turns(lambda: a @ b.t(), lambda: copied.copy_(source))
    return {
        "operations_per_second": 2 * 4096 * 4096 * 1024 / median(products),
        "copied_bytes_per_second": 2 * source.numel() * 4 / median(copies),
    }


def in_own_process(function, *arguments):
    """What the function returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
