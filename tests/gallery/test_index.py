"""Indexes.

Exact search against a loop, FAISS against exact search, each with the correction's column.
"""

from functools import partial

import numpy as np
import pytest
import torch

from gallery import index
from runtime.errors import InputError

WIDTH, N = 16, 2000

FAISS = (index.IVF, index.PQ)


def made_up(n, seed):
    """(n, WIDTH + 1) rows near forty centres, the last number of each that of a shift."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((40, WIDTH))
    rows = centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, WIDTH))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(np.hstack([rows, -0.3 - 0.2 * rng.random((n, 1))]).astype(np.float32))


@pytest.fixture(scope="module")
def rows():
    return made_up(N, 1)


@pytest.fixture(scope="module")
def queries():
    """Ten corrected, ten plain."""
    asked = made_up(60, 2)
    asked[:, -1] = torch.arange(60) % 2
    return asked


@pytest.fixture(scope="module")
def built(tmp_path_factory, rows, queries):
    """{type: its file}."""
    folder = tmp_path_factory.mktemp("indexes")
    for kind in FAISS:
        index.build(kind, rows, queries[:40], str(folder / kind))
    return {kind: str(folder / kind) for kind in FAISS}


def by_loop(rows, query, top):
    """The numbers of the best rows, one product at a time in float64."""
    scores = [float(np.dot(row, query)) for row in rows.double().numpy()]
    return sorted(range(len(scores)), key=lambda number: -scores[number])[:top], sorted(
        scores, reverse=True
    )[:top]


@pytest.mark.parametrize("n, top", [(1, 1), (3, 10), (50, 10), (257, 1)])
def test_exact_search_is_that_of_a_loop(monkeypatch, n, top):
    monkeypatch.setattr(index, "BLOCK_ROWS", 20)
    monkeypatch.setattr(index, "BLOCK_QUERIES", 2)
    rows, queries = made_up(n, 3), made_up(5, 4)
    scores, numbers = index.exact(rows, queries, top)
    assert scores.shape == numbers.shape == (5, min(top, n))
    for query, own_scores, own in zip(queries.double().numpy(), scores, numbers):
        expected, best = by_loop(rows, query, top)
        assert own.tolist() == expected
        assert np.allclose(own_scores, best, atol=1e-6)


def test_cosines_are_those_of_a_loop_and_zeros_are_like_nothing(monkeypatch):
    monkeypatch.setattr(index, "BLOCK_ROWS", 20)
    rows, queries = made_up(50, 3) * torch.arange(50).view(-1, 1), 7 * made_up(5, 4)
    scores, numbers = index.exact(rows, queries, 50, cosine=True)
    for query, own_scores, own in zip(queries.double().numpy(), scores, numbers):
        expected = {0: 0.0} | {
            number: np.dot(row, query) / np.linalg.norm(row) / np.linalg.norm(query)
            for number, row in enumerate(rows.double().numpy())
            if number
        }
        assert own_scores.tolist() == sorted(own_scores.tolist(), reverse=True)
        assert dict(zip(own.tolist(), own_scores.tolist())) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", FAISS)
def test_faiss_finds_what_exact_search_finds_with_its_scores(built, rows, queries, kind):
    search = index.read(kind, built[kind], rows)
    scores, numbers = search(queries, 10)
    exact_scores, exact_numbers = index.exact(rows, queries, 10)
    assert index.recall(numbers, exact_numbers) >= 0.95
    for query, own, found in zip(queries, scores, numbers):
        assert torch.allclose(rows[found] @ query, own, atol=1e-6)
        assert (own.diff() <= 0).all()
    assert search(queries, 150)[1].shape == (60, 150)


@pytest.mark.parametrize("kind", FAISS)
def test_the_shift_counts_as_much_as_in_exact_search(rows, queries, kind, tmp_path):
    """Rows that differ in the shift alone: a corrected question must rank them differently."""
    alike = rows.clone()
    alike[:, :-1] = rows[:1, :-1]
    corrected = torch.cat([queries[:5, :-1], torch.ones(5, 1)], 1)
    index.build(kind, alike, corrected, str(tmp_path / "index"))
    numbers = index.read(kind, str(tmp_path / "index"), alike)(corrected, 10)[1]
    best = alike[:, -1].topk(10).indices
    assert index.recall(numbers, best.expand(5, -1)) >= 0.9


def test_levelled_rows_are_of_length_one_and_order_as_before(rows):
    level = index.level_of(lambda: rows.split(7))
    double = rows.double().numpy()
    middle = double[:, -1].mean()
    assert level.middle == pytest.approx(middle)
    centred = double - middle * np.eye(WIDTH + 1)[-1]
    assert level.length == pytest.approx(np.linalg.norm(centred, axis=1).max())
    stored = index.levelled(rows, level).double().numpy()
    assert stored.shape == (N, WIDTH + 2)
    for row, own in zip(centred[:50], stored):
        # The form for photos of length 1 and the largest shift c: [x, -s, sqrt(c^2 - s^2)].
        c = np.sqrt(level.length**2 - 1)
        rest = np.sqrt(max(c**2 - row[-1] ** 2, 0))
        assert own == pytest.approx(np.append(row, rest) / np.sqrt(1 + c**2), abs=1e-6)
    assert np.linalg.norm(stored, axis=1) == pytest.approx(np.ones(N), abs=1e-6)
    query = double[7].copy()
    for corrected in (0.0, 1.0):
        query[-1] = corrected
        scores = double @ query
        asked = np.append(query, 0)
        assert level.length * stored @ asked + corrected * middle == pytest.approx(scores, abs=1e-5)
        distances = np.linalg.norm(stored - asked, axis=1)
        assert (scores[distances.argsort()] >= np.sort(scores)[::-1] - 1e-5).all()


@pytest.mark.parametrize("scale", [0.1, 30])
def test_levelled_rows_of_any_length_score_as_before(rows, scale):
    longer = rows * torch.linspace(0.1, scale, N).view(-1, 1)
    level = index.level_of(lambda: longer.split(N))
    stored = index.levelled(longer, level)
    assert torch.allclose(stored.norm(dim=1), torch.ones(N), atol=1e-5)
    again = level.length * stored[:, :-1]
    again[:, -1] += level.middle
    assert torch.allclose(again, longer, atol=1e-5 * scale)


def test_levelling_leaves_the_rows_as_they_are(rows):
    for kind in (torch.float32, torch.float64):
        own = rows.to(kind)
        before = own.clone()
        index.levelled(own, index.level_of(partial(own.split, N)))
        assert torch.equal(own, before)


@pytest.mark.parametrize("kind", FAISS)
def test_an_older_index_of_the_rows_as_they_are_still_answers(rows, queries, tmp_path, kind):
    faiss, width = pytest.importorskip("faiss"), WIDTH + 1
    flat = faiss.IndexFlatIP(width)
    if kind == index.IVF:
        codes = faiss.ScalarQuantizer.QT_8bit
        older = faiss.IndexIVFScalarQuantizer(flat, width, 8, codes, faiss.METRIC_INNER_PRODUCT)
    else:
        older = faiss.IndexIVFPQ(flat, width, 8, width, 8, faiss.METRIC_INNER_PRODUCT)
    older.train(rows.numpy())
    older.add(rows.numpy())
    older.nprobe = 8
    path = str(tmp_path / "index")
    faiss.write_index(older, path)
    scores, numbers = index.read(kind, path, rows)(queries, 10)
    wanted, exactly = index.exact(rows, queries, 10)
    assert index.recall(numbers, exactly) >= 0.95
    assert torch.allclose(scores[:, 0], wanted[:, 0], atol=1e-6)
    with pytest.raises(InputError, match="is not the .* index of this gallery"):
        index.read(kind, path, rows[:, :-2])


def test_the_recall_of_lists_is_the_share_of_the_wanted():
    assert (
        index.recall(torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.tensor([[3, 9], [4, 5]])) == 0.75
    )


@pytest.mark.parametrize("kind", FAISS)
def test_a_torn_file_or_another_index_is_said(built, rows, kind, tmp_path):
    whole = tmp_path / "whole"
    whole.write_bytes(open(built[kind], "rb").read())
    for size in (0, 3, 40, whole.stat().st_size // 2):
        (tmp_path / "torn").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(InputError, match="--rebuild_index"):
            index.read(kind, str(tmp_path / "torn"), rows)
    with pytest.raises(InputError, match="is not the"):
        index.read(kind, str(whole), rows[1:])
    with pytest.raises(InputError, match="is not the"):
        index.read(FAISS[1 - FAISS.index(kind)], str(whole), rows)


@pytest.mark.parametrize("kind", FAISS)
def test_few_photos_are_no_reason_for_warnings(rows, queries, kind, tmp_path, capfd):
    index.build(kind, rows[:300], queries[:5], str(tmp_path / "index"))
    assert capfd.readouterr() == ("", "")


def test_too_few_photos_for_codes_are_said(rows, queries, tmp_path):
    with pytest.raises(InputError, match="at least 256 photos"):
        index.build(index.IVF, rows[:255], queries, str(tmp_path / "index"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "n, kind",
    [
        (1, "exact"),
        (200_000, "exact"),
        (200_001, "ivf_sq8"),
        (5_000_000, "ivf_sq8"),
        (10**8, "opq_ivf_pq64"),
    ],
)
def test_the_usual_type_goes_by_the_number_of_photos(n, kind):
    assert index.usual_type(n) == kind


@pytest.mark.parametrize("n", [1, 5, 16_777_220, 20_000_000, 100_000_000])
def test_rows_are_spread_to_the_last_one_however_many_they_are(n):
    assert len(index.spread(torch.zeros(1).expand(n), 1000)) == min(n, 1000)
