"""A comparison's record: two files, small, without paths, and as good as its output folder."""

import json
import os

import numpy as np
import pytest

import reproduce
from experiments import records
from runtime.errors import InputError
from tests.helpers.comparisons import FAST, results

RUN = {
    "options": {
        **{"seed": 3, "data_path": "/a", "vocab_path": "/b", "cache_dir": None},
        **{"logger_name": "/c", "resume": "/c/x"},
    },
    **{"device": "cpu (x)", "packages": {"torch": "2.9"}, "git_commit": "0123456789abcdef"},
    **{"resumed_at_step": 470, "start": "2026-11-28T00:00:00+0000"},
    **{"end": "2026-11-28T00:10:00+0000"},
    "result": {"outcome": "finished", "epochs": 5, "steps": 1175},
}

HAL = "HAL/lr0.001_local_alpha60_local_ep0.7_seed0"

ONE = [*FAST, "--losses", "HAL", "--trials", "1", "--seeds", "0"]


def test_an_epoch_s_seconds_are_those_since_the_last_start():
    assert records.seconds_an_epoch(RUN) == 600 / (705 / 235)
    assert records.seconds_an_epoch({**RUN, "resumed_at_step": None}) == 120
    assert records.seconds_an_epoch({**RUN, "end": None}) is records.seconds_an_epoch({}) is None
    assert records.made_on(RUN) == "cpu (x), torch 2.9, commit 0123456"


def test_what_is_unpacked_goes_on_as_its_output_would(drawn):
    flags = [*FAST, "--losses", "HAL", "sum-margin", "--seeds", "0", "2"]
    reproduce.main([*flags, "--record", "all/record.json"])
    assert sorted(os.listdir("all")) == ["record.json", "record.npz"]
    calls, before = drawn(), results()
    reproduce.main([*flags, "--output", "copy", "--from_record", "all/record.json"])
    assert drawn() == calls and results("copy/results.json") == before
    for name in ("results.md", "results.png", "epochs.png"):
        made = open(f"runs/reproduce_smoke/{name}", "rb").read()
        assert open(f"copy/{name}", "rb").read() == made
    reproduce.main([*flags, "3", "--output", "copy", "--record", "again.json"])
    new = drawn()[len(calls) :]
    assert {call.split()[3 if call.startswith("train") else 1] for call in new} == {"3"}
    old = records.read_record("all/record.json")["runs"]
    again = records.read_record("again.json")["runs"]
    assert len(again) == len(old) + 2
    assert {folder: again[folder] for folder in old} == old


def test_the_same_output_gives_the_same_bytes(scripts):
    for name in ("a", "b"):
        reproduce.main([*ONE, "--record", f"{name}.json"])
    for ending in ("json", "npz"):
        assert open(f"a.{ending}", "rb").read() == open(f"b.{ending}", "rb").read()


def write_run(folder, run, **files):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_a_record_holds_no_weights_no_steps_no_items_and_no_paths(tmp_path):
    out = tmp_path / "out"
    run = out / "HAL/lr1_seed0"
    lines = '{"kind": "step"}\n{"kind": "validation", "rsum": 5}\n'
    write_run(run, RUN, log_jsonl=lines, model_best_pth_tar="weights")
    (out / "settings.json").write_text('{"layout": 2}')
    (run / "test.json").write_text('{"model_path": "/a/model", "rsum": 3}')
    rng = np.random.default_rng(0)
    arrays = {"image_of": np.arange(15, dtype=np.int32) // 5}
    for name in ("", "nnn_", "inverted_softmax_"):
        arrays[f"{name}i2t_ranks"] = rng.integers(0, 15, 3).astype(np.int32)
        arrays[f"{name}t2i_ranks"] = rng.integers(0, 3, 15).astype(np.int32)
    items = {"i2t_items": np.zeros((3, 10)), "nnn_t2i_items": np.zeros((15, 10))}
    np.savez(run / "test.npz", **arrays, **items)
    why = {"outcome": "gave up", "epochs": 1, "steps": 9, "why": "step 9: see /c/checkpoint.x"}
    options = {"seed": 3, "logger_name": "/c"}
    write_run(out / "HAL/lr2_seed0", {**RUN, "options": options, "result": why})
    write_run(out / "HAL/lr1_seed1", {**RUN, "end": None, "result": None})
    for _ in range(2):
        records.keep(str(out), str(tmp_path / "record.json"))
    record = records.read_record(str(tmp_path / "record.json"))
    kept = record["runs"]["HAL/lr1_seed0"]
    assert sorted(kept) == ["log.jsonl", "run.json", "test.json", "test.npz"]
    assert sorted(record["runs"]) == ["HAL/lr1_seed0", "HAL/lr2_seed0"]
    gave_up = record["runs"]["HAL/lr2_seed0"]["run.json"]
    assert gave_up["result"]["why"] == "step 9: see checkpoint.x"
    assert kept["run.json"] == {**RUN, "options": {"seed": 3}}
    assert kept["log.jsonl"] == [{"kind": "validation", "rsum": 5}]
    assert kept["test.json"] == {"rsum": 3}
    assert kept["test.npz"] == ["", "nnn", "inverted_softmax"]
    text = (tmp_path / "record.json").read_text()
    assert "/c" not in text and "weights" not in text
    records.unpack(str(tmp_path / "record.json"), record, str(tmp_path / "new"))
    with np.load(tmp_path / "new/HAL/lr1_seed0/test.npz") as content:
        assert set(content) == set(arrays)
        for name, array in arrays.items():
            assert np.array_equal(content[name], array) and content[name].dtype == np.int32


@pytest.mark.parametrize("folds, largest", [(None, 70_000), (2, 9)])
def test_ranks_of_folds_and_large_ones_come_back_as_they_were(tmp_path, folds, largest):
    shape = (folds,) if folds else ()
    rng = np.random.default_rng(0)
    image_of = np.broadcast_to(np.arange(20) // 5, (*shape, 20)).astype(np.int32)
    arrays = {"image_of": image_of}
    for name in ("", "csls_"):
        for side, n in (("i2t", 4), ("t2i", 20)):
            arrays[f"{name}{side}_ranks"] = rng.integers(0, largest, (*shape, n)).astype(np.int32)
    np.savez(tmp_path / "test.npz", **arrays)
    found = records.unpacked_ranks(*records.pack_ranks(tmp_path / "test.npz"))
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_a_run_that_is_in_the_output_is_not_replaced_by_the_record_s(scripts):
    reproduce.main([*ONE, "--record", "record.json"])
    run = results(f"runs/reproduce_smoke/{HAL}/run.json")
    records.write_json(f"runs/reproduce_smoke/{HAL}/run.json", {**run, "mine": 1})
    os.unlink("runs/reproduce_smoke/settings.json")
    reproduce.main([*ONE, "--from_record", "record.json"])
    assert results(f"runs/reproduce_smoke/{HAL}/run.json")["mine"] == 1


def test_models_that_are_not_named_stay_in_a_record(scripts):
    both = [*FAST, "--losses", "HAL", "sum-margin", "--trials", "1", "--seeds", "0"]
    reproduce.main([*both, "--record", "record.json"])
    before = open("record.json").read()
    reproduce.main(
        [*ONE, "--output", "new", "--from_record", "record.json", "--record", "record.json"]
    )
    assert open("record.json").read() == before


def test_a_record_of_other_runs_is_not_overwritten(scripts):
    flags = [*FAST, "--losses", "HAL", "--trials", "1"]
    reproduce.main([*flags, "--output", "a", "--seeds", "0", "2", "--record", "record.json"])
    reproduce.main([*flags, "--output", "b", "--seeds", "0"])
    calls = scripts()
    for output, missing in (("b", r"HAL/lr\S*_seed2/run.json"), ("new", HAL)):
        says = f"--record record.json has {missing}\\S*, which .*{output} has not: add --from_rec"
        with pytest.raises(InputError, match=says):
            reproduce.main([*flags, "--output", output, "--record", "record.json"])
    assert scripts() == calls


def test_a_record_of_other_settings_is_not_gone_on_from(scripts):
    reproduce.main([*ONE, "--record", "record.json"])
    calls = scripts()
    with pytest.raises(InputError, match="^record.json holds runs with other trials .1, not 2"):
        reproduce.main([*FAST, "--output", "new", "--from_record", "record.json"])
    assert scripts() == calls and os.listdir("new") == [".lock"]


def test_a_stopped_comparison_keeps_its_record(scripts, monkeypatch):
    monkeypatch.setenv("NO_DATA", "2")  # the trials go well
    with pytest.raises(InputError, match="no data here"):
        reproduce.main([*ONE, "--record", "record.json"])
    assert list(records.read_record("record.json")["runs"]) == [HAL]


@pytest.mark.parametrize(
    "name, words",
    [("run.json", "run.json cannot be read"), ("test.npz", "cannot be read as ranks")],
)
def test_what_is_damaged_is_named(scripts, name, words):
    reproduce.main([*ONE, "--record", "record.json"])
    with open(f"runs/reproduce_smoke/{HAL}/{name}", "w") as file:
        file.write("{")
    with pytest.raises(InputError, match=words):
        reproduce.main([*ONE, "--record", "record.json"])


def old_record(folder):
    """A record as older versions wrote it: a folder with a file for each part of each run."""
    reproduce.main([*ONE, "--output", folder])
    os.unlink(f"{folder}/{HAL}/model_best.pth.tar")
    return results(f"{folder}/results.json")


def test_a_record_of_the_old_layout_is_named_with_the_command_that_converts_it(scripts):
    before, calls = old_record("docs/old"), scripts()
    convert = ["--convert_record", "docs/old", "--record", "docs/old.json"]
    for flag in ("--record", "--from_record"):
        with pytest.raises(InputError, match=f"^{flag} docs/old is a folder") as error:
            reproduce.main([*ONE, "--output", "new", flag, "docs/old"])
        assert f"python3 reproduce.py {' '.join(convert)}" in str(error.value)
    reproduce.main(convert)
    reproduce.main([*ONE, "--output", "new", "--from_record", "docs/old.json"])
    assert results("new/results.json") == before and scripts() == calls


@pytest.mark.parametrize(
    "flags, says",
    [
        ([*ONE, "--record", "file"], "--record file is not the name of a record: name a file, N"),
        ([*ONE, "--record", "."], "--record . is not the name of a record"),
        ([*ONE, "--record", "x.json/y.json"], "--record x.json/y.json cannot be written"),
        ([*ONE, "--record", "x.json"], "--record x.json cannot be read as a record"),
        ([*ONE, "--from_record", "x.json"], "--from_record x.json cannot be read as a record"),
        ([*ONE, "--from_record", "no.json"], "--from_record no.json is not there: name"),
        (["--convert_record", "."], "--convert_record needs --record"),
        (["--convert_record", "z", "--record", "y.json"], "--convert_record z has no settings"),
    ],
)
def test_a_bad_place_for_a_record_is_one_sentence(scripts, flags, says):
    with open("x.json", "w") as file:
        file.write("{}")
    with pytest.raises(InputError, match=f"^{says}"):
        reproduce.main(flags)
    assert scripts() == []


@pytest.mark.parametrize(
    "runs",
    [
        *(3, [], {"HAL": {}}, {"../x/y": {}}, {"../y": {}}, {"/x/y": {}}, {"HAL/..": {}}),
        *({"HAL/x": 3}, {"HAL/x": {"../run.json": {}}}, {"HAL/x": {"train.py": ""}}),
    ],
)
def test_a_record_that_names_other_places_is_refused(tmp_path, runs):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"record": 1, "npz": "", "settings.json": {}, "runs": runs}))
    with pytest.raises(InputError, match="cannot be read as a record"):
        records.read_record(str(path))


@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_ranks_that_do_not_go_with_their_record_are_one_sentence(scripts, damage):
    reproduce.main([*ONE, "--record", "record.json"])
    if damage == "missing":
        os.unlink("record.npz")
    elif damage == "torn":
        with open("record.npz", "r+b") as file:
            file.truncate(200)
    else:  # the same ranks, but for one
        arrays = dict(np.load("record.npz"))
        arrays[f"{HAL}/test.npz"][0, 0] += 1
        np.savez("record.npz", **arrays)
    with pytest.raises(InputError, match="^record.npz cannot be read as the ranks of record.json"):
        reproduce.main([*ONE, "--output", "new", "--from_record", "record.json"])
