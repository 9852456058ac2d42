"""An evaluation as one HTML page: recalls with intervals, hubs before and after correction, examples.

    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data --report report

The page needs no other file and no network: style, plots and photos are inside. In image to text ("i2t") images are
the queries and captions the targets, in text to image ("t2i") the other way round. Captions and file names are other
people's text: all of it goes through `text`.
"""

import base64
import html
import io
import os
import sys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from corrections import in_words
from data import read_ids
from errors import InputError, replacing
from hubness import DEPTHS, occurrences
from images import decode_image

RESAMPLES, SEED = 1000, 0
NEGATIVES = 100_000  # wrong pairs whose similarities are drawn, at most
PAIR_BLOCK = 4096  # pairs compared at a time
HUBS = WINNINGS = 5  # hubs shown in each direction, and of the queries that each wrongly wins
EXAMPLES, RETRIEVED = 4, 3  # right and wrong queries shown in each direction, and the items shown of each
THUMBNAIL = 160  # pixels
LONGEST_TEXT = 300  # characters; more is cut
SIDES = {"i2t": ("image", "caption"), "t2i": ("caption", "image")}  # query, target
STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1d1d1b; --soft: #63615b; --line: #dfddd5; --band: #f3f2ec;
  --good: #17653a; --bad: #a3301c; --note: #fdf3d7; }
@media (prefers-color-scheme: dark) { :root { --paper: #17171a; --ink: #e8e6e1; --soft: #a9a69e; --line: #3a3a40;
  --band: #212126; --good: #84d3a0; --bad: #f59c8a; --note: #3b3218; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt, small, figcaption { color: var(--soft); }
dd, figure { margin: 0; }
small, figcaption { display: block; font-size: .8rem; }
.note { margin-top: 1rem; background: var(--note); padding: .6rem .9rem; border-radius: 6px; }
.box { overflow-x: auto; overflow-wrap: normal; margin: .8rem 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead tr > th { background: var(--band); vertical-align: bottom; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
sub { line-height: 0; }
.figures tr > * + * { text-align: right; white-space: nowrap; }
.item { min-width: 9rem; max-width: 17rem; unicode-bidi: isolate; overflow-wrap: anywhere; }
.item img { display: block; max-width: 100%; border-radius: 4px; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .5rem 1rem; min-width: 22rem;
  margin: .3rem 0 0; padding: 0; list-style: none; }
li .item { min-width: 0; }
li img { max-height: 90px; }
.right, .wrong { font-weight: 600; color: var(--good); }
.wrong { color: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
figure img { box-sizing: border-box; width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
"""


def write_report(options, split, result, hubs, words, outcome):
    """Write <options.report>/report.html.

    result: an Evaluation of one fold with 10 items a query; hubs: its hubness both ways; words: what the corrections'
    bank is; outcome: {method: its parameters, rankings, metrics, hubness}, empty without a correction.
    Raises InputError where options.images does not fit the data, or the page cannot be written.
    """
    rows = {"none": {"parameters": {"i2t": {}, "t2i": {}}, "rankings": result.rankings, "metrics": result.metrics,
                     "hubness": hubs}, **outcome}
    best = max(outcome, key=lambda name: outcome[name]["metrics"].rsum, default=None)
    opt, rankings = result.checkpoint.opt, on_cpu(result.rankings[0])
    counts = {"without correction": as_arrays(occurrences(rankings))}
    if best:
        counts[f"with {best}"] = as_arrays(occurrences(outcome[best]["rankings"][0]))
    image_of = result.dataset.image_of.numpy()
    items = Items(result.dataset.captions, image_of, *find_photos(options.images, split, result))
    own, wrong = pair_similarities(result.checkpoint.similarities(result.images, result.captions), image_of)
    title = text(f"Image-text retrieval: {opt.data_name}, {split}")
    sections = [evaluated_section(options, split, result, words), recalls_section(rows), hubness_section(rows),
                plots_section(counts, own, wrong, opt.measure), hubs_section(items, rankings, counts),
                examples_section(items, rankings, own)]
    # Other people's text is in it: the browser is told to run and to fetch nothing, should any escape the escaping.
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><header><h1>{title}</h1></header><main>
{"".join(sections)}</main></body></html>
"""
    with replacing(os.path.join(options.report, "report.html"), "w", encoding="utf-8") as file:
        file.write(page)


def on_cpu(rankings):
    """The same (i2t Ranking, t2i Ranking) on the CPU."""
    return tuple(type(ranking)(*(part.cpu() for part in ranking)) for ranking in rankings)


# Texts and photos -------------------------------------------------------------------------------

def text(content):
    """Anything as HTML text: escaped, cut where it is long, and without what UTF-8 cannot write."""
    content = str(content)
    content = content if len(content) <= LONGEST_TEXT else content[:LONGEST_TEXT] + "…"
    return html.escape(content.encode("utf-8", "backslashreplace").decode("utf-8"))


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
        """An "image" or "caption" by its number as HTML: the photo, else its name; or the caption's text."""
        photo = thumbnail(self.files[number]) if kind == "image" and self.files[number] else None
        content = text(self.names[number] if kind == "image" else self.captions[number])
        if photo:
            alt = text(f"Photo of image {number}: {self.captions[self.own_captions(number)[0]]}")
            content = f'<img src="{photo}" alt="{alt}">'
        return f'<div class="item">{content}<small>{kind} {number}</small></div>'


@lru_cache(maxsize=256)
def thumbnail(path):
    """A photo as a small JPEG in a data URI; None if it cannot be decoded."""
    try:
        picture = decode_image(path)
    except InputError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return data_uri("image/jpeg", content)


def data_uri(kind, content):
    """A BytesIO's content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def find_photos(folder, split, result):
    """(names, files) of the N images: "" and None where unknown.

    Raw data knows its files. Precomputed features have <split>_ids.txt, a file name for each image or caption, and
    the photos lie in `folder`; with None, only names are looked for.
    """
    opt, n_images = result.checkpoint.opt, len(result.images)
    if hasattr(result.dataset, "image_files"):
        return [os.path.basename(path) for path in result.dataset.image_files], result.dataset.image_files
    ids_split = "dev" if split == "val" else split
    ids_file = os.path.join(opt.data_path, opt.data_name, f"{ids_split}_ids.txt")
    try:
        names = image_names(ids_file, result.dataset)
    except InputError:
        if folder is not None:
            raise
        names = [""] * n_images
    files = [folder and photo_file(folder, name) for name in names]
    if folder is not None and not any(files):
        raise InputError(f"none of the {n_images} photos that {ids_file} names is in {folder}, such as {names[0]!r}: "
                         "check --images")
    if folder is not None and not all(files):
        print(f"note: {n_images - files.count(None)} of {n_images} photos are in {folder}; the others' names are shown",
              file=sys.stderr)
    return names, files


def image_names(path, dataset):
    """The file names of the N images of a PrecompDataset; raises InputError where there are none."""
    if not os.path.exists(path):
        raise InputError(f"{path} is not there: --images needs it, with the file name of each image on a line; add it, "
                         "or leave --images out")
    names, first = read_ids(path), torch.searchsorted(dataset.image_of, torch.arange(dataset.n_images))
    return [names[place] for place in (dataset.row_of[first] if len(names) == len(dataset.images) else first)]


def photo_file(folder, name):
    """The photo's path in `folder`, with .jpg added if need be; None if there is none, or the name reaches outside."""
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        return None
    paths = (os.path.join(folder, name + extension) for extension in ("", ".jpg"))
    return next((path for path in paths if os.path.isfile(path)), None)


# Figures ----------------------------------------------------------------------------------------

def resampled_recalls(ranks, generator):
    """R@1, R@5 and R@10 in percent of RESAMPLES draws of the queries with replacement: (RESAMPLES, rows, 3).

    ranks: (rows, n) 0-based; a row is one ranking of the same n queries, and all rows get the same draws.
    """
    rows, n = ranks.shape
    hits = (ranks.T[:, :, None] < np.array(DEPTHS)).reshape(n, -1).astype(float)
    counts = [np.bincount(generator.integers(n, size=n), minlength=n) @ hits for _ in range(RESAMPLES)]
    return 100 * np.reshape(counts, (RESAMPLES, rows, len(DEPTHS))) / n


def interval(samples):
    """The bounds of the middle 95 % of (RESAMPLES, ...) samples: (2, ...)."""
    return np.percentile(samples, (2.5, 97.5), axis=0)


def pair_similarities(source, image_of):
    """Similarities of each caption with its image (C,), and of a fixed sample of wrong pairs, as arrays.

    source: as `ranking` describes it; image_of: (C,) array.
    """
    n_images, n_captions = source.n_images, source.n_captions
    n_wrong, others = n_captions * (n_images - 1), max(1, n_images - 1)
    wrong = np.random.default_rng(SEED).choice(n_wrong, min(n_wrong, NEGATIVES), replace=False)
    # A wrong pair's number tells its caption, and how many images after the right one its image is.
    pairs, found = [(np.arange(n_captions), 0), (wrong // others, 1 + wrong % others)], []
    for chosen, further in pairs:
        numbers = torch.from_numpy(np.stack([(image_of[chosen] + further) % n_images, chosen]))
        found.append(torch.cat([source.pairs(*block).cpu() for block in numbers.split(PAIR_BLOCK, 1)]).numpy())
    return found


def as_arrays(counts):
    """N_k as `hubness.occurrences` gives it, as arrays."""
    return {side: {k: own.numpy() for k, own in depths.items()} for side, depths in counts.items()}


def is_own(image_of, side, query, target):
    """Whether a target belongs to a query, by their numbers; either may be an array. image_of: (C,) array."""
    image, caption = (query, target) if side == "i2t" else (target, query)
    return image_of[caption] == image


def spread(numbers, n):
    """At most n of an array's numbers, evenly spaced."""
    return numbers[np.linspace(0, len(numbers) - 1, min(n, len(numbers))).round().astype(int)].tolist()


# Sections ---------------------------------------------------------------------------------------

def section(heading, *parts):
    """A section of the page; heading and parts are HTML."""
    return f"<section><h2>{heading}</h2>\n" + "\n".join(parts) + "</section>\n"


def table(label, head, rows, kind=""):
    """A table of HTML cells in a box that scrolls where the screen is narrow; a row's first cell is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
                   for first, *rest in rows)
    return (f'<div class="box" role="region" aria-label="{label}" tabindex="0"><table class="{kind}">'
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>")


def evaluated_section(options, split, result, words):
    """What was evaluated."""
    opt = result.checkpoint.opt
    facts = {"Checkpoint": options.model_path, "Trained in": opt.logger_name,
             "Data": os.path.join(opt.data_path, opt.data_name), "Split": split,
             "Size": f"{len(result.images)} images, {len(result.captions)} captions", "Similarity": opt.measure,
             "Correction": words or "none"}
    lines = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    note = ('<p class="note" role="note"><strong>Transductive.</strong> The corrections on this page have seen all '
            "evaluated queries together. Their figures do not compare with those of models or corrections that see one "
            "query at a time.</p>" if words.startswith("transductive") else "")
    return section("What was evaluated", f"<dl>{lines}</dl>", note)


def recalls_section(rows):
    """Recalls with their intervals, a row without correction and one for each method."""
    generator = np.random.default_rng(SEED)
    i2t, t2i = (resampled_recalls(np.stack([row["rankings"][0][side].ranks.cpu() for row in rows.values()]), generator)
                for side in (0, 1))
    rsum = i2t.sum(2) + t2i.sum(2)
    bounds = interval(np.concatenate([i2t, t2i, rsum[:, :, None]], 2))
    gains = interval(rsum - rsum[:, :1])
    base, lines = rows["none"]["metrics"].rsum, []
    for place, (name, row) in enumerate(rows.items()):
        metrics = row["metrics"]
        figures = zip([*metrics.i2t[:3], *metrics.t2i[:3], metrics.rsum], *bounds[:, place])
        cells = [f"{value:.1f}<small>{low:.1f} to {high:.1f}</small>" for value, low, high in figures]
        gain = "{:+.1f}<small>{:+.1f} to {:+.1f}</small>".format(metrics.rsum - base, *gains[:, place])
        lines.append([f"{name}<small>{in_words(row['parameters'])}</small>", *cells, gain if place else ""])
    head = ["correction", *(f"{side} R@{k}" for side in SIDES for k in DEPTHS), "rsum", "rsum, gain"]
    return section(
        "Recalls", "<p>Percent of queries with an own item among the first 1, 5 and 10. i2t: images retrieve captions; "
        "t2i: captions retrieve images; rsum: the sum of all six. Equal scores count against the model. Below each "
        f"figure is its 95 % interval over {RESAMPLES} resamples of the queries (bootstrap, seed {SEED}; images and "
        "captions are drawn apart). A gain over none is taken on the same resamples.</p>",
        table("Recalls", *((head, lines) if len(rows) > 1 else (head[:-1], [lines[0][:-1]])), "figures"))


def hubness_section(rows):
    """How unevenly targets are retrieved: at all depths without correction, at the last one with each."""
    lines = []
    for name, row in rows.items():
        for side in SIDES:
            for k in DEPTHS if name == "none" else DEPTHS[-1:]:
                hubs = row["hubness"][side][k]
                lines.append([f"{name}, {side}", k, f"{hubs.skewness:.2f}", f"{hubs.anti_hubs:.1%}",
                              f"{hubs.top_share:.1%}", f"{hubs.robin_hood:.1%}", f"{hubs.largest:g}"])
    head = ["correction", "k", "skewness", "anti-hubs", "top 1 % take", "Robin Hood", "largest N<sub>k</sub>"]
    return section(
        "Hubness", "<p>N<sub>k</sub> of a target: the number of queries that have it among their k nearest; targets "
        "are captions in i2t, images in t2i. Anti-hubs: targets with N<sub>k</sub> = 0. Top 1 % take: the share of all "
        "places that the top 1 % of targets have. Robin Hood: the share of places that would have to move for all "
        "targets to have as many.</p>",
        table("Hubness", head, lines, "figures"))


def plots_section(counts, own, wrong, measure):
    """Histograms of N_10 both ways, {label: occurrences}, and the similarities of right and wrong pairs."""
    figures, k = [], DEPTHS[-1]
    for side, (query, target) in SIDES.items():
        values = {label: sides[side][k] for label, sides in counts.items()}
        largest = max(int(one.max()) for one in values.values())
        width = -(-(largest + 1) // 60)
        uri = plot(values, np.arange(0, largest + width + 1, width) - 0.5, xlabel=f"{side}: N_{k}",
                   ylabel=f"{target}s (log scale)", yscale="log", ylim=(0.7, None))
        figures.append((uri, f"{side}: the number of {target}s by N_{k}, the number of {query}s that have them among "
                        f"their {k} nearest; largest: "
                        + ", ".join(f"{int(one.max())} {label}" for label, one in values.items())))
    values = {"right pairs": own[np.isfinite(own)], "wrong pairs": wrong[np.isfinite(wrong)]}
    uri = plot(values, np.histogram_bin_edges(np.concatenate(list(values.values())), 80), density=True,
               xlabel=f"{measure} similarity", ylabel="density")
    figures.append((uri, "Similarities of pairs; " + ", ".join(
        f"{len(one):,} {label}" + (f": mean {one.mean():.3f}" if len(one) else "") for label, one in values.items())))
    figures = [f'<figure><img src="{uri}" alt="Plot. {words}"><figcaption>{words}.</figcaption></figure>'
               for uri, words in figures]
    best = [label.removeprefix("with ") for label in counts][1:]
    return section("Distributions", *[f"<p>The correction shown is {name}, the best rsum on this page.</p>"
                                      for name in best], f'<div class="plots">{"".join(figures)}</div>')


def plot(values, edges, density=False, **labels):
    """Histograms on one axis, {label: (n,)}, as a PNG in a data URI; labels: for Axes.set."""
    try:
        from matplotlib.figure import Figure  # not pyplot: that looks for a display, and keeps what it drew
    except ImportError as error:
        raise InputError(f"--report draws with matplotlib, which cannot be loaded ({error}): pip install matplotlib, "
                         "or leave --report out") from error
    figure, content = Figure(figsize=(4.8, 3.3), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for (label, own), colour in zip(values.items(), ("#1f5f99", "#c2551f")):
        if len(own):
            axes.hist(own, edges, density=density, histtype="stepfilled", color=colour, alpha=0.25)
            axes.hist(own, edges, density=density, histtype="step", color=colour, linewidth=1.5, label=label)
    axes.set(**labels)
    if any(map(len, values.values())):
        axes.legend(frameon=False)
    figure.savefig(content, format="png", dpi=160)
    return data_uri("image/png", content)


def hubs_section(items, rankings, counts):
    """The targets with the largest N_10, and queries that they wrongly win."""
    parts = ["<p>The targets with the largest N<sub>10</sub> without correction, and queries that they win wrongly: "
             "these have the hub as their nearest, though it is not their own.</p>"]
    for (side, (query, target)), ranking in zip(SIDES.items(), rankings):
        plain, *corrected = ([sides[side][k] for k in DEPTHS] for sides in counts.values())
        top1, lines = ranking.top1.numpy(), []
        for number in np.argsort(-plain[-1], kind="stable")[:HUBS].tolist():
            won = np.flatnonzero(top1 == number)
            won = won[~is_own(items.image_of, side, won, number)]
            queries = "".join(f"<li>{items.show(query, one)}</li>" for one in spread(won, WINNINGS))
            more = f", {WINNINGS} of them" if len(won) > WINNINGS else ""
            lines.append([items.show(target, number), *(count[number] for count in plain),
                          *(one[-1][number] for one in corrected), f"{len(won)}{more}<ul>{queries}</ul>"])
        head = [target, *(f"N<sub>{k}</sub>" for k in DEPTHS),
                *(f"N<sub>10</sub> {label}" for label in list(counts)[1:]), f"{query}s wrongly won"]
        parts += [f"<h3>{side}: {target}s that are hubs</h3>", table(f"Hubs, {side}", head, lines)]
    return section("The worst hubs", *parts)


def examples_section(items, rankings, own):
    """A few queries each way, right ones and wrong ones, with what they retrieve; own: similarities (C,)."""
    parts = [f"<p>Up to {EXAMPLES} right and {EXAMPLES} wrong queries each way, evenly spaced in the split, without "
             "correction. Of an image's own captions, the nearest is shown.</p>"]
    for (side, (query, target)), ranking in zip(SIDES.items(), rankings):
        ranks, lines = ranking.ranks.numpy(), []
        for number in [one for chosen in (ranks == 0, ranks > 0) for one in spread(np.flatnonzero(chosen), EXAMPLES)]:
            captions = items.own_captions(number)
            true = items.image_of[number] if side == "t2i" else captions[own[captions].argmax()]
            lines.append([items.show(query, number), f"{mark(ranks[number] == 0)} own at rank&nbsp;{ranks[number] + 1}",
                          items.show(target, true)])
            lines[-1] += [mark(is_own(items.image_of, side, number, one)) + items.show(target, one)
                          for one in ranking.items[number, :RETRIEVED].tolist()]
        head = [f"query: {query}", "result", f"own {target}", "first", "second", "third"]
        parts += [f"<h3>{side}: {query}s retrieve {target}s</h3>", table(f"Examples, {side}", head, lines)]
    return section("Examples", *parts)


def mark(right):
    """Right or wrong, in words and in colour."""
    return '<div class="right">right</div>' if right else '<div class="wrong">wrong</div>'
