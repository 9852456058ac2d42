"""Vector databases in place of the index: the recipes of docs/scale.md, and what they then answer."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gallery import export, remote, store
from pages import serve
from runtime.errors import InputError
from tests.gallery.test_store import build_made
from tests.helpers.galleries import ask, results, searcher_of
from tests.helpers.made import ROOT

PACKAGES = {"LanceDB": ["lancedb", "pyarrow"], "Milvus": ["pymilvus", "milvus_lite", "pyarrow"]}
TABLES = {"LanceDB": "lancedb://lance/photos", "Milvus": "milvus://photos.db/photos"}
GALLERY, PHOTOS = "runs/mine/gallery", 600
QUESTIONS = ["two dogs play in the snow", "a red cat", "a green bird near a river"]


def recipe(title):
    """The recipe of that title in docs/scale.md: [(language, block of code), ...]."""
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def commands_of(block):
    """search.py's flags in a block of shell, a list for each command."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["python3", "search.py"]]


def build_gallery():
    """A gallery of 600 made-up features, with a correction, in the current folder."""
    rng = np.random.default_rng(2)
    features = rng.standard_normal((PHOTOS, 8)).astype(np.float32)
    np.save("data/tiny_precomp/many_ims.npy", features)
    model = ["--model_path", "runs/runX/model_best.pth.tar", "--device", "cpu"]
    source = ["--precomp", "data/tiny_precomp", "--split", "many", "--correction", "csls"]
    ask(*model, *source, "--index", GALLERY)


@pytest.fixture(scope="module", params=PACKAGES)
def imported(request, tmp_path_factory, trained):
    """(a folder in which the recipe was run up to its questions, the store's address, its flags)."""
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        build_gallery()
        (_, before), (language, code), (_, after) = recipe(request.param)
        assert language == "python"
        for flags in commands_of(before):
            ask(*flags)
        exec(compile(code, f"docs/scale.md, {request.param}", "exec"), {})
    finally:
        os.chdir(here)
    return folder, TABLES[request.param], commands_of(after)


@pytest.fixture
def filled(imported, monkeypatch):
    """The address of the recipe's table, in its folder, and the flags of the recipe's questions."""
    monkeypatch.chdir(imported[0])
    return imported[1:]


# Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--correction", "none"]])
def test_a_table_answers_as_the_gallery_does(filled, capsys, flags):
    table, _ = filled
    with open("questions.txt", "w") as file:
        file.writelines(f"{question}\n" for question in QUESTIONS)
    asked = ["--index", GALLERY, "--batch", "questions.txt", "--json", *flags]
    ask(*asked)
    exact = results(capsys)
    ask(*asked, "--store", table)
    for own, expected in zip(results(capsys), exact, strict=True):
        assert [hit["item"] for hit in own["results"]] == [
            hit["item"] for hit in expected["results"]
        ]
        assert [hit["score"] for hit in own["results"]] == pytest.approx(
            [hit["score"] for hit in expected["results"]], abs=2e-6
        )


def test_corrected_and_plain_answers_differ(filled):
    found = searcher_of("--index", GALLERY, "--store", filled[0])
    queries = found.loaded.embed_questions(QUESTIONS)
    corrected, plain = (found.gallery.search(queries, 10, own)[1] for own in (True, False))
    assert corrected.tolist() != plain.tolist()


def test_the_recipe_s_questions_are_answered(filled, capsys, monkeypatch):
    monkeypatch.setattr("gallery.build.RECALL_QUERIES", 40)
    table, commands = filled
    assert len(commands) == 5
    for flags in commands:
        assert flags[:4] == ["--index", GALLERY, "--store", table]
        if flags[4:] != ["--serve"]:
            ask(*flags)
    corrected, plain, *recalls = re.split(r"\n(?=two|recall)", capsys.readouterr().out.strip())
    for answer in (corrected, plain):
        assert len(answer.splitlines()) == 11
    assert corrected != plain
    for line in recalls:
        assert re.fullmatch(rf"recall@10 of {table}: (1.0|0.99)\d+ \(40 of its own photos\)", line)


def test_the_page_and_its_json_answer_from_the_table(filled, monkeypatch):
    monkeypatch.setattr(serve, "Decoder", lambda seconds: SimpleNamespace())
    found = searcher_of("--index", GALLERY, "--store", filled[0])
    client = serve.make_app(found).test_client()
    answer = client.post("/api/search", json={"query": QUESTIONS[0], "top": 4}).get_json()
    (expected,) = searcher_of("--index", GALLERY).by_words(QUESTIONS[:1], 4)
    assert [hit["item"] for hit in answer["results"]] == [hit.item for hit in expected]
    page = client.get("/?q=two+dogs+play+in+the+snow").get_data(as_text=True)
    assert f"/like/{expected[0].number}" in page


def test_a_table_gives_all_rows_and_no_more_than_it_has(filled):
    found = searcher_of("--index", GALLERY, "--store", f"{filled[0]}?probes=600").gallery
    scores, numbers = found.search(found.embeddings[:2, :-1], PHOTOS + 5)
    assert numbers.shape == scores.shape == (2, PHOTOS)
    assert numbers.sort().values.tolist() == [list(range(PHOTOS))] * 2


# What goes wrong --------------------------------------------------------------------------------


def test_a_table_that_is_not_there_is_said(filled):
    table = filled[0].replace("photos", "pictures").replace("pictures.db", "photos.db")
    with pytest.raises(InputError, match=f"--store {table} does not answer .*pictures.*: check"):
        searcher_of("--index", GALLERY, "--store", table)


def test_rows_of_another_gallery_are_refused(filled, tmp_path):
    found = store.Gallery(build_made(str(tmp_path / "other"), "exact"))
    with pytest.raises(InputError, match="holds 600 rows of .* with 300: import all of its export"):
        remote.opened(filled[0], found)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A gallery of 300 made-up photos."""
    return store.Gallery(build_made(str(tmp_path_factory.mktemp("made") / "g"), "exact"))


@pytest.mark.parametrize(
    "address", ["lance/photos", "redis://x/y", "milvus://x", "lancedb:///t?p=1"]
)
def test_an_address_that_is_none_is_said(made, address):
    with pytest.raises(InputError, match=r"--store .* is no address of a table: --help shows"):
        remote.opened(address, made)


@pytest.mark.parametrize("address", ["lancedb://nowhere/t", "milvus://nowhere.db/t"])
def test_a_store_that_is_not_there_is_said_and_not_made(made, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no nowhere.*: import the gallery first"):
        remote.opened(address, made)
    assert os.listdir() == []


@pytest.mark.parametrize("listens", [False, True])
def test_a_server_that_does_not_answer_is_said_in_one_sentence(made, monkeypatch, capfd, listens):
    pytest.importorskip("pymilvus")
    monkeypatch.setattr(remote, "SECONDS", 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"milvus://127.0.0.1:{server.getsockname()[1]}/photos"
        with pytest.raises(InputError, match=f"--store {address} does not answer .*: check the"):
            remote.opened(address, made)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["lancedb", "pymilvus"])
def test_a_missing_package_is_named_with_its_command(made, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    address = f"{'lancedb' if kind == 'lancedb' else 'milvus'}://{tmp_path}/photos"
    with pytest.raises(InputError, match=f"needs the package {kind}, .*: pip install {kind}"):
        remote.opened(address, made)


def stored_by(monkeypatch, stamp, count, ask=None):
    """Make `remote` open a store that says this."""
    monkeypatch.setattr(remote, "_lancedb", lambda place, name, probes: (ask, stamp, count))


@pytest.mark.parametrize(
    "stamp, count, named",
    [
        (None, 300, "300 rows of the gallery no name"),
        ('{"gallery": "f00d", "middle": 0, "length": 1}', 300, "300 rows of the gallery f00d"),
        ("own", 299, "holds 299 rows of"),
        ("own", 301, "holds 301 rows of"),
    ],
)
def test_other_rows_than_the_gallery_s_are_refused(
    made, monkeypatch, tmp_path, stamp, count, named
):
    own = {"gallery": export.key_of(made), "width": 12, "middle": -0.5, "length": 2.0}
    stored_by(monkeypatch, export.stamp_of(own) if stamp == "own" else stamp, count)
    with pytest.raises(InputError, match=f"{named}.*: import all of its export into a new table"):
        remote.opened(f"lancedb://{tmp_path}/t", made)


def test_a_store_that_finds_fewer_or_fails_later(made, monkeypatch, tmp_path):
    """Rows that are lacking are -1 with the score -inf; scores are as the gallery's."""
    asked = []

    def ask(rows, top):
        asked.append(rows)
        if top == 7:
            raise OSError("the network is down\nas it often is")
        return [([5, 3], [0.5, 0.25]), ([7], [0.5])]

    stamp = {"gallery": export.key_of(made), "width": 12, "middle": -0.5, "length": 2.0}
    stored_by(monkeypatch, export.stamp_of(stamp).encode(), 300, ask)
    find = remote.opened(f"lancedb://{tmp_path}/t", made)
    queries = torch.randn(2, 13)
    queries[:, -1] = torch.tensor([1, 0])  # corrected, plain
    scores, numbers = find(queries, 3)
    assert numbers.tolist() == [[5, 3, -1], [7, -1, -1]]
    assert scores.tolist() == [[0.5, 0.0, -np.inf], [1.0, -np.inf, -np.inf]]
    assert asked[0].shape == (2, 16) and torch.equal(asked[0][:, :13], queries)
    assert not asked[0][:, 13:].any()
    with pytest.raises(InputError, match=r"does not answer \(the network is down\): check"):
        find(queries, 7)


def test_searching_a_gallery_imports_no_database():
    program = "import sys, search, gallery.remote; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"lancedb", "pymilvus", "milvus_lite", "pyarrow"} & {*run.stdout.split()}
