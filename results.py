"""The results of a comparison by reproduce.py: tables, plots, and what they are of."""

import io
import itertools
import json
import os
import statistics
import textwrap
from contextlib import suppress

import intervals
from errors import InputError, replacing

CURVES = {"rsum": "rsum", "i2t_n10_skewness": "i2t N10 skewness", "t2i_n10_skewness": "t2i N10 skewness"}
HUBS = "i2t N10 skewness", "t2i N10 skewness", "i2t anti-hubs %", "t2i anti-hubs %"  # of FIGURES
COMPARED = {"rsum": "rsum", "i2t_r1": "i2t R@1", "t2i_r1": "t2i R@1"}  # of intervals.FIGURES
FIGURES = {  # the table's columns, from compute_results.py's JSON
    **{f"{side} R@{k}": (lambda f, side=side, k=k: f[side][f"r{k}"]) for side in ("i2t", "t2i") for k in (1, 5, 10)},
    "rsum": lambda f: f["rsum"],
    **{f"{side} N10 skewness": (lambda f, side=side: f["hubness"][side]["10"]["skewness"]) for side in ("i2t", "t2i")},
    **{f"{side} anti-hubs %": (lambda f, side=side: 100 * f["hubness"][side]["10"]["anti_hubs"])
       for side in ("i2t", "t2i")},
    **{f"{side} hub occurrence %": (lambda f, side=side: 100 * f["hubness"][side]["10"]["hub_occurrence"])
       for side in ("i2t", "t2i")},
}


def best_correction(figures):
    """The name of the correction with the best rsum on dev, where its parameters were chosen."""
    return max(figures["corrections"], key=lambda name: figures["corrections"][name]["dev_rsum"])


def summary(runs, test, corrected=False):
    """{model: {figure: [value of each seed that was trained]}}; corrected: with each run's `best_correction`."""
    table = {}
    for model, seeds in runs.items():
        own = [figures[test] for figures in seeds.values() if "failed" not in figures]
        own = [figures["corrections"][best_correction(figures)] for figures in own] if corrected else own
        table[model] = {name: [pick(figures) for figures in own] for name, pick in FIGURES.items()}
    return table


def differences(folder, runs, test, corrected=False):
    """{"A - B": {figure: its Interval, as a list}} of all pairs of models with runs, from their ranks in a folder."""
    ranks = {}
    for model, seeds in runs.items():
        own = {seed: figures[test] for seed, figures in seeds.items() if "failed" not in figures}
        ranks[model] = {seed: intervals.read_ranks(os.path.join(folder, figures["ranks"]),
                                                   best_correction(figures) if corrected else None)
                        for seed, figures in own.items()}
    ranks = {model: own for model, own in ranks.items() if own}
    pairs = intervals.differences(ranks, COMPARED) if len(ranks) > 1 else {}
    return {f"{a} - {b}": {figure: list(interval) for figure, interval in own.items()}
            for (a, b), own in pairs.items()}


def hub_differences(runs, test):
    """{"A - B": {figure of HUBS: its Interval over seeds, as a list}} of all pairs of models with three runs or more:
    two tell too little of how seeds vary."""
    figures = {model: {seed: own[test] for seed, own in seeds.items() if "failed" not in own}
               for model, seeds in runs.items()}
    several = [model for model, own in figures.items() if len(own) > 2]
    return {f"{a} - {b}": {name: list(intervals.difference_over_seeds(*(
        {seed: FIGURES[name](one) for seed, one in figures[model].items()} for model in (a, b)))) for name in HUBS}
            for a, b in itertools.combinations(several, 2)}


def mean_and_deviation(values):
    """"mean ± sample standard deviation" over the seeds; "-" for none."""
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 10 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(head, rows):
    """A Markdown table's lines."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def trials_table(results):
    """What was tried for each model, its dev rsum (of finalists at their end, too), and what was chosen."""
    rows = []
    for model, trials in results["trials"].items():
        tried = "; ".join(f"{in_words(one['setting'])}: " + ", then ".join(
            "failed" if one[name] is None else f"{one[name]:.1f}" for name in ("dev_rsum", "final_dev_rsum")
            if name in one) for one in trials)
        rows.append([model, tried, in_words(results["chosen"][model])])
    return table(["model", "tried, with the dev rsum", "chosen"], rows)


def in_words(setting):
    """A setting in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def seeds_table(results, test):
    """Every seed's own figures, plain and corrected, and the seconds that an epoch took."""
    runs, seconds = results["runs"], results["cost"]["seconds_an_epoch"]
    rows, names = [], ("i2t R@1", "t2i R@1", "rsum", "i2t N10 skewness", "t2i N10 skewness")
    for model, seeds in runs.items():
        for seed, figures in seeds.items():
            if "failed" in figures:
                why = textwrap.shorten(figures["failed"], 72, placeholder=" ...")
                rows.append([model, str(seed), why, *[""] * (len(names) + 1)])
                continue
            figures = figures[test]
            best, taken = best_correction(figures), seconds.get(model, {}).get(seed)
            corrected = f"{best}: {figures['corrections'][best]['rsum']:.1f}"
            rows.append([model, str(seed), *(f"{FIGURES[name](figures):.{2 if 'skew' in name else 1}f}"
                                             for name in names), corrected, f"{taken:.0f}" if taken else ""])
    return table(["model", "seed", *names, "rsum, corrected", "s an epoch"], rows)


def in_digits(interval, bold, digits=1):
    """An interval as text, in bold where 0 lies outside, if asked for."""
    estimate, low, high = (f"{value:+.{digits}f}" for value in interval)
    text = f"{estimate} ({low} to {high})"
    return f"**{text}**" if bold and not interval[1] <= 0 <= interval[2] else text


def differences_table(plain, corrected, seeds_vary):
    """Every pair's differences with their 95 % intervals, in bold where 0 lies outside and seeds were drawn, too."""
    rows = [[pair, *(in_digits(own[pair][figure], seeds_vary) for own in (plain, corrected) for figure in COMPARED)]
            for pair in plain]
    return table(["difference", *COMPARED.values(), *(f"{name}, corrected" for name in COMPARED.values())], rows)


def machines(made_on):
    """Sorted texts of records.made_on as one, with the commits of one machine side by side."""
    own = [list(group) for _, group in itertools.groupby(made_on, lambda made: made.partition(", commit ")[0])]
    return "; ".join(", ".join([first, *(made.partition(", commit ")[2] for made in others)]) for first, *others in own)


def markdown(results):
    """The tables of a comparison, and what they are of."""
    settings, seeds, cost = results["settings"], results["seeds"], results["cost"]
    finals = (f"; the best {results['finalists']} of them then to the end, to choose the best there"
              if results["finalists"] > 1 else "")
    lines = [f"{results['data_name']}, {settings['num_epochs']} epochs, seeds {', '.join(map(str, seeds))}, amp "
             f"{settings['amp']}; {cost['hours']:.1f} hours of training on {machines(cost['made_on'])}.", "",
             f"Settings tried of each model: {settings['trials']}, for {settings['pilot_epochs']} epochs with seed "
             f"{settings['first_seed']}{finals}.", "", *trials_table(results)]
    for test in results["summary"]:
        for title, kind in (("as they are", "summary"), ("with the correction that dev likes best", "corrected")):
            lines += [f"{test}, {title}: mean ± standard deviation", ""]
            rows = []
            for model, figures in results[kind][test].items():
                failed = sum("failed" in run for run in results["runs"][model].values())
                name = model + (f" ({failed} of {len(seeds)} seeds failed)" if failed else "")
                rows.append([name, *map(mean_and_deviation, figures.values())])
            lines += table(["model", *FIGURES], rows)
        lines += [f"{test}, every seed", "", *seeds_table(results, test)]
        wanted, every = [set(pair) for pair in results["pairs"]], results["differences"][test]
        shown = [pair for pair in every if set(pair.split(" - ")) in wanted] or every
        plain, corrected = ({pair: results[kind][test][pair] for pair in shown}
                            for kind in ("differences", "differences_corrected"))
        if plain:
            seeds_vary = all(len(own["rsum"]) != 1 for own in results["summary"][test].values())
            of = ("images and seeds, in bold where 0 is outside (as, by chance, one in twenty is of differences that "
                  "are none)" if seeds_vary else "images; where a model has one seed, what others would give is not "
                  "in them, and nothing is in bold")
            told = (" to ".join(f"{half:.1f}" for half in intervals.smallest_differences(
                pair["rsum"] for pair in own.values())) for own in (plain, corrected))
            lines += [f"{test}, differences with 95 % intervals over {of}. A difference in rsum is told from none "
                      "where it is more than half its interval, which is {} (corrected: {}); a true one of just that "
                      "size is missed every second time, and smaller ones may be there unseen.".format(*told), "",
                      *differences_table(plain, corrected, seeds_vary)]
        hubs = {pair: own for pair, own in results["hub_differences"][test].items() if pair in shown}
        if hubs:
            lines += [f"{test}, differences in hubs, as they are, with 95 % intervals over seeds alone (in bold where "
                      "0 is outside): other images would move them, too.", "",
                      *table(["difference", *HUBS], [[pair, *(in_digits(own[name], True, 2 if "skew" in name else 1)
                                                              for name in HUBS)] for pair, own in hubs.items()])]
    return "\n".join(lines)


def pyplot_without_screen():
    """matplotlib.pyplot, drawing into files."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save_plot(figure, path):
    """Write a figure, the same bytes each time, and forget it; in 64 colours, which takes a quarter of the space."""
    from PIL import Image
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    with replacing(path) as file:
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    pyplot_without_screen().close(figure)


def plot_epochs(path, epochs):
    """The dev split's rsum and skewness after each epoch, the mean over seeds; epochs: {model: {seed: [...]}}."""
    pyplot = pyplot_without_screen()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items()):
        for place, (model, seeds) in enumerate(epochs.items()):
            means = [statistics.mean(one[name] for one in after) for after in zip(*seeds.values())]
            axis.plot(range(1, 1 + len(means)), means, marker=".", color=f"C{place % 10}", label=model,
                      linestyle=("-", "--", ":", "-.")[place // 10 % 4])
        axis.set_title(f"dev: {title}", fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    if len(epochs) > 10:
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=6, loc="outside right upper")
    else:
        axes[0].legend(fontsize=6)
    save_plot(figure, path)


def plot_grid(path, results):
    """Heat maps over HAL's alpha and epsilon, of the models that differ in these alone: the best dev rsum, and the
    skewness in that epoch, the mean over seeds that were trained. Nothing where these do not both vary."""
    cells = {}
    for model, setting in results["chosen"].items():
        flags = tuple(results["settings"]["models"][model]["flags"])
        others = tuple(item for item in setting.items() if item[0] not in ("local_alpha", "local_ep"))
        best = [max(seed, key=lambda epoch: epoch["rsum"]) for seed in results["epochs"][model].values() if seed]
        if {"local_alpha", "local_ep"} <= setting.keys():
            cells.setdefault((flags, others), {})[setting["local_alpha"], setting["local_ep"]] = {
                **{name: statistics.mean(one[name] for one in best) for name in CURVES if best}, "seeds": len(best)}
    grid = max(cells.values(), key=len, default={})
    alphas, epsilons = (sorted({key[place] for key in grid}) for place in (0, 1))
    if len(alphas) < 2 or len(epsilons) < 2:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return
    pyplot = pyplot_without_screen()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items()):
        values = [[grid.get((alpha, epsilon), {}).get(name, float("nan")) for epsilon in epsilons] for alpha in alphas]
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                seeds = grid.get((alphas[row], epsilons[column]), {}).get("seeds")
                text = {None: "", 0: "failed"}.get(seeds, f"{value:.{1 if name == 'rsum' else 2}f}")
                if seeds and seeds < len(results["seeds"]):
                    text += f"\n{seeds} of {len(results['seeds'])}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8,
                          bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1})
        axis.set_xticks(range(len(epsilons)), [f"{epsilon:g}" for epsilon in epsilons], fontsize=8)
        axis.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
        axis.set_xlabel("epsilon", fontsize=8)
        axis.set_ylabel("alpha", fontsize=8)
        axis.set_title(f"dev: {title}", fontsize=10)
        figure.colorbar(image, ax=axis)
    save_plot(figure, path)


def plot(path, results):
    """rsum and N_10's skewness of every run, plain and corrected, one row of panels a test."""
    pyplot = pyplot_without_screen()
    panels, tests = ("rsum", "i2t N10 skewness", "t2i N10 skewness"), results["summary"]
    models = list(results["runs"])
    height = len(tests) * (1.2 + 0.3 * len(models))
    figure, axes = pyplot.subplots(len(tests), len(panels), figsize=(12, height), squeeze=False, sharey=True,
                                   layout="constrained")
    for row, test in zip(axes, tests):
        for axis, panel in zip(row, panels):
            for color, kind, words in (("C0", "summary", "as they are"), ("C1", "corrected", "corrected")):
                for place, model in enumerate(models):
                    values = results[kind][test][model][panel]
                    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=4,
                              label=words if place == 0 else None)
                    if values:
                        axis.vlines(statistics.mean(values), place - 0.3, place + 0.3, color=color)
            axis.set_yticks(range(len(models)), models, fontsize=8)
            axis.set_ylim(len(models) - 0.4, -0.6)
            axis.set_title(f"{test}: {panel}", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    save_plot(figure, path)


def write_results(folder, results):
    """results.json, results.md and the plots of a comparison's settings, seeds, trials, choices, epochs and runs."""
    tests = [test for seeds in results["runs"].values() for figures in seeds.values() for test in figures
             if test != "failed"]
    runs = results["runs"]
    if not tests:
        model, seeds = next(iter(runs.items()))
        raise InputError(f"no run was trained to its end ({model}, {next(iter(seeds.values()))['failed']}): try lower "
                         "--learning_rates, or -- --lr_warmup_steps 100")
    for ending, corrected in (("", False), ("_corrected", True)):
        results["summary" if not corrected else "corrected"] = {
            test: summary(runs, test, corrected) for test in dict.fromkeys(tests)}
        results["differences" + ending] = {
            test: differences(folder, runs, test, corrected) for test in dict.fromkeys(tests)}
    results["hub_differences"] = {test: hub_differences(runs, test) for test in dict.fromkeys(tests)}
    with replacing(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    tables = markdown(results)
    with replacing(os.path.join(folder, "results.md"), "w", encoding="utf-8") as file:
        file.write(tables)
    print(tables)
    plot(os.path.join(folder, "results.png"), results)
    plot_epochs(os.path.join(folder, "epochs.png"), results["epochs"])
    plot_grid(os.path.join(folder, "grid.png"), results)
