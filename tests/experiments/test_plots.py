"""A comparison's plots: that they are drawn, and what stands in the heat map."""

import os

import reproduce
from experiments import runner
from experiments.presets import Model
from tests.helpers.comparisons import FAST, results, smoke_with


def test_the_epochs_of_every_run_are_kept_and_drawn(drawn):
    reproduce.main([*FAST, "--losses", "HAL", "--seeds", "0", "2"])
    assert results()["epochs"]["HAL"] == {
        seed: [
            {"rsum": 110 + epoch, "i2t_n10_skewness": 0.001 * epoch, "t2i_n10_skewness": int(seed)}
            for epoch in (0, 1)
        ]
        for seed in ("0", "2")
    }
    assert open("runs/reproduce_smoke/epochs.png", "rb").read(4) == b"\x89PNG"
    assert not os.path.exists("runs/reproduce_smoke/grid.png")


def test_models_that_differ_in_alpha_and_epsilon_alone_make_a_heat_map(drawn, monkeypatch):
    texts = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.text", lambda axes, x, y, text, **_: texts.append((x, y, text))
    )
    path = os.path.join(runner.SCRIPTS, "train.py")
    train = open(path).read()
    with open(path, "w") as file:  # one of the four cannot be trained
        file.write(
            train.replace(
                "lr > 0.001", '(flags["--local_alpha"], flags["--local_ep"]) == ("60", "0.3")'
            )
        )
    settings = {
        f"HAL alpha {alpha} epsilon {epsilon}": {"local_alpha": (alpha,), "local_ep": (epsilon,)}
        for alpha in (30, 60)
        for epsilon in (0.3, 0.7)
    }
    grid = list(settings)
    settings["HAL batch 64"] = {"local_alpha": (30,), "local_ep": (0.3,), "batch_size": (64,)}
    models = {
        name: Model((), {"learning_rate": (0.001,), **tried}) for name, tried in settings.items()
    }
    smoke_with(
        monkeypatch,
        models=models,
        trials=1,
        pairs=[(grid[0], name) for name in (*grid[1:], "HAL batch 64")],
    )
    reproduce.main([*FAST, "--losses", *grid, "HAL batch 64", "--seeds", "0", "2"])
    assert open("runs/reproduce_smoke/grid.png", "rb").read(4) == b"\x89PNG"
    assert texts[:4] == [(0, 0, "111.0"), (1, 0, "111.0"), (0, 1, "failed"), (1, 1, "111.0")]
    text = open("runs/reproduce_smoke/results.md").read()
    rows = [
        line.split(" | ")[0].removeprefix("| ")
        for line in text.partition("| difference |")[2].splitlines()[2:]
    ]
    assert [row for row in rows if row] == [
        f"{grid[0]} - {grid[1]}",
        f"{grid[0]} - {grid[3]}",
        f"{grid[0]} - HAL batch 64",
    ]
    assert len(results()["differences"]["test"]) == 6
    texts.clear()
    with open(path, "w") as file:
        file.write(train.replace('kind == "HAL" and lr > 0.001', "seed == 3"))
    reproduce.main([*FAST, "--losses", grid[0], grid[3], "--seeds", "0", "3"])
    assert texts[:4] == [(0, 0, "111.0\n1 of 2"), (1, 0, ""), (0, 1, ""), (1, 1, "111.0\n1 of 2")]
    reproduce.main([*FAST, "--losses", grid[0], grid[2], "--seeds", "0"])  # of one epsilon
    assert not os.path.exists("runs/reproduce_smoke/grid.png")
    reproduce.main([*FAST, "--losses", grid[1], grid[3], "--seeds", "0"])  # neither is in a pair
    assert f"| {grid[1]} - {grid[3]} |" in open("runs/reproduce_smoke/results.md").read()
