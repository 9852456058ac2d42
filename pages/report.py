"""An evaluation as one HTML page: recalls with intervals, hubs before and after, examples.

    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --report report

The page needs no other file and no network: it contains style, plots and photos. In image to text
("i2t") images are the queries and captions the targets; in text to image ("t2i") it is the other
way round. templates/report.html is the layout; this module computes what it shows.

Captions and file names are other people's text, so Jinja2 escapes everything it puts into a page.
"""

import base64
import io
import os
import sys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from inputs.decoding import thumbnail
from pages.template import template
from retrieval import intervals
from retrieval.corrections import in_words
from retrieval.hubness import DEPTHS, occurrences
from runtime.errors import InputError
from runtime.files import replacing

RESAMPLES, SEED = 1000, 0
NEGATIVES = 100_000  # most wrong pairs whose similarities are plotted
PAIR_BLOCK = 4096  # pairs compared at a time
HUBS = WINNINGS = 5  # hubs shown in each direction, and queries shown that each wrongly wins
EXAMPLES, RETRIEVED = 4, 3  # right, and wrong, queries shown in each direction; items for each
THUMBNAIL = 160  # pixels
SIDES = {"i2t": ("image", "caption"), "t2i": ("caption", "image")}  # query, target


def write_report(options, split, result, hubs, words, outcome, compared=None, tied=""):
    """Write <options.report>/report.html.

    Raises InputError if options.images does not fit the data, or the page cannot be written.

    result: an Evaluation of one fold with 10 items per query
    hubs, words: its hubness both ways, and the corrections' bank in words
    outcome: {method: its parameters, rankings, metrics, hubness}; empty without a correction
    compared: a `retrieval.comparison.Compared` of this model and others, or None
    tied: ties in words, if they matter
    """
    plain = {
        "parameters": {"i2t": {}, "t2i": {}},
        "rankings": result.rankings,
        "metrics": result.metrics,
        "hubness": hubs,
    }
    rows = {"none": plain, **outcome}
    best = max(outcome, key=lambda name: outcome[name]["metrics"].rsum, default=None)
    opt, rankings = result.checkpoint.opt, on_cpu(result.rankings[0])
    counts = {"without correction": as_arrays(occurrences(rankings))}
    if best:
        counts[f"with {best}"] = as_arrays(occurrences(outcome[best]["rankings"][0]))
    items, measure = items_of(options, split, result), measure_of(opt)
    source = result.checkpoint.similarities(result.images, result.captions)
    own, wrong = pair_similarities(source, items.image_of)
    page = template("report.html").render(
        data=opt.data_name,
        split=split,
        facts=facts(options, split, result, words, measure) | ({"Ties": tied} if tied else {}),
        sides=SIDES,
        depths=DEPTHS,
        transductive=words.startswith("transductive"),
        recalls=recalls(rows, items.image_of),
        resamples=RESAMPLES,
        seed=SEED,
        best=best,
        hubness=hubness_lines(rows),
        plots=[*hub_plots(counts), similarity_plot(own, wrong, measure)],
        items=items,
        hubs=worst_hubs(items, rankings, counts),
        examples=examples(items, rankings, own),
        n_examples=EXAMPLES,
        models=model_lines(compared, items.image_of),
        differences=compared.differences if compared else {},
        compared_figures=intervals.COMPARED,
    )
    # What UTF-8 cannot encode, such as half of a surrogate pair in a caption, becomes an escape.
    with replacing(os.path.join(options.report, "report.html")) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def items_of(options, split, result):
    """The Items of an Evaluation; prints a note if photos are missing in options.images."""
    names, files = find_photos(options.images, split, result.checkpoint.opt, result.dataset)
    if options.images is not None and not all(files):
        print(
            f"note: {len(files) - files.count(None)} of {len(files)} photos are in "
            f"{options.images}; the others' names are shown",
            file=sys.stderr,
        )
    return Items(result.dataset.captions, result.dataset.image_of.numpy(), names, files)


def on_cpu(rankings):
    """The same (i2t Ranking, t2i Ranking) on the CPU."""
    return tuple(type(ranking)(*(part.cpu() for part in ranking)) for ranking in rankings)


# Texts and photos -------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What a page shows for an image or a caption: a photo with its alternative text, or a text."""

    kind: str  # "image" or "caption"
    number: int
    text: str
    photo: str | None = None  # a data URI


class Items(NamedTuple):
    """What images and captions look like to a person."""

    captions: list  # C texts
    image_of: np.ndarray  # (C,) each caption's image
    names: list  # N file names, "" where unknown
    files: list  # N paths, or None

    def own_captions(self, image):
        """The numbers of an image's captions."""
        return np.flatnonzero(self.image_of == image)

    def show(self, kind, number):
        """An "image" or "caption" as Shown: the photo, its name if there is none, or the text."""
        if kind == "caption":
            return Shown(kind, number, self.captions[number])
        photo = self.files[number] and small_photo(self.files[number])
        if not photo:
            return Shown(kind, number, self.names[number])
        caption = self.captions[self.own_captions(number)[0]]
        return Shown(kind, number, f"Photo of image {number}: {caption}", photo)


@lru_cache(maxsize=256)
def small_photo(path):
    """A photo as a small JPEG in a data URI; None if it cannot be decoded."""
    try:
        return data_uri("image/jpeg", thumbnail(path, THUMBNAIL))
    except InputError:
        return None


def data_uri(kind, content):
    """Bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def find_photos(folder, split, opt, dataset):
    """(names, files) of a data set's N images; "" and None if unknown.

    A data set of photos knows its files. For features, names come from <split>_ids.txt, with a file
    name for each image or caption. Raises InputError if `folder` does not fit the data.

    folder: of the photos; None: only names are looked for
    opt: the checkpoint's
    """
    n_images = dataset.n_images
    if hasattr(dataset, "image_files"):
        if folder is not None:
            raise InputError(
                f"{opt.data_name} is of photos, which the page shows as they are: leave --images "
                "out"
            )
        return dataset.names, dataset.image_files
    ids_split = "dev" if split == "val" else split
    ids_file = getattr(dataset, "ids_file", None) or os.path.join(
        opt.data_path, opt.data_name, f"{ids_split}_ids.txt"
    )
    if folder is not None and dataset.names is None:
        raise InputError(
            f"{ids_file} is not there: --images needs it, with the file name of each image on a "
            "line; add it, or leave --images out"
        )
    names = dataset.names or [""] * n_images
    files = [folder and photo_file(folder, name) for name in names]
    if folder is not None and not any(files):
        raise InputError(
            f"none of the {n_images} photos that {ids_file} names is in {folder}, such as "
            f"{names[0]!r}: check --images"
        )
    return names, files


def photo_file(folder, name):
    """The photo's path in `folder`, with .jpg added if needed; None if missing or outside it."""
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        return None
    paths = (os.path.join(folder, name + extension) for extension in ("", ".jpg"))
    return next((path for path in paths if os.path.isfile(path)), None)


# Figures ----------------------------------------------------------------------------------------


def pair_similarities(source, image_of):
    """Similarities of each caption with its image, (C,), and of a fixed sample of wrong pairs.

    source: of similarities (see `retrieval.ranking`); image_of: (C,) array
    """
    n_images, n_captions = source.n_images, source.n_captions
    n_wrong, others = n_captions * (n_images - 1), max(1, n_images - 1)
    wrong = np.random.default_rng(SEED).choice(n_wrong, min(n_wrong, NEGATIVES), replace=False)
    # A wrong pair's number encodes its caption, and how many images past the right one it takes.
    pairs, found = [(np.arange(n_captions), 0), (wrong // others, 1 + wrong % others)], []
    for chosen, further in pairs:
        numbers = torch.from_numpy(np.stack([(image_of[chosen] + further) % n_images, chosen]))
        found.append(
            torch.cat(
                [source.pairs(*block).cpu() for block in numbers.split(PAIR_BLOCK, 1)]
            ).numpy()
        )
    return found


def as_arrays(counts):
    """N_k, as `retrieval.hubness.occurrences` returns it, in arrays."""
    return {side: {k: own.numpy() for k, own in depths.items()} for side, depths in counts.items()}


def is_own(image_of, side, query, target):
    """Whether a target belongs to a query; both are numbers, and either may be an array."""
    image, caption = (query, target) if side == "i2t" else (target, query)
    return image_of[caption] == image


def spread(numbers, n):
    """At most n of an array's numbers, evenly spaced."""
    return numbers[
        np.linspace(0, len(numbers) - 1, min(n, len(numbers))).round().astype(int)
    ].tolist()


# Sections ---------------------------------------------------------------------------------------


def measure_of(opt):
    """What the similarity is, in words."""
    return (
        f"cross attention ({opt.cross_attn})"
        if opt.cross_attn and opt.measure == "cosine"
        else opt.measure
    )


def facts(options, split, result, words, measure):
    """What was evaluated: {name: text}."""
    return {
        **(getattr(result.checkpoint, "facts", None) or checkpoint_facts(options, split, result)),
        "Size": f"{len(result.images)} images, {len(result.captions)} captions",
        "Similarity": measure,
        "Correction": words or "none",
    }


def checkpoint_facts(options, split, result):
    """Where checkpoints and their data are: {name: text}."""
    models = [member.opt for member in result.checkpoint.members]
    paths = options.model_path if isinstance(options.model_path, list) else [options.model_path]
    folders = dict.fromkeys(os.path.join(model.data_path, model.data_name) for model in models)
    return {
        "Checkpoint": ", ".join(paths),
        "Trained in": result.checkpoint.opt.logger_name,
        "Data": ", ".join(folders),
        "Split": split,
    }


def model_lines(compared, image_of):
    """A line of figures for each model of a Compared: as `recalls` gives them, and hubness."""
    if compared is None:
        return []
    rows = {
        label: {"rankings": result.rankings, "metrics": result.metrics}
        for label, result in compared.results.items()
    }
    hubs = compared.hubness().values()
    return [{**line, "hubs": own} for line, own in zip(recalls(rows, image_of), hubs)]


def recalls(rows, image_of):
    """Recalls, rsum and its gain over the first row, with intervals: a line for each row.

    Intervals are the middle 95 % over resamples of the images, each with its captions. All lines
    share the same resamples, so gains are paired.
    """
    runs = [
        (*(side.ranks.cpu().numpy() for side in row["rankings"][0]), image_of)
        for row in rows.values()
    ]
    n = len(runs[0][0])
    weights = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    # For each figure, (draws, rows).
    drawn = {figure: intervals.recalls(runs, figure, weights) for figure in intervals.FIGURES}
    rsum, middle = (
        drawn.pop("rsum"),
        [50 * (1 - intervals.CONFIDENCE), 50 * (1 + intervals.CONFIDENCE)],
    )
    bounds = np.percentile(np.stack([*drawn.values(), rsum], 2), middle, axis=0)
    gains = np.percentile(rsum - rsum[:, :1], middle, axis=0)
    base, lines = next(iter(rows.values()))["metrics"].rsum, []
    for place, (name, row) in enumerate(rows.items()):
        metrics = row["metrics"]
        figures = zip([*metrics.i2t[:3], *metrics.t2i[:3], metrics.rsum], *bounds[:, place])
        lines.append(
            {
                "name": name,
                "parameters": in_words(row["parameters"]) if "parameters" in row else "",
                "figures": [intervals.Interval(*one) for one in figures],
                "gain": intervals.Interval(metrics.rsum - base, *gains[:, place]),
            }
        )
    return lines


def hubness_lines(rows):
    """[(name, side, k, Hubness)]: at all depths without correction, at the last one with it."""
    return [
        (name, side, k, row["hubness"][side][k])
        for name, row in rows.items()
        for side in SIDES
        for k in (DEPTHS if name == "none" else DEPTHS[-1:])
    ]


def hub_plots(counts):
    """[(a plot's data URI, its caption)]: N_10 in each direction; counts: {label: occurrences}."""
    figures, k = [], DEPTHS[-1]
    for side, (query, target) in SIDES.items():
        values = {label: sides[side][k] for label, sides in counts.items()}
        largest = max(int(one.max()) for one in values.values())
        width = -(-(largest + 1) // 60)
        uri = plot(
            values,
            np.arange(0, largest + width + 1, width) - 0.5,
            xlabel=f"{side}: N_{k}",
            ylabel=f"{target}s (log scale)",
            yscale="log",
            ylim=(0.7, None),
        )
        found = ", ".join(f"{int(one.max())} {label}" for label, one in values.items())
        caption = (
            f"{side}: the number of {target}s by N_{k}, the number of {query}s that have them "
            f"among their {k} nearest; largest: {found}"
        )
        figures.append((uri, caption))
    return figures


def similarity_plot(own, wrong, measure):
    """(a plot's data URI, its caption): similarities of right and wrong pairs.

    own, wrong: as `pair_similarities` returns them
    """
    pairs = {"right pairs": own, "wrong pairs": wrong}
    # In float64: a narrow range of float32 cannot always be divided into 80 bins.
    values = {label: one[np.isfinite(one)].astype(float) for label, one in pairs.items()}
    uri = plot(
        values,
        np.histogram_bin_edges(np.concatenate(list(values.values())), 80),
        density=True,
        xlabel=f"{measure} similarity",
        ylabel="density",
    )
    means = [
        f"{len(one):,} {label}" + (f": mean {one.mean():.3f}" if len(one) else "")
        for label, one in values.items()
    ]
    return uri, f"Similarities of pairs; {', '.join(means)}"


def plot(values, edges, density=False, **labels):
    """Histograms of {label: (n,)} in one plot, as a PNG in a data URI; labels: for Axes.set."""
    try:
        # Not pyplot, which looks for a display and keeps every figure in memory.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"--report draws with matplotlib, which cannot be loaded ({error}): pip install "
            "matplotlib, or leave --report out"
        ) from error
    figure, content = Figure(figsize=(4.8, 3.3), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for (label, own), colour in zip(values.items(), ("#1f5f99", "#c2551f")):
        if len(own):
            axes.hist(own, edges, density=density, histtype="stepfilled", color=colour, alpha=0.25)
            axes.hist(
                own,
                edges,
                density=density,
                histtype="step",
                color=colour,
                linewidth=1.5,
                label=label,
            )
    axes.set(**labels)
    if any(map(len, values.values())):
        axes.legend(frameon=False)
    figure.savefig(content, format="png", dpi=160)
    return data_uri("image/png", content.getvalue())


def worst_hubs(items, rankings, counts):
    """{side: the targets with the largest N_10, with their counts and queries that they win}.

    A target wrongly wins a query if it is the query's nearest, but not its own.
    """
    hubs = {}
    for side, ranking in zip(SIDES, rankings):
        plain, *corrected = ([sides[side][k] for k in DEPTHS] for sides in counts.values())
        top1, hubs[side] = ranking.top1.numpy(), []
        for number in np.argsort(-plain[-1], kind="stable")[:HUBS].tolist():
            won = np.flatnonzero(top1 == number)
            won = won[~is_own(items.image_of, side, won, number)]
            shown = [count[number] for count in (*plain, *(one[-1] for one in corrected))]
            hubs[side].append(
                {"number": number, "counts": shown, "n_won": len(won), "won": spread(won, WINNINGS)}
            )
    return hubs


def examples(items, rankings, own):
    """{side: a few right and a few wrong queries, with what they retrieve}.

    own: (C,) similarity of each caption with its image
    """
    chosen = {}
    for side, ranking in zip(SIDES, rankings):
        ranks, chosen[side] = ranking.ranks.numpy(), []
        for number in [
            one
            for which in (ranks == 0, ranks > 0)
            for one in spread(np.flatnonzero(which), EXAMPLES)
        ]:
            captions = items.own_captions(number)
            true = items.image_of[number] if side == "t2i" else captions[own[captions].argmax()]
            retrieved = [
                (one, is_own(items.image_of, side, number, one))
                for one in ranking.items[number, :RETRIEVED].tolist()
            ]
            chosen[side].append(
                {"number": number, "rank": ranks[number], "own": true, "retrieved": retrieved}
            )
    return chosen
