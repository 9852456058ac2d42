"""The runner: what is run, what is kept, what is chosen, and what is refused."""

import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

import reproduce
from experiments import records, runner
from runtime.errors import InputError
from tests.helpers.comparisons import FAST, results, smoke_with


def test_of_each_loss_the_setting_with_the_best_dev_rsum_of_the_trials_is_run(scripts, rates):
    reproduce.main(FAST)
    found = results()
    assert found["chosen"] == {
        name: {"learning_rate": 0.001} for name in ("sum-margin", "max-margin", "HAL", "HAL+bank")
    }
    assert found["trials"]["sum-margin"] == [
        {"setting": {"learning_rate": 0.0005}, "dev_rsum": 100},
        {"setting": {"learning_rate": 0.001}, "dev_rsum": 110},
    ]
    trained = [call for call in scripts() if call.startswith("train sum")]
    assert sorted(trained) == [
        "train sum 0.0005 0 1 cpu",
        "train sum 0.001 0 1 cpu",
        "train sum 0.001 0 2 cpu",
        "train sum 0.001 1 2 cpu",
    ]


def test_a_longer_trial_chooses_otherwise_and_a_collapsed_one_is_out(scripts, rates):
    reproduce.main(
        [
            *FAST,
            "--pilot_epochs",
            "2",
            "--learning_rates",
            "0.0005",
            "0.001",
            "0.002",
            "--losses",
            "HAL",
            "--trials",
            "3",
        ]
    )
    found = results()
    assert found["chosen"] == {"HAL": {"learning_rate": 0.0005}}
    assert {one["setting"]["learning_rate"]: one["dev_rsum"] for one in found["trials"]["HAL"]} == {
        0.0005: 150,
        0.001: 111,
        0.002: None,
    }
    assert "learning rate 0.002: failed" in open("runs/reproduce_smoke/results.md").read()


def test_of_several_finalists_the_best_at_their_end_is_run(scripts, rates):
    flags = [
        *FAST,
        "--learning_rates",
        "0.0005",
        "0.001",
        "0.0001",
        "--trials",
        "3",
        "--losses",
        "sum-margin",
    ]
    reproduce.main(flags)
    assert results()["chosen"] == {"sum-margin": {"learning_rate": 0.001}}
    before = scripts()
    for _ in range(2):
        reproduce.main([*flags, "--finalists", "2", "--record", "record.json"])
    found = results()
    assert found["chosen"] == {
        "sum-margin": {"learning_rate": 0.0005}
    }  # 100 after one epoch, 150 after two
    assert found["trials"]["sum-margin"] == [
        {"setting": {"learning_rate": 0.0005}, "dev_rsum": 100, "final_dev_rsum": 150},
        {"setting": {"learning_rate": 0.0001}, "dev_rsum": 100},
        {"setting": {"learning_rate": 0.001}, "dev_rsum": 110, "final_dev_rsum": 111},
    ]
    assert [call for call in scripts()[len(before) :] if call.startswith("train")] == [
        "train sum 0.0005 0 2 cpu",
        "train sum 0.0005 1 2 cpu",
    ]
    text = open("runs/reproduce_smoke/results.md").read()
    assert (
        "learning rate 0.0005: 100.0, then 150.0; learning rate 0.0001: 100.0; "
        "learning rate 0.001: 110.0, then 111.0 |"
    ) in text
    assert "with seed 0. The best 2 then ran to the end, where the best one was chosen." in text
    run = results("record.json")["runs"]["sum-margin/lr0.0005_seed0"]
    assert run["trial_2.json"] == {"dev_rsum": 150}


def test_a_finalist_that_collapses_is_out(scripts, rates):
    path = os.path.join(runner.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace("lr > 0.001", "(lr, epochs) == (0.0005, 2)"))
    reproduce.main([*FAST, "--losses", "HAL", "--finalists", "2"])
    assert results()["chosen"] == {"HAL": {"learning_rate": 0.001}}
    assert (
        "0.0005: 100.0, then failed; learning rate 0.001: 110.0, then 111.0 |"
        in open("runs/reproduce_smoke/results.md").read()
    )


def test_finished_runs_are_kept_and_more_seeds_add_to_them(scripts):
    reproduce.main([*FAST, "--seeds", "0"])
    first = scripts()
    reproduce.main([*FAST, "--seeds", "0"])
    assert scripts() == first
    reproduce.main([*FAST, "--seeds", "0", "2"])
    assert all(
        call.split()[3 if call.startswith("train") else 1] == "2"
        for call in scripts()[len(first) :]
    )
    assert len(scripts()) == len(first) + 8


def test_several_devices_work_at_once_each_on_one_run(scripts):
    reproduce.main(["--preset", "smoke", "--devices", "cpu", "auto", "--seeds", "0"])
    assert {call.split()[-1] for call in scripts() if call.startswith("train")} == {"cpu", "auto"}


def test_an_error_on_one_device_does_not_wait_for_another(monkeypatch):
    begun, calls = [], runner.Calls(["cpu", "auto"])

    def function(number):
        begun.append(number)
        if number == 1:
            raise InputError("no data")
        time.sleep(2 if number == 0 else 0.2)

    with pytest.raises(InputError, match="no data"):
        calls.map(function, [(number,) for number in range(50)])
    assert len(begun) < 10


@pytest.mark.parametrize("epochs", ["1", "2"])  # in the trials, and when they have gone well
def test_what_is_wrong_with_the_data_stops_everything_with_its_sentence(
    scripts, monkeypatch, epochs
):
    monkeypatch.setenv("NO_DATA", epochs)
    with pytest.raises(InputError, match="no data here: look elsewhere"):
        reproduce.main(FAST)
    assert len(scripts()) == (1 if epochs == "1" else 9)
    assert not os.path.exists("runs/reproduce_smoke/results.json")


def test_a_run_that_gave_up_is_not_trained_again_until_its_folder_is_deleted(scripts, monkeypatch):
    flags = [*FAST, "--losses", "HAL", "--learning_rates", "0.002", "0.001"]
    reproduce.main([*flags, "--record", "record.json"])
    calls, before = scripts(), results()
    assert [one["dev_rsum"] for one in before["trials"]["HAL"]].count(None) == 1
    for folder in ("runs/reproduce_smoke", "copy"):
        reproduce.main([*flags, "--output", folder, "--from_record", "record.json"])
        assert scripts() == calls and results(f"{folder}/results.json") == before
        kept = [name for name in os.listdir(f"{folder}/HAL") if name.startswith("lr0.002")]
        assert results(f"{folder}/HAL/{kept[0]}/run.json")["result"]["outcome"] == "gave up"
    shutil.rmtree(f"runs/reproduce_smoke/HAL/{kept[0]}")
    monkeypatch.setenv("NO_DATA", "1")
    with pytest.raises(InputError, match="no data here: look elsewhere"):
        reproduce.main(flags)


def test_what_was_chosen_stays_so_where_the_runs_are_made_again_elsewhere(
    scripts, rates, monkeypatch
):
    flags = [*FAST, "--losses", "HAL", "sum-margin", "--learning_rates", "0.0005", "0.001"]
    monkeypatch.setenv("NO_DATA", "2")  # the trials are all
    with pytest.raises(InputError, match="no data"):
        reproduce.main([*flags, "--record", "record.json"])
    monkeypatch.delenv("NO_DATA")
    path = os.path.join(runner.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:  # another machine, with other numbers
        file.write(train.replace("rsum = 100", "rsum = 50"))
    for _ in range(2):
        reproduce.main([*flags, "--output", "copy", "--from_record", "record.json"])
        assert results("copy/results.json")["chosen"]["HAL"] == {"learning_rate": 0.001}
        assert [one["dev_rsum"] for one in results("copy/results.json")["trials"]["HAL"]] == [
            100,
            110,
        ]
        assert results("copy/results.json")["epochs"]["HAL"]["0"][0]["rsum"] == 60
        calls = scripts()
    reproduce.main([*flags, "--output", "copy"])
    assert scripts() == calls


def test_a_record_of_a_run_that_was_not_tested_yet_makes_it_again(scripts):
    flags = [*FAST, "--losses", "HAL", "--trials", "1", "--seeds", "0"]
    reproduce.main([*flags, "--record", "record.json"])
    content = results("record.json")
    for name in ("test.json", "test.npz"):
        del content["runs"]["HAL/lr0.001_local_alpha60_local_ep0.7_seed0"][name]
    with open("record.json", "w") as file:
        json.dump(content, file)
    before = scripts()
    reproduce.main([*flags, "--output", "copy", "--from_record", "record.json"])
    assert [call.split()[0] for call in scripts()[len(before) :]] == ["train", "test"]


def test_what_a_test_is_of_having_been_trained_again_it_is_made_again(scripts, monkeypatch):
    smoke_with(monkeypatch, ensembles={"both": ("sum-margin", "max-margin")})
    flags = [*FAST, "--losses", "sum-margin", "max-margin", "both", "--trials", "1", "--seeds", "0"]
    reproduce.main([*flags, "--record", "record.json"])
    (run,) = (
        f"runs/reproduce_smoke/sum-margin/{name}"
        for name in os.listdir("runs/reproduce_smoke/sum-margin")
    )
    os.unlink(f"{run}/run.json")
    before = scripts()
    reproduce.main(flags)
    assert [call.split()[0] for call in scripts()[len(before) :]] == ["train", "test", "test"]
    reproduce.main([*flags, "--output", "copy", "--from_record", "record.json"])
    shutil.rmtree("copy/both")
    with pytest.raises(
        InputError,
        match=r"both: there is no model_best.pth.tar in .*copy/sum-margin/.*copy/max-mar",
    ):
        reproduce.main([*flags, "--output", "copy"])
    (run,) = (f"copy/sum-margin/{name}" for name in os.listdir("copy/sum-margin"))
    with open(f"{run}/run.json", "w") as file:  # with one that collapsed there is nothing to test
        json.dump(
            {"options": {}, "result": {"outcome": "gave up", "epochs": 1, "steps": 9}, "end": ""},
            file,
        )
    reproduce.main([*flags, "--output", "copy"])
    assert results("copy/results.json")["runs"]["both"]["0"] == {"failed": "a member failed"}


@pytest.mark.parametrize("result", [{"outcome": "failed", "epochs": 2, "steps": 9}, None])
def test_a_run_that_ended_by_an_error_is_gone_on_with(scripts, result):
    flags = [*FAST, "--losses", "HAL", "--trials", "1", "--seeds", "0"]
    reproduce.main(flags)
    path = "runs/reproduce_smoke/HAL/lr0.001_local_alpha60_local_ep0.7_seed0/run.json"
    with open(path, "w") as file:  # its weights could not be written, say
        json.dump({"options": {}, "result": result, "end": None}, file)
    before = scripts()
    reproduce.main(flags)
    assert [call.split()[0] for call in scripts()[len(before) :]] == ["train", "test"]


def test_a_trial_that_was_killed_later_costs_no_results(scripts, rates):
    reproduce.main([*FAST, "--losses", "sum-margin"])
    path = "runs/reproduce_smoke/sum-margin/lr0.0005_seed0/run.json"  # of a killed finalist
    with open(path, "w") as file:
        json.dump({"options": {}, "result": None, "end": None}, file)
    before = results()
    reproduce.main([*FAST, "--losses", "sum-margin", "--record", "record.json"])
    assert results() == before
    assert list(results("record.json")["runs"]["sum-margin/lr0.0005_seed0"]) == ["trial_1.json"]


def test_all_models_of_a_seed_come_before_the_next(scripts):
    reproduce.main([*FAST, "--trials", "1", "--seeds", "0", "3", "2"])
    tested = [call.split()[1] for call in scripts() if call.startswith("test")]
    assert tested == ["0"] * 4 + ["3"] * 4 + ["2"] * 4


@pytest.mark.parametrize(
    "name, content",
    [
        ("settings.json", "{"),
        ("settings.json", "[]"),
        ("HAL/lr0.001_seed0/run.json", "{"),
        ("HAL/lr0.001_seed0/run.json", "[1]"),
        ("HAL/lr0.001_seed0/run.json", '{"options": {}, "result": 1, "end": ""}'),
        (
            "HAL/lr0.001_seed0/run.json",
            '{"options": {}, "result": {"outcome": "finished"}, "end": ""}',
        ),
        ("settings.json", "[" * 100_000),
        ("HAL/lr0.001_seed0/log.jsonl", "[" * 100_000),
        ("HAL/lr0.001_seed0/log.jsonl", "{"),
        ("HAL/lr0.001_seed0/log.jsonl", ""),
        ("HAL/lr0.001_seed0/test.json", "{"),
        ("HAL/lr0.001_seed0/test.json", "{}"),
    ],
)
def test_a_damaged_file_is_named_and_deleting_it_helps(scripts, rates, name, content):
    flags = [*FAST, "--losses", "HAL", "--learning_rates", "0.001", "--trials", "1"]
    reproduce.main(flags)
    before, path = results(), os.path.join("runs/reproduce_smoke", name)
    with open(path, "w") as file:
        file.write(content)
    with pytest.raises(InputError, match=f"{os.path.basename(name)} cannot be read"):
        reproduce.main(flags)
    if name.endswith("log.jsonl"):
        shutil.rmtree(os.path.dirname(path))
    else:
        os.unlink(path)
    reproduce.main(flags)
    assert results() == before


def test_a_run_of_other_flags_is_not_taken_for_one_of_these(scripts, rates):
    flags = [*FAST, "--losses", "HAL", "--learning_rates", "0.001", "--trials", "1", "--seeds", "0"]
    reproduce.main(flags)
    path = "runs/reproduce_smoke/HAL/lr0.001_seed0/run.json"
    run = results(path)
    for name, value, says in (
        ("amp", "bf16", "amp bf16, not off"),
        ("lr_update", 5, "lr_update 5, not 8"),
        ("learning_rate", 1e-3, None),
        ("embed_size", 64.0, None),
        ("data_path", "else", None),
    ):
        with open(path, "w") as file:
            json.dump({**run, "options": {name: value}}, file)
        os.unlink("runs/reproduce_smoke/settings.json")
        with (
            pytest.raises(InputError, match=f"holds a run with --{says}") if says else nullcontext()
        ):
            reproduce.main(flags)


@pytest.mark.parametrize(
    "content", ['{"layout": 2}', '{"layout": 2, "preset": "smoke", "models": []}']
)
def test_settings_of_something_else_are_one_sentence(scripts, content):
    os.makedirs("runs/reproduce_smoke")
    with open("runs/reproduce_smoke/settings.json", "w") as file:
        file.write(content)
    with pytest.raises(InputError, match="holds results of an older layout"):
        reproduce.main(FAST)


def test_other_tests_or_members_of_one_name_are_not_mixed_in(scripts, monkeypatch):
    flags = [*FAST, "--losses", "sum-margin", "max-margin", "both", "--trials", "1", "--seeds", "0"]
    both, tests = {"both": ("sum-margin", "max-margin")}, {"test": ("--split", "test")}
    smoke_with(monkeypatch, ensembles=both)
    reproduce.main(flags)
    calls = scripts()
    changes = [
        ({"ensembles": {"both": ("max-margin", "sum-margin")}}, "other members of both: give"),
        ({"ensembles": both, "tests": {"test": ("--split", "dev")}}, "other flags of test: give"),
    ]
    for change, says in changes:
        smoke_with(monkeypatch, **change)
        with pytest.raises(InputError, match=says):
            reproduce.main(flags)
    assert scripts() == calls
    settings = results("runs/reproduce_smoke/settings.json")
    assert settings["tests"] == {"test": ["--split", "test"]}
    del settings["tests"], settings["ensembles"]  # as older versions wrote it
    records.write_json("runs/reproduce_smoke/settings.json", settings)
    smoke_with(monkeypatch, ensembles=both, tests={**tests, "dev": ("--split", "dev")})
    reproduce.main(flags)
    assert [call.split()[0] for call in scripts()[len(calls) :]] == ["test"] * 3


def test_other_data_is_not_mixed_in(scripts):
    reproduce.main([*FAST, "--losses", "HAL"])
    with pytest.raises(InputError, match="other data_path"):
        reproduce.main([*FAST, "--losses", "HAL", "--data_path", "elsewhere"])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--num_epochs", "3"], "num_epochs"),
        (["--", "--embed_size", "9"], "train_flags"),
        (["--seeds", "7"], "first_seed"),
        (["--amp", "bf16"], "amp"),
        (["--trials", "1"], r"trials \(2, not 1\): give"),
        (["--learning_rates", "1", "2"], "settings of HAL: give"),
    ],
)
def test_runs_made_otherwise_are_not_mixed(scripts, flags, named):
    reproduce.main([*FAST, "--losses", "HAL"])
    before = scripts()
    with pytest.raises(InputError, match=f"holds runs with other {named}"):
        reproduce.main([*FAST, "--losses", "HAL", *flags])
    assert scripts() == before


def test_other_losses_may_join_and_results_of_an_older_layout_are_not_mixed_in(scripts):
    reproduce.main([*FAST, "--losses", "HAL"])
    reproduce.main([*FAST, "--losses", "sum-margin"])
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin"])
    path = "runs/reproduce_smoke/settings.json"
    content = results(path)
    del content["layout"]
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(InputError, match="holds results of an older layout"):
        reproduce.main([*FAST, "--losses", "HAL"])


def test_figures_that_contradict_themselves_are_refused(scripts, rates):
    reproduce.main([*FAST, "--seeds", "0"])
    path = next(
        path
        for path in Path("runs").rglob("*.json")
        if '"i2t"' in path.read_text() and path.name != "results.json"
    )
    true = json.loads(path.read_text())
    nnn = true["corrections"]["nnn"]
    for change in (
        {"rsum": true["rsum"] + 30},
        {"i2t": {**true["i2t"], "r1": 60}},
        {"corrections": {**true["corrections"], "nnn": {**nnn, "rsum": 500}}},
    ):
        path.write_text(json.dumps({**true, **change}))
        with pytest.raises(
            InputError, match=r"\.json contradicts itself: it has .* as rsum beside"
        ):
            reproduce.main([*FAST, "--seeds", "0"])


def test_a_validation_whose_rsum_contradicts_its_recalls_is_refused(tmp_path):
    recalls = dict(zip(("r1", "r5", "r10", "r1i", "r5i", "r10i"), (1.5, 2.5, 4.0, 1.0, 2.0, 3.0)))
    line = {
        "kind": "validation",
        "epoch": 0,
        "i2t_n10_skewness": 1,
        "t2i_n10_skewness": 1,
        **recalls,
    }
    for rsum, found in (
        (14.0, nullcontext()),
        (15.0, pytest.raises(InputError, match="contradicts")),
    ):
        (tmp_path / "log.jsonl").write_text(json.dumps({**line, "rsum": rsum}) + "\n")
        with found:
            assert records.read_epochs(str(tmp_path))[0]["rsum"] == rsum
