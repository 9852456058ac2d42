"""The search benchmark.

Its made-up galleries have the stated geometry, and every part is measured.
"""

import json

import torch

import benchmark
from benchmarks import search

TINY = [
    "--embed_size",
    "16",
    "--device",
    "cpu",
    "--parts",
    "search",
    "--search_sizes",
    "1000",
    "--search_quantizer",
]


def test_photos_lie_near_centres_and_questions_near_their_photos(monkeypatch):
    monkeypatch.setattr(search, "CENTRES", 20)
    blocks = list(search.made_up_rows(500, 64, at_once=200))
    assert [len(block) for block in blocks] == [200, 200, 100]
    rows = torch.cat(blocks)
    photos, shifts = rows[:, :-1], rows[:, -1]
    assert (
        torch.allclose(photos.norm(dim=1), torch.ones(500), atol=1e-5)
        and ((shifts < -0.2) & (shifts > -0.3)).all()
    )
    alike = photos @ photos.t() - 2 * torch.eye(500)
    assert (
        alike.amax(1) > 0.5
    ).all() and alike.mean() < 0.1  # some of the same centre, most of others
    questions = search.questions_near(photos)
    assert ((questions @ photos.t()).argmax(1) == torch.arange(500)).float().mean() > 0.95


def test_the_part_is_measured_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(search, "ASKED", 20)
    benchmark.main([*TINY, "--search_folder", str(tmp_path), "--json", str(tmp_path / "b.json")])
    kept, table = json.loads((tmp_path / "b.json").read_text())["parts"], capsys.readouterr().out
    for kind in ("exact", "opq_ivf_pq64"):
        name = f"search, 1000 photos, {kind}"
        for title in (
            "built (s)",
            "on disk (MB)",
            "questions a second, one by one",
            "questions a second, 64 at once",
            "a question of ten words, from text to photos (ms)",
            "recall@10",
        ):
            assert kept[f"{name}: {title}"]["ours"]["median"] > 0 and f"{name}: {title}" in table
    assert kept["search, 1000 photos, exact: recall@10"]["ours"]["median"] == 1
    assert kept["search, 1000 photos, opq_ivf_pq64: recall@10"]["ours"]["median"] > 0.9
    assert kept["search, 1000 photos, exact: on disk (MB)"]["ours"]["median"] > 1000 * 17 * 4 / 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
