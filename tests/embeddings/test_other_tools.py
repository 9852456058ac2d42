"""The table of docs/embeddings.md: what other tools call recall, on one made example.

Their figures come from plain loops over their definitions, and from the packages themselves where
they are installed.
"""

import json

import numpy as np
import pytest
import torch

import compute_results
from tests.helpers.made import ROOT

N, EACH = 100, 5
DEPTHS = (1, 5)


def example():
    """Cosines (100, 500) of made embeddings, rounded to two decimals, so that some are tied."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N, 8))
    captions = images.repeat(EACH, 0) + 1.2 * rng.standard_normal((N * EACH, 8))
    images, captions = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, captions))
    return np.round(images @ captions.T, 2)


def sides(scores):
    """(scores of a query with all items, its own items) for each image, and for each caption."""
    own = [range(EACH * image, EACH * image + EACH) for image in range(N)]
    return (
        list(zip(scores, own)),
        [(column, [caption // EACH]) for caption, column in enumerate(scores.T)],
    )


def first(row, k):
    """The k first items; of equal ones, those that come first."""
    return sorted(range(len(row)), key=lambda item: -row[item])[:k]


def hit(row, own, k):
    """MTEB's cv_recall: whether an own item is among the first k."""
    return any(item in own for item in first(row, k))


def share(row, own, k):
    """MTEB's and torchmetrics' recall: how much of what is right is among the first k."""
    return sum(item in own for item in first(row, k)) / len(own)


def share_above_zero(row, own, k):
    """torchmetrics' recall, in which what scores 0 or less is not found."""
    return sum(item in own and row[item] > 0 for item in first(row, k)) / len(own)


def mean(figure, queries, k):
    return 100 * sum(figure(row, own, k) for row, own in queries) / len(queries)


def both_ways(figure, scores):
    """[i2t R@1, i2t R@5, t2i R@1, t2i R@5] in percent."""
    return [mean(figure, queries, k) for queries in sides(scores) for k in DEPTHS]


def of_pairs(scores):
    """open_clip's: rows of images repeated for each caption, of which one is right."""
    square = scores.repeat(EACH, 0)
    queries = [list(zip(matrix, ([n] for n in range(N * EACH)))) for matrix in (square, square.T)]
    return [mean(hit, own, k) for own in queries for k in DEPTHS]


def logits(scores):
    """As SigLIP makes them of cosines: with a bias far below 0."""
    return 20 * scores - 14


def ours(folder, monkeypatch):
    """["low to high", ...] as compute_results.py finds them."""
    monkeypatch.chdir(folder)
    np.save("s.npy", example())
    compute_results.main(["--sims", "s.npy", "--save_json", "s.json", "--device", "cpu"])
    with open("s.json") as file:
        content = json.load(file)
    high = content["ties"]["counted_for_the_model"]
    return [
        f"{content[side][f'r{k}']:.1f} to {high[side][f'r{k}']:.1f}"
        for side in ("i2t", "t2i")
        for k in DEPTHS
    ]


def test_the_table_of_the_docs_is_right(tmp_path, monkeypatch):
    scores = example()
    expected = {
        "here": ours(tmp_path, monkeypatch),
        "MTEB `cv_recall`": both_ways(hit, scores),
        "MTEB `recall`, torchmetrics": both_ways(share, scores),
        "torchmetrics, scores with SigLIP's bias": both_ways(share_above_zero, logits(scores)),
        "open_clip": of_pairs(scores),
    }
    text = (ROOT / "docs/embeddings.md").read_text(encoding="utf-8")
    for name, values in expected.items():
        cells = [one if isinstance(one, str) else f"{one:.1f}" for one in values]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_loops_are_torchmetrics_recall():
    functional = pytest.importorskip("torchmetrics.functional", reason="not installed")
    for scores, figure in ((example(), share), (logits(example()), share_above_zero)):
        found = [
            100
            * np.mean(
                [
                    float(
                        functional.retrieval_recall(
                            torch.tensor(row),
                            torch.tensor([item in own for item in range(len(row))]),
                            top_k=k,
                        )
                    )
                    for row, own in queries
                ]
            )
            for queries in sides(untied(scores))
            for k in DEPTHS
        ]
        assert found == pytest.approx(both_ways(figure, untied(scores)))


def test_the_loops_are_mteb_s_recall():
    """MTEB computes recall by pytrec_eval."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="not installed")
    found = []
    for queries in sides(untied(example())):
        right = {str(n): {str(item): 1 for item in own} for n, (_, own) in enumerate(queries)}
        run = {
            str(n): {str(item): float(score) for item, score in enumerate(row)}
            for n, (row, _) in enumerate(queries)
        }
        scores = pytrec_eval.RelevanceEvaluator(right, {"recall.1,5"}).evaluate(run).values()
        found += [100 * np.mean([own[f"recall_{k}"] for own in scores]) for k in DEPTHS]
    assert found == pytest.approx(both_ways(share, untied(example())))


def test_the_loops_are_open_clip_s():
    train = pytest.importorskip("open_clip_train.train", reason="not installed")
    scores = torch.from_numpy(untied(example()))
    metrics = train.get_clip_metrics(
        scores.repeat_interleave(EACH, 0), torch.eye(N * EACH).double(), 1.0
    )
    found = [
        100 * metrics[f"{side}_R@{k}"]
        for side in ("image_to_text", "text_to_image")
        for k in DEPTHS
    ]
    assert found[:2] == pytest.approx(of_pairs(untied(example()))[:2])
    # The rows of one image are tied; whichever is first, only one of five can be right.
    hits = both_ways(hit, untied(example()))[2:]
    assert found[2] <= hits[0] / 2 and found[3] == pytest.approx(hits[0])


def untied(scores):
    """The scores with ties broken by the items' places."""
    rows, columns = scores.shape
    return scores - 1e-5 * np.arange(rows)[:, None] - 5e-6 * np.arange(columns)
