"""Intervals against plain loops, on ranks whose true difference is known, and on files."""

import itertools
import statistics
from contextlib import suppress

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_ind, ttest_rel

import compute_results
from retrieval import intervals
from retrieval.ranking import Ranking
from runtime.errors import InputError
from tests.helpers import loops

CUTS = {1: 0.8, 5: 0.0, 10: -0.5}  # a query's rank is below k where its luck is above CUTS[k]

EASE = 0.5  # deviation of the images' ease, which all runs share

MODEL = "runs/runX/model_best.pth.tar"


def made_runs(rng, level, ease, seeds, each=2, seed_sd=0.05, own_sd=0.3):
    """A loss's runs {seed: (i2t_ranks, t2i_ranks, image_of)}: luck is of its level, seed, image and query."""
    n, runs = len(ease), {}
    image_of = np.repeat(np.arange(n), each)
    ease = ease + own_sd * rng.standard_normal(n)
    for seed in range(seeds):
        own = level + seed_sd * rng.standard_normal()
        i2t, t2i = (
            own + ease + rng.standard_normal(n),
            own + ease[image_of] + rng.standard_normal(n * each),
        )
        runs[seed] = (
            *(
                np.select([luck > CUTS[1], luck > CUTS[5], luck > CUTS[10]], [0, 3, 7], 40)
                for luck in (i2t, t2i)
            ),
            image_of,
        )
    return runs


def true_figure(figure, level, seed_sd, own_sd):
    """The expected figure of a loss of that level, over all images and seeds."""
    sd = np.sqrt(1 + EASE**2 + seed_sd**2 + own_sd**2)
    depths = {"rsum": [1, 5, 10] * 2, "i2t_r1": [1], "t2i_r5": [5]}[figure]
    return sum(100 * norm.cdf((level - CUTS[k]) / sd) for k in depths)


def looped(runs_a, runs_b, draws, seed, paired):
    """rsum's interval by loops over draws, seeds, images and captions."""
    *_, image_of = runs_a[0]
    n = image_of[-1] + 1

    def rsum(run, counts):
        i2t, t2i, _ = run
        total = 0
        for k in (1, 5, 10):
            total += 100 * sum(counts[image] for image in range(n) if i2t[image] < k) / n
            total += (
                100
                * sum(counts[image] for image, rank in zip(image_of, t2i) if rank < k)
                / sum(counts[image] for image in image_of)
            )
        return total

    def groups(counts):
        a, b = (
            [rsum(runs[number], counts) for number in sorted(runs)] for runs in (runs_a, runs_b)
        )
        return [[x - y for x, y in zip(a, b)]] if paired else [a, [-y for y in b]]

    whole = groups([1] * n)
    drawn = [
        groups(counts)
        for counts in np.random.default_rng(seed).multinomial(n, [1 / n] * n, draws).tolist()
    ]
    images = statistics.variance(sum(statistics.mean(group) for group in draw) for draw in drawn)
    sizes = [len(group) for group in whole]
    parts = [statistics.variance(group) / len(group) for group in whole]
    both = sum(
        statistics.mean(
            statistics.variance([x - y for x, y in zip(draw[side], whole[side])]) for draw in drawn
        )
        / size
        for side, size in enumerate(sizes)
    )
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes))
    of_image = t.ppf(0.975, n - 1) ** 2
    half = (
        max(
            t.ppf(0.975, freedom) ** 2 * sum(parts) + of_image * max(0, images - both),
            of_image * images,
        )
        ** 0.5
    )
    centre = sum(statistics.mean(group) for group in whole)
    return centre, centre - half, centre + half


@pytest.mark.parametrize("paired", [True, False])
def test_the_bootstrap_is_that_of_a_plain_loop(paired):
    rng = np.random.default_rng(3)
    image_of = np.repeat(np.arange(12), [1, 2, 3, 4] * 3)  # unequally many captions
    runs_a, runs_b = (
        {
            seed: (rng.integers(0, 15, 12), rng.integers(0, 15, 30), image_of)
            for seed in range(seeds)
        }
        for seeds in (4, 4 if paired else 3)
    )
    found = intervals.difference(runs_a, runs_b, draws=40, seed=7)
    assert found == pytest.approx(looped(runs_a, runs_b, 40, 7, paired), rel=1e-9)
    assert found.low < found.estimate < found.high
    other = intervals.difference(runs_b, runs_a, draws=40, seed=7)
    assert other == pytest.approx((-found.estimate, -found.high, -found.low), rel=1e-9)


@pytest.mark.parametrize(
    "figure, seeds, seed_sd, own_sd",
    [
        ("rsum", (5, 5), 0.05, 0.3),
        ("rsum", (3, 3), 0.05, 0.3),
        ("i2t_r1", (5, 5), 0.2, 0.1),
        ("t2i_r5", (5, 3), 0, 0.5),
        ("rsum", (2, 2), 0.1, 0.3),
    ],
)
def test_the_interval_covers_a_known_difference(figure, seeds, seed_sd, own_sd):
    rng, covered = np.random.default_rng(1), 0
    truth = true_figure(figure, 0.3, seed_sd, own_sd) - true_figure(figure, 0.1, seed_sd, own_sd)
    for _ in range(500):
        ease = EASE * rng.standard_normal(100)
        runs_a, runs_b = (
            made_runs(rng, level, ease, n, seed_sd=seed_sd, own_sd=own_sd)
            for level, n in zip((0.3, 0.1), seeds)
        )
        found = intervals.difference(runs_a, runs_b, figure, draws=100)
        covered += found.low <= truth <= found.high
    assert 460 <= covered <= 490


def test_figures_are_the_recalls():
    rng = np.random.default_rng(5)
    run = rng.integers(0, 15, 9), rng.integers(0, 15, 45), np.repeat(np.arange(9), 5)
    nothing = np.full(9, 99), np.full(45, 99), run[2]
    expected = [loops.recall(ranks)[:3] for ranks in run[:2]]
    for (side, ranks), (place, k) in itertools.product(
        zip(("i2t", "t2i"), expected), enumerate((1, 5, 10))
    ):
        found = intervals.difference({0: run}, {0: nothing}, f"{side}_r{k}", draws=10)
        assert found.estimate == pytest.approx(ranks[place])
    assert intervals.difference({0: run}, {0: nothing}, draws=10).estimate == pytest.approx(
        sum(map(sum, expected))
    )


def test_identical_runs_do_not_differ():
    runs = made_runs(np.random.default_rng(2), 0.3, np.zeros(50), 3)
    found = intervals.difference(runs, runs)
    assert found.low <= found.estimate == 0 <= found.high
    renamed = {
        seed + 10: run for seed, run in runs.items()
    }  # as if they were other seeds: nothing cancels
    found = intervals.difference(runs, renamed)
    assert found.low < 0 < found.high and found.estimate == pytest.approx(0, abs=1e-9)


def test_images_drawn_alone_make_the_interval_of_one_seed():
    runs_a, runs_b = (
        made_runs(np.random.default_rng(number), 0.3, np.zeros(400), 1) for number in (1, 2)
    )
    found = intervals.difference(runs_a, runs_b, "i2t_r1", draws=4000)
    hits = [100.0 * (a - b) for a, b in zip(runs_a[0][0] == 0, (runs_b[0][0] == 0).astype(int))]
    expected = t.ppf(0.975, 399) * statistics.pstdev(hits) / 20  # the standard error of a mean
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.05)


def test_seeds_that_agree_by_chance_leave_the_interval_of_the_images():
    rng, none = np.random.default_rng(4), 99
    image_of = np.arange(400)
    hits = rng.random((2, 400)) < 0.5
    hits[1] = rng.permutation(hits[0])  # the same recall on other images
    runs = {
        seed: (np.where(hit, 0, none), np.full(400, none), image_of)
        for seed, hit in enumerate(hits)
    }
    nothing = {seed: (np.full(400, none), np.full(400, none), image_of) for seed in runs}
    found = intervals.difference(runs, nothing, "i2t_r1", draws=4000)
    expected = t.ppf(0.975, 399) * 100 * statistics.pstdev(hits.mean(0).tolist()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "other", [{0: 1.2, 1: 0.7, 2: 0.1}, {0: 1.2, 1: 0.7, 3: 0.1}, {0: 1.2, 5: 0.7}]
)
def test_an_interval_over_seeds_is_student_s_or_welch_s(other):
    one = {2: 3.1, 0: 2.5, 1: 2.7}
    test = (
        ttest_rel([2.5, 2.7, 3.1], [1.2, 0.7, 0.1])
        if other.keys() == one.keys()
        else ttest_ind(list(one.values()), list(other.values()), equal_var=False)
    )
    expected = (
        statistics.mean(one.values()) - statistics.mean(other.values()),
        *test.confidence_interval(0.95),
    )
    assert intervals.difference_over_seeds(one, other) == pytest.approx(expected)


def test_the_smallest_differences_are_half_the_intervals():
    found = [
        intervals.Interval(1.0, -3.25, 5.25),
        [0.0, -1.0, 1.0],
        intervals.Interval(9.0, 7.0, 11.0),
    ]
    assert intervals.smallest_differences(found) == (1.0, 4.25)


def test_all_pairs_at_once_are_each_pair_alone():
    losses = {
        name: made_runs(np.random.default_rng(number), 0.3, np.zeros(30), 2)
        for number, name in enumerate("abc")
    }
    losses["c"] = {seed + 5: run for seed, run in losses["c"].items()}
    found = intervals.differences(losses, ("rsum", "t2i_r1"), draws=30, seed=3)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), own in found.items():
        for figure, interval in own.items():
            assert interval == intervals.difference(losses[a], losses[b], figure, draws=30, seed=3)


# Bad input --------------------------------------------------------------------------------------


def run_of(image_of, images=None):
    image_of = np.array(image_of)
    return np.zeros(images or image_of[-1] + 1, int), np.zeros(len(image_of), int), image_of


@pytest.mark.parametrize(
    "runs_a, runs_b, says",
    [
        ({}, {0: run_of([0, 1])}, "no run"),
        ({0: run_of([0, 1])}, {}, "no run"),
        ({0: run_of([0, 1])}, {0: run_of([0, 1, 2])}, "same images"),
        ({0: run_of([0, 0, 1])}, {0: run_of([0, 1, 1])}, "same images"),
        ({0: run_of([0, 1], images=3)}, {0: run_of([0, 1])}, "same images"),
        ({0: run_of([0, 0])}, {0: run_of([0, 0])}, "single image"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs_a, runs_b, says):
    with pytest.raises(InputError, match=says):
        intervals.difference(runs_a, runs_b)


GOOD = {
    "i2t_ranks": np.zeros(2, int),
    "t2i_ranks": np.zeros(4, int),
    "image_of": np.array([0, 0, 1, 1]),
}


@pytest.mark.parametrize(
    "change",
    [
        {"i2t_ranks": None},
        {"image_of": None},
        {"i2t_ranks": np.zeros(2)},
        {"image_of": np.array([0, 1, 0, 1])},
        {"i2t_ranks": np.zeros(3, int)},
        {"t2i_ranks": np.zeros((2, 2), int)},
        {"image_of": np.array([[0, 0, 1, 1]])},
        {"image_of": np.array([None] * 4)},
        {"image_of": np.array(0)},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change):
    np.savez(
        tmp_path / "r.npz",
        **{name: part for name, part in {**GOOD, **change}.items() if part is not None},
    )
    with pytest.raises(InputError, match=r"r\.npz .*--save_ranks"):
        intervals.read_ranks(tmp_path / "r.npz")


def test_no_flipped_bit_is_more_than_a_sentence(tmp_path):
    np.savez_compressed(tmp_path / "r.npz", **{name: np.arange(400) // 4 for name in GOOD})
    whole, rng = (tmp_path / "r.npz").read_bytes(), np.random.default_rng(1)
    for place in rng.integers(0, len(whole), 300):
        torn = bytearray(whole)
        torn[place] ^= 1 << rng.integers(0, 8)
        (tmp_path / "r.npz").write_bytes(torn)
        with suppress(InputError):
            intervals.read_ranks(tmp_path / "r.npz")


@pytest.mark.parametrize(
    "content, kind",
    [(b"<html>", "a web page"), (b"version https://git-lfs", "a Git LFS"), (b"1 2\n", "text")],
)
def test_ranks_of_another_kind_are_called_what_they_are(tmp_path, content, kind):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(
        InputError, match=f"cannot be read as ranks .it is {kind}.*: write it"
    ) as caught:
        intervals.read_ranks(tmp_path / "r.npz")
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"text"])
def test_a_torn_file_is_refused(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"r\.npz cannot be read as ranks"):
        intervals.read_ranks(tmp_path / "r.npz")
    with pytest.raises(InputError, match="cannot be read as ranks"):
        intervals.read_ranks(tmp_path / "none.npz")


# compute_results.py --save_ranks ----------------------------------------------------------------


def test_ranks_and_items_are_saved_before_and_after_corrections(evaluated):
    compute_results.main(
        [
            "--model_path",
            MODEL,
            "--device",
            "cpu",
            "--save_ranks",
            "r.npz",
            "--save_embeddings",
            "--correction",
            "nnn",
            "--correction_k",
            "3",
            "--correction_alpha",
            "1",
        ]
    )
    saved, embeddings = np.load("r.npz"), np.load("runX_img_and_cap_embeddings.npz")
    images, captions = (
        embeddings["img_embs"][::5].astype(float),
        embeddings["cap_embs"].astype(float),
    )
    scores = images @ captions.T
    assert set(saved) == {
        "image_of",
        *(
            f"{name}{side}_{part}"
            for name in ("", "nnn_")
            for side in ("i2t", "t2i")
            for part in ("ranks", "items")
        ),
    }
    assert saved["image_of"].tolist() == [image for image in range(6) for _ in range(5)]
    for side, ranks, rows in zip(("i2t", "t2i"), loops.ranks(scores), (scores, scores.T)):
        assert saved[f"{side}_ranks"].tolist() == list(ranks)
        first = np.take_along_axis(
            rows, saved[f"{side}_items"], 1
        )  # equal scores may come in any order
        np.testing.assert_allclose(first, -np.sort(-rows, 1)[:, :10], atol=1e-6)
        assert (saved[f"nnn_{side}_items"] != saved[f"{side}_items"]).any()
    i2t, t2i, image_of = intervals.read_ranks("r.npz", "nnn")
    assert (
        i2t.tolist() == saved["nnn_i2t_ranks"].tolist()
        and t2i.tolist() == saved["nnn_t2i_ranks"].tolist()
    )
    assert image_of.tolist() == saved["image_of"].tolist()
    with pytest.raises(InputError, match="no ranks by csls"):
        intervals.read_ranks("r.npz", "csls")


def test_folds_are_saved_side_by_side_and_read_end_to_end(tmp_path):
    import torch

    rng = np.random.default_rng(0)
    folds = [
        tuple(
            Ranking(*(torch.from_numpy(rng.integers(0, 9, shape)) for shape in (n, (n, 12))))
            for n in (3, 6)
        )
        for _ in range(5)
    ]
    intervals.write_ranks(tmp_path / "r.npz", [torch.tensor([0, 0, 1, 1, 2, 2])] * 5, {"": folds})
    saved = np.load(tmp_path / "r.npz")
    assert saved["i2t_ranks"].shape == (5, 3) and saved["t2i_items"].shape == (5, 6, 10)
    assert saved["t2i_items"][4, 5].tolist() == folds[4][1].items[5, :10].tolist()
    i2t, _, image_of = intervals.read_ranks(tmp_path / "r.npz")
    assert i2t.tolist() == [rank for i2t, _ in folds for rank in i2t.ranks.tolist()]
    assert image_of.tolist() == [image for image in range(15) for _ in range(2)]


@pytest.mark.parametrize("flag", ["ranks", "csv", "json"])
@pytest.mark.parametrize("path", ["nowhere/r.npz", "data", ""])
def test_a_place_where_files_cannot_go_is_refused_before_anything_is_read(evaluated, flag, path):
    if flag == "json" and path == "nowhere/r.npz":
        pytest.skip("its folder is made")
    reason = " .* cannot be written" if path else ": it is empty"
    with pytest.raises(InputError, match=f"--save_{flag}{reason}"):
        compute_results.main(["--model_path", "not/there.pth.tar", f"--save_{flag}", path])


def test_two_files_in_one_place_are_refused(evaluated):
    with pytest.raises(InputError, match="--save_csv and --save_ranks name the same file"):
        compute_results.main(["--save_csv", "one", "--save_ranks", "./one"])
