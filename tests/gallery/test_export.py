"""Exports: Parquet parts that hold and order what the gallery does, whole or not at all.

python3 -m pytest tests/gallery/test_export.py -m soak -s   # ten kills of the command
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from gallery import export, index, store
from runtime.errors import InputError
from runtime.files import lock
from tests.gallery.test_store import build_made
from tests.helpers.killed import kill_at_random, kill_commands
from tests.helpers.made import ROOT

parquet = pytest.importorskip("pyarrow.parquet")

WIDTH, N = 12, 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build_made(str(tmp_path_factory.mktemp("made") / "g"), "exact")


@pytest.fixture
def folder(tmp_path, monkeypatch, made):
    """A current folder with a gallery `g` of 300 photos; row groups of 32 rows."""
    shutil.copytree(made, tmp_path / "g")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "BLOCK_ROWS", 32)
    return tmp_path


def publish_anew(change):
    """Publish the gallery `g` again after change(its arrays' folder)."""
    description = store.describe("g")
    change(os.path.join("g", description["files"]))
    store.publish("g", os.path.join("g", description["files"]), description)


def change_embedding(files):
    rows = np.load(f"{files}/embeddings.npy")
    rows[7] *= 2
    store.save(f"{files}/embeddings.npy", rows)


def content_of(output):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in Path(output).iterdir()}


def rows_of(manifest, output="out"):
    """The rows of all parts as dictionaries."""
    paths = [Path(output, part["file"]) for part in manifest["parts"]]
    return [row for path in paths for row in parquet.read_table(path).to_pylist()]


def by_loop(found):
    """Vectors (n, 16) of a Gallery's rows, number by number in float64; their middle and length."""
    rows = [row.double().tolist() for row in found.embeddings]
    middle = sum(row[-1] for row in rows) / len(rows)
    rows = [[*row[:-1], row[-1] - middle] for row in rows]
    squares = [sum(number * number for number in row) for row in rows]
    length = max(squares) ** 0.5
    vectors = [
        [number / length for number in (*row, (length**2 - square) ** 0.5, 0, 0)]
        for row, square in zip(rows, squares)
    ]
    return np.array(vectors), middle, length


# What is in it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("float16", 1e-3)])
@pytest.mark.parametrize("rows_per_part, parts", [(1000, 1), (300, 1), (70, 5), (299, 2)])
def test_parts_hold_the_gallery_s_photos_in_its_order(folder, rows_per_part, parts, dtype, error):
    found = store.Gallery("g")
    manifest = export.export("g", "out", rows_per_part, dtype)
    vectors, middle, length = by_loop(found)
    rows = rows_of(manifest)
    assert [row["id"] for row in rows] == list(range(N))
    assert [row["item"] for row in rows] == list(found.items)
    assert [row["captions"] for row in rows] == [found.captions(number) for number in range(N)]
    assert [row["shift"] for row in rows] == [-float(row[-1]) for row in found.embeddings]
    assert np.array([row["vector"] for row in rows]) == pytest.approx(vectors, abs=error)
    assert (manifest["middle"], manifest["length"]) == pytest.approx((middle, length))
    assert len(manifest["parts"]) == parts
    assert str(parquet.read_schema("out/part-00000.parquet").field("vector").type) == (
        f"fixed_size_list<element: {'float' if dtype == 'float32' else 'halffloat'}>[16]"
    )


def test_the_manifest_says_what_the_parts_are(folder):
    manifest = export.export("g", "out", 130)
    assert manifest == json.loads(Path("out/manifest.json").read_text())
    assert {name: manifest[name] for name in ("width", "padded_width", "rows", "correction")} == {
        "width": WIDTH,
        "padded_width": 16,
        "rows": N,
        "correction": "csls",
    }
    assert [part["rows"] for part in manifest["parts"]] == [130, 130, 40]
    assert sorted(os.listdir("out")) == [
        ".lock",
        "manifest.json",
        *(part["file"] for part in manifest["parts"]),
    ]
    for part in manifest["parts"]:
        content = Path("out", part["file"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        own = parquet.read_schema(Path("out", part["file"])).metadata[b"gallery"]
        names = ("gallery", "width", "middle", "length")
        assert json.loads(own) == {name: manifest[name] for name in names}


@pytest.mark.parametrize("width, expected", [(1, 16), (14, 16), (15, 32), (256, 272), (1024, 1040)])
def test_vectors_are_padded_to_a_multiple_of_sixteen(width, expected):
    assert export.padded(width) == expected


@pytest.mark.parametrize("corrected", [True, False])
def test_products_cosines_and_distances_order_as_the_gallery_does(folder, corrected):
    found = store.Gallery("g")
    manifest = export.export("g", "out")
    vectors = np.array([row["vector"] for row in rows_of(manifest)], np.float64)
    queries = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(3))
    scores, numbers = found.search(queries, 10, corrected)
    for query, own_scores, own in zip(queries.double().numpy(), scores, numbers):
        asked = np.array([*query, float(corrected), 0, 0, 0])
        products = vectors @ asked
        cosines = products / np.linalg.norm(asked) / np.linalg.norm(vectors, axis=1)
        distances = np.linalg.norm(vectors - asked, axis=1)
        for order in (-products, -cosines, distances):
            assert order.argsort()[:10].tolist() == own.tolist()
        again = products[own] * manifest["length"] + corrected * manifest["middle"]
        assert again == pytest.approx(own_scores.numpy(), abs=1e-5)


def test_names_that_utf_8_cannot_encode_are_escaped(folder):
    names = [os.fsdecode(b"odd \xff.png"), "zwei W\u00f6rter.png", *map(str, range(N - 2))]
    publish_anew(lambda files: store.write_texts(f"{files}/items", names))
    rows = rows_of(export.export("g", "out"))
    assert [row["item"] for row in rows[:3]] == ["odd \\udcff.png", "zwei W\u00f6rter.png", "0"]


def test_memory_does_not_grow_with_the_gallery(tmp_path):
    """The vectors of the 90,000 photos more take 98 MB."""
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from benchmarks.search import build; from benchmarks.timing import resident_memory\n"
        "from gallery.export import export\n"
        "import os; os.mkdir('few'); os.mkdir('many')\n"
        "build('few', 10_000, 256, 'exact'); build('many', 100_000, 256, 'exact')\n"
        "for folder in ('few', 'few', 'many'):\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    export(f'{folder}/gallery', f'{folder}/out', 10_000)\n"
        "    print(resident_memory('VmHWM'))\n"
        "    __import__('shutil').rmtree(f'{folder}/out')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    _, few, many = map(int, run.stdout.split())
    assert many < few + 40e6


# Going on, and damage ---------------------------------------------------------------------------


def run_export():
    export.export("g", "out", 70)


def test_killed_exports_end_in_the_same_bytes(folder):
    run_export()
    whole = content_of("out")
    shutil.rmtree("out")
    kill_at_random(run_export, "out", 3)
    assert content_of("out") == whole


@pytest.mark.soak
def test_ten_kills_of_the_command_end_in_the_same_bytes(tmp_path, monkeypatch):
    from benchmarks.search import build

    monkeypatch.chdir(tmp_path)
    os.mkdir("made")
    build("made", 60_000, 256, "exact")
    flags = ["--index", "made/gallery", "--export", "out", "--rows_per_part", "10000"]
    command = [sys.executable, str(ROOT / "search.py"), *flags]
    assert subprocess.run(command).returncode == 0
    whole = content_of("out")
    shutil.rmtree("out")
    print(kill_commands(lambda: subprocess.Popen(command), "out"))
    assert content_of("out") == whole


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_only_a_damaged_part_is_written_again(folder, damage):
    run_export()
    whole, part = content_of("out"), Path("out/part-00002.parquet")
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    content = bytearray(part.read_bytes())
    content[99] ^= 1
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(content if damage == "flipped" else content[:99])
    run_export()
    assert content_of("out") == whole
    others = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    changed = {name for name in before if before[name] != others[name]}
    assert changed == {"part-00002.parquet", "manifest.json"}
    run_export()  # nothing is left to do
    assert others == {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_a_full_disk_is_said_and_the_rest_follows_once_there_is_room(folder, small_disk):
    disk = small_disk(200)
    run_export()
    whole = content_of("out")
    (disk / "filler").write_bytes(bytes(152_000))
    with pytest.raises(InputError, match="parquet could not be written .No space left on device"):
        export.export("g", str(disk / "out"), 70)
    there = content_of(disk / "out")
    assert {"unfinished.json", "part-00000.parquet"} <= there.keys() < {*whole, "unfinished.json"}
    assert all(there[name] == whole[name] for name in there if name != "unfinished.json")
    (disk / "filler").unlink()
    export.export("g", str(disk / "out"), 70)
    assert content_of(disk / "out") == whole


def test_a_damaged_gallery_is_not_exported(folder):
    files = Path("g", store.describe("g")["files"])
    content = bytearray((files / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (files / "embeddings.npy").write_bytes(content)
    with pytest.raises(InputError, match="embeddings.npy is not as it was written"):
        run_export()
    assert not os.path.exists("out")


def test_a_gallery_without_checksums_is_refused(folder):
    said = store.describe("g")
    Path("g/gallery.json").write_text(json.dumps({**said, "checksums": None}))
    with pytest.raises(InputError, match="without checksums.*: write them with --rebuild_index"):
        run_export()
    assert not os.path.exists("out")


def add_index(files):
    index.build("ivf_sq8", torch.randn(N, 13), torch.randn(9, 13), f"{files}/{store.INDEX}")


@pytest.mark.parametrize("change, ends", [(change_embedding, False), (add_index, True)])
def test_a_gallery_that_changes_in_between(folder, monkeypatch, change, ends):
    """Another index leaves the rows as they are; other rows must not be mixed with the first."""
    write = export._write_json

    def write_and_change(output, name, content):
        write(output, name, content)
        if len(content["parts"]) == 2:
            publish_anew(change)

    monkeypatch.setattr(export, "_write_json", write_and_change)
    if ends:
        run_export()
        assert len(rows_of(json.loads(Path("out/manifest.json").read_text()))) == N
    else:
        with pytest.raises(InputError, match="g was changed while it was exported"):
            run_export()
        assert not os.path.exists("out/manifest.json")


# Other folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["letter.txt", "part-00000.parquet", "part-1.parquet"])
def test_a_folder_with_other_files_is_refused(folder, name):
    os.mkdir("out")
    Path("out", name).write_text("mine")
    with pytest.raises(InputError, match=f"is not an export, .* such as {name}: name an empty"):
        run_export()
    assert content_of("out") == {name: b"mine"}


@pytest.mark.parametrize(
    "flags, named",
    [((71, "float32"), "rows_per_part is 70, not 71"), ((70, "float16"), "dtype is float32, not")],
)
def test_an_export_with_other_flags_is_refused(folder, flags, named):
    run_export()
    whole = content_of("out")
    with pytest.raises(InputError, match=f"other flags .{named}.*: name another folder"):
        export.export("g", "out", *flags)
    assert content_of("out") == whole


def test_an_export_of_another_gallery_is_refused(folder):
    run_export()
    whole = content_of("out")
    publish_anew(change_embedding)
    with pytest.raises(InputError, match="holds parts of another gallery"):
        run_export()
    assert content_of("out") == whole


@pytest.mark.parametrize("content", ["[]", "{}", '{"parts": [{"file": "../x"}]}', '{"parts": [3]}'])
def test_a_manifest_that_is_none_is_said(folder, content):
    os.mkdir("out")
    Path("out/manifest.json").write_text(content)
    with pytest.raises(InputError, match="manifest.json does not list an export's parts"):
        run_export()


def test_two_exports_into_one_folder_at_once_are_refused(folder):
    with lock("out"), pytest.raises(InputError, match="--export out: another run is writing"):
        run_export()


# The command ------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(folder, capsys):
    search.main(["--index", "g", "--export", "out", "--rows_per_part", "200"])
    printed = capsys.readouterr()
    assert printed.out == "out: 300 photos in 2 files, 0.0 MiB\n"
    assert [line.split(",")[0] for line in printed.err.splitlines()] == [
        "out/part-00000.parquet: 200 rows",
        "out/part-00001.parquet: 100 rows",
    ]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--rows_per_part", "5"], "--rows_per_part does nothing without --export"),
        (["--dtype", "float16"], "--dtype does nothing without --export"),
        (["--export", "out", "--add", "photos"], "--add does nothing with --export"),
        (["--export", "out", "--store", "x"], "--store does nothing with --export"),
        (["--export", "out", "a dog"], "a question and --export are given"),
        (["--export", "out", "--rows_per_part", "0"], "0 is out of range"),
        (["--export", ""], "it is empty"),
        (["--store", "x", "--rebuild_index"], "--rebuild_index does nothing with --store"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, flags, named):
    with pytest.raises(InputError, match=named):
        search.main(["--index", "g", *flags])
    assert not os.path.exists("out")


def test_no_gallery_is_no_export(folder):
    with pytest.raises(InputError, match="no whole gallery in nowhere"):
        search.main(["--index", "nowhere", "--export", "out"])


def test_a_missing_package_is_named_with_its_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="--export needs the package pyarrow.*: pip install pya"):
        run_export()
    assert not os.path.exists("out")
