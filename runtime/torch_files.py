"""Read files of `torch.save` without running code, and refuse them if a bit has changed.

Since PyTorch 1.6 such a file is a zip archive with a checksum for every entry. `torch.load` does
not check them, so a flipped bit would pass as a weight. Older files have no checksum.
"""

import errno
import re
import sys
import warnings
import zipfile

import torch

from runtime.errors import InputError
from runtime.file_kinds import HEAD, ZIP, binary_kind
from runtime.files import check_regular

CHUNK = 2**20  # bytes read at a time
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before PyTorch 1.6
WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read(path, kind, admitted=(), flag=""):
    """Return the content of a file of `torch.save`.

    kind: what the file should be, in words, such as "checkpoint".
    admitted: classes allowed beside tensors and plain containers; others are refused.
    flag: the flag that names the file, for messages.
    Raises InputError if the file is missing, cut short, damaged, or asks to load anything else. Its
    cause is an OSError only if the file cannot be read at present, as when its disk is gone.
    """
    shown, head = f"{flag} {path}".strip(), b""
    check_regular(path, shown)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        has_checksums = head.startswith(ZIP)
        if has_checksums:
            _check_archive(path, shown)
        with torch.serialization.safe_globals(list(admitted)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # becomes a refusal
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # torn files raise errors of many kinds
        raise _refusal(error, shown, kind, head) from (None if _is_torn(error) else error)
    if not has_checksums:
        _check_legacy(content, shown)
    return content


def _is_torn(error):
    """Whether a seek beyond the end of a file that was cut short raised this OSError."""
    return isinstance(error, OSError) and error.errno == errno.EINVAL


def _refusal(error, shown, kind, head):
    """The InputError for what reading raised; errors of memory are raised as they are."""
    if isinstance(error, OSError) and not _is_torn(error):
        return InputError(f"{shown} cannot be read ({error.strerror or error}): check the path")
    reason = str(error) or repr(error)
    if "can't allocate memory" in reason:
        raise error
    asked = re.search(r"GLOBAL ([\w.]+)", reason)
    if asked:
        return InputError(f"{shown} is refused: it asks to load {asked[1]}, which could run code")
    # The first entry that torch.save writes is data.pkl.
    is_torchs = b"data.pkl" in head or len(head) <= len(ZIP)
    foreign = binary_kind(head, [LEGACY_START] + [ZIP] * is_torchs)
    if foreign:
        return InputError(f"{shown} is {foreign[0]}, not a {kind}: {foreign[1]}")
    detail = re.search(r"WeightsUnpickler error: (.+)", reason) or re.search(r"(.+)", reason)
    if "weights_only" in detail[1]:  # PyTorch's advice to run whatever the file asks for
        detail = [None, "its content is damaged"]
    return InputError(
        f"{shown} is not a {kind}, or is cut short ({detail[1]}): fetch or make it again"
    )


def _check_archive(path, shown):
    """Raise InputError or BadZipFile unless each entry is uncompressed and matches its checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(
                f"{shown} is refused: it is compressed, which torch.save never does, and could "
                "fill the memory"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise InputError(
                f"{shown} is refused: two of its entries have one name, which torch.save never does"
            )
        for entry in entries:
            with archive.open(entry) as stored:
                while stored.read(CHUNK):  # the last read raises BadZipFile if the checksum differs
                    pass


def _check_legacy(content, shown):
    """Print that the file has no checksums; raise InputError if a tensor is not finite."""
    for tensor in tensors_of(content):
        if not is_whole(tensor):
            raise InputError(
                f"{shown} is refused: it has a tensor that claims more numbers than the file holds"
            )
        if not tensor.isfinite().all():
            raise InputError(
                f"{shown} has NaN or infinity in a tensor, so it is damaged: take another one"
            )
    print(
        f"note: {shown} is unchecked: PyTorch before 1.6 wrote no checksums, so damage to it may "
        "go unnoticed",
        file=sys.stderr,
    )


def tensors_of(content):
    """Yield every tensor in nested dicts, lists and tuples, visiting each container once."""
    waiting, seen = [content], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            waiting.extend(part.values() if isinstance(part, dict) else part)


def is_whole(tensor):
    """Whether a tensor is dense and has memory for each of its entries, as saved tensors do."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def check_weights(state, named, integers=("num_batches_tracked",)):
    """Raise InputError unless a state dict has whole, finite, floating-point weights.

    named: the file in words, such as "checkpoint x.pth.tar".
    integers: endings of names whose tensors may be integers, such as batch norm's counter.
    """
    for name, tensor in state.items():
        if not is_whole(tensor) or not isinstance(name, str):
            raise InputError(f"{named}: {name} is not a whole tensor")
        if tensor.dtype not in WEIGHT_TYPES and not name.endswith(tuple(integers)):
            raise InputError(
                f"{named}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}, but "
                "weights are float32 or the like: it is not a checkpoint of VSE++ code"
            )
        if not tensor.float().isfinite().all():
            raise InputError(
                f"{named}: {name} has NaN or infinity, so its model is broken: take an earlier "
                "checkpoint"
            )
