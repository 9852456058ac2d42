"""Open and check feature arrays, and the image ids beside them."""

import re
import sys

import numpy as np
import torch

from inputs.captions import ASCII_SPACE, read_bytes
from runtime.errors import InputError
from runtime.file_kinds import HEAD, ZIP, binary_kind
from runtime.files import check_regular
from runtime.finite import LARGEST

CHECKED_BYTES = 2**26  # of a feature file, checked at a time
# Mean cosine of two rows; a CNN's features have 0.3 to 0.7, a random CNN's more.
NEARLY_ALIKE = 0.98
SAMPLED = 500  # rows that the mean cosine is estimated from
COMMON_SHARE = 10  # a row is reported as repeated if a tenth of all rows equal it
CAPTIONS_PER_IMAGE = 5


def open_features(path):
    """A .npy file's features, (n, width) or (n, regions, width), as a memory-mapped tensor.

    Prints one warning that counts uninformative rows.
    Raises InputError unless all are finite numbers, and not all of them zero.
    """
    features = map_array(path, "feature file", "--data_path and --data_name")
    if features.dtype.kind not in "fiu":
        raise InputError(
            f"feature file {path} holds {features.dtype}, not numbers: save float16 or float32 "
            "features"
        )
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise InputError(
            f"feature file {path} has shape {features.shape}: it must be (images, feature width) "
            "or (images, regions, feature width)"
        )
    if features.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)  # rare enough to be held in memory
    check_features(features, path)
    return torch.from_numpy(features)


def map_array(path, what, flags):
    """The array of a .npy file, memory-mapped.

    what, flags: the file in words, and the flags that name it, for messages.
    Raises InputError if the file is missing, torn or of another kind.
    """
    check_regular(path)
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        # "c": pages are private, so the file is never written to.
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{what} {path} cannot be read ({reason}): check {flags}") from error
    except Exception as error:  # a torn header may raise anything
        raise InputError(f"{what} {path} {what_is_wrong(head, error)}") from error
    if isinstance(found, np.lib.npyio.NpzFile):
        found.close()
        raise InputError(f"{what} {path} {what_is_wrong(head, None)}")
    return found


def what_is_wrong(head, error):
    """The end of a sentence about a .npy file that NumPy cannot read; head: its first bytes."""
    if head.startswith(b"\x93NUMPY"):
        if "object" not in str(error).lower():
            return f"is not a whole .npy array of numbers ({error}): fetch or make it again"
        return (
            "holds Python objects, as NumPy saves images of unequal numbers of regions: give "
            "every image as many rows, with rows of zeros at the end, and save one float32 array"
        )
    if head.startswith(ZIP):
        return "is a zip archive, such as .npz, not a .npy array: save the one array with np.save"
    what, remedy = binary_kind(head) or ("of an unknown kind", "save the numbers with np.save")
    return f"is {what}, not a .npy array: {remedy}"


def rows_at_a_time(features):
    """How many rows to check at a time."""
    return max(1, CHECKED_BYTES * len(features) // features.nbytes)


# Uninformative rows -----------------------------------------------------------------------------


def check_features(features, path):
    """Count uninformative rows in one warning on stderr.

    features: an array (n, width) or (n, regions, width) of float16 or float32.
    Raises InputError if a number is not finite, or so large that lengths overflow, or all are zero.
    """
    block, axes = rows_at_a_time(features), tuple(range(1, features.ndim))
    largest = min(LARGEST, float(np.finfo(features.dtype).max))
    zeros = flat = 0
    digests = np.empty(len(features), np.uint64)
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        whole = (np.abs(rows) <= largest).all(axis=axes)  # False for NaN, too
        if not whole.all():
            raise InputError(
                f"feature file {path} has NaN, infinity or a number beyond {LARGEST:g} in row "
                f"{start + int(whole.argmin())}: make the features again"
            )
        rows = rows.reshape(len(rows), -1)
        one_number = _of_one_number(rows)
        empty = one_number & (rows[:, 0] == 0)
        zeros += int(np.count_nonzero(empty))
        flat += int(np.count_nonzero(one_number & ~empty)) if rows.shape[1] > 1 else 0
        digests[start : start + block] = np.where(empty, 0, _digests(rows))
    if zeros == len(features):
        raise InputError(
            f"feature file {path} holds nothing but zeros: the extraction failed, so make the "
            "features again"
        )
    _warn(features, path, zeros, flat, digests)


def _of_one_number(rows):
    """Whether all numbers of a row are equal, for each row of (n, numbers)."""
    found = (rows[:, 0] == rows[:, rows.shape[1] // 2]) & (rows[:, 0] == rows[:, -1])
    found[found] = (rows[found] == rows[found, :1]).all(axis=1)
    return found


def _digests(rows):
    """A hash (n,) uint64 for each row of (n, numbers): equal rows have equal ones."""
    rows = np.ascontiguousarray(rows)
    size = next(size for size in (8, 4, 2) if rows[0].nbytes % size == 0)
    words = rows.view(f"u{size}").astype(np.uint64, copy=False)
    factors = np.random.default_rng(0).integers(2**64, size=words.shape[1], dtype=np.uint64)
    return words @ (factors | np.uint64(1))


def _warn(features, path, zeros, flat, digests):
    """Print in one line which rows are uninformative; digests: (n,), with 0 for rows of zeros."""
    faults, n = [], len(features)
    if zeros:
        faults.append(f"{zeros} all zero")
    if flat:
        faults.append(f"{flat} of one number throughout")
    found, counts = np.unique(digests[digests != 0], return_counts=True)
    if len(counts) and counts.max() > max(CAPTIONS_PER_IMAGE, n // COMMON_SHARE):
        first = int((digests == found[counts.argmax()]).argmax())
        faults.append(f"{counts.max()} equal to row {first}")
    elif n > CAPTIONS_PER_IMAGE and (cosine := mean_cosine(features)) > NEARLY_ALIKE:
        faults.append(f"nearly all in one direction (mean cosine {cosine:.4f})")
    if faults:
        print(
            f"Warning: {path} has {n} rows, of which {' and '.join(faults)}: such rows say "
            "nothing about their images, so check how they were made",
            file=sys.stderr,
        )


def mean_cosine(features):
    """The mean cosine of two rows, over up to `SAMPLED` evenly spread rows that are not zero.

    features: an array or tensor (n, width) or (n, regions, width). Regions count as one long row.
    """
    wide = max(1, CHECKED_BYTES // (4 * int(np.prod(features.shape[1:]))))
    step = -(-len(features) // min(SAMPLED, wide))
    rows = torch.as_tensor(features[::step]).cpu().float().flatten(1)
    units = torch.nn.functional.normalize(rows[rows.any(1)].double(), dim=1)
    n = len(units)
    return ((units.sum(0).square().sum() - n) / (n * (n - 1))).item() if n > 1 else 0.0


def read_ids(path):
    """The lines of an ids file, a name or number each, as str without white space at both ends.

    Bytes that are not UTF-8 are kept, as surrogates. Raises InputError if the file cannot be read,
    is no text, or has a blank line before its end.
    """
    text = read_bytes(path, "ids file").decode("utf-8", "surrogateescape")
    lines = [line.strip(ASCII_SPACE) for line in re.split("\r\n|\r|\n", text.rstrip(ASCII_SPACE))]
    if "" in lines:
        raise InputError(
            f"ids file {path}, line {lines.index('') + 1} is blank: give each image a "
            "name or number"
        )
    return lines


def five_each(image_of):
    """Whether there are five captions for each image in turn, the usual layout.

    image_of: (C,) each caption's image.
    """
    return len(image_of) % CAPTIONS_PER_IMAGE == 0 and bool(
        (image_of == torch.arange(len(image_of)) // CAPTIONS_PER_IMAGE).all()
    )
