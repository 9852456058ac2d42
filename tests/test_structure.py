"""The rooms of the project: what stands where, and who may import whom."""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers.made import ROOT

# Each line may import from those above it, and from itself.
FLOORS = (
    ("runtime",),
    ("inputs", "layers"),
    ("memory_bank",),
    ("loss",),
    ("vocab",),
    ("features",),
    ("model", "data"),
    ("retrieval",),
    ("embeddings",),
    ("training",),
    ("evaluation",),
    ("gallery",),
    ("pages",),
    ("experiments",),
    ("benchmarks",),
)
SCRIPTS = {"train", "compute_results", "extract_features", "search", "reproduce", "benchmark"}
FRONT = SCRIPTS | {"model", "data", "vocab", "evaluation", "loss", "memory_bank"}
FORBIDDEN = {("retrieval", other) for other in ("model", "data", "vocab", "features", "inputs")}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", ".venv")
]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def room(module):
    return module.split(".")[0]


def imports_of(path):
    """The project's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found & MODULES.keys()


IMPORTS = {module: imports_of(path) - {module} for module, path in MODULES.items()}
BETWEEN = sorted({(one, other) for one, others in IMPORTS.items() for other in others})


def test_the_top_folder_holds_the_scripts_and_the_eight_files_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == FRONT


def test_every_folder_says_what_belongs_there():
    folders = {path.parent for path in FILES} - {ROOT}
    assert {room for room in FLOOR_OF if room not in FRONT} == {folder.name for folder in folders}
    for folder in folders:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert len(re.findall(r"\.(?:\s|$)", said)) >= 2, folder


def test_nothing_imports_a_script():
    assert [pair for pair in BETWEEN if pair[1] in SCRIPTS] == []


def test_no_import_points_up():
    assert [
        (one, other)
        for one, other in BETWEEN
        if one not in SCRIPTS and FLOOR_OF[room(other)] > FLOOR_OF[room(one)]
    ] == []


def test_what_comes_after_the_model_knows_no_model():
    assert [pair for pair in BETWEEN if tuple(map(room, pair)) in FORBIDDEN] == []


def test_there_is_no_circle():
    left = {one: set(others) for one, others in IMPORTS.items()}
    while free := [one for one, others in left.items() if not others & left.keys()]:
        for one in free:
            del left[one]
    assert left == {}


@pytest.mark.parametrize("name, needs", [("loss", {"memory_bank"}), ("memory_bank", set())])
def test_the_losses_need_pytorch_and_each_other(name, needs):
    assert IMPORTS[name] == needs


@pytest.mark.parametrize("name", ["loss", "memory_bank", "evaluation"])
def test_a_file_is_imported_beside_somebody_s_own_model(tmp_path, name):
    """From a folder with a model.py, data.py and vocab.py of its own, which come first."""
    for other in ("model", "data", "vocab", "errors", "train"):
        (tmp_path / f"{other}.py").write_text(
            "raise RuntimeError('this is somebody else\\'s file')\n"
        )
    program = f"import sys; sys.path.append({str(ROOT)!r}); import {name}"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_each_module_has_the_test_file_that_bears_its_name():
    expected = {
        path.relative_to(ROOT).with_name(f"test_{path.name}")
        for path in FILES
        if path.name != "__init__.py"
    }
    assert sorted(str(path) for path in expected if not (ROOT / "tests" / path).exists()) == []
