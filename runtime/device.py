"""The device and the precision of float32 products, chosen once when a script starts."""

import os
import re
import time
from typing import NamedTuple

import torch

from runtime import distributed
from runtime.errors import InputError

# PyTorch's switch for huge pages, read at the first tensor: a step over a batch of 4,096 takes about
# half as long, as most of its time went into getting every matrix's pages anew.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Precisions of float32 products; the first is PyTorch's default, and exact everywhere.
CPU_KINDS = ("highest", "medium")
PROBE_SIZE = 512
# Relative to the largest entry; bf16 products are near 1e-3, float32 ones near 1e-6.
PROBE_ERROR = 1e-5
# Least and most rows, and width, of a timed product: about a millisecond on one thread.
PROBE_SHAPES = ((64, 128), (256, 512))
PROBE_ROUNDS, PROBE_SECONDS = 60, 0.15
# Another kind must be this much faster than the default, so that close calls do not change the
# choice from run to run.
CLEARLY = 1.15
WORTHWHILE = 1.1  # bf16 products must be this much faster, since casts cost time as well


def to_device(tensor, device):
    """Copy a tensor to a device; on CUDA without waiting for the copy.

    On MPS a copy that is not waited for may read memory that has been reused meanwhile (PyTorch
    issues 139550 and 189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def choose_device(name):
    """The torch device for auto, cpu, cuda[:n] or mps; raises InputError if it is not available.

    Under torchrun, cuda is the GPU whose number is the process's number on its machine.
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", name):
        raise InputError(
            f"--device {name} is not a device: choose auto, cpu, cuda, cuda:<n> or mps"
        )
    if distributed.launched():
        name = _own(name)
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            if device.index:
                # Otherwise some of this process's memory would be on the first GPU.
                torch.cuda.set_device(device.index)
            # TF32 would keep 10 of float32's 23 bits in GRUs and convolutions.
            torch.backends.cudnn.allow_tf32 = False
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): choose auto or "
            "cpu"
        ) from error
    return device


def _own(name):
    """The device for one of torchrun's processes; raises InputError for one they cannot share."""
    if name.startswith(("cuda:", "mps")):
        raise InputError(
            f"--device {name} under torchrun: give cuda, with which each process takes one GPU of "
            "its machine, or cpu"
        )
    if name.startswith("cpu") or not torch.cuda.is_available():
        return "cpu" if name == "auto" else name
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    nccl = torch.distributed.is_nccl_available()
    if local >= gpus or not nccl:
        raise InputError(
            f"process {local} of this machine finds {gpus} GPUs{'' if nccl else ' and no NCCL'}: "
            "start one per GPU with --nproc_per_node, or take --device cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


class Products(NamedTuple):
    """The float32 products in use, and the seconds per product that decided it, by kind."""

    kind: str  # one of torch's float32 matmul precisions
    seconds: dict

    def __str__(self):
        times = ", ".join(
            f"{kind} {1000 * seconds:.2f} ms" for kind, seconds in self.seconds.items()
        )
        return self.kind + (f" (a product: {times})" if times else "")


def choose_matmul_precision(device, kept=None, amp="off", rows=128, width=1024):
    """Set a CPU's float32 products to the faster kind that is exact; return the Products in use.

    "medium" leaves float32 products to oneDNN, which computes them in float32 on some CPUs and in
    bf16 on others. A small product shows which. Then products of about a training step's shape,
    (rows, width) by (width, 3 width), are timed; with amp "bf16" those in bf16 as well.

    kept: the kind that a resumed run has used. It is taken again if it is exact here, since another
    kind would round differently.
    """
    if device.type != "cpu":
        return Products(torch.get_float32_matmul_precision(), {})
    exact = [kind for kind in CPU_KINDS if _is_exact(kind)]
    kinds = exact + ["bf16"] * (amp == "bf16")
    shape = [max(low, min(size, high)) for size, (low, high) in zip((rows, width), PROBE_SHAPES)]
    seconds = _timed(kinds, *shape) if len(kinds) > 1 else {}
    kind = kept if kept in exact else CPU_KINDS[0]
    if kept not in exact and len(exact) > 1 and seconds[exact[1]] * CLEARLY <= seconds[exact[0]]:
        kind = exact[1]
    torch.set_float32_matmul_precision(kind)
    return Products(kind, seconds)


def choose_products(device, kept=None, *options):
    """As `choose_matmul_precision`, but all processes take the first one's choice."""
    products = distributed.from_first(
        lambda: tuple(choose_matmul_precision(device, kept, *options))
    )
    if not distributed.is_first():
        choose_matmul_precision(device, products[0])
    return Products(*products)


def amp_in_words(amp, device, products):
    """What --amp means on this device, for a person; products: from `choose_matmul_precision`."""
    if amp == "off" or device.type == "cuda":
        gru = " (the GRU in float16: PyTorch's autocast has no other there)"
        return amp if amp == "off" else amp + gru
    if "bf16" in products.seconds:
        faster = products.seconds[products.kind] / products.seconds["bf16"]
        if faster < WORTHWHILE:
            return (
                f"{amp}, WARNING: its products are {faster:.2f} times as fast as float32 ones "
                "here, and casts come on top of them, so training should be faster without --amp"
            )
        return f"{amp} (products {faster:.2f} times faster)"
    return amp


def _is_exact(kind):
    """Whether this kind of product is as exact as float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision(kind)
    return bool(((a @ b) - exact).abs().max() <= PROBE_ERROR * exact.abs().max())


def _timed(kinds, rows, width):
    """{kind: seconds of processor time of a product on one thread}, the best of many rounds.

    The kinds take turns in every round. Processor time on one thread hardly changes when other
    processes share the cores; the wall-clock time of all threads would mostly show their turns.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, width, generator=generator)
    b = torch.randn(width, 3 * width, generator=generator)
    operands = {kind: (a.bfloat16(), b.bfloat16()) if kind == "bf16" else (a, b) for kind in kinds}
    threads, rounds, end = torch.get_num_threads(), [], _clock() + PROBE_SECONDS
    torch.set_num_threads(1)
    try:
        while len(rounds) < PROBE_ROUNDS and (len(rounds) < 3 or _clock() < end):
            rounds.append([])
            for kind, (x, y) in operands.items():
                torch.set_float32_matmul_precision(CPU_KINDS[0] if kind == "bf16" else kind)
                start = _clock()
                x @ y
                rounds[-1].append(_clock() - start)
    finally:
        torch.set_num_threads(threads)
    # The first round is a warm-up.
    return {kind: min(times) for kind, times in zip(kinds, zip(*rounds[1:]))}


def _clock():
    """This thread's processor time in seconds; wall-clock time if that counter is too coarse."""
    fine = time.get_clock_info("thread_time").resolution < 1e-5
    return time.thread_time() if fine else time.perf_counter()
