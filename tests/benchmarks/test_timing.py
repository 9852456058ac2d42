"""Timing: the note about a long round, and the memory of a call."""

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import peak_extra_memory


@pytest.mark.skipif(
    peak_extra_memory(list) is None, reason="no /proc/self/clear_refs that may be written"
)
def test_memory_is_that_of_the_call():
    assert 150e6 < peak_extra_memory(lambda: torch.ones(50_000_000)) < 300e6


@pytest.mark.parametrize("one, said", [(50.0, "  this takes about 7 minutes"), (30.0, "")])
def test_what_takes_over_five_minutes_is_said_after_the_first_round(one, said, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    for number in timing.watched(range(8)):
        words = capsys.readouterr().err
        assert words.startswith(said if number == 1 else "") and bool(words) == bool(
            said and number == 1
        )  # once
        clock[0] += one
