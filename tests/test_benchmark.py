"""The script benchmark.py on sizes that take seconds: every part is measured and recorded."""

import json

import pytest

import benchmark
from benchmarks.timing import spread
from runtime.device import Products
from runtime.errors import InputError
from tests.helpers.made import BENCHMARK

BF16 = ["--amp", "off", "bf16"]  # also where it is emulated: at these sizes that takes no time


def test_every_part_is_measured_and_kept(tmp_path, capsys):
    benchmark.main([*BENCHMARK, *BF16, "--json", str(tmp_path / "b.json")])
    kept = json.loads((tmp_path / "b.json").read_text())
    table = capsys.readouterr().out
    for part in (
        "loader",
        "caption cache",
        "step, batch of 10, float32",
        "step, batch of 10, bf16",
        "bank exclusion",
        "bank build",
        "evaluation, 10 x 50",
        "five folds of 2",
    ):
        assert any(title.startswith(part) for title in kept["parts"]) and part in table
    for line in kept["parts"].values():
        assert all(
            spread["min"] <= spread["median"] <= spread["max"]
            for spread in line.values()
            if isinstance(spread, dict)
        )


@pytest.fixture
def quick(monkeypatch):
    """The machine's speeds are not measured, which takes a second."""
    monkeypatch.setattr(
        benchmark,
        "machine_speeds",
        lambda _: {"operations_per_second": 1e11, "copied_bytes_per_second": 1e10},
    )


def pretend_bf16(monkeypatch, faster):
    """A probe that finds bf16 products so many times faster than float32 ones."""
    monkeypatch.setattr(
        benchmark,
        "choose_matmul_precision",
        lambda *_, **__: Products("highest", {"highest": 0.01, "bf16": 0.01 / faster}),
    )


@pytest.mark.parametrize(
    "faster, flags, kinds, said",
    [
        (
            0.014,
            [],
            {"float32"},
            "note: left out is bf16, WARNING: its products are 0.01 times as fast",
        ),
        (
            0.014,
            BF16,
            {"float32", "bf16"},
            "note: bf16, WARNING: its products are 0.01 times as fast",
        ),
        (2.0, [], {"float32", "bf16"}, ""),
        (2.0, ["--amp", "off"], {"float32"}, ""),
        (0.014, ["--amp", "off"], {"float32"}, ""),
    ],
)
def test_bf16_is_measured_where_its_products_are_faster_or_it_is_named(
    faster, flags, kinds, said, quick, monkeypatch, capsys
):
    pretend_bf16(monkeypatch, faster)
    benchmark.main([*BENCHMARK, *flags, "--parts", "step"])
    table, words = capsys.readouterr()
    assert {
        kind for kind in ("float32", "bf16") if f"| step, batch of 10, {kind} (ms)" in table
    } == kinds
    assert (
        [line for line in words.splitlines() if "note: " in line] == []
        if not said
        else said in words
    )


def test_a_line_is_printed_before_the_next_one_is_measured(quick, monkeypatch, capsys):
    def parts_of(*_):
        def lines():
            yield {"one": {"ours": spread([1.0])}}
            table, words = capsys.readouterr()
            assert "| one | 1 (1-1) |" in table and "measuring: evaluation" in words
            yield {"two": {"ours": spread([2.0])}}

        return {"evaluation": lines()}

    monkeypatch.setattr(benchmark, "parts_of", parts_of)
    benchmark.main([*BENCHMARK, "--amp", "off", "--parts", "evaluation"])
    assert "| two | 2 (2-2) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--eval_images", "11"], "--eval_images"),
        (["--images", "1"], "--images"),
        (["--repeats", "0"], "--repeats"),
        (["--search_folder", "nowhere"], "--search_folder nowhere is not there"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags, named):
    with pytest.raises(InputError, match=named):
        benchmark.parse_args([*BENCHMARK, *flags])
