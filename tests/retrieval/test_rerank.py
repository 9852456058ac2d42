"""Reranking, against a plain loop that sorts each query's shortlist."""

import json

import numpy as np
import pytest
import torch

import compute_results
from retrieval.ranking import rank_shifted
from retrieval.rerank import candidate_scores, rerank
from retrieval.similarity import Cosine, Order
from tests.helpers import loops
from tests.helpers.made import tree
from tests.retrieval.test_ensemble import BOTH, figures, json_of, matrices, paths  # noqa: F401 (matrices: a fixture)
from tests.test_compute_results import approximately, as_dict, mean_of
from tests.test_regions import refused


def drawn(n, seed, source=Cosine, whole=False):
    """A source of n images with five captions each, its matrix, and image_of.

    whole: of whole numbers, full of ties.
    """
    rng = np.random.default_rng(seed)
    images, captions = (
        (rng.integers(-1, 2, (rows, 5)) if whole else rng.standard_normal((rows, 5))).astype(float)
        for rows in (n, 5 * n)
    )
    source = source(images, captions)
    return (
        source,
        source.tile(slice(0, n), slice(0, 5 * n), (n, 5 * n)).clone().numpy(),
        torch.arange(5 * n) // 5,
    )


def loop_rank(fast, slow, own, k):
    """The rank of one query's best own item, and its k first items.

    Fast and slow scores of all, own items' numbers.
    """
    shortlist = np.argsort(-fast, kind="stable")[:k]
    order = [int(item) for item in sorted(shortlist, key=lambda item: -slow[item])]
    mine = [item for item in order if item in own]
    first = sum(
        loops.tied_or_better(score, max(fast[item] for item in own))
        for item, score in enumerate(fast)
        if item not in own
    )
    if first < k:
        best = max(slow[item] for item in mine)
        return sum(
            loops.tied_or_better(slow[item], best) for item in order if item not in own
        ), order
    return first, order


def loop_ranks(fast, slow, k):
    """((i2t ranks, items), (t2i ranks, items)) of matrices with five captions an image."""
    n = len(fast)
    to_text = [loop_rank(fast[i], slow[i], set(range(5 * i, 5 * i + 5)), k) for i in range(n)]
    to_image = [loop_rank(fast[:, c], slow[:, c], {c // 5}, k) for c in range(5 * n)]
    return [tuple(zip(*side)) for side in (to_text, to_image)]


# Functions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Cosine, Order])
def test_candidates_scores_are_those_of_the_matrix(source):
    source, matrix, _ = drawn(6, 0, source)
    captions = torch.tensor([[3, 29, 0], [7, 7, 1]])
    found = candidate_scores(source, "i2t", captions, torch.tensor([4, 2]))
    np.testing.assert_allclose(
        found, [[matrix[4, c] for c in (3, 29, 0)], [matrix[2, c] for c in (7, 7, 1)]]
    )
    images = torch.arange(60).view(30, 2) % 6
    found = candidate_scores(source, "t2i", images)
    np.testing.assert_allclose(
        found, [[matrix[i, c] for i in row] for c, row in enumerate(images.tolist())]
    )


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_ranks_and_items_are_a_plain_loop_s(k):
    (fast, fast_matrix, image_of), (slow, slow_matrix, _) = drawn(12, 1), drawn(12, 2, Order)
    (shortlists,) = rank_shifted(fast, top=12, image_of=image_of)
    found = rerank(slow, shortlists, k, image_of)
    for side, (ranks, items), shortlist in zip(
        found, loop_ranks(fast_matrix, slow_matrix, k), shortlists
    ):
        assert side.ranks.tolist() == list(ranks)
        assert [row[:k] for row in side.items.tolist()] == [list(row) for row in items]
        assert torch.equal(
            side.items[:, k:], shortlist.items[:, k:]
        )  # what stands behind the shortlist


def test_a_query_without_its_own_in_the_shortlist_ranks_behind_it():
    (fast, _, image_of), (slow, _, _) = drawn(12, 1), drawn(12, 2)
    (shortlists,) = rank_shifted(fast, top=3, image_of=image_of)
    for side, plain, own in zip(
        rerank(slow, shortlists, 3, image_of),
        shortlists,
        (lambda q, t: t // 5 == q, lambda q, t: t == q // 5),
    ):
        has_own = torch.tensor(
            [any(own(q, t) for t in row) for q, row in enumerate(plain.items.tolist())]
        )
        assert 0 < has_own.sum() < len(has_own)
        assert (side.ranks[has_own] < 3).all() and (side.ranks[~has_own] >= 3).all()
        assert torch.equal(side.ranks[~has_own], plain.ranks[~has_own])


@pytest.mark.parametrize("whole", [False, True], ids=["no ties", "ties"])
def test_a_shortlist_of_all_is_the_full_ranking(whole):
    (fast, _, image_of), (slow, _, _) = drawn(9, 3), drawn(9, 4, whole=whole)
    (shortlists,) = rank_shifted(fast, top=45, image_of=image_of)
    (full,) = rank_shifted(slow, image_of=image_of)
    for side, expected in zip(rerank(slow, shortlists, 1000, image_of), full):
        assert torch.equal(side.ranks, expected.ranks)


def test_many_pairs_are_scored_in_turns(monkeypatch):
    (fast, _, image_of), (slow, _, _) = drawn(12, 1), drawn(12, 2)
    (shortlists,) = rank_shifted(fast, top=6, image_of=image_of)
    expected = rerank(slow, shortlists, 6, image_of)
    monkeypatch.setattr("retrieval.rerank.PAIRS", 7)
    found = rerank(slow, shortlists, 6, image_of)
    for one, other in zip(expected, found):
        assert torch.equal(one.ranks, other.ranks) and torch.equal(one.items, other.items)


@pytest.mark.parametrize("broken", ["own", "another"])
def test_nan_counts_against_the_model(broken):
    """Of two images with one caption each."""
    slow = torch.tensor(
        [[torch.nan, 0.5], [0.2, 0.3]] if broken == "own" else [[0.5, torch.nan], [0.2, 0.3]]
    )

    class Given:
        pairs = staticmethod(lambda images, captions: slow[images, captions])

    (shortlists,) = rank_shifted(
        Cosine(torch.eye(2), torch.eye(2)), top=2, image_of=torch.arange(2)
    )
    assert rerank(Given, shortlists, 2, torch.arange(2))[0].ranks.tolist() == [1, 0]


def test_an_own_item_that_ties_for_the_last_place_is_not_in_the_shortlist():
    """Two images with two captions each, all equal to one model.

    The other image's two rank before an image's own.
    """
    fast, slow = (
        Cosine(torch.ones(2, 1), torch.ones(4, 1)),
        Cosine(torch.ones(2, 1), torch.arange(4.0).unsqueeze(1)),
    )
    image_of = torch.arange(4) // 2
    (shortlists,) = rank_shifted(fast, top=4, image_of=image_of)
    assert rerank(slow, shortlists, 2, image_of)[0].ranks.tolist() == [2, 2]
    of_first, of_second = rerank(slow, shortlists, 3, image_of)[0].ranks.tolist()
    assert 1 <= of_first <= 2 and of_second == 0


# From the command line --------------------------------------------------------------------------


@pytest.fixture
def distinct(models):
    """The three runs, with distinct test captions.

    Of two equal ones, either could be shortlisted.
    """
    for name in ("vectors_precomp", "regions_precomp"):
        path = models / "data" / name / "test_caps.txt"
        path.write_text(
            "".join(
                f"{caption} {' '.join('red' if bit == '1' else 'dog' for bit in f'{number:07b}')}\n"
                for number, caption in enumerate(path.read_text().splitlines())
            )
        )
    return models


@pytest.mark.parametrize(
    "runs, k", [(("vse", "i2t"), 3), (("t2i", "vse"), 7), (("vse", "t2i"), 1000)], ids=str
)
def test_three_rankings_are_a_plain_loop_s(distinct, matrices, capsys, runs, k):  # noqa: F811
    content = json_of(distinct, ["--model_path", *paths(*runs), "--rerank", str(k), "--hubness"])
    fast, slow = matrices("vse"), matrices(next(run for run in runs if run != "vse"))
    expected = {
        "vse": figures(fast),
        "scan": figures(slow),
        "reranked": [loops.recall(ranks) for ranks, _ in loop_ranks(fast, slow, k)],
    }
    found = content["rerank"]
    for way, sides in expected.items():
        assert 0 <= found[way].pop("seconds") < 60
        assert found[way] == approximately(as_dict(*sides)), way
    assert found["k"] == k and {name: content[name] for name in found["reranked"]} == approximately(
        found["reranked"]
    )
    output = capsys.readouterr().out.splitlines()
    assert output[0] == f"rsum: {sum(sum(side[:3]) for side in expected['reranked']):.1f}"
    assert [line.split()[0] for line in output[8:11]] == [
        "VSE",
        "VSE's",
        "SCAN",
    ] and f"VSE's {k}, by SCAN" in output[9]
    if k == 1000:
        assert found["reranked"] == found["scan"]


def test_a_table_tells_what_was_reranked(distinct):
    for flags in ([], ["--rerank", "5"], ["--rerank", "7"]):
        json_of(distinct, ["--model_path", *paths("vse", "i2t"), *flags, "--save_csv", "all.csv"])
    names = [line.split(",")[0] for line in (distinct / "all.csv").read_text().splitlines()]
    assert names[1:] == [f"{names[0]} reranked 5", f"{names[0]} reranked 7"]


def test_folds_have_shortlists_of_their_own(distinct, matrices):  # noqa: F811
    content = json_of(distinct, ["--model_path", *paths("vse", "i2t"), "--rerank", "2", "--fold5"])
    fast, slow = matrices("vse"), matrices("i2t")
    folds = []
    for f in range(5):
        part = slice(4 * f, 4 * f + 4), slice(20 * f, 20 * f + 20)
        folds.append([loops.recall(ranks) for ranks, _ in loop_ranks(fast[part], slow[part], 2)])
    assert [found["i2t"] for found in content["folds"]] == [
        approximately(as_dict(*fold)["i2t"]) for fold in folds
    ]
    assert {name: content[name] for name in ("i2t", "t2i", "rsum")} == approximately(
        {
            name: value
            for name, value in as_dict(*mean_of(folds)).items()
            if name in ("i2t", "t2i", "rsum")
        }
    )


# Bad input --------------------------------------------------------------------------------------

BAD = {
    "one checkpoint": (["--model_path", *paths("vse"), "--rerank", "3"], ["--rerank", "names 1"]),
    "three checkpoints": (
        ["--model_path", *paths("vse", "t2i", "i2t"), "--rerank", "3"],
        ["--rerank", "names 3"],
    ),
    "two of one kind": (
        ["--model_path", *paths("t2i", "i2t"), "--rerank", "3"],
        ["--rerank", "0 of the one", "2 of"],
    ),
    "two of the other kind": (
        ["--model_path", *paths("vse", "vse"), "--rerank", "3"],
        ["2 of the one", "0 of"],
    ),
    "a correction": ([*BOTH, "--rerank", "3", "--correction", "nnn"], ["--correction", "--rerank"]),
    "a page": ([*BOTH, "--rerank", "3", "--report", "page"], ["--report", "--rerank"]),
    "a shortlist of none": ([*BOTH, "--rerank", "0"], ["--rerank", "at least 1"]),
    "a shortlist of a half": ([*BOTH, "--rerank", "0.5"], ["--rerank", "0.5"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(models, kind):
    flags, named = BAD[kind]
    before = tree(models)
    refused(compute_results.main, flags, *named)
    assert tree(models) == before


def test_without_reranking_the_json_has_none(models):
    assert "rerank" not in json.loads(json.dumps(json_of(models, BOTH)))
