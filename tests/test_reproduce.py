"""The comparison of the losses: what is run, what is kept, what is chosen, and the tables' numbers.

But for one run of the real scripts, stand-ins for train.py and compute_results.py keep a record of their calls.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import ROOT

import reproduce
import train
from errors import InputError
from intervals import difference, read_ranks
from results import machines
from run_record import lock

TRAIN = '''
import json, os, sys, time
flags = dict(zip(sys.argv[1::1], sys.argv[2::1]))
folder, lr, seed, epochs = (flags["--" + name] for name in ("logger_name", "learning_rate", "seed", "num_epochs"))
lr, seed, epochs = float(lr), int(seed), int(epochs)
kind = "sum" if "--sum_violation" in flags else "max" if "--max_violation" in flags else \\
    "bank" if "--memory_bank" in flags else "HAL"
with open(os.environ["CALLS"], "a") as file:
    file.write(f"train {kind} {lr:g} {seed} {epochs} {flags['--device']}\\n")
if os.environ.get("NO_DATA") == str(epochs):
    print("error: no data here: look elsewhere", file=sys.stderr)
    sys.exit(2)
if kind == os.environ.get("SLOW"):
    time.sleep(60)
if kind == "HAL" and lr > 0.001:
    result = {"outcome": "gave up", "epochs": 0, "steps": 5,
              "why": "step 5: training has collapsed; go back to " + os.path.join(folder, "checkpoint.pth.tar")
              + " or lower the rate"}
    json.dump({"options": {"logger_name": folder}, "result": result, "end": str(time.time())},
              open(os.path.join(folder, "run.json"), "w"))
    print("error:", result["why"], file=sys.stderr)
    sys.exit(2)
with open(os.path.join(folder, "log.jsonl"), "w") as file:
    for epoch in range(epochs):  # 0.001 leads after one epoch, 0.0005 in the end
        rsum = 100 + epoch * (50 if lr == 0.0005 else 1) + (10 if lr == 0.001 else 0)
        file.write(json.dumps({"kind": "validation", "epoch": epoch, "rsum": rsum, "i2t_n10_skewness": lr * epoch,
                               "t2i_n10_skewness": seed}) + "\\n")
        file.write(json.dumps({"kind": "step", "epoch": epoch}) + "\\n")
open(os.path.join(folder, "model_best.pth.tar"), "w").close()
result = {"outcome": "finished", "epochs": epochs, "steps": 9}
json.dump({"options": {}, "result": result, "end": str(time.time())}, open(os.path.join(folder, "run.json"), "w"))
'''
TEST = '''
import json, os, shutil, sys
flags = dict(zip(sys.argv[1::1], sys.argv[2::1]))
seed = int(flags["--model_path"].rsplit("seed", 1)[1][0])
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(["test", str(seed), *(part for part in sys.argv if part.endswith(".pth.tar"))]) + "\\n")
recalls = {"r1": 10 + seed, "r5": 20, "r10": 30 + seed * seed, "medr": 1, "meanr": 2}
row = {"skewness": 1.5 + seed, "anti_hubs": 0.25, "hub_occurrence": 0.125}
figures = {"i2t": recalls, "t2i": recalls, "rsum": 120 + 4 * seed,
           "hubness": {side: {"10": row} for side in ("i2t", "t2i")}}
# On dev csls leads with seed 0 and nnn with others; on the test split csls always does.
corrections = {name: {**figures, "rsum": 120 + 4 * seed + gain, "dev_rsum": 150 - (gain if seed else -gain)}
               for name, gain in (("csls", 9), ("nnn", 5))}
json.dump({**figures, "corrections": corrections}, open(flags["--save_json"], "w"))
better = "better_" if "/HAL+bank/" in flags["--model_path"] else ""
shutil.copy(f"{os.environ['CALLS']}_{better}{seed}.npz", flags["--save_ranks"])
'''
FAST = ["--preset", "smoke", "--devices", "cpu"]


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Stand-ins; returns a function that gives the calls so far."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "compute_results.py").write_text(TEST)
    monkeypatch.setattr(reproduce, "SCRIPTS", str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    names = [f"{name}{side}_ranks" for name in ("", "csls_", "nnn_") for side in ("i2t", "t2i")]
    for seed in range(5):
        for better, high in (("", 20), ("better_", 5)):
            rng = np.random.default_rng(seed)
            ranks = {name: rng.integers(0, high, 10 if "i2t" in name else 50).astype(np.int32) for name in names}
            np.savez(tmp_path / f"calls_{better}{seed}.npz", image_of=np.arange(50) // 5, **ranks)
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    for number, handler in before.items():
        signal.signal(number, handler)


def results(path="runs/reproduce_smoke/results.json"):
    with open(path) as file:
        return json.load(file)


@pytest.fixture
def rates(monkeypatch):
    """Let only learning rates be tried, 0.0005 and 0.001."""
    preset = reproduce.PRESETS["smoke"]
    models = {name: model._replace(tried={"learning_rate": (0.0005, 0.001)}) for name, model in preset.models.items()}
    monkeypatch.setitem(reproduce.PRESETS, "smoke", preset._replace(models=models))


def test_of_each_loss_the_setting_with_the_best_dev_rsum_of_the_trials_is_run(scripts, rates):
    reproduce.main(FAST)
    found = results()
    assert found["chosen"] == {name: {"learning_rate": 0.001} for name in ("sum-margin", "max-margin", "HAL",
                                                                           "HAL+bank")}
    assert found["trials"]["sum-margin"] == [{"setting": {"learning_rate": 0.0005}, "dev_rsum": 100},
                                             {"setting": {"learning_rate": 0.001}, "dev_rsum": 110}]
    trained = [call for call in scripts() if call.startswith("train sum")]
    assert sorted(trained) == ["train sum 0.0005 0 1 cpu", "train sum 0.001 0 1 cpu", "train sum 0.001 0 2 cpu",
                               "train sum 0.001 1 2 cpu"]


def test_a_longer_trial_chooses_otherwise_and_a_collapsed_one_is_out(scripts, rates):
    reproduce.main([*FAST, "--pilot_epochs", "2", "--learning_rates", "0.0005", "0.001", "0.002", "--losses", "HAL",
                    "--trials", "3"])
    found = results()
    assert found["chosen"] == {"HAL": {"learning_rate": 0.0005}}
    assert {one["setting"]["learning_rate"]: one["dev_rsum"] for one in found["trials"]["HAL"]} == {
        0.0005: 150, 0.001: 111, 0.002: None}
    assert "learning rate 0.002: failed" in open("runs/reproduce_smoke/results.md").read()


def test_of_several_finalists_the_best_at_their_end_is_run(scripts, rates):
    flags = [*FAST, "--learning_rates", "0.0005", "0.001", "0.0001", "--trials", "3", "--losses", "sum-margin"]
    reproduce.main(flags)
    assert results()["chosen"] == {"sum-margin": {"learning_rate": 0.001}}
    before = scripts()
    for _ in range(2):
        reproduce.main([*flags, "--finalists", "2", "--record", "record"])
    found = results()
    assert found["chosen"] == {"sum-margin": {"learning_rate": 0.0005}}  # 100 after one epoch, 150 after two
    assert found["trials"]["sum-margin"] == [
        {"setting": {"learning_rate": 0.0005}, "dev_rsum": 100, "final_dev_rsum": 150},
        {"setting": {"learning_rate": 0.0001}, "dev_rsum": 100},
        {"setting": {"learning_rate": 0.001}, "dev_rsum": 110, "final_dev_rsum": 111}]
    assert [call for call in scripts()[len(before):] if call.startswith("train")] == [
        "train sum 0.0005 0 2 cpu", "train sum 0.0005 1 2 cpu"]
    text = open("runs/reproduce_smoke/results.md").read()
    assert ("learning rate 0.0005: 100.0, then 150.0; learning rate 0.0001: 100.0; "
            "learning rate 0.001: 110.0, then 111.0 |") in text
    assert "with seed 0; the best 2 of them then to the end, to choose the best there." in text
    assert results("record/sum-margin/lr0.0005_seed0/trial_2.json") == {"dev_rsum": 150}


def test_a_finalist_that_collapses_is_out(scripts, rates):
    path = os.path.join(reproduce.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace("lr > 0.001", "(lr, epochs) == (0.0005, 2)"))
    reproduce.main([*FAST, "--losses", "HAL", "--finalists", "2"])
    assert results()["chosen"] == {"HAL": {"learning_rate": 0.001}}
    assert "0.0005: 100.0, then failed; learning rate 0.001: 110.0, then 111.0 |" in open(
        "runs/reproduce_smoke/results.md").read()


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_model_has_as_many_trials_each_of_its_own_parameters_and_the_same_every_time(preset):
    opt, again = (reproduce.parse_args(["--preset", preset]) for _ in range(2))
    assert opt.settings == again.settings
    for name, settings in opt.settings.items():
        tried = opt.models[name].tried
        assert len({tuple(setting.items()) for setting in settings}) == len(settings) == opt.trials
        assert all(setting.keys() == tried.keys() and all(setting[flag] in tried[flag] for flag in tried)
                   for setting in settings)
        assert settings[0] == {flag: values[0] for flag, values in tried.items()}
    assert all(set(members) <= set(opt.models) for members in reproduce.PRESETS[preset].ensembles.values())


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_the_flags_of_every_run_are_train_s(preset):
    opt = reproduce.parse_args(["--preset", preset])
    for name, (flags, _) in opt.models.items():
        setting = [part for flag, value in opt.settings[name][-1].items() for part in (f"--{flag}", str(value))]
        train.parse_args([*flags, *setting, *reproduce.PRESETS[preset].train])


def test_more_trials_than_settings_are_refused():
    with pytest.raises(InputError, match="--trials 99: learning_rate, margin have 8 settings in all"):
        reproduce.parse_args([*FAST, "--trials", "99"])


def test_the_correction_is_the_one_that_each_seed_s_dev_split_likes_best(scripts):
    reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "2"])
    found = results()
    assert found["summary"]["test"]["HAL"]["rsum"] == [120, 128]
    assert found["corrected"]["test"]["HAL"]["rsum"] == [129, 133]
    assert "| HAL | 2 | 12.0 | 12.0 | 128.0 | 3.50 | 3.50 | nnn: 133.0 |" in open(
        "runs/reproduce_smoke/results.md").read()


def test_the_epochs_of_every_run_are_kept_and_drawn(scripts):
    reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "2"])
    assert results()["epochs"]["HAL"] == {seed: [
        {"rsum": 110 + epoch, "i2t_n10_skewness": 0.001 * epoch, "t2i_n10_skewness": int(seed)} for epoch in (0, 1)]
        for seed in ("0", "2")}
    assert open("runs/reproduce_smoke/epochs.png", "rb").read(4) == b"\x89PNG"
    assert not os.path.exists("runs/reproduce_smoke/grid.png")


def test_models_that_differ_in_alpha_and_epsilon_alone_make_a_heat_map(scripts, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda axes, x, y, text, **_: drawn.append((x, y, text)))
    path = os.path.join(reproduce.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:  # one of the four cannot be trained
        file.write(train.replace("lr > 0.001", '(flags["--local_alpha"], flags["--local_ep"]) == ("60", "0.3")'))
    models = reproduce.ablations(0.001, (30, 60), (0.3, 0.7))
    grid = [f"HAL alpha {alpha} epsilon {epsilon}" for alpha in (30, 60) for epsilon in (0.3, 0.7)]
    monkeypatch.setitem(reproduce.PRESETS, "smoke", reproduce.PRESETS["smoke"]._replace(
        models=models, trials=1, pairs=reproduce.ablation_pairs(models)))
    reproduce.main([*FAST, "--losses", *grid, "HAL batch 64", "--seeds", "0", "2"])
    assert open("runs/reproduce_smoke/grid.png", "rb").read(4) == b"\x89PNG"
    assert drawn[:4] == [(0, 0, "111.0"), (1, 0, "111.0"), (0, 1, "failed"), (1, 1, "111.0")]
    text = open("runs/reproduce_smoke/results.md").read()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.partition("| difference |")[2].splitlines()[2:]]
    assert [row for row in rows if row] == [f"{grid[0]} - {grid[1]}", f"{grid[0]} - {grid[3]}",
                                            f"{grid[0]} - HAL batch 64"]
    assert len(results()["differences"]["test"]) == 6
    drawn.clear()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', "seed == 3"))
    reproduce.main([*FAST, "--losses", grid[0], grid[3], "--seeds", "0", "3"])
    assert drawn[:4] == [(0, 0, "111.0\n1 of 2"), (1, 0, ""), (0, 1, ""), (1, 1, "111.0\n1 of 2")]
    reproduce.main([*FAST, "--losses", grid[0], grid[2], "--seeds", "0"])  # of one epsilon
    assert not os.path.exists("runs/reproduce_smoke/grid.png")
    reproduce.main([*FAST, "--losses", grid[1], grid[3], "--seeds", "0"])  # neither is in a pair
    assert f"| {grid[1]} - {grid[3]} |" in open("runs/reproduce_smoke/results.md").read()


def test_every_pair_s_difference_has_its_interval(scripts):
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "HAL+bank", "--seeds", "0", "2"])
    folder, found = "runs/reproduce_smoke", results()
    assert list(found["differences"]["test"]) == ["sum-margin - HAL", "sum-margin - HAL+bank", "HAL - HAL+bank"]
    own, other = ({seed: read_ranks(os.path.join(folder, figures["test"]["ranks"]), "csls" if seed == "0" else "nnn")
                   for seed, figures in found["runs"][name].items()} for name in ("HAL", "HAL+bank"))
    assert found["differences_corrected"]["test"]["HAL - HAL+bank"]["i2t_r1"] == list(
        difference(own, other, "i2t_r1"))
    _, low, high = found["differences"]["test"]["sum-margin - HAL+bank"]["rsum"]
    assert low < high < 0
    text = open(f"{folder}/results.md").read()
    assert "| sum-margin - HAL | +0.0 (+0.0 to +0.0) |" in text and "| sum-margin - HAL+bank | **-" in text


def test_differences_in_hubs_have_intervals_over_seeds(scripts):
    path = os.path.join(reproduce.SCRIPTS, "compute_results.py")
    test = open(path).read()
    with open(path, "w") as file:  # HAL: 3.5, 5.5 and 8.5 less 0.1, 0.2, 0.6 by seed
        file.write(test.replace('"skewness": 1.5 + seed', '"skewness": 1.5 + seed - ("/HAL/" in flags["--model_path"])'
                                                          ' * {0: 0.1, 2: 0.2, 4: 0.6}[seed]'))
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "--seeds", "0", "2", "4"])
    mean, deviation = 0.3, statistics.stdev([0.1, 0.2, 0.6])
    half = 4.302653 * deviation / 3**0.5  # Student's t with 2 degrees of freedom, from a table
    found = results()["hub_differences"]["test"]["sum-margin - HAL"]
    assert found["i2t N10 skewness"] == pytest.approx([mean, mean - half, mean + half], abs=1e-5)
    assert found["t2i anti-hubs %"] == [0, 0, 0]
    text = open("runs/reproduce_smoke/results.md").read()
    assert f"| sum-margin - HAL | {mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}) |" in text
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "--seeds", "0", "2"])
    assert results()["hub_differences"]["test"] == {}
    assert "differences in hubs" not in open("runs/reproduce_smoke/results.md").read()


def test_an_ensemble_is_tested_with_its_models_or_where_it_is_named(scripts, rates, monkeypatch):
    preset = reproduce.PRESETS["smoke"]._replace(ensembles={"both": ("sum-margin", "max-margin")})
    monkeypatch.setitem(reproduce.PRESETS, "smoke", preset)
    reproduce.main([*FAST, "--losses", "sum-margin", "max-margin", "both"])
    assert list(results()["runs"]) == ["sum-margin", "max-margin", "both"]
    members = [f"{loss}/lr0.001_seed1/model_best.pth.tar" for loss in preset.ensembles["both"]]
    assert any(all(member in call for member in members) for call in scripts() if call.startswith("test 1"))
    reproduce.main([*FAST, "--losses", "sum-margin", "max-margin"])
    assert list(results()["runs"]) == ["sum-margin", "max-margin"]
    with pytest.raises(InputError, match="--losses 'both' is the mean of 'sum-margin' and 'max-margin': name these"):
        reproduce.main([*FAST, "--losses", "sum-margin", "both"])
    reproduce.main(FAST)
    assert list(results()["runs"]) == ["sum-margin", "max-margin", "HAL", "HAL+bank", "both"]


def test_a_machine_is_named_once_with_its_commits():
    made_on = ["cpu (x), torch 2.9, commit 0123456", "cpu (x), torch 2.9, commit 89abcde", "cuda, torch 2.9"]
    assert machines(made_on) == "cpu (x), torch 2.9, commit 0123456, 89abcde; cuda, torch 2.9"


def test_every_row_has_the_mean_and_sample_deviation_over_the_seeds(scripts):
    reproduce.main([*FAST, "--seeds", "0", "1", "3"])
    assert results()["summary"]["test"]["HAL"]["rsum"] == [120, 124, 132]
    lines = open("runs/reproduce_smoke/results.md").read().splitlines()
    lines = lines[next(place for place, line in enumerate(lines) if line.startswith("| model | i2t R@1")):]
    head, row = lines[0].split("|"), next(line for line in lines if line.startswith("| max-margin |")).split("|")
    cells = {name.strip(): cell.strip() for name, cell in zip(head, row)}
    assert cells["rsum"] == f"{statistics.mean([120, 124, 132]):.1f} ± {statistics.stdev([120, 124, 132]):.1f}"
    assert cells["i2t R@1"] == "11.3 ± 1.5" and cells["t2i R@5"] == "20.0 ± 0.0"
    assert cells["t2i N10 skewness"] == "2.83 ± 1.53" and cells["i2t anti-hubs %"] == "25.0 ± 0.0"
    assert open("runs/reproduce_smoke/results.png", "rb").read(4) == b"\x89PNG"


def test_finished_runs_are_kept_and_more_seeds_add_to_them(scripts):
    reproduce.main([*FAST, "--seeds", "0"])
    first = scripts()
    reproduce.main([*FAST, "--seeds", "0"])
    assert scripts() == first
    reproduce.main([*FAST, "--seeds", "0", "2"])
    assert all(call.split()[3 if call.startswith("train") else 1] == "2" for call in scripts()[len(first):])
    assert len(scripts()) == len(first) + 8


def test_several_devices_work_at_once_each_on_one_run(scripts):
    reproduce.main(["--preset", "smoke", "--devices", "cpu", "auto", "--seeds", "0"])
    assert {call.split()[-1] for call in scripts() if call.startswith("train")} == {"cpu", "auto"}


@pytest.mark.parametrize("gpus, expected", [(0, ["auto"]), (1, ["cuda:0"]), (3, ["cuda:0", "cuda:1", "cuda:2"])])
def test_all_gpus_are_used_unless_devices_are_named(monkeypatch, gpus, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert reproduce.parse_args(["--preset", "coco"]).devices == expected
    assert reproduce.parse_args(["--preset", "coco", "--devices", "cpu", "cpu"]).devices == ["cpu", "cpu"]


@pytest.mark.parametrize("rates", (["0.002"], ["0.002", "0.003"]))
def test_a_loss_that_no_setting_trains_is_a_result_beside_others_and_alone_one_sentence(scripts, rates):
    flags = [*FAST, "--learning_rates", *rates, "--trials", str(len(rates)), "--losses", "HAL"]
    with pytest.raises(InputError, match=r"no run was trained to its end \(HAL, step 5.*try lower --learning_rates"):
        reproduce.main(flags)
    assert not os.path.exists("runs/reproduce_smoke/results.json")
    reproduce.main([*flags, "sum-margin"])
    assert set(results()["runs"]["HAL"]["0"]) == {"failed"}
    text = open("runs/reproduce_smoke/results.md").read()
    assert "| HAL (2 of 2 seeds failed) | - |" in text and "local ep 0.7: failed" in text


def test_where_every_run_fails_after_its_trials_it_is_one_sentence(scripts):
    path = os.path.join(reproduce.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', "epochs == 2"))
    with pytest.raises(InputError, match=r"no run was trained to its end \(HAL, step 5: training has collapsed;"):
        reproduce.main([*FAST, "--losses", "HAL"])
    assert not os.path.exists("runs/reproduce_smoke/results.json")


def test_a_seed_alone_has_intervals_over_images_and_nothing_in_bold(scripts):
    for seeds, words in (["0"], "over images;"), (["0", "2", "3"], "over images and seeds, in bold"):
        reproduce.main([*FAST, "--losses", "sum-margin", "HAL+bank", "--seeds", *seeds])
        text = open("runs/reproduce_smoke/results.md").read()
        assert ("**" in text) == (len(seeds) > 1)
        assert f"differences with 95 % intervals {words}" in text and "is missed every second time" in text


def test_a_model_that_failed_with_every_seed_takes_nothing_from_the_others_intervals(scripts):
    path = os.path.join(reproduce.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', 'kind == "HAL" and epochs == 2'))
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "max-margin", "--seeds", "0", "2"])
    text = open("runs/reproduce_smoke/results.md").read()
    assert "| HAL (2 of 2 seeds failed) |" in text and "intervals over images and seeds, in bold" in text


def test_an_error_on_one_device_does_not_wait_for_another(monkeypatch):
    begun, calls = [], reproduce.Calls(["cpu", "auto"])

    def function(number):
        begun.append(number)
        if number == 1:
            raise InputError("no data")
        time.sleep(2 if number == 0 else 0.2)
    with pytest.raises(InputError, match="no data"):
        calls.map(function, [(number,) for number in range(50)])
    assert len(begun) < 10


def test_a_seed_that_collapses_is_reported_and_left_out_of_the_mean(scripts, monkeypatch):
    train = open(os.path.join(reproduce.SCRIPTS, "train.py")).read()
    with open(os.path.join(reproduce.SCRIPTS, "train.py"), "w") as file:
        file.write(train.replace("lr > 0.001", "seed == 1"))
    reproduce.main([*FAST, "--seeds", "0", "1", "2"])
    found = results()
    assert found["summary"]["test"]["HAL"]["rsum"] == [120, 128]
    why = "step 5: training has collapsed; go back to checkpoint.pth.tar or"
    assert found["runs"]["HAL"]["1"] == {"failed": why + " lower the rate"}
    text = open("runs/reproduce_smoke/results.md").read()
    assert "| HAL (1 of 3 seeds failed) | 11.0 ± 1.4 |" in text
    row, head = (next(line for line in text.splitlines() if line.startswith(start))
                 for start in (f"| HAL | 1 | {why} ... |", "| model | seed |"))
    assert row.count("|") == head.count("|")


@pytest.mark.parametrize("epochs", ["1", "2"])  # in the trials, and when they have gone well
def test_what_is_wrong_with_the_data_stops_everything_with_its_sentence(scripts, monkeypatch, epochs):
    monkeypatch.setenv("NO_DATA", epochs)
    with pytest.raises(InputError, match="no data here: look elsewhere"):
        reproduce.main(FAST)
    assert len(scripts()) == (1 if epochs == "1" else 9)
    assert not os.path.exists("runs/reproduce_smoke/results.json")


def test_a_run_that_gave_up_is_not_trained_again_until_its_folder_is_deleted(scripts, monkeypatch):
    flags = [*FAST, "--losses", "HAL", "--learning_rates", "0.002", "0.001"]
    reproduce.main([*flags, "--record", "record"])
    calls, before = scripts(), results()
    assert [one["dev_rsum"] for one in before["trials"]["HAL"]].count(None) == 1
    for folder in ("runs/reproduce_smoke", "record"):
        reproduce.main([*flags, "--output", folder])
        assert scripts() == calls and results(f"{folder}/results.json") == before
        kept = [name for name in os.listdir(f"{folder}/HAL") if name.startswith("lr0.002")]
        assert results(f"{folder}/HAL/{kept[0]}/run.json")["result"]["outcome"] == "gave up"
    shutil.rmtree(f"runs/reproduce_smoke/HAL/{kept[0]}")
    monkeypatch.setenv("NO_DATA", "1")
    with pytest.raises(InputError, match="no data here: look elsewhere"):
        reproduce.main(flags)


def test_what_was_chosen_stays_so_where_the_runs_are_made_again_elsewhere(scripts, rates, monkeypatch):
    flags = [*FAST, "--losses", "HAL", "sum-margin", "--learning_rates", "0.0005", "0.001"]
    monkeypatch.setenv("NO_DATA", "2")  # the trials are all
    with pytest.raises(InputError, match="no data"):
        reproduce.main([*flags, "--record", "record"])
    monkeypatch.delenv("NO_DATA")
    path = os.path.join(reproduce.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:  # another machine, with other numbers
        file.write(train.replace("rsum = 100", "rsum = 50"))
    shutil.copytree("record", "copy")
    for _ in range(2):
        reproduce.main([*flags, "--output", "copy"])
        assert results("copy/results.json")["chosen"]["HAL"] == {"learning_rate": 0.001}
        assert [one["dev_rsum"] for one in results("copy/results.json")["trials"]["HAL"]] == [100, 110]
        assert results("copy/results.json")["epochs"]["HAL"]["0"][0]["rsum"] == 60
        calls = scripts()
    reproduce.main([*flags, "--output", "copy"])
    assert scripts() == calls


def test_a_record_of_a_run_that_was_not_tested_yet_makes_it_again(scripts):
    flags = [*FAST, "--losses", "HAL", "--trials", "1", "--seeds", "0"]
    reproduce.main([*flags, "--record", "record"])
    os.unlink("record/HAL/lr0.001_local_alpha60_local_ep0.7_seed0/test.npz")
    before = scripts()
    reproduce.main([*flags, "--output", "record"])
    assert [call.split()[0] for call in scripts()[len(before):]] == ["train", "test"]


def test_what_a_test_is_of_having_been_trained_again_it_is_made_again(scripts, monkeypatch):
    preset = reproduce.PRESETS["smoke"]._replace(ensembles={"both": ("sum-margin", "max-margin")})
    monkeypatch.setitem(reproduce.PRESETS, "smoke", preset)
    flags = [*FAST, "--losses", "sum-margin", "max-margin", "both", "--trials", "1", "--seeds", "0"]
    reproduce.main([*flags, "--record", "record"])
    run, = (f"runs/reproduce_smoke/sum-margin/{name}" for name in os.listdir("runs/reproduce_smoke/sum-margin"))
    os.unlink(f"{run}/run.json")
    before = scripts()
    reproduce.main(flags)
    assert [call.split()[0] for call in scripts()[len(before):]] == ["train", "test", "test"]
    shutil.copytree("record", "copy")
    reproduce.main([*flags, "--output", "copy"])
    shutil.rmtree("copy/both")
    with pytest.raises(InputError, match=r"both: there is no model_best.pth.tar in .*copy/sum-margin/.*copy/max-mar"):
        reproduce.main([*flags, "--output", "copy"])
    run, = (f"copy/sum-margin/{name}" for name in os.listdir("copy/sum-margin"))
    with open(f"{run}/run.json", "w") as file:  # with one that collapsed there is nothing to test
        json.dump({"options": {}, "result": {"outcome": "gave up", "epochs": 1, "steps": 9}, "end": ""}, file)
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
    assert [call.split()[0] for call in scripts()[len(before):]] == ["train", "test"]


def test_a_trial_that_was_killed_later_costs_no_results(scripts, rates):
    reproduce.main([*FAST, "--losses", "sum-margin"])
    path = "runs/reproduce_smoke/sum-margin/lr0.0005_seed0/run.json"  # as a finalist that was killed leaves it
    with open(path, "w") as file:
        json.dump({"options": {}, "result": None, "end": None}, file)
    before = results()
    reproduce.main([*FAST, "--losses", "sum-margin", "--record", "record"])
    assert results() == before and os.listdir("record/sum-margin/lr0.0005_seed0") == ["trial_1.json"]


def test_all_models_of_a_seed_come_before_the_next(scripts):
    reproduce.main([*FAST, "--trials", "1", "--seeds", "0", "3", "2"])
    tested = [call.split()[1] for call in scripts() if call.startswith("test")]
    assert tested == ["0"] * 4 + ["3"] * 4 + ["2"] * 4


@pytest.mark.parametrize("name, content", [
    ("settings.json", "{"), ("settings.json", "[]"), ("HAL/lr0.001_seed0/run.json", "{"),
    ("HAL/lr0.001_seed0/run.json", "[1]"), ("HAL/lr0.001_seed0/run.json", '{"options": {}, "result": 1, "end": ""}'),
    ("HAL/lr0.001_seed0/run.json", '{"options": {}, "result": {"outcome": "finished"}, "end": ""}'),
    ("settings.json", "[" * 100_000), ("HAL/lr0.001_seed0/log.jsonl", "[" * 100_000),
    ("HAL/lr0.001_seed0/log.jsonl", "{"), ("HAL/lr0.001_seed0/log.jsonl", ""), ("HAL/lr0.001_seed0/test.json", "{"),
    ("HAL/lr0.001_seed0/test.json", "{}")])
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
    for name, value, says in (("amp", "bf16", "amp bf16, not off"), ("lr_update", 5, "lr_update 5, not 8"),
                              ("learning_rate", 1e-3, None), ("embed_size", 64.0, None), ("data_path", "else", None)):
        with open(path, "w") as file:
            json.dump({**run, "options": {name: value}}, file)
        os.unlink("runs/reproduce_smoke/settings.json")
        with pytest.raises(InputError, match=f"holds a run with --{says}") if says else nullcontext():
            reproduce.main(flags)


@pytest.mark.parametrize("content", ['{"layout": 2}', '{"layout": 2, "preset": "smoke", "models": []}'])
def test_settings_of_something_else_are_one_sentence(scripts, content):
    os.makedirs("runs/reproduce_smoke")
    with open("runs/reproduce_smoke/settings.json", "w") as file:
        file.write(content)
    with pytest.raises(InputError, match="holds results of an older layout"):
        reproduce.main(FAST)


@pytest.mark.parametrize("output", ["plain", "plain/x", "/proc/x"])
def test_an_output_folder_that_cannot_be_written_is_one_sentence(scripts, output):
    open("plain", "w").close()
    with pytest.raises(InputError, match=f"--output .*{output} cannot be written"):
        reproduce.main([*FAST, "--output", output])


def test_two_at_once_in_one_folder_are_refused(scripts):
    held = lock("out", "--output")
    with pytest.raises(InputError, match="--output .*out: another run is writing there"):
        reproduce.main([*FAST, "--output", "out"])
    held.close()


def test_other_data_is_not_mixed_in(scripts):
    reproduce.main([*FAST, "--losses", "HAL"])
    with pytest.raises(InputError, match="other data_path"):
        reproduce.main([*FAST, "--losses", "HAL", "--data_path", "elsewhere"])


@pytest.mark.parametrize("flag", ["--seed=3", "--logger_name", "--help", "--memory_bank", "--local_alpha"])
def test_what_this_script_decides_is_refused_after_the_dashes(scripts, flag):
    with pytest.raises(InputError, match=f"{flag.split('=')[0]} after --"):
        reproduce.main([*FAST, "--", flag])


def test_the_same_seed_or_rate_twice_counts_once():
    opt = reproduce.parse_args([*FAST, "--seeds", "2", "2", "--learning_rates", "0.1", "0.10"])
    assert opt.seeds == [2] and opt.models["HAL"].tried["learning_rate"] == (0.1,)


@pytest.mark.parametrize("flags, named", [(["--num_epochs", "3"], "num_epochs"),
                                          (["--", "--embed_size", "9"], "train_flags"),
                                          (["--seeds", "7"], "first_seed"), (["--amp", "bf16"], "amp"),
                                          (["--trials", "1"], r"trials \(2, not 1\): give"),
                                          (["--learning_rates", "1", "2"], "settings of HAL: give")])
def test_runs_made_otherwise_are_not_mixed(scripts, flags, named):
    reproduce.main([*FAST, "--losses", "HAL"])
    before = scripts()
    with pytest.raises(InputError, match=f"holds runs with other {named}"):
        reproduce.main([*FAST, "--losses", "HAL", *flags])
    assert scripts() == before


@pytest.mark.parametrize("flags", [[], ["--preset", "mnist"], [*FAST, "--losses", "triplet"], [*FAST, "--seeds", "-1"],
                                   [*FAST, "--learning_rates", "0"], [*FAST, "--pilot_epochs", "3"]], ids=" ".join)
def test_bad_flags_are_one_sentence(scripts, flags):
    with pytest.raises(InputError):
        reproduce.main(flags)
    assert not scripts()


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


def test_a_signal_reaches_the_running_script_and_the_same_command_goes_on(scripts, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reproduce; "
            f"reproduce.SCRIPTS = {reproduce.SCRIPTS!r}; reproduce.main({FAST!r})")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "SLOW": "max"}, stderr=subprocess.PIPE)
    until = time.time() + 60
    while not any(call.startswith("train max") for call in scripts()) and time.time() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and b"The same command goes on" in errors
    before = scripts()
    reproduce.main(FAST)
    assert not any(call.startswith("train sum 0.0005 0 1") for call in scripts()[len(before):])
    assert results()["summary"]["test"]["max-margin"]["rsum"] == [120, 124]


def test_the_real_scripts_end_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "--preset", "smoke", "--losses", "HAL",
               "--seeds", "4", "--num_epochs", "1", "--trials", "1", "--devices", "cpu", "cpu", "--",
               "--batch_size", "256", "--embed_size", "16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "runs/reproduce_smoke/results.json")
    figures = found["runs"]["HAL"]["4"]["test"]
    assert found["summary"]["test"]["HAL"]["rsum"] == [figures["rsum"]]
    assert figures["rsum"] == pytest.approx(
        sum(figures[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)))
    assert figures["images"] == 200 and figures["hubness"]["i2t"]["10"]["largest"] >= 2
    assert found["corrected"]["test"]["HAL"]["rsum"][0] in {one["rsum"] for one in figures["corrections"].values()}
    assert done.stdout.count("\n| HAL |") == 4  # its trial, as it is, corrected, and its seed
