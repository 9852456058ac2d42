"""Pickles of arrays: every protocol, NumPy 1's and 2's names, and nothing that runs."""

import io
import os
import pickle

import numpy as np
import pytest

from embeddings import pickles

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def load(content):
    return pickles.load(io.BytesIO(content), len(content))


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        np.asfortranarray(ARRAY),
        ARRAY.astype(">f8"),
        ARRAY.astype(np.float16),
        ARRAY.astype(np.int64),
    ],
    ids=["C", "F", "big-endian", "half", "int"],
)
def test_an_array_is_read_as_it_was_saved(array, protocol):
    found = load(pickle.dumps(array, protocol))
    assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize("protocol", range(6))
def test_a_dict_of_arrays_and_numbers_is_read(protocol):
    found = load(pickle.dumps({"npts": 2, "sims": ARRAY, "note": "text"}, protocol))
    assert found.keys() == {"npts", "sims"} and found["npts"] == 2
    assert np.array_equal(found["sims"], ARRAY)


def test_a_number_of_numpy_is_read():
    assert int(load(pickle.dumps({"npts": np.int64(7)}))["npts"]) == 7


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_numpy_1_names_its_modules_otherwise(protocol):
    content = pickle.dumps({"sims": ARRAY}, protocol)
    older = content.replace(b"numpy._core.", b"numpy.core.")
    assert older != content
    assert np.array_equal(load(older)["sims"], ARRAY)


def test_python_2_s_bytes_are_read():
    """A protocol-2 pickle of Python 2 has the array's bytes as a str."""
    content = pickle.dumps(ARRAY, 3)
    raw = ARRAY.tobytes()
    place = content.index(b"C" + bytes([len(raw)]) + raw)
    older = content[:place] + b"U" + content[place + 1 :]
    assert np.array_equal(load(older), ARRAY)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"sims": x}, lambda x: np.array([x], object)],
    ids=["alone", "in a dict", "in an array"],
)
def test_a_planted_call_is_refused_and_not_run(tmp_path, monkeypatch, wrap, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickles.Refused, match="asks to load (posix|nt).system, which could run"):
        load(pickle.dumps(wrap(Planted()), protocol))
    assert os.listdir() == []


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "numpy.core.multiarray dot", "embeddings.pickles load"]
)
def test_no_other_name_is_admitted(name):
    content = b"c" + "\n".join(name.split()).encode() + b"\n."
    with pytest.raises(pickles.Refused, match="asks to load"):
        load(content)


@pytest.mark.parametrize("cut", [1, 5, 40, 100])
def test_a_torn_pickle_raises(cut):
    with pytest.raises(Exception):  # noqa: B017 (any; the caller makes a sentence of it)
        load(pickle.dumps({"sims": ARRAY})[:-cut])


def test_a_damaged_length_takes_no_memory():
    """BINBYTES8 that claims an exabyte."""
    with pytest.raises(EOFError):
        load(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([True])])
def test_other_arrays_than_of_numbers_are_refused(array):
    with pytest.raises(pickles.Refused, match="not of numbers"):
        load(pickle.dumps(array))


def test_bytes_that_do_not_fit_the_shape_are_refused():
    content = pickle.dumps(ARRAY, 2)
    fewer = content.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")
    assert fewer != content
    with pytest.raises(pickles.Refused, match="do not fit its shape"):
        load(fewer)


@pytest.mark.parametrize("content", [[1, 2], "text", None, np.array([ARRAY, None], object)])
def test_what_is_no_array_is_refused(content):
    with pytest.raises(pickles.Refused, match="not an array"):
        load(pickle.dumps(content))
