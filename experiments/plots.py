"""Draw a comparison's plots."""

import io
import itertools
import os
import statistics
from contextlib import suppress

from retrieval.intervals import mean_over_seeds
from runtime.files import replacing

# What is drawn of each epoch, and its title.
CURVES = {
    "rsum": "rsum",
    "i2t_n10_skewness": "i2t N10 skewness",
    "t2i_n10_skewness": "t2i N10 skewness",
}
NAMES = ("results.png", "epochs.png", "grid.png", "curves.png")


def pyplot_without_screen():
    """matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_plot(figure, path):
    """Write a figure as a PNG file and close it.

    64 colours take a quarter of the space, and the same figure gives the same bytes.
    """
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    picture = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    with replacing(path) as file:
        picture.save(file, "PNG", optimize=True)
    pyplot_without_screen().close(figure)


def plot_all(folder, results):
    """Draw the plots of a comparison into its output folder, see `NAMES`.

    results: as `tables.write_results` completes them.
    """
    paths = [os.path.join(folder, name) for name in NAMES]
    plot_runs(paths[0], results)
    plot_epochs(paths[1], results["epochs"])
    plot_grid(paths[2], results)
    plot_curves(paths[3], results)


def plot_runs(path, results):
    """rsum and N_10's skewness of every run, plain and corrected: a row of panels for each test."""
    pyplot = pyplot_without_screen()
    panels, tests = tuple(CURVES.values()), results["summary"]
    models = list(results["runs"])
    figure, axes = pyplot.subplots(
        len(tests),
        len(panels),
        figsize=(12, len(tests) * (1.2 + 0.3 * len(models))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    kinds = (("C0", "summary", "as they are"), ("C1", "corrected", "corrected"))
    for row, test in zip(axes, tests):
        for axis, panel in zip(row, panels):
            for color, kind, words in kinds:
                for place, model in enumerate(models):
                    values = results[kind][test][model][panel]
                    axis.plot(
                        values,
                        [place] * len(values),
                        "o",
                        color=color,
                        alpha=0.6,
                        markersize=4,
                        label=words if place == 0 else None,
                    )
                    if values:
                        axis.vlines(statistics.mean(values), place - 0.3, place + 0.3, color=color)
            axis.set_yticks(range(len(models)), models, fontsize=8)
            axis.set_ylim(len(models) - 0.4, -0.6)
            axis.set_title(f"{test}: {panel}", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    save_plot(figure, path)


def plot_epochs(path, epochs):
    """The dev split's rsum and skewness after each epoch, as means over seeds.

    epochs: {model: {seed: [{name of CURVES: figure}, ...]}}.
    """
    pyplot = pyplot_without_screen()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items()):
        for place, (model, seeds) in enumerate(epochs.items()):
            means = [statistics.mean(one[name] for one in after) for after in zip(*seeds.values())]
            axis.plot(
                range(1, 1 + len(means)),
                means,
                marker=".",
                color=f"C{place % 10}",
                label=model,
                linestyle=("-", "--", ":", "-.")[place // 10 % 4],
            )
        axis.set_title(f"dev: {title}", fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    if len(epochs) > 10:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, fontsize=6, loc="outside right upper")
    else:
        axes[0].legend(fontsize=6)
    save_plot(figure, path)


def grid_of(results):
    """The largest set of models that differ in HAL's alpha and epsilon alone.

    Returns {(alpha, epsilon): {name of CURVES: figure, "seeds": how many were trained}}: each
    seed's best dev rsum and that epoch's skewness, as means over seeds.
    """
    grids = {}
    for model, setting in results["chosen"].items():
        if not {"local_alpha", "local_ep"} <= setting.keys():
            continue
        others = [item for item in setting.items() if item[0] not in ("local_alpha", "local_ep")]
        flags = results["settings"]["models"][model]["flags"]
        seeds = results["epochs"][model].values()
        best = [max(seed, key=lambda epoch: epoch["rsum"]) for seed in seeds if seed]
        figures = {name: statistics.mean(one[name] for one in best) for name in CURVES if best}
        place = setting["local_alpha"], setting["local_ep"]
        grid = grids.setdefault((tuple(flags), tuple(others)), {})
        grid[place] = {**figures, "seeds": len(best)}
    return max(grids.values(), key=len, default={})


def plot_grid(path, results):
    """Heat maps over alpha and epsilon of what `grid_of` gives.

    Where one of the two does not vary there is nothing to draw, and an older plot is deleted.
    """
    grid = grid_of(results)
    alphas, epsilons = (sorted({key[place] for key in grid}) for place in (0, 1))
    if len(alphas) < 2 or len(epsilons) < 2:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return
    pyplot = pyplot_without_screen()
    size = max(12, 2 * len(epsilons)), max(3.2, 0.45 * len(alphas))
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=size, layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items()):
        cells = [[grid.get((alpha, epsilon), {}) for epsilon in epsilons] for alpha in alphas]
        values = [[cell.get(name, float("nan")) for cell in row] for row in cells]
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        white = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1}
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                text = cell_text(cell, name, len(results["seeds"]))
                axis.text(column, row, text, ha="center", va="center", fontsize=8, bbox=white)
        axis.set_xticks(range(len(epsilons)), [f"{value:g}" for value in epsilons], fontsize=8)
        axis.set_yticks(range(len(alphas)), [f"{value:g}" for value in alphas], fontsize=8)
        axis.set_xlabel("epsilon", fontsize=8)
        axis.set_ylabel("alpha", fontsize=8)
        axis.set_title(f"dev: {title}", fontsize=10)
        figure.colorbar(image, ax=axis)
    save_plot(figure, path)


def cell_text(cell, name, n_seeds):
    """What stands in a cell of a heat map; also how many of n_seeds were trained, if not all."""
    if not cell:
        return ""
    if not cell["seeds"]:
        return "failed"
    text = f"{cell[name]:.{1 if name == 'rsum' else 2}f}"
    return text if cell["seeds"] == n_seeds else f"{text}\n{cell['seeds']} of {n_seeds}"


def plot_curves(path, results):
    """rsum and N_10's skewness over a flag's values, as means with 95 % intervals over seeds.

    A row of panels for each flag and test, a line for each name in `results["curves"]`. Without
    curves there is nothing to draw, and an older plot is deleted.
    """
    rows = list(itertools.product(results["curves"], results["summary"]))
    if not rows:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return
    pyplot = pyplot_without_screen()
    size = 12, 3.4 * len(rows)
    panels = [("rsum", "summary"), ("rsum", "corrected"), (CURVES["i2t_n10_skewness"], "summary")]
    figure, axes = pyplot.subplots(
        len(rows), len(panels), figsize=size, squeeze=False, layout="constrained"
    )
    for line, (flag, test) in zip(axes, rows):
        for axis, (name, kind) in zip(line, panels):
            for place, (family, models) in enumerate(results["curves"][flag].items()):
                trained = [
                    (value, results[kind][test][model][name]) for value, model in sorted(models)
                ]
                points = [(value, *mean_over_seeds(own)) for value, own in trained if own]
                if points:
                    values, means, lows, highs = zip(*points)
                    label = family.replace(f"{{{flag}}}", "").strip()
                    axis.plot(values, means, marker=".", color=f"C{place}", label=label)
                    axis.fill_between(values, lows, highs, color=f"C{place}", alpha=0.15, lw=0)
            every = sorted(
                {value for models in results["curves"][flag].values() for value, _ in models}
            )
            if every[0] > 0:
                axis.set_xscale("log", base=2)
            axis.set_xticks(every, [f"{value:g}" for value in every], fontsize=8)
            axis.set_xlabel(flag.replace("_", " "), fontsize=8)
            words = ", corrected" if kind == "corrected" else ""
            axis.set_title(f"{test}: {name}{words}", fontsize=10)
            axis.grid(alpha=0.3)
        line[0].legend(fontsize=7)
    save_plot(figure, path)
