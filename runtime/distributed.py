"""Several processes as one run, under torchrun: their start and end, what they send each other, how they fail together.

    torchrun --standalone --nproc_per_node 2 train.py ...

Without torchrun there is one process, nothing of torch.distributed is started, and everything here does nothing. Only
all_gather, all_reduce and broadcast are used, which every backend has. An InputError on one process is told to the
others where they next `sync`, by then or as it leaves the `session`; each ends with 2, and one of them says why.
"""

import io
import os
import signal
import sys
import time
import uuid
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import InputError

TIMEOUT = 600  # seconds that the others are waited for, unless --dist_timeout says otherwise
_timeout = TIMEOUT


class RunBroken(Exception):
    """The processes can't go on together: one is gone, or they have come apart."""


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    """This process's number, from 0 on."""
    return int(os.environ["RANK"]) if launched() else 0


def size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_first():
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def backend(device):
    """What carries the tensors of a device from process to process; None where there is one process."""
    return ("nccl" if device.type == "cuda" else "gloo") if launched() else None


# Start and end ----------------------------------------------------------------------------------

@contextmanager
def session():
    """A script's whole work: inside, the first process alone speaks; at its end all wait for each other.

    Exits with 1 where another process is gone. InputError: see the module's text.
    """
    if not launched():
        yield
        return
    whole = False
    try:
        with _in_silence() if rank() else nullcontext():
            try:
                yield
                sync()
            except InputError as error:
                if not getattr(error, "told", False):
                    sync(error)
                raise
        whole = True
    except InputError:
        whole = True
        raise
    except RunBroken as error:
        print(f"error: process {rank()} of {size()}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun's, as soon as the first one has ended
            signal.signal(number, signal.SIG_IGN)
        if whole and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _in_silence():
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def wait_at_most(seconds):
    """How long the others are waited for; to be called before anything is sent."""
    global _timeout
    _timeout = seconds


def _start():
    """Meet the others; raises InputError where they can't be met."""
    mixed, wait = torch.cuda.is_available() and dist.is_nccl_available(), timedelta(seconds=_timeout)
    try:
        store = _fresh(next(dist.rendezvous("env://", timeout=wait))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if mixed else "gloo", store=store, rank=rank(), world_size=size(),
                                timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = InputError(f"the processes cannot meet ({str(error).splitlines()[0]}): check torchrun's endpoint, and "
                            "that its port is free" if os.environ["LOCAL_RANK"] == "0" else "")
        reason.told = True
        raise reason from error


def _fresh(store):
    """A part of torchrun's store that these processes share, and none before them: it keeps, over --max-restarts, the
    addresses of processes that are gone. The first process names the part to each that asks."""
    own = name = uuid.uuid4().hex
    if rank():
        store.set(f"asks/{rank()}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{rank()}", "")
    missing, end = set(range(1, size())) if rank() == 0 else set(), time.monotonic() + _timeout
    while missing:
        for one in sorted(missing):
            if store.check([f"{name}/{one}"]):
                missing.remove(one)
            elif store.check([f"asks/{one}"]):
                store.set(f"answer/{store.get(f'asks/{one}').decode()}", name)
        if time.monotonic() > end:
            raise RuntimeError(f"process {min(missing)} did not come")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def _call(collective, *arguments):
    """A collective of torch.distributed, which is started by the first one."""
    if not dist.is_initialized():
        _start()
    try:
        collective(*arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RunBroken(f"another one is gone, or too slow for --dist_timeout ({reason})") from error


# What they send each other ----------------------------------------------------------------------

def gather(rows, sizes):
    """Every process's rows, one process after the other: own (sizes[rank], ...) -> (sum of sizes, ...), detached."""
    rows = rows.detach()
    if not launched():
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    _call(dist.all_gather, parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def gather_batches(own, sizes, like):
    """Rows of a list of batches, in order, of which each process made every `size`-th from its `rank` on.

    own: this process's batches; sizes: rows of every batch; like: an empty tensor of such rows.
    """
    if not launched():
        return torch.cat(own)
    sync()
    rows, own = like.new_empty(sum(sizes), *like.shape[1:]), iter(own)
    for place, batch in enumerate(rows.split(sizes)):
        owner = place % size()
        if owner == rank():
            batch.copy_(next(own))
        _call(dist.broadcast, batch, owner)
    return rows


def add_up(tensors):
    """Sum each tensor over the processes, in place, in one message."""
    if not launched():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _call(dist.all_reduce, flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def sync(error=None, flag=0):
    """Wait for all; returns the largest flag (>= 0). Raises where any has an error: that one, mute on all others."""
    if not launched():
        if error:
            raise error
        return flag
    flags = gather(torch.tensor([[error is not None, flag]], dtype=torch.int64), [1] * size())
    return agree(flags, error)


def agree(flags, error=None):
    """What `sync` makes of gathered (size, 2) flags: whether a process has failed, and its flag."""
    flags = flags.tolist()
    failed = [number for number, (bad, _) in enumerate(flags) if bad]
    if failed:
        error = error if error is not None and failed[0] == rank() else InputError("")
        error.told = True
        raise error
    return int(max(flag for _, flag in flags))


def from_first(make, admitted=()):
    """What make() gives on the first process, on all: tensors, plain containers, and the classes `admitted`."""
    if not launched():
        return make()
    made, buffer = None, io.BytesIO()
    if is_first():
        made = make()
        torch.save(made, buffer)
    sync()
    length = torch.tensor([buffer.tell()])
    _call(dist.broadcast, length, 0)
    content = torch.frombuffer(bytearray(buffer.getvalue() or bytes(int(length))), dtype=torch.uint8)
    _call(dist.broadcast, content, 0)
    with torch.serialization.safe_globals(list(admitted)):
        return made if is_first() else torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def machine_by_machine(make):
    """make() on each machine's first process, which may leave files, and only then on its others."""
    if not launched():
        return make()
    first = os.environ["LOCAL_RANK"] == "0"
    made = make() if first else None
    sync()
    return made if first else make()


def check_alike(digests):
    """Raise where processes differ in one of {what: an int64}, and say in which."""
    if launched():
        sync()  # a process that has given up by now is no longer here to compare
        rows = gather(torch.tensor([list(digests.values())]), [1] * size())
        differing = [what for what, column in zip(digests, rows.t().tolist()) if len(set(column)) > 1]
        if differing:
            raise InputError(f"the processes differ in {', '.join(differing)}: give all the same")
