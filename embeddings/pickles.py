"""Read pickles of NumPy arrays without running what they ask for.

VSE++ codes save results this way: `np.save(path, {"npts": npts, "sims": sims})`, or a pickle of
`{"img_embs": ..., "cap_embs": ...}`. A pickle names functions to call. Here each name that NumPy's
own pickles use stands for a small function of this file, which checks its bytes and makes an
array; any other name is refused. So neither NumPy nor anything else runs on a stranger's word.
"""

import math
import pickle
import re

import numpy as np

NUMBERS = re.compile(r"[<>=|]?[iuf][1248]")  # the types of arrays that are admitted
MODULES = ("numpy.core.", "numpy._core.")  # of NumPy 1 and 2


class Refused(ValueError):
    """The pickle asks for something, or holds something, that no array needs."""


class HasTensors(Refused):
    """The pickle holds PyTorch's tensors, which `runtime.torch_files` reads."""


class _Type:
    """What NumPy pickles of a dtype: its name, and its byte order as state."""

    def __init__(self, name):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    def dtype(self):
        """The dtype of NumPy; raises Refused unless it is of numbers."""
        if not NUMBERS.fullmatch(str(self.name)) or self.order not in tuple("<>=|"):
            raise Refused(f"its array is of {str(self.name)[:20]!r}, not of numbers")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """What NumPy pickles of an array: version, shape, type, order and bytes, as state."""

    def __setstate__(self, state):
        _, self.shape, self.type, self.is_fortran, self.content = state

    def array(self):
        """The array of NumPy; raises Refused if its bytes do not fit its shape."""
        kind, content = self.type.dtype(), self.content
        content = content.encode("latin1") if isinstance(content, str) else content  # of Python 2
        if (
            not isinstance(content, (bytes, bytearray))
            or not all(isinstance(size, int) and size >= 0 for size in self.shape)
            or len(content) != math.prod(self.shape) * kind.itemsize
        ):
            raise Refused("its array's bytes do not fit its shape")
        order = "F" if self.is_fortran else "C"
        return np.frombuffer(content, kind).reshape(self.shape, order=order)


def _reconstruct(subtype, shape, typecode):
    return _Array()


def _from_buffer(content, kind, shape, order):
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _scalar(kind, content):
    return _from_buffer(content, kind, (), "C")


def _make_type(name, align=False, copy=False):
    return _Type(name)


def _encode(text, encoding):
    if encoding not in ("latin1", "latin-1"):
        raise Refused("its bytes are in an unknown encoding")
    return text.encode("latin1")


STAND_INS = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _make_type,
    ("numpy", "ndarray"): "ndarray",  # only named as an argument
    **{(f"{module}multiarray", "_reconstruct"): _reconstruct for module in MODULES},
    **{(f"{module}multiarray", "scalar"): _scalar for module in MODULES},
    **{(f"{module}numeric", "_frombuffer"): _from_buffer for module in MODULES},
}


class _Rest:
    """The rest of a file, which never gives memory to a damaged length."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def read(self, n):
        """The next n bytes."""
        if not 0 <= n <= self.left:
            raise EOFError("it is cut short")
        self.left -= n
        return self.file.read(n)

    def readline(self):
        """The bytes up to the next newline."""
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


class _ArrayUnpickler(pickle._Unpickler):
    """Admits the names of STAND_INS alone.

    Based on the unpickler in Python: the one in C would allocate gigabytes for one damaged number.
    """

    def find_class(self, module, name):
        if module.split(".")[0] == "torch":
            raise HasTensors(f"it asks to load {module}.{name}")
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise Refused(f"it asks to load {module}.{name}, which could run code") from None

    def persistent_load(self, pid):
        raise HasTensors("it holds tensors")


def load(file, size):
    """What a pickle holds: an array, or {name: array or number} of a dict.

    A dict in an array of one object, as np.save makes it, is that dict.
    Raises Refused, or whatever a damaged pickle raises.

    file: open at the pickle; size: bytes from there to its end
    """
    content = _ArrayUnpickler(_Rest(file, size), encoding="latin1").load()
    if isinstance(content, _Array) and isinstance(content.content, list):
        if len(content.content) != 1:
            raise Refused("it holds several Python objects, not an array of numbers")
        (content,) = content.content
    if isinstance(content, _Array):
        return content.array()
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__}, not an array or a dict of arrays")
    return {
        name: value.array() if isinstance(value, _Array) else value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, (_Array, int))
    }
