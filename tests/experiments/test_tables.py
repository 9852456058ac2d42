"""A comparison's tables: means, deviations, intervals, and what failed."""

import os
import statistics

import pytest

import reproduce
from experiments import runner, tables
from experiments.tables import machines
from retrieval.intervals import difference, read_ranks
from runtime.errors import InputError
from tests.helpers.comparisons import FAST, results


def test_the_correction_is_the_one_that_each_seed_s_dev_split_likes_best(scripts):
    reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "2"])
    found = results()
    assert found["summary"]["test"]["HAL"]["rsum"] == [120, 128]
    assert found["corrected"]["test"]["HAL"]["rsum"] == [129, 133]
    assert (
        "| HAL | 2 | 12.0 | 12.0 | 128.0 | 3.50 | 3.50 | nnn: 133.0 |"
        in open("runs/reproduce_smoke/results.md").read()
    )


def test_every_pair_s_difference_has_its_interval(scripts):
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "HAL+bank", "--seeds", "0", "2"])
    folder, found = "runs/reproduce_smoke", results()
    assert list(found["differences"]["test"]) == [
        "sum-margin - HAL",
        "sum-margin - HAL+bank",
        "HAL - HAL+bank",
    ]
    own, other = (
        {
            seed: read_ranks(
                os.path.join(folder, figures["test"]["ranks"]), "csls" if seed == "0" else "nnn"
            )
            for seed, figures in found["runs"][name].items()
        }
        for name in ("HAL", "HAL+bank")
    )
    assert found["differences_corrected"]["test"]["HAL - HAL+bank"]["i2t_r1"] == list(
        difference(own, other, "i2t_r1")
    )
    _, low, high = found["differences"]["test"]["sum-margin - HAL+bank"]["rsum"]
    assert low < high < 0
    text = open(f"{folder}/results.md").read()
    assert (
        "| sum-margin - HAL | +0.0 (+0.0 to +0.0) |" in text
        and "| sum-margin - HAL+bank | **-" in text
    )


def test_differences_in_hubs_have_intervals_over_seeds(scripts):
    path = os.path.join(runner.SCRIPTS, "compute_results.py")
    test = open(path).read()
    with open(path, "w") as file:  # HAL: 3.5, 5.5 and 8.5 less 0.1, 0.2, 0.6 by seed
        file.write(
            test.replace(
                '"skewness": 1.5 + seed',
                '"skewness": 1.5 + seed - ("/HAL/" in flags["--model_path"])'
                " * {0: 0.1, 2: 0.2, 4: 0.6}[seed]",
            )
        )
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
    assert "Differences in hubs" not in open("runs/reproduce_smoke/results.md").read()


def test_a_machine_is_named_once_with_its_commits():
    made_on = [
        "cpu (x), torch 2.9, commit 0123456",
        "cpu (x), torch 2.9, commit 89abcde",
        "cuda, torch 2.9",
    ]
    assert machines(made_on) == "cpu (x), torch 2.9, commit 0123456, 89abcde; cuda, torch 2.9"


def test_every_row_has_the_mean_and_sample_deviation_over_the_seeds(scripts):
    reproduce.main([*FAST, "--seeds", "0", "1", "3"])
    assert results()["summary"]["test"]["HAL"]["rsum"] == [120, 124, 132]
    lines = open("runs/reproduce_smoke/results.md").read().splitlines()
    lines = lines[
        next(place for place, line in enumerate(lines) if line.startswith("| model | i2t R@1")) :
    ]
    head, row = (
        lines[0].split("|"),
        next(line for line in lines if line.startswith("| max-margin |")).split("|"),
    )
    cells = {name.strip(): cell.strip() for name, cell in zip(head, row)}
    assert (
        cells["rsum"]
        == f"{statistics.mean([120, 124, 132]):.1f} ± {statistics.stdev([120, 124, 132]):.1f}"
    )
    assert cells["i2t R@1"] == "11.3 ± 1.5" and cells["t2i R@5"] == "20.0 ± 0.0"
    assert cells["t2i N10 skewness"] == "2.83 ± 1.53" and cells["i2t anti-hubs %"] == "25.0 ± 0.0"


@pytest.mark.parametrize("rates", (["0.002"], ["0.002", "0.003"]))
def test_a_loss_that_no_setting_trains_is_a_result_beside_others_and_alone_one_sentence(
    scripts, rates
):
    flags = [*FAST, "--learning_rates", *rates, "--trials", str(len(rates)), "--losses", "HAL"]
    with pytest.raises(
        InputError, match=r"no run was trained to its end \(HAL, step 5.*try lower --learning_rates"
    ):
        reproduce.main(flags)
    assert not os.path.exists("runs/reproduce_smoke/results.json")
    reproduce.main([*flags, "sum-margin"])
    assert set(results()["runs"]["HAL"]["0"]) == {"failed"}
    text = open("runs/reproduce_smoke/results.md").read()
    assert "| HAL (2 of 2 seeds failed) | - |" in text and "local ep 0.7: failed" in text


def test_where_every_run_fails_after_its_trials_it_is_one_sentence(scripts):
    path = os.path.join(runner.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', "epochs == 2"))
    with pytest.raises(
        InputError, match=r"no run was trained to its end \(HAL, step 5: training has collapsed;"
    ):
        reproduce.main([*FAST, "--losses", "HAL"])
    assert not os.path.exists("runs/reproduce_smoke/results.json")


def test_a_seed_alone_has_intervals_over_images_and_nothing_in_bold(scripts):
    for seeds, words in (
        (["0"], "over images alone, because a model has one seed"),
        (["0", "2", "3"], "over images and seeds. Bold"),
    ):
        reproduce.main([*FAST, "--losses", "sum-margin", "HAL+bank", "--seeds", *seeds])
        text = open("runs/reproduce_smoke/results.md").read()
        assert ("**" in text) == (len(seeds) > 1)
        assert f"with 95 % intervals {words}" in text and "of just that size are missed" in text


def test_a_model_that_failed_with_every_seed_takes_nothing_from_the_others_intervals(scripts):
    path = os.path.join(runner.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', 'kind == "HAL" and epochs == 2'))
    reproduce.main([*FAST, "--losses", "HAL", "sum-margin", "max-margin", "--seeds", "0", "2"])
    text = open("runs/reproduce_smoke/results.md").read()
    assert (
        "| HAL (2 of 2 seeds failed) |" in text and "intervals over images and seeds. Bold" in text
    )


def test_a_seed_that_collapses_is_reported_and_left_out_of_the_mean(scripts, monkeypatch):
    train = open(os.path.join(runner.SCRIPTS, "train.py")).read()
    with open(os.path.join(runner.SCRIPTS, "train.py"), "w") as file:
        file.write(train.replace("lr > 0.001", "seed == 1"))
    reproduce.main([*FAST, "--seeds", "0", "1", "2"])
    found = results()
    assert found["summary"]["test"]["HAL"]["rsum"] == [120, 128]
    why = "step 5: training has collapsed; go back to checkpoint.pth.tar or"
    assert found["runs"]["HAL"]["1"] == {"failed": why + " lower the rate"}
    text = open("runs/reproduce_smoke/results.md").read()
    assert "| HAL (1 of 3 seeds failed) | 11.0 ± 1.4 |" in text
    row, head = (
        next(line for line in text.splitlines() if line.startswith(start))
        for start in (f"| HAL | 1 | {why} ... |", "| model | seed |")
    )
    assert row.count("|") == head.count("|")


def test_a_page_has_the_tables_and_plots_and_is_written_again(drawn):
    for _ in range(2):
        reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "--page", "docs/smoke.md"])
    text = open("runs/reproduce_smoke/results.md").read()
    pictures = "".join(f"\n![smoke: {name}](smoke_{name}.png)\n" for name in ("results", "epochs"))
    title = "# The paper's four losses on the sample data\n\n"
    assert open("docs/smoke.md").read() == tables.MARK + title + text + pictures
    for name in ("results.png", "epochs.png"):
        made = open(f"runs/reproduce_smoke/{name}", "rb").read()
        assert open(f"docs/smoke_{name}", "rb").read() == made


@pytest.mark.parametrize("page", ["page.md", "folder.md"])
def test_a_page_that_somebody_wrote_is_refused_before_anything_runs(scripts, page):
    os.mkdir("folder.md")
    with open("page.md", "w") as file:
        file.write("# Mine\n")
    with pytest.raises(InputError, match=f"{page} (was not written by reproduce.py|is a folder)"):
        reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "--page", page])
    assert scripts() == [] and open("page.md").read() == "# Mine\n"


@pytest.mark.parametrize("captions, shown", [(10, True), (50, False)])
def test_hub_occurrence_is_left_out_where_it_says_nothing(scripts, captions, shown):
    path = os.path.join(runner.SCRIPTS, "compute_results.py")
    script = open(path).read()
    with open(path, "w") as file:
        file.write(script.replace('"captions": 50', f'"captions": {captions}'))
    reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0"])
    text = open("runs/reproduce_smoke/results.md").read()
    assert ("i2t hub occurrence % | t2i hub occurrence %" in text) == shown
    assert ("| 12.5 | 12.5 |" in text) == shown and "| 25.0 | 25.0 |" in text
    assert results()["summary"]["test"]["HAL"]["i2t hub occurrence %"] == [12.5]
