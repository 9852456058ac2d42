"""Several processes as one run under torchrun: start, end, communication and failing together.

    torchrun --standalone --nproc_per_node 2 train.py ...

Without torchrun there is one process: torch.distributed is not started, and everything here does
nothing. Only all_gather, all_reduce and broadcast are used, which every backend has.

If one process raises an InputError, the others learn of it at their next `sync`, at the latest
when they leave the `session`. Each ends with exit code 2, and one of them prints the reason.
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

from runtime.errors import InputError

TIMEOUT = 600  # seconds to wait for other processes, unless --dist_timeout says otherwise
HEAD_START = 1.0  # seconds of the process that prints why a run fails, before the others end
_timeout = TIMEOUT


class RunBroken(Exception):
    """The processes cannot go on together: one is gone, or they are out of step."""


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_first():
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def backend(device):
    """The torch.distributed backend for tensors of a device; None if there is one process."""
    return ("nccl" if device.type == "cuda" else "gloo") if launched() else None


# Start and end ----------------------------------------------------------------------------------


@contextmanager
def session():
    """Run a script's whole work: only the first process prints, and at the end all wait for all.

    Exits with 1 if another process is gone. For an InputError see the module's docstring.
    """
    if not launched():
        yield
        return
    wait = 0.0
    try:
        with _in_silence() if rank() else nullcontext():
            try:
                yield
                sync()
            except InputError as error:
                if not getattr(error, "told", False):
                    sync(error)
                raise
    except InputError as error:
        if not str(error):  # another process prints the sentence; torchrun ends all with the first
            wait = HEAD_START
        raise
    except RunBroken as error:
        print(f"error: process {rank()} of {size()}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        # torchrun sends these signals as soon as the first process has ended.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(wait)


@contextmanager
def _in_silence():
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def wait_at_most(seconds):
    """Set how many seconds to wait for the other processes; call it before anything is sent."""
    global _timeout
    _timeout = seconds


def _start():
    """Connect to the other processes; raises InputError if that fails."""
    mixed = torch.cuda.is_available() and dist.is_nccl_available()
    wait = timedelta(seconds=_timeout)
    try:
        store = _fresh(next(dist.rendezvous("env://", timeout=wait))[0])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if mixed else "gloo",
            store=store,
            rank=rank(),
            world_size=size(),
            timeout=wait,
        )
    except (RuntimeError, ValueError) as error:
        reason = InputError(
            f"the processes cannot meet ({str(error).splitlines()[0]}): check torchrun's "
            "endpoint, and that its port is free"
            if os.environ["LOCAL_RANK"] == "0"
            else ""
        )
        reason.told = True
        raise reason from error


def _fresh(store):
    """A part of torchrun's store that only these processes use.

    Over --max-restarts the store keeps the addresses of processes that are gone. So the first
    process invents a name for the part, and tells it to each process that asks.
    """
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
    """Call a collective of torch.distributed; the first call starts torch.distributed."""
    if not dist.is_initialized():
        _start()
    try:
        collective(*arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RunBroken(
            f"another one is gone, or too slow for --dist_timeout ({reason})"
        ) from error


# What they send each other ----------------------------------------------------------------------


def gather(rows, sizes):
    """Concatenate the rows of all processes, detached, in the order of their numbers.

    rows: (sizes[rank], ...); returns (sum of sizes, ...).
    """
    rows = rows.detach()
    if not launched():
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    _call(dist.all_gather, parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def gather_batches(own, sizes, like):
    """Concatenate the rows of all batches; each process made every `size`-th from its `rank` on.

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
    """Wait for all processes; return the largest flag (>= 0).

    If any process passes an error, all raise: that process its own, the others one without a
    message.
    """
    if not launched():
        if error:
            raise error
        return flag
    flags = gather(torch.tensor([[error is not None, flag]], dtype=torch.int64), [1] * size())
    return agree(flags, error)


def agree(flags, error=None):
    """The part of `sync` after gathering: flags (size, 2), one row (failed, flag) per process."""
    flags = flags.tolist()
    failed = [number for number, (bad, _) in enumerate(flags) if bad]
    if failed:
        error = error if error is not None and failed[0] == rank() else InputError("")
        error.told = True
        raise error
    return int(max(flag for _, flag in flags))


def from_first(make, admitted=()):
    """What make() returns on the first process, sent to all.

    May hold tensors, plain containers, and instances of the classes in `admitted`.
    """
    if not launched():
        return make()
    made, buffer = None, io.BytesIO()
    if is_first():
        made = make()
        torch.save(made, buffer)
    sync()
    length = torch.tensor([buffer.tell()])
    _call(dist.broadcast, length, 0)
    content = torch.frombuffer(
        bytearray(buffer.getvalue() or bytes(int(length))), dtype=torch.uint8
    )
    _call(dist.broadcast, content, 0)
    if is_first():
        return made
    with torch.serialization.safe_globals(list(admitted)):
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def machine_by_machine(make):
    """Call make() on each machine's first process; then, with the files it left, on the others."""
    if not launched():
        return make()
    first = os.environ["LOCAL_RANK"] == "0"
    made = make() if first else None
    sync()
    return made if first else make()


def check_alike(digests):
    """Raise InputError, naming what differs, unless all processes pass the same {name: int64}."""
    if launched():
        sync()  # raises if a process has given up and will not take part in the comparison
        rows = gather(torch.tensor([list(digests.values())]), [1] * size())
        differing = [
            what for what, column in zip(digests, rows.t().tolist()) if len(set(column)) > 1
        ]
        if differing:
            raise InputError(
                f"the processes differ in {', '.join(differing)}: give all of them the same"
            )
