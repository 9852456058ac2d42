"""A comparison's plots: that they are drawn, and what stands in the heat map."""

import os

import pytest
from matplotlib.axes import Axes

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


def test_models_made_each_of_a_flag_s_values_make_a_curve_with_intervals(drawn, monkeypatch):
    lines, bands = {}, []
    plot, fill = Axes.plot, Axes.fill_between

    def noted_plot(axes, x, y, *rest, **kind):
        if (kind.get("label") or "").startswith("mean"):
            lines.setdefault(axes.get_gridspec().ncols, []).append((list(x), list(y)))
        return plot(axes, x, y, *rest, **kind)

    def noted_fill(axes, x, low, high, **kind):
        bands.append((list(low), list(high)))
        return fill(axes, x, low, high, **kind)

    monkeypatch.setattr(Axes, "plot", noted_plot)
    monkeypatch.setattr(Axes, "fill_between", noted_fill)
    names = {value: f"mean {value} HAL" for value in (32, 8, 16)}
    models = {
        name: Model((), {"learning_rate": (0.001,), "batch_size": (value,)})
        for value, name in names.items()
    }
    curves = {"batch_size": {"mean {batch_size} HAL": names}}
    smoke_with(monkeypatch, models=models, curves=curves, trials=1)
    reproduce.main([*FAST, "--seeds", "0", "2"])
    assert open("runs/reproduce_smoke/curves.png", "rb").read(4) == b"\x89PNG"
    # Seeds 0 and 2 have an rsum of 120 and 128; Student's t for one degree of freedom is 12.706.
    half = 12.7062 * 4
    assert bands[0][0] == pytest.approx([124 - half] * 3, abs=0.01)
    assert bands[0][1] == pytest.approx([124 + half] * 3, abs=0.01)
    # Corrected, dev prefers csls with seed 0 (+ 9) and nnn with seed 2 (+ 5).
    means = [line for line in lines[3] if line[0] == [8, 16, 32]]
    assert [line[1] for line in means] == [[124] * 3, [131] * 3, [2.5] * 3]
    reproduce.main([*FAST, "--losses", names[8], names[32], "--seeds", "0"])
    assert bands[-1] == ([1.5, 1.5], [1.5, 1.5])  # one seed: no width
    smoke_with(monkeypatch, models=models, curves={}, trials=1)
    reproduce.main([*FAST, "--seeds", "0", "2"])
    assert not os.path.exists("runs/reproduce_smoke/curves.png")
