"""Timing functions in turn, and the memory that they take: the tools of benchmark.py and benchmark_scan.py."""

import ctypes
import time
from statistics import median

import torch


class Timer:
    """Times functions in turn: `repeats` rounds after one to warm up."""

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats

    def wait(self):
        """Let the GPU finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def seconds(self, function):
        """Of one call."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def turns(self, *functions):
        """[[seconds of each round] of each function], A B A B ..."""
        for function in functions:
            function()
        rounds = [[self.seconds(function) for function in functions] for _ in range(self.repeats)]
        return [list(times) for times in zip(*rounds)]


def spread(times, unit=1.0):
    """The median, minimum and maximum of some seconds, in `unit`s."""
    return {"median": median(times) / unit, "min": min(times) / unit, "max": max(times) / unit}


def ratio(slow, fast):
    """How many times slower, round by round."""
    return spread([a / b for a, b in zip(slow, fast)])


def row(ours, reference=None, unit=1.0, floor=None):
    """A line of the table: our times, the reference's, their ratio, and how near the floor is."""
    line = {"ours": spread(ours, unit)}
    if reference:
        line |= {"reference": spread(reference, unit), "ratio": ratio(reference, ours)}
    if floor:
        line |= {"floor": floor / unit, "floor share": floor / median(ours)}
    return line


def peak_extra_memory(function):
    """Bytes of resident memory a call takes at its peak beyond what was there before; None where it cannot be read."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide what the call takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is resident now
        before = resident_memory("VmRSS")
        function()
        return resident_memory("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident_memory(name):
    """Bytes of this process by a name of Linux's /proc/self/status: VmRSS, VmHWM, RssAnon."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def machine_speeds(timer):
    """Operations a second of a large float32 product as the scripts use it, and bytes a second of a large copy."""
    a, b = (torch.randn(4096, 1024, device=timer.device) for _ in range(2))
    copied = torch.empty_like(source := torch.zeros(64 * 1024 * 1024, device=timer.device))
    products, copies = timer.turns(lambda: a @ b.t(), lambda: copied.copy_(source))
    return {"operations_per_second": 2 * 4096 * 4096 * 1024 / median(products),
            "copied_bytes_per_second": 2 * source.numel() * 4 / median(copies)}
