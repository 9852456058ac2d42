"""Where a script computes, and how exactly: chosen once, at its start."""

import re

import torch

from errors import InputError

PROBE_SIZE = 512
PROBE_ERROR = 1e-5  # relative to the largest entry; bf16 products are near 1e-3, float32 ones near 1e-6


def choose_device(name):
    """The torch device for auto, cpu, cuda[:n] or mps; raises InputError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise InputError(f"--device {name} is no device: choose auto, cpu, cuda, cuda:<n> or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): choose auto or cpu"
                         ) from error
    return device


def choose_matmul_precision(device):
    """Take the faster float32 products of a CPU where they are as exact as the default; returns what is in use.

    "medium" leaves float32 products to oneDNN, which on some CPUs computes them in float32, faster, and on
    others in bf16: a small product tells which.
    """
    default = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator) for _ in range(2))
        exact = a.double() @ b.double()
        torch.set_float32_matmul_precision("medium")
        if ((a @ b) - exact).abs().max() > PROBE_ERROR * exact.abs().max():
            torch.set_float32_matmul_precision(default)
    return torch.get_float32_matmul_precision()
