"""Where a script computes, and how exactly: chosen once, at its start; how tensors get there."""

import os
import re
import time
from statistics import median
from typing import NamedTuple

import torch

import distributed
from errors import InputError

CPU_KINDS = ("highest", "medium")  # of float32 products; the first is PyTorch's default, and exact everywhere
PROBE_SIZE = 512
PROBE_ERROR = 1e-5  # relative to the largest entry; bf16 products are near 1e-3, float32 ones near 1e-6
PROBE_SHAPES = (128, 256), (512, 1024)  # rows and width of a timed product: smaller ones are noise, larger ones long
PROBE_ROUNDS, PROBE_SECONDS = 12, 0.2
CLEARLY = 1.15  # times faster that another kind than the default must be: close calls must not change from run to run
WORTHWHILE = 1.1  # times faster that bf16 products must be: the casts take what is less


def to_device(tensor, device):
    """A tensor on a device. On CUDA nothing waits for it; elsewhere it is there at once.

    On MPS a copy that is not waited for may read what has been let go meanwhile (PyTorch's issues 139550 and 189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def choose_device(name):
    """The torch device for auto, cpu, cuda[:n] or mps; raises InputError where it is not there.

    Under torchrun cuda is the GPU of the process's number on its machine.
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", name):
        raise InputError(f"--device {name} is no device: choose auto, cpu, cuda, cuda:<n> or mps")
    if distributed.launched():
        name = _own(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            if device.index:
                torch.cuda.set_device(device.index)  # or some of this process's memory would be on the first GPU
            torch.backends.cudnn.allow_tf32 = False  # or its GRUs and convolutions would have 10 bits of float32's 23
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): choose auto or cpu"
                         ) from error
    return device


def _own(name):
    """--device for one of torchrun's processes; raises InputError for a device that several cannot have."""
    if name.startswith(("cuda:", "mps")):
        raise InputError(f"--device {name} under torchrun: give cuda, where each process takes the GPU of its number "
                         "on its machine, or cpu")
    if name.startswith("cpu") or not torch.cuda.is_available():
        return "cpu" if name == "auto" else name
    local, gpus, nccl = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count(), torch.distributed.is_nccl_available()
    if local >= gpus or not nccl:
        raise InputError(f"process {local} of this machine finds {gpus} GPUs{'' if nccl else ' and no NCCL'}: start as "
                         "many as there are with --nproc_per_node, or take --device cpu")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


class Products(NamedTuple):
    """Which float32 products are in use, and what was timed to choose them: seconds a product by kind."""

    kind: str  # one of torch's float32 matmul precisions
    seconds: dict

    def __str__(self):
        times = ", ".join(f"{kind} {1000 * seconds:.2f} ms" for kind, seconds in self.seconds.items())
        return self.kind + (f" (a product: {times})" if times else "")


def choose_matmul_precision(device, kept=None, amp="off", rows=128, width=1024):
    """Take the faster of a CPU's float32 products where it is clearly so, and as exact; returns the Products in use.

    "medium" leaves float32 products to oneDNN, which on some CPUs computes them in float32 and on others in bf16: a
    small product tells which, and a few of a training step's shape, (rows, width) by (width, 3 width), which is
    faster. With amp "bf16" those are timed, too. kept: the kind that a run has been using, which is taken again
    where it is exact here, since another one would round otherwise.
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
    """As `choose_matmul_precision`, the first process's choice on all of them."""
    products = distributed.from_first(lambda: tuple(choose_matmul_precision(device, kept, *options)))
    if not distributed.is_first():
        choose_matmul_precision(device, products[0])
    return Products(*products)


def amp_in_words(amp, device, products):
    """What --amp means on this device, for a person; products: what `choose_matmul_precision` returned."""
    if amp == "off" or device.type == "cuda":
        return amp if amp == "off" else f"{amp} (the GRU in float16: PyTorch's autocast has no other there)"
    if "bf16" in products.seconds:
        faster = products.seconds[products.kind] / products.seconds["bf16"]
        if faster < WORTHWHILE:
            return (f"{amp}, WARNING: its products are {faster:.2f} times as fast as float32 ones here, and casts come "
                    "on top of them, so training should be faster without --amp")
        return f"{amp} (products {faster:.2f} times faster)"
    return amp


def _is_exact(kind):
    """Whether float32 products of this kind are as exact as float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision(kind)
    return bool(((a @ b) - exact).abs().max() <= PROBE_ERROR * exact.abs().max())


def _timed(kinds, rows, width):
    """{kind: median seconds of a product}, each kind in turn, in PROBE_SECONDS in all or little more."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, width, generator=generator), torch.randn(width, 3 * width, generator=generator)
    operands = {kind: (a.bfloat16(), b.bfloat16()) if kind == "bf16" else (a, b) for kind in kinds}
    rounds, end = [], time.perf_counter() + PROBE_SECONDS
    while len(rounds) < PROBE_ROUNDS and (len(rounds) < 2 or time.perf_counter() < end):
        rounds.append([])
        for kind, (x, y) in operands.items():
            torch.set_float32_matmul_precision(CPU_KINDS[0] if kind == "bf16" else kind)
            start = time.perf_counter()
            x @ y
            rounds[-1].append(time.perf_counter() - start)
    return {kind: median(times) for kind, times in zip(kinds, zip(*rounds[1:]))}  # the first one warms up
