"""A comparison's record: small, without paths, and as good as the output folder that it is of."""

import json
import os
import shutil

import numpy as np
import pytest
from test_reproduce import FAST, results, scripts  # noqa: F401 (a fixture)

import records
import reproduce
from errors import InputError

RUN = {"options": {"seed": 3, "data_path": "/a", "vocab_path": "/b", "cache_dir": None, "logger_name": "/c",
                   "resume": "/c/x"},
       "device": "cpu (x)", "packages": {"torch": "2.9"}, "git_commit": "0123456789abcdef", "resumed_at_step": 470,
       "start": "2026-11-28T00:00:00+0000", "end": "2026-11-28T00:10:00+0000",
       "result": {"outcome": "finished", "epochs": 5, "steps": 1175}}


def test_an_epoch_s_seconds_are_those_since_the_last_start():
    assert records.seconds_an_epoch(RUN) == 600 / (705 / 235)
    assert records.seconds_an_epoch({**RUN, "resumed_at_step": None}) == 120
    assert records.seconds_an_epoch({**RUN, "end": None}) is records.seconds_an_epoch({}) is None
    assert records.made_on(RUN) == "cpu (x), torch 2.9, commit 0123456"


def test_a_copy_of_a_record_goes_on_as_its_output_would(scripts):  # noqa: F811
    flags = [*FAST, "--losses", "HAL", "sum-margin", "--seeds", "0", "2"]
    reproduce.main([*flags, "--record", "record"])
    calls, before = scripts(), results()
    shutil.copytree("record", "copy")
    reproduce.main([*flags, "--output", "copy"])
    assert scripts() == calls and results("copy/results.json") == before
    for name in ("results.md", "results.png", "epochs.png"):
        assert open(f"copy/{name}", "rb").read() == open(f"runs/reproduce_smoke/{name}", "rb").read()
    reproduce.main([*flags, "3", "--output", "copy"])
    assert {call.split()[3 if call.startswith("train") else 1] for call in scripts()[len(calls):]} == {"3"}


def test_a_record_holds_no_weights_no_steps_no_items_and_no_paths(tmp_path):
    run = tmp_path / "out" / "HAL" / "lr1_seed0"
    run.mkdir(parents=True)
    (tmp_path / "out/settings.json").write_text('{"layout": 2}')
    (run / "run.json").write_text(json.dumps(RUN))
    (run / "log.jsonl").write_text('{"kind": "step"}\n{"kind": "validation", "rsum": 5}\n')
    (run / "model_best.pth.tar").write_text("weights")
    (run / "test.json").write_text('{"model_path": "/a/model", "rsum": 3}')
    arrays = {name: np.arange(9) for name in ("image_of", "i2t_ranks", "t2i_ranks", "nnn_t2i_ranks")}
    np.savez(run / "test.npz", **arrays, i2t_items=np.zeros((9, 10)), nnn_t2i_items=np.zeros((9, 10)))
    gave_up = tmp_path / "out" / "HAL" / "lr2_seed0"
    gave_up.mkdir()
    (gave_up / "run.json").write_text(json.dumps({**RUN, "options": {"seed": 3, "logger_name": "/c"}, "result": {
        "outcome": "gave up", "epochs": 1, "steps": 9, "why": "step 9: go back to /c/checkpoint.pth.tar"}}))
    unfinished = tmp_path / "out" / "HAL" / "lr1_seed1"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({**RUN, "end": None, "result": None}))
    for _ in range(2):
        records.keep(tmp_path / "out", tmp_path / "record")
    kept = tmp_path / "record/HAL/lr1_seed0"
    assert sorted(os.listdir(kept)) == ["log.jsonl", "run.json", "test.json", "test.npz"]
    assert sorted(os.listdir(tmp_path / "record/HAL")) == ["lr1_seed0", "lr2_seed0"]
    assert json.loads((tmp_path / "record/HAL/lr2_seed0/run.json").read_text())["result"]["why"] == (
        "step 9: go back to checkpoint.pth.tar")
    assert json.loads((kept / "run.json").read_text()) == {**RUN, "options": {"seed": 3}}
    assert (kept / "log.jsonl").read_text() == '{"kind": "validation", "rsum": 5}\n'
    assert json.loads((kept / "test.json").read_text()) == {"rsum": 3}
    with np.load(kept / "test.npz") as content:
        assert set(content) == set(arrays) and all(np.array_equal(content[name], arrays[name]) for name in arrays)


def test_a_record_of_other_runs_is_not_overwritten(scripts):  # noqa: F811
    flags = [*FAST, "--losses", "HAL", "--trials", "1", "--record", "record"]
    reproduce.main([*flags, "--output", "a"])
    reproduce.main([*flags, "--output", "a", "--seeds", "0", "1", "2"])
    reproduce.main([*FAST, "--losses", "HAL", "--trials", "1", "--output", "b"])
    calls = scripts()
    for output, missing in (("b", r"HAL/lr\S*_seed2/log.jsonl"), ("new", "settings.json")):
        with pytest.raises(InputError, match=f"--record record has {missing}, which .*{output} has not: copy the"):
            reproduce.main([*flags, "--output", output])
    for name in ("file", "record/run.json.1.tmp", "record/README.md"):
        with open(name, "w"):
            pass
    reproduce.main([*flags, "--output", "a"])
    with pytest.raises(InputError, match="--record file cannot be written"):
        reproduce.main([*FAST, "--record", "file"])
    assert scripts() == calls


def test_a_stopped_comparison_keeps_its_record(scripts, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NO_DATA", "2")  # the trials go well
    with pytest.raises(InputError, match="no data here"):
        reproduce.main([*FAST, "--losses", "HAL", "--trials", "1", "--record", "record"])
    assert os.path.exists("record/settings.json")
    assert os.listdir("record/HAL") == ["lr0.001_local_alpha60_local_ep0.7_seed0"]


@pytest.mark.parametrize("name, words", [("run.json", "run.json cannot be read"),
                                         ("test.npz", "cannot be read as ranks")])
def test_what_is_damaged_is_named(scripts, name, words):  # noqa: F811
    flags = [*FAST, "--losses", "HAL", "--seeds", "0", "--record", "record"]
    reproduce.main(flags)
    with open(f"runs/reproduce_smoke/HAL/lr0.001_local_alpha60_local_ep0.7_seed0/{name}", "w") as file:
        file.write("{")
    with pytest.raises(InputError, match=words):
        reproduce.main(flags)


def test_results_stand_between_a_page_s_lines_and_replace_what_stood_there(scripts):  # noqa: F811
    page = "Before\n<!-- smoke -->\n{}<!-- /smoke -->\nAfter\n"
    os.mkdir("docs")
    with open("docs/page.md", "w") as file:
        file.write(page.format("old\n"))
    flags = [*FAST, "--losses", "HAL", "--seeds", "0", "--page", "docs/page.md"]
    for _ in range(2):
        reproduce.main(flags)
    tables = open("runs/reproduce_smoke/results.md").read()
    pictures = "".join(f"![smoke: {name}](smoke_{name}.png)\n\n" for name in ("results", "epochs"))
    assert open("docs/page.md").read() == page.format(f"\n{tables}\n{pictures}")
    for name in ("results.png", "epochs.png"):
        assert open(f"docs/smoke_{name}", "rb").read() == open(f"runs/reproduce_smoke/{name}", "rb").read()


@pytest.mark.parametrize("text", [None, "nothing\n", "<!-- /smoke -->\n<!-- smoke -->\n", "<!-- smoke -->\n"])
def test_a_page_without_a_place_for_results_is_refused_before_anything_runs(scripts, text):  # noqa: F811
    if text is not None:
        with open("page.md", "w") as file:
            file.write(text)
    with pytest.raises(InputError, match="--page page.md (cannot be read|has no line <!-- smoke -->)"):
        reproduce.main([*FAST, "--page", "page.md"])
    assert scripts() == []


def test_a_record_within_what_it_is_a_copy_of_is_refused_before_anything_runs(scripts):  # noqa: F811
    for record in ("out", "out/record"):
        with pytest.raises(InputError, match=f"--record {record} lies in --output"):
            reproduce.main([*FAST, "--output", "out", "--record", record])
    assert scripts() == [] and not os.path.exists("out")
