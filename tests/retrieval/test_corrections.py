"""Corrections against plain double loops of their papers' formulas, their limiting cases, and the NNN package."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import compute_results
from retrieval import corrections
from retrieval.corrections import (
    METHODS,
    Correction,
    corrections_of,
    parameters_of,
    rank_corrected,
    tune,
)
from retrieval.metrics import metrics_of
from retrieval.ranking import rank_both_ways
from retrieval.similarity import SOURCES, Cosine

TOLERANCE = 1e-6


def unit_rows(n, width, seed):
    rows = np.random.default_rng(seed).standard_normal((n, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


QUERIES, TARGETS, BANK = unit_rows(9, 6, 1), unit_rows(13, 6, 2), unit_rows(17, 6, 3)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def mean_of_nearest(item, others, k):
    return sum(sorted((dot(item, other) for other in others), reverse=True)[:k]) / min(
        k, len(others)
    )


# Each formula as its paper has it: the corrected score of query q and target t. They order a
# query's targets as S - shift does, where the paper's score is increasing in it; so both are
# compared after the paper's score is brought to the scale of S and a term of the query alone is
# taken off.


def loop_csls(k):
    return [
        [
            (2 * dot(q, t) - mean_of_nearest(q, TARGETS, k) - mean_of_nearest(t, BANK, k)) / 2
            for t in TARGETS
        ]
        for q in QUERIES
    ]


def loop_nnn(k, alpha):
    return [[dot(q, t) - alpha * mean_of_nearest(t, BANK, k) for t in TARGETS] for q in QUERIES]


def loop_inverted_softmax(temperature):
    return [
        [
            temperature
            * math.log(
                math.exp(dot(q, t) / temperature)
                / sum(math.exp(dot(b, t) / temperature) for b in BANK)
            )
            for t in TARGETS
        ]
        for q in QUERIES
    ]


def loop_qbnorm(temperature, k):
    activation = set()
    for b in BANK:
        activation |= set(sorted(range(len(TARGETS)), key=lambda j: -dot(b, TARGETS[j]))[:k])
    rows = []
    for q, corrected in zip(QUERIES, loop_inverted_softmax(temperature)):
        plain = [dot(q, t) for t in TARGETS]
        rows.append(corrected if plain.index(max(plain)) in activation else plain)
    return rows


def loop_sinkhorn(temperature, iterations):
    """exp(S / T) of the bank and the targets, balanced.

    Every target to a sum of 1 / n, then every query to 1 / m.
    """
    kernel = [[math.exp(dot(b, t) / temperature) for t in TARGETS] for b in BANK]
    n, m = len(TARGETS), len(BANK)
    u, v = [1.0] * m, [1.0] * n
    for iteration in range(iterations):
        if iteration:
            u = [1 / m / sum(kernel[b][t] * v[t] for t in range(n)) for b in range(m)]
        v = [1 / n / sum(kernel[b][t] * u[b] for b in range(m)) for t in range(n)]
    return [
        [
            temperature * math.log(math.exp(dot(q, TARGETS[t]) / temperature) * v[t])
            for t in range(n)
        ]
        for q in QUERIES
    ]


CASES = [
    ("csls", {"k": 1}),
    ("csls", {"k": 4}),
    ("csls", {"k": 100}),
    ("nnn", {"k": 1, "alpha": 0.75}),
    ("nnn", {"k": 5, "alpha": 0.3}),
    ("inverted_softmax", {"temperature": 0.05}),
    ("inverted_softmax", {"temperature": 1.0}),
    ("qbnorm", {"temperature": 0.1, "k": 1}),
    ("qbnorm", {"temperature": 0.1, "k": 3}),
    ("sinkhorn", {"temperature": 0.1, "iterations": 1}),
    ("sinkhorn", {"temperature": 0.1, "iterations": 2}),
    ("sinkhorn", {"temperature": 0.2, "iterations": 10}),
]

LOOPS = {
    "csls": loop_csls,
    "nnn": loop_nnn,
    "inverted_softmax": loop_inverted_softmax,
    "qbnorm": loop_qbnorm,
    "sinkhorn": loop_sinkhorn,
}


def bank_source(side, targets, bank, measure="cosine"):
    """Captions are the targets in image to text, images in text to image."""
    return SOURCES[measure](*((bank, targets) if side == "i2t" else (targets, bank)))


def corrected_scores(
    name, parameters, queries=QUERIES, targets=TARGETS, bank=BANK, dtype=torch.float64, side="i2t"
):
    """S - shift for queries that are corrected, S for the others."""
    queries, targets, bank = (torch.as_tensor(x, dtype=dtype) for x in (queries, targets, bank))
    (correction,) = corrections_of(side, bank_source(side, targets, bank), [(name, parameters)])
    scores = queries @ targets.T
    active = torch.ones(len(queries), dtype=torch.bool)
    if correction.activation is not None:
        active = correction.activation[scores.argmax(1)]
    return torch.where(active.unsqueeze(1), scores - correction.shift, scores)


def up_to_a_constant_a_query(scores):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return scores - scores.mean(1, keepdim=True)


@pytest.mark.parametrize(
    "side, dtype", [("i2t", torch.float64), ("t2i", torch.float32)], ids=["i2t", "t2i"]
)
@pytest.mark.parametrize("name, parameters", CASES, ids=str)
def test_corrections_agree_with_their_papers_formula_in_a_loop(name, parameters, dtype, side):
    ours = up_to_a_constant_a_query(corrected_scores(name, parameters, dtype=dtype, side=side))
    expected = up_to_a_constant_a_query(LOOPS[name](**parameters))
    assert torch.allclose(ours, expected, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(ours, up_to_a_constant_a_query(QUERIES @ TARGETS.T), atol=1e-3)


def test_corrections_in_one_pass_are_those_of_each_alone():
    targets, bank = torch.as_tensor(TARGETS), torch.as_tensor(BANK)
    source = bank_source("i2t", targets, bank)
    alone = [corrections_of("i2t", source, [case])[0] for case in CASES]
    for one, together in zip(alone, corrections_of("i2t", source, CASES), strict=True):
        assert torch.equal(one.shift, together.shift)
        assert (one.activation is None) == (together.activation is None)
        assert one.activation is None or torch.equal(one.activation, together.activation)


def test_a_source_may_use_its_memory_again(monkeypatch):
    class Thrifty(Cosine):
        """Scores that the next ones overwrite."""

        def across(self, side, targets):
            scores = super().across(side, targets)
            return self.buffer.resize_(scores.shape).copy_(scores)

    sinkhorn = [("sinkhorn", {"temperature": 0.1, "iterations": 3})]
    bank, targets = torch.as_tensor(BANK), torch.as_tensor(TARGETS)
    (expected,) = corrections_of("i2t", Cosine(bank, targets), sinkhorn)
    monkeypatch.setattr(corrections, "BLOCK", 5 * len(BANK))
    (found,) = corrections_of("i2t", Thrifty(bank, targets), sinkhorn)
    assert torch.allclose(found.shift, expected.shift, atol=1e-12)


@pytest.mark.parametrize("block", [1, 40])
@pytest.mark.parametrize("name, parameters", CASES, ids=str)
def test_the_block_size_changes_nothing(monkeypatch, name, parameters, block):
    expected = corrected_scores(name, parameters)
    monkeypatch.setattr(corrections, "BLOCK", block)
    assert torch.allclose(corrected_scores(name, parameters), expected, atol=1e-12)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
def test_order_similarity_takes_the_images_first(side):
    """-||max(0, caption - image)||, whichever of them are the targets."""
    targets, bank = torch.as_tensor(TARGETS).abs(), torch.as_tensor(BANK).abs()
    (correction,) = corrections_of(
        side, bank_source(side, targets, bank, "order"), [("nnn", {"k": 2, "alpha": 1.0})]
    )
    for target, shift in zip(TARGETS, correction.shift.tolist()):
        pairs = [
            (abs(b), abs(target)) if side == "i2t" else (abs(target), abs(b)) for b in BANK
        ]  # image, caption
        similarities = [
            -math.sqrt(sum(max(0, c - i) ** 2 for i, c in zip(image, caption)))
            for image, caption in pairs
        ]
        assert shift == pytest.approx(sum(sorted(similarities)[-2:]) / 2, abs=TOLERANCE)


# Limiting cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inverted_softmax", "sinkhorn"])
def test_at_infinite_temperature_a_target_loses_its_mean_similarity_to_the_bank(name):
    ours = corrected_scores(name, parameters_of(name, temperature=1e5))
    # Sinkhorn's terms of the bank are then constant, too: its first iteration is all there is.
    assert torch.allclose(
        up_to_a_constant_a_query(ours),
        up_to_a_constant_a_query(QUERIES @ TARGETS.T - (TARGETS @ BANK.T).mean(1)),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["inverted_softmax", "nnn"])
def test_at_temperature_zero_or_k_of_one_a_target_loses_its_largest_similarity(name):
    parameters = {"inverted_softmax": {"temperature": 1e-5}, "nnn": {"k": 1, "alpha": 1.0}}[name]
    expected = QUERIES @ TARGETS.T - (TARGETS @ BANK.T).max(1)
    assert np.allclose(corrected_scores(name, parameters), expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("csls", {"k": 10}),
        ("nnn", {"k": 10, "alpha": 1.0}),
        ("inverted_softmax", {"temperature": 0.05}),
        ("sinkhorn", {"temperature": 0.05, "iterations": 10}),
    ],
)
def test_with_a_bank_of_one_a_target_loses_its_similarity_to_it(name, parameters):
    lost = (TARGETS @ BANK[0]) * (0.5 if name == "csls" else 1.0)
    ours = corrected_scores(name, parameters, bank=BANK[:1])
    assert np.allclose(
        up_to_a_constant_a_query(ours),
        up_to_a_constant_a_query(QUERIES @ TARGETS.T - lost),
        atol=1e-9,
    )


def test_qbnorm_with_a_bank_of_one_touches_only_queries_of_its_nearest_target():
    ours = corrected_scores("qbnorm", {"temperature": 0.05, "k": 1}, bank=QUERIES[:1])
    plain = torch.as_tensor(QUERIES) @ torch.as_tensor(TARGETS).T
    same = plain.argmax(1) == plain[0].argmax()
    assert (
        [bool(torch.equal(a, b)) for a, b in zip(ours, plain)] == (~same).tolist()
        and same.any()
        and not same.all()
    )


def test_csls_is_nnn_with_half_the_weight():
    assert torch.equal(
        corrected_scores("csls", {"k": 4}), corrected_scores("nnn", {"k": 4, "alpha": 0.5})
    )


def test_sinkhorn_gives_every_target_its_share_of_the_bank():
    targets, bank = torch.as_tensor(TARGETS), torch.as_tensor(BANK)
    shift = corrections.sinkhorn(targets @ bank.T, temperature=0.2, iterations=200)
    plan = ((targets @ bank.T - shift.unsqueeze(1)) / 0.2).softmax(
        0
    )  # each bank query spreads one unit
    assert torch.allclose(plan.sum(1), torch.full((13,), 17 / 13, dtype=torch.float64), atol=1e-6)
    assert not torch.allclose(
        (targets @ bank.T / 0.2).softmax(0).sum(1), torch.full((13,), 17 / 13).double(), atol=0.1
    )


@pytest.mark.parametrize("k, alpha", [(1, 0.75), (5, 0.5), (16, 1.0)])
def test_nnn_agrees_with_its_authors_package(k, alpha):
    nnn = pytest.importorskip("nnn")
    queries, targets, bank = (x.astype(np.float32) for x in (QUERIES, TARGETS, BANK))
    ranker = nnn.NNNRanker(
        nnn.NNNRetriever(6), targets, bank, alternate_ks=k, batch_size=4, alternate_weight=alpha
    )
    scores, items = ranker.search(queries, len(targets))
    ours = corrected_scores("nnn", {"k": k, "alpha": alpha}, dtype=torch.float32)
    assert np.allclose(ours.gather(1, torch.as_tensor(items)), scores, atol=1e-5)


# Both directions of an evaluation ---------------------------------------------------------------


def evaluation(n, seed=5, width=20, nearness=1.5):
    images, captions = (torch.as_tensor(unit_rows(rows, width, seed + rows)) for rows in (n, 5 * n))
    return images, torch.nn.functional.normalize(
        captions + nearness * images.repeat_interleave(5, 0)
    )


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("name", METHODS)
def test_corrected_ranks_and_items_are_those_of_the_corrected_matrix(name, measure):
    images, captions = evaluation(SOURCES[measure].tile_images + 4)
    bank_images, bank_captions = evaluation(24, seed=9)
    matrix = (
        images @ captions.T
        if measure == "cosine"
        else -(captions - images.unsqueeze(1)).clamp(min=0).norm(dim=2)
    )
    wanted = [(name, parameters_of(name, temperature=0.1, k=3))]
    (i2t,), (t2i,) = (
        corrections_of("i2t", SOURCES[measure](bank_images, captions), wanted),
        corrections_of("t2i", SOURCES[measure](images, bank_captions), wanted),
    )
    plain = rank_both_ways(images, captions, measure, top=10)
    ((to_text, to_image),) = rank_corrected(SOURCES[measure](images, captions), plain, [(i2t, t2i)])
    own = torch.arange(len(captions)) // 5
    for ranking, scores, correction, is_own in (
        (to_text, matrix, i2t, own == torch.arange(len(images))[:, None]),
        (to_image, matrix.T, t2i, own[:, None] == torch.arange(len(images))),
    ):
        corrected = scores - correction.shift
        if correction.activation is not None:
            corrected = torch.where(
                correction.activation[scores.argmax(1)][:, None], corrected, scores
            )
        best_own = corrected.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        assert (
            ranking.ranks.tolist()
            == (corrected.masked_fill(is_own, -torch.inf) > best_own).sum(1).tolist()
        )
        assert ranking.items.tolist() == corrected.topk(10).indices.tolist()


def test_a_shift_of_nothing_changes_nothing():
    images, captions = evaluation(40)
    plain = rank_both_ways(images, captions, top=10)
    nothing = Correction(captions.new_zeros(200)), Correction(captions.new_zeros(40))
    ((to_text, to_image),) = rank_corrected(Cosine(images, captions), plain, [nothing])
    assert torch.equal(to_text.items, plain[0].items) and torch.equal(
        to_image.ranks, plain[1].ranks
    )


def test_tuning_takes_what_has_the_best_recalls_of_each_direction():
    images, captions = evaluation(60, seed=8, nearness=0.5)
    bank_images, bank_captions = evaluation(50, seed=3)
    source, banks = (
        Cosine(images, captions),
        (Cosine(bank_images, captions), Cosine(images, bank_captions)),
    )
    chosen = tune(["nnn"], source, banks, {})[0]
    plain = rank_both_ways(images, captions)

    def recalls(parameters, side):
        pair = [
            corrections_of(way, bank, [("nnn", parameters)])[0]
            for way, bank in zip(("i2t", "t2i"), banks)
        ]
        return sum(metrics_of(rank_corrected(source, plain, [pair])[0])[side][:3])

    for side in (0, 1):
        tried = [
            recalls({"k": k, "alpha": alpha}, side)
            for k in corrections.GRIDS["nnn"]["k"]
            for alpha in corrections.GRIDS["nnn"]["alpha"]
        ]
        assert recalls(chosen[side], side) == max(tried) > recalls(chosen[1 - side], side)
    assert chosen.rsum == pytest.approx(recalls(chosen.i2t, 0) + recalls(chosen.t2i, 1))


def test_tuning_leaves_what_is_given():
    source = Cosine(*evaluation(20))
    ((i2t, t2i, _),) = tune(
        ["nnn"], source, (source, source), {"k": 7, "alpha": None, "temperature": 3.0}
    )
    assert i2t["k"] == t2i["k"] == 7 and set(i2t) == {"k", "alpha"}


def test_several_methods_are_tuned_as_each_alone_is():
    images, captions = evaluation(40, nearness=0.5)
    bank_images, bank_captions = evaluation(30, seed=3)
    source, banks = (
        Cosine(images, captions),
        (Cosine(bank_images, captions), Cosine(images, bank_captions)),
    )
    names = ["sinkhorn", "csls", "qbnorm"]
    assert tune(names, source, banks, {}) == [tune([name], source, banks, {})[0] for name in names]


def test_what_tuning_chooses_from():
    """Measured results depend on it. Further corrections may join."""
    temperatures = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    measured = {
        "csls": {"k": (1, 5, 10, 20, 50, 100, 200, 500)},
        "inverted_softmax": {"temperature": temperatures},
        "qbnorm": {"temperature": temperatures},
        "sinkhorn": {"temperature": temperatures},
        "nnn": {"k": (8, 16, 32, 64, 128, 256, 512), "alpha": (0.25, 0.5, 0.75, 1.0, 1.25)},
    }
    assert {name: corrections.GRIDS[name] for name in measured} == measured


@pytest.mark.parametrize(
    "name, expected",
    [
        ("csls", {"k": 10}),
        ("inverted_softmax", {"temperature": 0.05}),
        ("qbnorm", {"temperature": 0.05, "k": 1}),
        ("nnn", {"k": 128, "alpha": 0.75}),
        ("sinkhorn", {"temperature": 0.05, "iterations": 10}),
    ],
)
def test_without_parameters_a_correction_takes_the_documented_ones(name, expected):
    similarities = torch.as_tensor(TARGETS @ unit_rows(200, 6, 8).T)
    assert torch.equal(METHODS[name](similarities), METHODS[name](similarities, **expected))
    assert parameters_of(name) == {
        key: value for key, value in expected.items() if key != "iterations"
    }


def test_parameters_are_the_defaults_but_for_what_is_given():
    assert parameters_of("qbnorm", k=None, temperature=0.1, alpha=3) == {"temperature": 0.1, "k": 1}


@pytest.mark.parametrize(
    "flag, allowed, refused",
    [
        ("k", ["1", "500"], ["0", "-1", "1.5"]),
        ("temperature", ["0.0001", "100"], ["0.00009", "0", "100.1", "nan"]),
        ("alpha", ["1e-9", "7"], ["0", "-1", "inf"]),
    ],
)
def test_parameters_on_the_command_line_stay_where_the_formulas_make_sense(flag, allowed, refused):
    parser = argparse.ArgumentParser()
    corrections.add_flags(parser, METHODS)
    for text in allowed:
        options = parser.parse_args([f"--correction_{flag}", text])
        rest = dict.fromkeys({"k", "temperature", "alpha"} - {flag})
        assert corrections.given_by(options) == {**rest, flag: float(text)}
    for text in refused:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--correction_{flag}={text}"])


@pytest.mark.parametrize(
    "i2t, t2i, words",
    [
        ({"k": 3, "alpha": 0.5}, {"k": 3, "alpha": 0.5}, "k=3 alpha=0.5"),
        ({"k": 3}, {"k": 4}, "i2t k=3, t2i k=4"),
    ],
)
def test_parameters_in_words_are_said_once_where_they_are_the_same(i2t, t2i, words):
    assert corrections.in_words({"i2t": i2t, "t2i": t2i}) == words


def test_another_correction_is_added_in_this_module_alone(evaluated, monkeypatch, capsys):
    """A function of the similarities and its grid.

    Chosen by its name, tuned on dev, printed and written.
    """

    def share_of_the_mean(similarities, alpha=1.0):
        return alpha * similarities.mean(1)

    monkeypatch.setitem(corrections.METHODS, "mean", share_of_the_mean)
    monkeypatch.setitem(corrections.GRIDS, "mean", {"alpha": (0.0, 0.5)})
    flags = ["--correction", "mean", "--save_json", "out.json"]
    nnn = ["--correction", "nnn", "--correction_k", "100000", "--save_json", "nnn.json"]
    compute_results.main([*flags, "--correction_alpha", "0.7"])
    assert "mean" in capsys.readouterr().out
    compute_results.main([*nnn, "--correction_alpha", "0.7"])
    mine, same = (
        json.loads((evaluated / f"{name}.json").read_text())["corrections"][method]
        for name, method in (("out", "mean"), ("nnn", "nnn"))
    )
    assert mine["i2t"] == pytest.approx(same["i2t"]) and mine["t2i"] == pytest.approx(same["t2i"])
    compute_results.main([*flags, "--tune_correction"])
    found = json.loads((evaluated / "out.json").read_text())["corrections"]["mean"]["parameters"]
    assert {side: list(own) for side, own in found.items()} == {"i2t": ["alpha"], "t2i": ["alpha"]}
    assert all(own["alpha"] in (0.0, 0.5) for own in found.values())
    compute_results.main(["--correction", "all", "--save_json", "all.json"])
    assert list(json.loads((evaluated / "all.json").read_text())["corrections"])[-1] == "mean"
