"""watch.py: figures of a step, and when training has gone wrong."""

import argparse
import os

import pytest
import torch

from errors import InputError
from watch import StepFigures, Watch, figures_of

GOOD = StepFigures(loss=0.5, finite=1.0, positive_share=0.9, positive_mean=0.4, negative_mean=0.1)
COLLAPSED = StepFigures(loss=0.0, finite=1.0, positive_share=0.0, positive_mean=-0.5, negative_mean=-0.5)
BAD = StepFigures(loss=float("nan"), finite=0.0, positive_share=0.0, positive_mean=float("nan"), negative_mean=0.0)


def watch_with(said=None, **changes):
    options = {"margin": 0.2, "skip_bad_steps": 0, "collapse_patience": 5, "on_collapse": None, **changes}
    return Watch(argparse.Namespace(**options), (said if said is not None else []).append)


def feed(watch, figures, steps, kind="hal", batch=128):
    for step in range(1, steps + 1):
        watch.see(step, 0.001, figures, batch, kind, "runs/x/checkpoint.pth.tar")


def test_figures_are_those_of_plain_loops():
    torch.manual_seed(0)
    similarities = torch.randn(5, 5, dtype=torch.float64)
    similarities[3, 3] = 0  # not positive
    figures = StepFigures(*figures_of(torch.tensor(0.25).double(), torch.tensor(1.0).double(), similarities).tolist())
    pairs = [similarities[i, i].item() for i in range(5)]
    others = [similarities[i, j].item() for i in range(5) for j in range(5) if i != j]
    assert figures.loss == 0.25 and figures.finite == 1
    assert figures.positive_share == pytest.approx(sum(value > 0 for value in pairs) / 5)
    assert figures.positive_mean == pytest.approx(sum(pairs) / 5)
    assert figures.negative_mean == pytest.approx(sum(others) / 20)


def test_a_batch_of_one_has_no_negatives():
    figures = figures_of(torch.tensor(0.25), torch.tensor(1.0), torch.tensor([[0.5]], requires_grad=True))
    assert figures.tolist() == [0.25, 1, 1, 0.5, 0] and not figures.requires_grad


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, float("nan")),
                                        (0.5, float("inf"))])
def test_a_loss_or_gradient_that_is_not_finite_is_seen(loss, norm):
    assert figures_of(torch.tensor(loss), torch.tensor(norm), torch.ones(1, 1))[1] == 0


def test_collapsed_hal_stops_at_its_patience_and_not_before():
    watch = watch_with()
    feed(watch, COLLAPSED, 4)
    with pytest.raises(InputError, match=r"step 1: .*collapsed: for 5 steps.*--lr_warmup_steps.* below 0\.001$"):
        feed(watch, COLLAPSED, 1)


def test_a_good_step_starts_the_count_again():
    watch = watch_with()
    for _ in range(3):
        feed(watch, COLLAPSED, 4)
        feed(watch, GOOD, 1)


def test_a_warning_is_given_once_when_asked_for():
    said = []
    feed(watch_with(said, on_collapse="warn"), COLLAPSED, 20)
    assert len(said) == 1 and "collapsed" in said[0]


@pytest.mark.parametrize("on_collapse, stops", [(None, False), ("warn", False), ("stop", True)])
def test_stuck_max_margin_warns_and_stops_only_by_request(on_collapse, stops):
    said = []
    watch = watch_with(said, on_collapse=on_collapse)
    stuck = GOOD._replace(loss=51.5, negative_mean=0.395)  # 2 x 128 x 0.2 is 51.2
    if stops:
        with pytest.raises(InputError, match="trivial loss"):
            feed(watch, stuck, 5, kind="max")
    else:
        feed(watch, stuck, 20, kind="max")
        assert len(said) == 1 and "trivial loss" in said[0]


@pytest.mark.parametrize("changes", [{"loss": 45.0, "negative_mean": 0.4}, {"loss": 51.2}], ids=["loss", "gap"])
def test_max_margin_away_from_its_trivial_point_is_left_alone(changes):
    said = []
    feed(watch_with(said, on_collapse="stop"), GOOD._replace(positive_share=0.0, **changes), 20, kind="max")
    assert not said


@pytest.mark.parametrize("share, collapsed", [(0.0, True), (0.049, True), (1 - 0.95, True), (0.051, False)])
def test_hal_has_collapsed_where_19_of_20_pairs_are_not_positive(share, collapsed):
    said = []
    feed(watch_with(said, on_collapse="warn"), GOOD._replace(positive_share=share), 5)
    assert len(said) == collapsed


@pytest.mark.parametrize("loss, gap, stuck", [
    (51.2, 0.0, True), (53.7, 0.0, True), (53.8, 0.0, False), (48.7, 0.0, True), (48.6, 0.0, False),
    (51.2, 0.0099, True), (51.2, 0.0101, False), (51.2, -0.0099, True), (51.2, -0.0101, False)])
def test_max_margin_is_stuck_within_a_twentieth_of_its_trivial_point(loss, gap, stuck):
    """The loss of 2 x 128 x 0.2, the pairs' lead over the others of the margin of 0.2."""
    said = []
    feed(watch_with(said), GOOD._replace(loss=loss, positive_mean=0.4, negative_mean=0.4 - gap), 5, kind="max")
    assert len(said) == stuck


@pytest.mark.parametrize("loss, gap, stuck", [(0.25, 0.125, True), (0.75, 0.0, True), (0.25, 0.1875, False)])
def test_the_bounds_themselves_are_stuck(monkeypatch, loss, gap, stuck):
    """Where all numbers are exact: a trivial loss of 0.5, half of it and half the margin of 0.25 allowed."""
    monkeypatch.setattr("watch.STUCK_WITHIN", 0.5)
    said = []
    feed(watch_with(said, margin=0.25), GOOD._replace(loss=loss, positive_mean=0.5, negative_mean=0.5 - gap), 5,
         kind="max", batch=1)
    assert len(said) == stuck


def test_max_margin_of_no_margin_has_no_trivial_point():
    said = []
    feed(watch_with(said, margin=0.0), GOOD._replace(loss=0.0, positive_mean=0.4, negative_mean=0.4), 9, kind="max")
    assert not said


def test_sum_margin_is_not_watched_for_collapse():
    said = []
    feed(watch_with(said), COLLAPSED, 20, kind="sum")
    assert not said


def test_a_step_that_is_not_finite_stops_with_the_last_good_loss(tmp_path, monkeypatch):
    watch = watch_with()
    feed(watch, GOOD, 1)
    with pytest.raises(InputError, match=r"step 1: .*not finite.*0\.001.*0\.5.*Start again with a lower"):
        feed(watch, BAD, 1)
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/x")
    open("runs/x/checkpoint.pth.tar", "w").close()
    with pytest.raises(InputError, match="Go back to runs/x/checkpoint.pth.tar with a lower"):
        feed(watch, BAD, 1)


def test_bad_steps_in_a_row_may_be_let_pass_up_to_a_number():
    said = []
    watch = watch_with(said, skip_bad_steps=2)
    for _ in range(3):
        feed(watch, BAD, 2)
        feed(watch, GOOD, 1)
    assert [message[-14:] for message in said] == ["d (1 in a row)", "d (2 in a row)"] * 3
    with pytest.raises(InputError, match="step 3: .*not finite"):
        feed(watch, BAD, 3)


def test_bad_steps_say_nothing_of_a_collapse():
    """Neither do they count, nor do they end its count."""
    watch = watch_with(skip_bad_steps=20)
    feed(watch, COLLAPSED, 4)
    feed(watch, BAD, 9)
    with pytest.raises(InputError, match="for 5 steps"):
        feed(watch, COLLAPSED, 1)


def test_a_restored_watch_goes_on_counting():
    first, second = watch_with(), watch_with()
    feed(first, COLLAPSED, 4)
    second.restore(first.state())
    with pytest.raises(InputError, match="for 5 steps"):
        feed(second, COLLAPSED, 1)


def test_a_restored_watch_knows_bad_steps_and_the_last_good_loss():
    first, second = watch_with(skip_bad_steps=2), watch_with(skip_bad_steps=2)
    feed(first, GOOD, 1)
    feed(first, BAD, 2)
    second.restore(first.state())
    with pytest.raises(InputError, match=r"last good loss 0\.5"):
        feed(second, BAD, 1)


def test_a_restored_watch_has_warned_already():
    said = []
    first, second = watch_with(said, on_collapse="warn"), watch_with(said, on_collapse="warn")
    feed(first, COLLAPSED, 5)
    second.restore(first.state())
    feed(second, COLLAPSED, 5)
    assert len(said) == 1
