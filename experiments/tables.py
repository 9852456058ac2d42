"""Tables of a comparison: means and deviations over seeds, every seed, differences with intervals.

`write_results` completes what `runner.run_all` found, and writes it into the output folder as
results.json, as Markdown tables, results.md, and as plots.
"""

import itertools
import json
import os
import shutil
import statistics
import textwrap

from experiments import plots
from retrieval import intervals
from retrieval.intervals import COMPARED, in_digits
from runtime.errors import InputError
from runtime.files import check_regular, replacing

MARK = "<!-- Written by reproduce.py, which overwrites this page. -->\n"
SIDES = ("i2t", "t2i")
HUBS = ("i2t N10 skewness", "t2i N10 skewness", "i2t anti-hubs %", "t2i anti-hubs %")  # of FIGURES
SEED_COLUMNS = ("i2t R@1", "t2i R@1", "rsum", "i2t N10 skewness", "t2i N10 skewness")


def _recall(side, k):
    return lambda figures: figures[side][f"r{k}"]


def _hubs(side, name, scale):
    return lambda figures: scale * figures["hubness"][side]["10"][name]


# The columns: each takes its figure from compute_results.py's JSON.
FIGURES = {
    **{f"{side} R@{k}": _recall(side, k) for side in SIDES for k in (1, 5, 10)},
    "rsum": lambda figures: figures["rsum"],
    **{f"{side} N10 skewness": _hubs(side, "skewness", 1) for side in SIDES},
    **{f"{side} anti-hubs %": _hubs(side, "anti_hubs", 100) for side in SIDES},
    **{f"{side} hub occurrence %": _hubs(side, "hub_occurrence", 100) for side in SIDES},
}


def best_correction(figures):
    """The name of the correction with the best rsum on dev, where its parameters were chosen."""
    return max(figures["corrections"], key=lambda name: figures["corrections"][name]["dev_rsum"])


def trained(seeds, test):
    """{seed: a test's figures} of the seeds that were trained; seeds: {seed: {test: figures}}."""
    return {seed: own[test] for seed, own in seeds.items() if "failed" not in own}


def summary(runs, test, corrected=False):
    """{model: {figure: [value of each seed that was trained]}}.

    corrected: the figures are those with each run's `best_correction`.
    """
    columns = {}
    for model, seeds in runs.items():
        own = list(trained(seeds, test).values())
        if corrected:
            own = [figures["corrections"][best_correction(figures)] for figures in own]
        columns[model] = {name: [pick(one) for one in own] for name, pick in FIGURES.items()}
    return columns


def differences(folder, runs, test, corrected=False):
    """{"A - B": {figure: [estimate, low, high]}} of all pairs of models, from their ranks.

    folder: what the paths of the ranks start from. Models that failed with every seed are left out.
    """
    ranks = {}
    for model, seeds in runs.items():
        for seed, figures in trained(seeds, test).items():
            path = os.path.join(folder, figures["ranks"])
            correction = best_correction(figures) if corrected else None
            ranks.setdefault(model, {})[seed] = intervals.read_ranks(path, correction)
    pairs = intervals.differences(ranks, COMPARED) if len(ranks) > 1 else {}
    return {
        f"{a} - {b}": {figure: list(interval) for figure, interval in own.items()}
        for (a, b), own in pairs.items()
    }


def hub_differences(runs, test):
    """{"A - B": {name of HUBS: [estimate, low, high]}} of all pairs, with intervals over seeds.

    Of models with three runs or more: two say too little about how seeds vary.
    """
    figures = {model: trained(seeds, test) for model, seeds in runs.items()}
    several = [model for model, own in figures.items() if len(own) > 2]
    found = {}
    for a, b in itertools.combinations(several, 2):
        found[f"{a} - {b}"] = own = {}
        for name in HUBS:
            sides = (
                {seed: FIGURES[name](one) for seed, one in figures[model].items()}
                for model in (a, b)
            )
            own[name] = list(intervals.difference_over_seeds(*sides))
    return found


def mean_and_deviation(values):
    """ "mean ± sample standard deviation" over the seeds; "-" for none."""
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 10 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(head, rows):
    """A Markdown table's lines, and an empty one."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def in_words(setting):
    """A setting as words: "learning rate 0.004, margin 0.2"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def trials_table(results):
    """What was tried for each model, with its dev rsum, and what was chosen."""
    rows = []
    for model, trials in results["trials"].items():
        tried = []
        for one in trials:
            rsums = [one[name] for name in ("dev_rsum", "final_dev_rsum") if name in one]
            words = ("failed" if rsum is None else f"{rsum:.1f}" for rsum in rsums)
            tried.append(f"{in_words(one['setting'])}: {', then '.join(words)}")
        rows.append([model, "; ".join(tried), in_words(results["chosen"][model])])
    return table(["model", "tried, with the dev rsum", "chosen"], rows)


def columns(results, test):
    """The names of FIGURES that say something about a test.

    A hub is a target that is among the 10 nearest of 20 queries or more. If a target's mean is far
    from 10, nearly all targets are hubs, or none is: with five captions an image it is 2 for
    captions and 50 for images. Then hub occurrence is left out.
    """
    tested = [own for seeds in results["runs"].values() for own in trained(seeds, test).values()]
    images, captions = tested[0]["images"], tested[0]["captions"]
    means = {"i2t": 10 * images / captions, "t2i": 10 * captions / images}
    silent = {f"{side} hub occurrence %" for side, mean in means.items() if not 5 < mean < 20}
    return [name for name in FIGURES if name not in silent]


def summary_table(results, test, kind):
    """Every model's means and deviations over seeds; kind: "summary" or "corrected"."""
    names, rows = columns(results, test), []
    for model, figures in results[kind][test].items():
        failed = sum("failed" in run for run in results["runs"][model].values())
        of = f" ({failed} of {len(results['seeds'])} seeds failed)" if failed else ""
        rows.append([model + of, *(mean_and_deviation(figures[name]) for name in names)])
    return table(["model", *names], rows)


def seeds_table(results, test):
    """Every seed's own figures, plain and corrected, and the seconds that an epoch took."""
    seconds = results["cost"]["seconds_an_epoch"]
    rows = []
    for model, seeds in results["runs"].items():
        for seed, figures in seeds.items():
            row = [model, str(seed)]
            rows.append(row)
            if "failed" in figures:
                row.append(textwrap.shorten(figures["failed"], 72, placeholder=" ..."))
                row += [""] * (len(SEED_COLUMNS) + 1)
                continue
            figures = figures[test]
            best, taken = best_correction(figures), seconds.get(model, {}).get(seed)
            for name in SEED_COLUMNS:
                row.append(f"{FIGURES[name](figures):.{2 if 'skew' in name else 1}f}")
            row.append(f"{best}: {figures['corrections'][best]['rsum']:.1f}")
            row.append(f"{taken:.0f}" if taken else "")
    return table(["model", "seed", *SEED_COLUMNS, "rsum, corrected", "s an epoch"], rows)


def differences_table(plain, corrected, bold):
    """Differences of pairs with their 95 % intervals; plain, corrected: as `differences` gives."""
    rows = []
    for pair in plain:
        row = [pair]
        for own in (plain, corrected):
            row += [in_digits(own[pair][figure], bold) for figure in COMPARED]
        rows.append(row)
    names = COMPARED.values()
    return table(["difference", *names, *(f"{name}, corrected" for name in names)], rows)


def machines(made_on):
    """Sorted texts of records.made_on as one, with the commits of one machine side by side."""
    parts = []
    for _, group in itertools.groupby(made_on, lambda made: made.partition(", commit ")[0]):
        first, *others = group
        parts.append(", ".join([first, *(made.partition(", commit ")[2] for made in others)]))
    return "; ".join(parts)


def shown_pairs(results, test):
    """The pairs, "A - B", that the preset names, or all where it names none of those there."""
    wanted, every = [set(pair) for pair in results["pairs"]], results["differences"][test]
    return [pair for pair in every if set(pair.split(" - ")) in wanted] or list(every)


def differences_part(results, test):
    """Lines about the differences in recalls, none if there is one model."""
    kinds = ("differences", "differences_corrected")
    plain, corrected = (
        {pair: results[kind][test][pair] for pair in shown_pairs(results, test)} for kind in kinds
    )
    if not plain:
        return []
    seeds_vary = all(len(own["rsum"]) != 1 for own in results["summary"][test].values())
    over = (
        "images and seeds. Bold differences are significant: the interval excludes 0, which it "
        "does by chance for one in twenty pairs that do not differ."
        if seeds_vary
        else "images alone, because a model has one seed: they say nothing about other seeds, and "
        "no difference is in bold."
    )
    halves = []
    for own in (plain, corrected):
        least, greatest = intervals.smallest_differences(pair["rsum"] for pair in own.values())
        halves.append(f"{least:.1f} to {greatest:.1f}")
    return [
        f"## Differences on {test}",
        "",
        f"The first model less the second, with 95 % intervals over {over} A difference in rsum "
        f"must exceed half its interval to be significant, {halves[0]} here (corrected: "
        f"{halves[1]}). Half of all true differences of just that size are missed, and more of the "
        "smaller ones.",
        "",
        *differences_table(plain, corrected, seeds_vary),
    ]


def hubs_part(results, test):
    """Lines about the differences in hubs, none if no two models have three seeds."""
    shown = shown_pairs(results, test)
    rows = []
    for pair, own in results["hub_differences"][test].items():
        if pair in shown:
            texts = (in_digits(own[name], True, 2 if "skew" in name else 1) for name in HUBS)
            rows.append([pair, *texts])
    if not rows:
        return []
    return [
        f"## Differences in hubs on {test}",
        "",
        "Without a correction, with 95 % intervals over seeds alone, which other images would move "
        "too. Bold differences are significant: the interval excludes 0.",
        "",
        *table(["difference", *HUBS], rows),
    ]


def markdown(results):
    """All tables of a comparison, and what they are of, as one text."""
    settings, cost = results["settings"], results["cost"]
    finals = (
        f" The best {results['finalists']} then ran to the end, where the best one was chosen."
        if results["finalists"] > 1
        else ""
    )
    lines = [
        f"{results['data_name']}, {settings['num_epochs']} epochs, seeds "
        f"{', '.join(map(str, results['seeds']))}, amp {settings['amp']}; {cost['hours']:.1f} "
        f"hours of training on {machines(cost['made_on'])}.",
        "",
        f"Settings tried for each model: {settings['trials']}, for {settings['pilot_epochs']} "
        f"epochs with seed {settings['first_seed']}.{finals}",
        "",
        *trials_table(results),
    ]
    for test in results["summary"]:
        lines += [f"## Means on {test}", "", "Mean ± standard deviation over seeds.", ""]
        lines += summary_table(results, test, "summary")
        lines += ["With the correction that does best on dev:", ""]
        lines += summary_table(results, test, "corrected")
        lines += [f"## Every seed on {test}", "", *seeds_table(results, test)]
        lines += differences_part(results, test) + hubs_part(results, test)
    return "\n".join(lines)


def complete(folder, results):
    """Add each test's summaries and differences; raises InputError if no run was trained.

    folder: what the paths of the ranks start from.
    """
    runs = results["runs"]
    names = [name for seeds in runs.values() for figures in seeds.values() for name in figures]
    tests = [name for name in dict.fromkeys(names) if name != "failed"]
    if not tests:
        model, seeds = next(iter(runs.items()))
        raise InputError(
            f"no run was trained to its end ({model}, {next(iter(seeds.values()))['failed']}): try "
            "lower --learning_rates, or -- --lr_warmup_steps 100"
        )
    for ending, corrected in (("", False), ("_corrected", True)):
        results["corrected" if corrected else "summary"] = {
            test: summary(runs, test, corrected) for test in tests
        }
        results["differences" + ending] = {
            test: differences(folder, runs, test, corrected) for test in tests
        }
    results["hub_differences"] = {test: hub_differences(runs, test) for test in tests}


def write_results(folder, results):
    """Write results.json, results.md and the plots into an output folder; print the tables.

    results: settings, data_name, seeds, finalists, pairs and what `runner.run_all` returns.
    """
    complete(folder, results)
    with replacing(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    tables = markdown(results)
    with replacing(os.path.join(folder, "results.md"), "w", encoding="utf-8") as file:
        file.write(tables)
    print(tables)
    plots.plot_all(folder, results)


def check_page(page):
    """Raise InputError if a page is there that `write_page` has not written."""
    if not os.path.exists(page):
        return
    check_regular(page)
    with open(page, encoding="utf-8", errors="replace") as file:
        if not file.read().startswith(MARK):
            raise InputError(
                f"--page {page} was not written by reproduce.py, which would overwrite it: name "
                "another file"
            )


def write_page(page, preset, folder):
    """Write a page of the tables that `write_results` left in a folder, the plots beside it."""
    with open(os.path.join(folder, "results.md"), encoding="utf-8") as file:
        text = f"{MARK}# {preset.title or preset.name}\n\n{file.read()}"
    for name in plots.NAMES:
        if os.path.exists(os.path.join(folder, name)):
            check_regular(os.path.join(folder, name))
            own = f"{preset.name}_{name}"
            text += f"\n![{preset.name}: {name.removesuffix('.png')}]({own})\n"
            to = os.path.join(os.path.dirname(page), own)
            with open(os.path.join(folder, name), "rb") as plot, replacing(to) as file:
                shutil.copyfileobj(plot, file)
    with replacing(page, "w", encoding="utf-8") as file:
        file.write(text)
