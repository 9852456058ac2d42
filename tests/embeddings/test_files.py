"""Files of embeddings: every kind gives the same numbers, and bad ones a sentence."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch

from embeddings import files
from embeddings.files import read
from runtime.errors import InputError

ROWS = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
OTHER = ROWS + 1


def rows_of(text, side="images"):
    return read(str(text), side, "--embeddings").rows


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)


def write_safetensors(path, **tensors):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    save_file(tensors, path)


def fixed(rows):
    pa = pytest.importorskip("pyarrow")
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


# Kinds ------------------------------------------------------------------------------------------

WRITERS = {
    "x.npy": lambda: np.save("x.npy", ROWS),
    "x.npz": lambda: np.savez("x.npz", own=ROWS),
    "x.npz:b": lambda: np.savez_compressed("x.npz", a=OTHER, b=ROWS),
    "x.pt": lambda: torch.save(torch.from_numpy(ROWS), "x.pt"),
    "x.pt:b": lambda: torch.save({"a": torch.zeros(3), "b": torch.from_numpy(ROWS)}, "x.pt"),
    "old.pt": lambda: torch.save(
        torch.from_numpy(ROWS), "old.pt", _use_new_zipfile_serialization=False
    ),
    "array.pt:b": lambda: torch.save({"a": OTHER, "b": ROWS}, "array.pt"),
    "x.safetensors": lambda: write_safetensors("x.safetensors", own=torch.from_numpy(ROWS)),
    "x.safetensors:b": lambda: write_safetensors(
        "x.safetensors", a=torch.from_numpy(OTHER), b=torch.from_numpy(ROWS)
    ),
    "x.parquet": lambda: write_parquet("x.parquet", name=list("abcdefg"), own=ROWS.tolist()),
    "x.parquet:b": lambda: write_parquet("x.parquet", a=fixed(OTHER), b=fixed(ROWS)),
    "x.pkl": lambda: open("x.pkl", "wb").write(pickle.dumps(ROWS)),
    "x.pkl:b": lambda: open("x.pkl", "wb").write(pickle.dumps({"a": OTHER, "b": ROWS}, 2)),
    "dict.npy:b": lambda: np.save("dict.npy", {"a": OTHER, "b": ROWS}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(name):
    WRITERS[name]()
    found = rows_of(name)
    assert np.array_equal(found.double().numpy(), ROWS.astype(np.float64))


@pytest.mark.parametrize(
    "side, expected", [("images", ROWS), ("captions", OTHER)], ids=["images", "captions"]
)
@pytest.mark.parametrize(
    "names",
    [
        ("img_embs", "cap_embs"),
        ("image_embeds", "text_embeds"),
        ("image_features", "text_features"),
    ],
)
def test_usual_names_need_no_key(names, side, expected):
    np.savez("both.npz", **dict(zip(names, (ROWS, OTHER))))
    assert np.array_equal(rows_of("both.npz", side).numpy(), expected)


def test_the_array_of_a_npy_file_is_not_read_at_once():
    np.save("x.npy", ROWS)
    found = rows_of("x.npy")
    changed = np.load("x.npy", mmap_mode="r+")
    changed[0, 0] = 5
    changed.flush()
    assert float(found[0, 0]) == 5


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_tensor_keeps_its_type(name, kind):
    tensor = torch.from_numpy(ROWS).to(kind)
    if name == "x.pt":
        torch.save(tensor, name)
    else:
        write_safetensors(name, own=tensor)
    found = rows_of(name)
    assert found.dtype == kind and torch.equal(found, tensor)


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", ">f4", "longdouble"])
def test_other_numbers_become_floats(kind):
    whole = np.arange(12).reshape(3, 4)
    np.save("x.npy", whole.astype(kind))
    assert rows_of("x.npy").tolist() == whole.tolist()


def test_a_dict_of_similarities_tells_how_many_images_it_has():
    np.save("x.npy", {"npts": 7, "sims": ROWS})
    found = read("x.npy", "similarities", "--sims")
    assert found.count == 7 and np.array_equal(found.rows.numpy(), ROWS)


def test_a_colon_in_a_file_s_name_is_no_key():
    np.save("a:b.npy", ROWS)
    assert files.split_key("a:b.npy") == ("a:b.npy", None)
    assert len(rows_of("a:b.npy")) == 7


# clip-retrieval ---------------------------------------------------------------------------------


def write_parts(numbers, digits=1, rows=2, metadata=True):
    """Folders as clip-retrieval writes them; the rows of part n begin with n. Returns the images."""
    for name in ("img_emb", "text_emb", "metadata"):
        os.makedirs(f"out/{name}", exist_ok=True)
    images = []
    for number in numbers:
        part = np.random.default_rng(number).standard_normal((rows, 3)).astype(np.float16)
        part[:, 0] = number
        images.append(part)
        end = str(number).zfill(digits)
        np.save(f"out/img_emb/img_emb_{end}.npy", part)
        np.save(f"out/text_emb/text_emb_{end}.npy", part + 1)
        if metadata:
            write_parquet(
                f"out/metadata/metadata_{end}.parquet",
                image_path=[f"{number}_{row}.jpg" for row in range(rows)],
                caption=[f"caption {row} of {number}" for row in range(rows)],
            )
    return np.concatenate(images)


@pytest.mark.parametrize("digits", [1, 2], ids=["plain numbers", "filled with zeros"])
@pytest.mark.parametrize("folder", ["out", "out/img_emb"])
def test_twelve_parts_come_in_the_order_of_their_numbers(folder, digits):
    expected = write_parts(range(12), digits)
    found = read(folder, "images", "--embeddings")
    assert np.array_equal(found.rows.numpy(), expected)
    assert found.ids == [f"{number}_{row}.jpg" for number in range(12) for row in (0, 1)]
    assert found.texts[5] == "caption 1 of 2"


def test_captions_come_from_their_own_folder():
    expected = write_parts(range(3))
    assert np.array_equal(rows_of("out", "captions").numpy(), expected + 1)


def test_parts_without_metadata_have_no_ids():
    write_parts(range(3), metadata=False)
    found = read("out", "images", "--embeddings")
    assert found.ids is None and len(found.rows) == 6


def test_an_image_without_a_path_leaves_all_without_ids():
    write_parts(range(2))
    write_parquet("out/metadata/metadata_1.parquet", image_path=["a", None], caption=["x", "y"])
    found = read("out", "images", "--embeddings")
    assert found.ids is None and found.texts[-1] == "y"


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda: os.remove("out/img_emb/img_emb_2.npy"), "parts 0 to 3, but no part 2: mend"),
        (
            lambda: np.save("out/img_emb/img_emb_02.npy", ROWS),
            "parts 0 to 3, but part 2 twice: mend",
        ),
        (
            lambda: np.save("out/img_emb/img_emb_3.npy", ROWS),
            "rows of width 4, and .*img_emb_0.npy of width 3",
        ),
        (lambda: os.remove("out/metadata/metadata_3.parquet"), "4 parts, and .* metadata of 3"),
        (
            lambda: write_parquet("out/metadata/metadata_1.parquet", image_path=["a"]),
            "metadata_1.parquet has 1 rows, and its part of the embeddings 2",
        ),
        (
            lambda: open("out/metadata/metadata_1.parquet", "wb").write(b"PAR1 torn"),
            "metadata_1.parquet cannot be read as parquet",
        ),
    ],
)
def test_a_broken_folder_is_refused(spoil, sentence):
    write_parts(range(4))
    spoil()
    with pytest.raises(InputError, match=sentence):
        rows_of("out")


def test_a_folder_of_other_things_is_refused():
    os.mkdir("empty")
    with pytest.raises(InputError, match="--embeddings empty has no img_emb_0.npy or the like"):
        rows_of("empty")


# Bad input --------------------------------------------------------------------------------------


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


def with_nan(*places):
    rows = np.ones((20, 3), np.float32)
    for row, value in places:
        rows[row, 1] = value
    return rows


BAD = {
    "a file that is not there": (lambda: None, "x.npy", "x.npy cannot be read .*: check the path"),
    "a .pt with code": (
        lambda: torch.save({"images": Planted()}, "x.pt"),
        "x.pt",
        "--embeddings x.pt is refused: it asks to load posix.system, which could run code",
    ),
    "a pickle with code": (
        lambda: open("x.pkl", "wb").write(pickle.dumps({"sims": Planted()})),
        "x.pkl",
        "--embeddings x.pkl is refused: it asks to load posix.system",
    ),
    "a .npy with code": (
        lambda: np.save("x.npy", {"sims": Planted()}),
        "x.npy",
        "--embeddings x.npy is refused: it asks to load posix.system",
    ),
    "tensors in a pickle": (
        lambda: open("x.pkl", "wb").write(pickle.dumps({"sims": torch.ones(2, 2)})),
        "x.pkl",
        "x.pkl is refused: it asks to load torch.*: save NumPy's arrays, or tensors by torch.save",
    ),
    "a missing array": (
        lambda: np.savez("x.npz", a=ROWS, b=ROWS),
        "x.npz:c",
        "x.npz has no 'c': its arrays are a, b; name one of them",
    ),
    "a missing tensor": (
        lambda: torch.save({"a": torch.ones(2, 2)}, "x.pt"),
        "x.pt:b",
        "x.pt has no 'b': its tensors are a; name one",
    ),
    "a missing tensor of safetensors": (
        lambda: write_safetensors("x.safetensors", a=torch.ones(2, 2)),
        "x.safetensors:b",
        "x.safetensors has no 'b': its tensors are a; name one",
    ),
    "a missing column": (
        lambda: write_parquet("x.parquet", name=["a"], own=[[1.0]]),
        "x.parquet:b",
        "x.parquet has no 'b': its columns of vectors are own; name one",
    ),
    "no column of vectors": (
        lambda: write_parquet("x.parquet", name=["a"]),
        "x.parquet",
        "does not say which of its columns of vectors are the images: they are none",
    ),
    "no dict entry": (
        lambda: np.save("x.npy", {"a": ROWS, "b": ROWS}),
        "x.npy",
        "which of its arrays are the images: they are a, b; name one after a colon",
    ),
    "vectors of different widths": (
        lambda: write_parquet("x.parquet", own=[[1.0, 2.0], [1.0]]),
        "x.parquet",
        "rows without own, or vectors of different widths",
    ),
    "a row without a vector": (
        lambda: write_parquet("x.parquet", own=[[1.0, 2.0], None]),
        "x.parquet",
        "rows without own, or vectors of different widths",
    ),
    "NaN in a row": (
        lambda: np.save("x.npy", with_nan((4, np.nan))),
        "x.npy",
        r"x.npy has NaN, infinity or a number beyond 1e\+15 in row 4 \(the first is 0\)",
    ),
    "NaN and infinity in several rows": (
        lambda: np.save("x.npy", with_nan(*((row, np.inf) for row in range(3, 10)), (1, np.nan))),
        "x.npy",
        r"in rows 1, 3, 4, 5, 6 and 3 more \(the first is 0\)",
    ),
    "infinity in half precision": (
        lambda: np.save("x.npy", with_nan((4, np.inf)).astype(np.float16)),
        "x.npy",
        "in row 4",
    ),
    "zeros": (
        lambda: np.save("x.npy", np.eye(6, 3, dtype=np.float32)),
        "x.npy",
        "x.npy has 3 of 6 rows of nothing but zeros: make it again",
    ),
    "a vector": (lambda: np.save("x.npy", ROWS[0]), "x.npy", r"x.npy has shape \(4,\): it must be"),
    "regions": (lambda: np.save("x.npy", ROWS[None]), "x.npy", r"has shape \(1, 7, 4\)"),
    "nothing": (lambda: np.save("x.npy", ROWS[:0]), "x.npy", r"has shape \(0, 4\)"),
    "texts": (lambda: np.save("x.npy", np.array([["a"]])), "x.npy", "holds <U1, not numbers"),
    "booleans": (lambda: torch.save(torch.ones(2, 2) > 0, "x.pt"), "x.pt", "holds torch.bool"),
    "a text file": (lambda: open("x.txt", "w").write("1 2"), "x.txt", "is text, not .npy, .npz"),
    "a torn .npy": (
        lambda: open("x.npy", "wb").write(b"\x93NUMPY\x01\x00v\x00{'de"),
        "x.npy",
        "x.npy is not a whole .npy array",
    ),
    "a torn .npz": (
        lambda: open("x.npz", "wb").write(b"PK\x03\x04 torn"),
        "x.npz",
        "x.npz cannot be read as .npz",
    ),
    "a torn .safetensors": (
        lambda: open("x.safetensors", "wb").write(b"\x05\0\0\0\0\0\0\0{torn"),
        "x.safetensors",
        "x.safetensors cannot be read as safetensors",
    ),
    "a torn pickle": (
        lambda: open("x.pkl", "wb").write(pickle.dumps(ROWS)[:-9]),
        "x.pkl",
        "x.pkl is not a whole pickle of arrays",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    make, name, sentence = BAD[case]
    if "safetensors" in name:
        pytest.importorskip("safetensors")
    make()
    with pytest.raises(InputError, match=sentence) as caught:
        rows_of(name)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("planted")


@pytest.mark.parametrize(
    "package, name, start",
    [("safetensors", "x.safetensors", b"\0"), ("pyarrow", "x.parquet", b"PAR1")],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, package, name, start):
    for module in [package, "pyarrow.parquet"]:
        monkeypatch.setitem(sys.modules, module, None)
    with open(name, "wb") as file:
        file.write(start)
    with pytest.raises(InputError, match=f"which is not installed: pip install {package}"):
        rows_of(name)


def test_a_pyarrow_that_runs_a_file_s_code_is_refused(monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet("x.parquet", own=ROWS.tolist())
    monkeypatch.setattr(pyarrow, "__version__", "14.0.0")
    with pytest.raises(InputError, match="since 14.0.0 may run a file's code: pip install --upg"):
        rows_of("x.parquet")


def test_a_few_rows_of_zeros_are_counted(capsys):
    np.save("x.npy", np.eye(4, 3, dtype=np.float32))
    rows_of("x.npy")
    assert "Warning: --embeddings x.npy has 1 of 4 rows of nothing but zeros" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_read_or_refused(name):
    """Cut short, or with changed bytes in its first part, where the structure is."""
    WRITERS[name]()
    path, key = files.split_key(name)
    with open(path, "rb") as file:
        whole = file.read()
    rng, refused = np.random.default_rng(len(whole)), 0
    for number in range(30):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: int(rng.integers(len(whole)))]
        else:
            for place in rng.integers(min(len(whole), 1500), size=number % 5 + 1):
                content[place] = int(rng.integers(256))
        damaged = f"damaged_{path}"
        with open(damaged, "wb") as file:
            file.write(content)
        try:
            assert rows_of(damaged + (f":{key}" if key else "")).isfinite().all()
        except InputError:
            refused += 1
    assert refused >= 10  # those that were cut short
