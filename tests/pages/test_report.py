"""The report: its figures against plain loops, its hubs and photos, and that it is safe to open."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError

from data import ImageDataset, PrecompDataset
from evaluation import Checkpoint, Evaluation
from inputs.tokenizer import SPECIAL_WORDS
from loss import SIMILARITIES
from pages import report
from retrieval.hubness import DEPTHS, hubness_both_ways
from retrieval.metrics import metrics_of
from retrieval.ranking import Ranking, rank_both_ways
from retrieval.similarity import SOURCES
from runtime.errors import InputError
from tests.helpers.made import captions_of, tree, write_image
from vocab import vocabulary_of

N_IMAGES = 12  # enough that ten items a query leave some out


def five_each(n_images, ids_file=None):
    """The attributes of a data set with five captions per image, with the names in `file` if given."""
    names = (
        ids_file.read_text(encoding="utf-8").split("\n")[:n_images]
        if ids_file and ids_file.exists()
        else None
    )
    return {"n_images": n_images, "image_of": torch.arange(5 * n_images) // 5, "names": names}


def evaluation(images, captions, texts, measure="cosine", top=10, split="test", **paths):
    """An Evaluation of given embeddings, as compute_results.py makes it."""
    opt = SimpleNamespace(
        **{
            "data_path": "data",
            "data_name": "own_precomp",
            "measure": measure,
            "cross_attn": None,
            "logger_name": "runs/own",
            **paths,
        }
    )
    rankings = rank_both_ways(images, captions, measure, top)
    ids_file = Path(opt.data_path) / opt.data_name / f"{split}_ids.txt"
    dataset = SimpleNamespace(captions=texts, images=images, **five_each(len(images), ids_file))
    checkpoint = Checkpoint(None, opt, None)
    return Evaluation(
        checkpoint,
        dataset,
        images,
        captions,
        [rankings],
        [metrics_of(rankings)],
        metrics_of(rankings),
    )


def drawn(measure="cosine", seed=0, **paths):
    """An Evaluation of random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    images, captions = (
        torch.nn.functional.normalize(torch.randn(n, 4, generator=generator))
        for n in (N_IMAGES, 5 * N_IMAGES)
    )
    return evaluation(
        images,
        captions,
        [text for image in range(N_IMAGES) for text in captions_of(image)],
        measure,
        **paths,
    )


def outcome_of(result):
    """The outcome of a correction that has the given Evaluation's figures."""
    return {
        "parameters": {"i2t": {"k": 10}, "t2i": {"k": 5}},
        "rankings": tuple(result.rankings),
        "metrics": result.metrics,
        "hubness": hubness_both_ways(result.rankings[0]),
    }


def page_of(folder, result, words="", outcome=None, images=None, plots=False):
    """The page's text; plots take the most time, and are left empty unless asked for."""
    options = SimpleNamespace(
        report=str(folder), images=images and str(images), model_path="runs/own/model.pth.tar"
    )
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setattr(report, "plot", lambda *_, **__: "data:image/png;base64,")
        report.write_report(
            options, "test", result, hubness_both_ways(result.rankings[0]), words, outcome or {}
        )
    return (folder / "report.html").read_text(encoding="utf-8")


def rows_of(page, label):
    """The cells' HTML of a table's rows, by its label."""
    body = page.split(f'aria-label="{label}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("</tr>")[:-1]
    ]


# Figures ----------------------------------------------------------------------------------------


def row_of(i2t, t2i):
    ranks = [Ranking(torch.as_tensor(one), None) for one in (i2t, t2i)]
    return {"rankings": [ranks], "metrics": metrics_of(ranks), "parameters": {"i2t": {}, "t2i": {}}}


def test_intervals_are_those_of_a_plain_loop_over_images_with_their_captions():
    drawn_ranks = np.random.default_rng(3)
    image_of = np.repeat(np.arange(30), drawn_ranks.integers(1, 4, 30))
    rows = {
        name: row_of(drawn_ranks.integers(0, 15, 30), drawn_ranks.integers(0, 15, len(image_of)))
        for name in ("none", "csls")
    }
    draws = np.random.default_rng(report.SEED).multinomial(
        30, np.full(30, 1 / 30), report.RESAMPLES
    )
    samples = []
    for counts in draws:  # one draw for both rows: their difference is paired
        images = [image for image, count in enumerate(counts) for _ in range(count)]
        captions = [caption for image in images for caption in np.flatnonzero(image_of == image)]
        samples.append(
            [
                [
                    sum(100 * int(side.ranks[query] < k) for query in queries) / len(queries)
                    for side, queries in zip(row["rankings"][0], (images, captions))
                    for k in (1, 5, 10)
                ]
                for row in rows.values()
            ]
        )
    samples = np.array(samples)
    samples = np.concatenate([samples, samples.sum(2, keepdims=True)], 2)
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    gain = np.percentile(samples[:, 1, 6] - samples[:, 0, 6], (2.5, 97.5))
    lines = report.recalls(rows, image_of)
    np.testing.assert_allclose(
        [[(one.low, one.high) for one in line["figures"]] for line in lines],
        np.stack([low, high], 2),
        atol=1e-9,
    )
    np.testing.assert_allclose(lines[1]["gain"][1:], gain, atol=1e-9)


@pytest.mark.parametrize("rank, recall", [(0, 100.0), (10, 0.0)])
def test_recalls_that_cannot_vary_have_no_width(rank, recall):
    (line,) = report.recalls(
        {"none": row_of(np.full(7, rank), np.full(35, rank))}, np.repeat(np.arange(7), 5)
    )
    assert [tuple(one) for one in line["figures"][:6]] == [(recall,) * 3] * 6


@pytest.mark.parametrize(
    "opt, words",
    [
        ({"cross_attn": None, "measure": "order"}, "order"),
        ({"cross_attn": "t2i", "measure": "cosine"}, "cross attention (t2i)"),
        ({"cross_attn": "i2t", "measure": "mean of i2t, t2i"}, "mean of i2t, t2i"),
    ],
)
def test_the_similarity_is_named(opt, words):
    assert report.measure_of(SimpleNamespace(**opt)) == words


def test_similarities_that_hardly_differ_are_drawn():
    own = np.float32(1) - np.arange(20, dtype=np.float32) * np.float32(6e-8)
    counts = {"with none": {side: {10: np.arange(3)} for side in report.SIDES}}
    assert len(report.hub_plots(counts)) == 2
    assert report.similarity_plot(own, own, "cosine")


def test_recalls_and_gains_of_the_page(tmp_path):
    plain, better = drawn(), drawn(seed=1)
    lines = rows_of(
        page_of(tmp_path, plain, "bank: train", {"csls": outcome_of(better)}), "Recalls"
    )
    figures = [[cell.split("<small>")[0] for cell in line] for line in lines]
    expected = [
        [*one.metrics.i2t[:3], *one.metrics.t2i[:3], one.metrics.rsum] for one in (plain, better)
    ]
    assert figures[0] == ["none", *(f"{value:.1f}" for value in expected[0]), ""]
    gain = better.metrics.rsum - plain.metrics.rsum
    assert figures[1] == ["csls", *(f"{value:.1f}" for value in expected[1]), f"{gain:+.1f}"]
    assert lines[1][0] == "csls<small>i2t k=10, t2i k=5</small>"


def test_the_same_ranking_gains_nothing(tmp_path):
    lines = rows_of(
        page_of(tmp_path, drawn(), "bank: train", {"nnn": outcome_of(drawn())}), "Recalls"
    )
    assert lines[1][-1] == "+0.0<small>+0.0 to +0.0</small>"


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("limit", [100_000, 50])
def test_similarities_of_right_and_wrong_pairs(measure, limit, monkeypatch):
    monkeypatch.setattr(report, "NEGATIVES", limit)
    monkeypatch.setattr(report, "PAIR_BLOCK", 7)
    result = drawn(measure)
    own, wrong = report.pair_similarities(
        SOURCES[measure](result.images, result.captions), np.arange(5 * N_IMAGES) // 5
    )
    matrix = SIMILARITIES[measure](result.images, result.captions)
    expected = {
        right: [
            float(matrix[i, c])
            for c in range(5 * N_IMAGES)
            for i in range(N_IMAGES)
            if (i == c // 5) == right
        ]
        for right in (True, False)
    }
    np.testing.assert_allclose(own, expected[True], rtol=1e-4, atol=1e-6)
    assert len(wrong) == min(limit, len(expected[False]))
    if limit > len(wrong):
        np.testing.assert_allclose(np.sort(wrong), np.sort(expected[False]), rtol=1e-4, atol=1e-6)
    assert all(
        min(abs(value - other) for other in expected[False]) < 1e-5 for value in wrong.tolist()
    )


@pytest.mark.parametrize("n, chosen", [(0, []), (2, [0, 1]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_examples_are_evenly_spaced(n, chosen):
    assert report.spread(np.arange(n), 4) == chosen


# Hubs and examples ------------------------------------------------------------------------------


@pytest.fixture
def hub():
    """An Evaluation in which caption 7 (of image 1) wins every image, and image 2 every caption, at the top only."""
    result = drawn()
    i2t, t2i = result.rankings[0]
    captions, images = i2t.items.clone(), t2i.items.clone()
    for items, target in ((captions, 7), (images, 2)):
        items[:] = torch.where(items == target, items[:, :1], items)
        items[:, 0] = target
    ranks = (
        (torch.arange(N_IMAGES) != 1).long() * 3,
        (torch.arange(5 * N_IMAGES) // 5 != 2).long() * 4,
    )
    rankings = Ranking(ranks[0], captions), Ranking(ranks[1], images)
    texts = [f"words {number}" for number in range(5 * N_IMAGES)]
    return result._replace(
        rankings=[rankings],
        metrics=metrics_of(rankings),
        folds=[metrics_of(rankings)],
        dataset=SimpleNamespace(captions=texts, images=result.images, **five_each(N_IMAGES)),
    )


@pytest.mark.parametrize(
    "side, query, target, number, n, own",
    [
        ("i2t", "image", "caption", 7, N_IMAGES, {1}),
        ("t2i", "caption", "image", 2, 5 * N_IMAGES, set(range(10, 15))),
    ],
)
def test_the_worst_hub_and_the_queries_it_wrongly_wins(
    hub, tmp_path, side, query, target, number, n, own
):
    first = rows_of(page_of(tmp_path, hub, "bank", {"csls": outcome_of(drawn())}), f"Hubs, {side}")[
        0
    ]
    assert f"<small>{target} {number}</small>" in first[0] and (
        target == "image" or "words 7<" in first[0]
    )
    assert first[1:4] == [str(n)] * 3
    other = drawn().rankings[0][("i2t", "t2i").index(side)].items
    assert first[4] == str(int((other == number).sum()))  # N_10 after the correction
    won = [int(found) for found in re.findall(rf"{query} (\d+)</small>", first[5])]
    assert (
        first[5].startswith(f"{n - len(own)}, 5 of them") and len(won) == 5 and not own & set(won)
    )


def test_the_five_largest_hubs_come_in_order(tmp_path):
    result = drawn()
    lines = rows_of(page_of(tmp_path, result), "Hubs, i2t")
    counts = [
        [sum(target in items[:k] for items in result.rankings[0][0].items.tolist()) for k in DEPTHS]
        for target in range(5 * N_IMAGES)
    ]
    assert [int(line[3]) for line in lines] == sorted(
        (count[-1] for count in counts), reverse=True
    )[:5]
    for line in lines:
        number = int(re.search(r"caption (\d+)<", line[0])[1])
        assert [int(cell) for cell in line[1:4]] == counts[number]
        won = [
            image
            for image, items in enumerate(result.rankings[0][0].items.tolist())
            if items[0] == number and number // 5 != image
        ]  # fewer than six: all are shown
        assert line[4].split("<ul>")[0].strip() == str(len(won))
        assert [int(image) for image in re.findall(r"image (\d+)</small>", line[4])] == won


def test_hubness_says_direction_and_depth(tmp_path):
    result = drawn()
    lines = rows_of(
        page_of(tmp_path, result, "bank", {"csls": outcome_of(drawn(seed=1))}), "Hubness"
    )
    assert [line[:2] for line in lines] == [
        *(["none, " + side, str(k)] for side in ("i2t", "t2i") for k in DEPTHS),
        ["csls, i2t", "10"],
        ["csls, t2i", "10"],
    ]
    hubs = hubness_both_ways(result.rankings[0])["t2i"][5]
    assert lines[4][2:] == [
        f"{hubs.skewness:.2f}",
        f"{hubs.anti_hubs:.1%}",
        f"{hubs.top_share:.1%}",
        f"{hubs.robin_hood:.1%}",
        f"{hubs.hub_occurrence:.1%}",
        str(hubs.largest),
    ]


@pytest.mark.parametrize("side, n_own", [("i2t", 1), ("t2i", 4)])
def test_examples_show_right_and_wrong_queries(hub, tmp_path, side, n_own):
    lines = rows_of(page_of(tmp_path, hub), f"Examples, {side}")
    results = [re.sub("<[^>]*>", "", line[1]).replace("&nbsp;", " ") for line in lines]
    assert (
        results
        == ["right own at rank 1"] * n_own + [f"wrong own at rank {4 if side == 'i2t' else 5}"] * 4
    )
    assert [">right<" in line[3] for line in lines] == [True] * n_own + [False] * 4
    assert all(">wrong<" in line[3] for line in lines[n_own:])


def test_the_nearest_own_caption_is_shown(tmp_path):
    result = drawn()
    for line in rows_of(page_of(tmp_path, result), "Examples, i2t"):
        image = int(re.search(r"image (\d+)<", line[0])[1])
        similarities = (result.captions[5 * image : 5 * image + 5] @ result.images[image]).tolist()
        assert f"caption {5 * image + similarities.index(max(similarities))}<" in line[2]


def test_the_best_method_is_shown_and_named(tmp_path):
    methods = {f"method{seed}": outcome_of(drawn(seed=seed)) for seed in (1, 2, 3)}
    best = max(methods, key=lambda name: methods[name]["metrics"].rsum)
    page = page_of(tmp_path, drawn(), "bank", methods)
    assert f"The correction shown is {best}, which has the best rsum on this page" in page


@pytest.mark.parametrize(
    "words, labelled",
    [
        ("transductive: the bank is the evaluated queries themselves", True),
        ("bank: train, 4 images, 20 captions", False),
    ],
)
def test_a_transductive_bank_is_labelled(tmp_path, words, labelled):
    page = page_of(tmp_path, drawn(), words, {"csls": outcome_of(drawn())})
    assert (">Transductive.<" in page) == labelled and f"<dd>{words}</dd>" in page


# Safety -----------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nor is its template looked for where the command is given
    page = page_of(tmp_path, drawn(), "bank", {"csls": outcome_of(drawn(seed=1))}, plots=True)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]*)", page)
    assert len(sources) == 3 and all(
        source.startswith("data:image/png;base64,iVBOR") for source in sources
    )
    assert page.count("<img") == page.count(" alt=")
    assert (
        page.count(
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">"
        )
        == 1
    )


@pytest.mark.parametrize(
    "caption, shown",
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ('" onload="x', "&#34; onload=&#34;x"),
        ("half \ud83d a pair", "half \\ud83d a pair"),
        ("x" * 20_000, "x" * 300 + "…<"),
    ],
)
def test_captions_are_text(tmp_path, caption, shown):
    result = drawn()
    result.dataset.captions[:] = [caption] * (5 * N_IMAGES)
    page = page_of(tmp_path, result)
    assert shown in page and caption not in page


class Parser(HTMLParser):
    """Collects the names of tags, the alt texts, and the texts by the tag before them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.alts, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.alts += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.texts.append((self.tags[-1:], data))


def test_names_are_text(tmp_path):
    evil = "<b title=\"x\">'&amp;' {{ 7 * 7 }} {% if %} {#"
    folder = tmp_path / "data" / evil
    folder.mkdir(parents=True)
    lines = ["0.png", *(f"{number} {evil}" for number in range(1, N_IMAGES))]
    (folder / "test_ids.txt").write_text("\n".join(lines), encoding="utf-8")
    write_image(tmp_path / "photos" / "0.png", 0)
    result = drawn(data_path=str(tmp_path / "data"), data_name=evil, logger_name=evil)
    result.dataset.captions[:] = [f"caption {evil}"] * (5 * N_IMAGES)
    found = Parser(
        page_of(
            tmp_path,
            result,
            f"bank: {evil}",
            {f"csls {evil}": outcome_of(drawn(seed=1))},
            images=tmp_path / "photos",
        )
    )
    assert set(found.tags) & {"b", "script"} == set() and found.tags.count("img") == len(found.alts)
    for tag, text in (
        ("title", f"Image-text retrieval: {evil}, test"),
        ("h1", f"Image-text retrieval: {evil}, test"),
        ("dd", evil),
        ("dd", str(folder)),
        ("dd", f"bank: {evil}"),
        ("div", f"caption {evil}"),
        ("div", f"11 {evil}"),
        ("th", f"csls {evil}"),
    ):
        assert ([tag], text) in found.texts
    assert f"Photo of image 0: caption {evil}" in found.alts


def test_a_page_that_lacks_a_figure_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "examples", lambda *_: {})
    with pytest.raises(UndefinedError):
        page_of(tmp_path / "out", drawn())
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("images", [1, 2])
def test_tiny_splits(tmp_path, images):
    result = drawn()
    result = evaluation(
        result.images[:images], result.captions[: 5 * images], result.dataset.captions[: 5 * images]
    )
    assert len(rows_of(page_of(tmp_path, result, plots=True), "Hubs, t2i")) == images


def test_embeddings_that_are_not_finite_are_shown(tmp_path):
    result = drawn()
    result = evaluation(result.images * torch.nan, result.captions, result.dataset.captions)
    assert "; 0 right pairs, 0 wrong pairs." in page_of(tmp_path, result, plots=True)


# Photos -----------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """A data folder with an ids file, and photos of all images but the last, which is broken."""
    folder = tmp_path / "data" / "own_precomp"
    folder.mkdir(parents=True)
    (folder / "test_ids.txt").write_text(
        "".join(f"{number}.png\n" for number in range(N_IMAGES)), encoding="utf-8"
    )
    for number in range(N_IMAGES - 1):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "photos" / f"{N_IMAGES - 1}.png").write_bytes(b"no picture")
    return tmp_path


def found(root, split="test"):
    """(names, files) for the photos of `root`."""
    result = drawn(data_path=str(root / "data"), split={"val": "dev"}.get(split, split))
    return report.find_photos(str(root / "photos"), split, result.checkpoint.opt, result.dataset)


def test_photos_are_inlined_with_a_text_and_broken_ones_named(photos):
    result = drawn(data_path=str(photos / "data"))
    page = page_of(photos / "out", result, images=photos / "photos")
    shown = {
        number: set(
            re.findall(
                f'<div class="item">((?:(?!<div).)*)<small>image {number}</small></div>', page
            )
        )
        for number in (3, 11)
    }
    (photo,) = shown[3]
    alt = f"Photo of image 3: {captions_of(3)[0]}"
    assert re.fullmatch(f'<img src="data:image/jpeg;base64,/9j/[^"]*" alt="{alt}">', photo)
    assert shown[11] == {"11.png"}


def test_names_may_lack_the_ending(photos):
    (photos / "data" / "own_precomp" / "test_ids.txt").write_text(
        "\n".join(map(str, range(N_IMAGES)))
    )
    for path in (photos / "photos").iterdir():
        path.rename(path.with_suffix(".jpg"))
    names, files = found(photos)
    assert names[3] == "3" and all(files) and files[3].endswith("3.jpg")


def test_val_is_dev(photos):
    folder = photos / "data" / "own_precomp"
    (folder / "test_ids.txt").rename(folder / "dev_ids.txt")
    assert found(photos, "val")[0][2] == "2.png"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "photos/../../secret.png",
        "..\\secret.png",
        "{root}/secret.png",
        "a\0b.png",
        "",
        "x" * 5000,
    ],
)
def test_a_photo_outside_the_folder_is_not_read(photos, name):
    write_image(photos / "secret.png", 1)
    name = name.format(root=photos)
    names = [name, *(f"{number}.png" for number in range(1, N_IMAGES))]
    (photos / "data" / "own_precomp" / "test_ids.txt").write_text(
        "\n".join(names), encoding="utf-8"
    )
    names, files = found(photos)
    assert names[0] == name and files[0] is None and files[1] is not None


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda root: (root / "data" / "own_precomp" / "test_ids.txt").unlink(),
            r"test_ids\.txt is not there: .*leave --images out$",
        ),
        (
            lambda root: (root / "photos").rename(root / "elsewhere"),
            r"^none of the 12 photos that .*test_ids\.txt names is in .*photos, such as '0\.png': check --images$",
        ),
    ],
)
def test_photos_that_do_not_fit_are_an_error(photos, change, sentence):
    change(photos)
    with pytest.raises(InputError, match=sentence):
        page_of(photos / "out", drawn(data_path=str(photos / "data")), images=photos / "photos")
    assert not (photos / "out").exists()


def test_without_photos_no_ids_file_is_needed(photos):
    (photos / "data" / "own_precomp" / "test_ids.txt").unlink()
    page = page_of(photos / "out", drawn(data_path=str(photos / "data")))
    assert '<div class="item"><small>image ' in page and "data:image/jpeg" not in page


@pytest.mark.parametrize("rows", [3, 15])  # a row an image, or a caption
def test_dev_may_be_evaluated_in_part(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("data.DEV_CAPTIONS", 10)
    np.save(tmp_path / "dev_ims.npy", np.ones((rows, 2), np.float32))
    (tmp_path / "dev_caps.txt").write_text("a dog\n" * 15)
    (tmp_path / "dev_ids.txt").write_text(
        "".join(f"{number * 3 // rows}.png\n" for number in range(rows))
    )
    dataset = PrecompDataset(str(tmp_path), "dev", vocabulary_of([*SPECIAL_WORDS, "a"]))
    result = drawn(data_path=str(tmp_path.parent), data_name=tmp_path.name)
    found = report.find_photos(None, "dev", result.checkpoint.opt, dataset)
    assert found == (["0.png", "1.png"], [None, None])


def test_raw_data_knows_its_photos(tmp_path):
    write_image(tmp_path / "0.png", 0)
    dataset = ImageDataset(
        [str(tmp_path / "0.png")], ["a dog"] * 5, [0] * 5, vocabulary_of([*SPECIAL_WORDS, "a"])
    )
    opt = drawn().checkpoint.opt
    assert report.find_photos(None, "test", opt, dataset) == (["0.png"], [str(tmp_path / "0.png")])
    with pytest.raises(InputError, match="own_precomp is of photos, .* leave --images out"):
        report.find_photos(str(tmp_path), "test", opt, dataset)
