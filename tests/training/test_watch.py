"""Figures of a step, and when training has failed."""

import argparse
import os

import pytest
import torch

from runtime.errors import InputError
from training.watch import GaveUp, StepFigures, Watch, chance_r10, figures_of

GOOD = StepFigures(loss=0.5, finite=1.0, positive_share=0.9, positive_mean=0.4, negative_mean=0.1)

COLLAPSED = StepFigures(
    loss=0.0, finite=1.0, positive_share=0.0, positive_mean=-0.5, negative_mean=-0.5
)

BAD = StepFigures(
    loss=float("nan"), finite=0.0, positive_share=0.0, positive_mean=float("nan"), negative_mean=0.0
)


def watch_with(said=None, **changes):
    options = {
        "margin": 0.2,
        "skip_bad_steps": 0,
        "collapse_patience": 5,
        "on_collapse": None,
        "lr_warmup_steps": 0,
        **changes,
    }
    return Watch(argparse.Namespace(**options), (said if said is not None else []).append)


def feed(watch, figures, steps, kind="no positives", batch=128):
    for step in range(1, steps + 1):
        watch.see(step, 0.001, figures, batch, kind, "runs/x/checkpoint.pth.tar")


def test_figures_are_those_of_plain_loops():
    torch.manual_seed(0)
    similarities = torch.randn(5, 5, dtype=torch.float64)
    similarities[3, 3] = 0  # not positive
    figures = StepFigures(
        *figures_of(torch.tensor(0.25).double(), torch.tensor(1.0).double(), similarities).tolist()
    )
    pairs = [similarities[i, i].item() for i in range(5)]
    others = [similarities[i, j].item() for i in range(5) for j in range(5) if i != j]
    assert figures.loss == 0.25 and figures.finite == 1
    assert figures.positive_share == pytest.approx(sum(value > 0 for value in pairs) / 5)
    assert figures.positive_mean == pytest.approx(sum(pairs) / 5)
    assert figures.negative_mean == pytest.approx(sum(others) / 20)


def test_a_batch_of_one_has_no_negatives():
    figures = figures_of(
        torch.tensor(0.25), torch.tensor(1.0), torch.tensor([[0.5]], requires_grad=True)
    )
    assert figures.tolist() == [0.25, 1, 1, 0.5, 0] and not figures.requires_grad


@pytest.mark.parametrize(
    "loss, norm",
    [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, float("nan")), (0.5, float("inf"))],
)
def test_a_loss_or_gradient_that_is_not_finite_is_seen(loss, norm):
    assert figures_of(torch.tensor(loss), torch.tensor(norm), torch.ones(1, 1))[1] == 0


def test_collapsed_hal_stops_at_its_patience_and_not_before():
    watch = watch_with()
    feed(watch, COLLAPSED, 4)
    with pytest.raises(
        InputError, match=r"step 1: .*collapsed: for 5 steps.*--lr_warmup_steps.* below 0\.001$"
    ):
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
            feed(watch, stuck, 5, kind="trivial")
    else:
        feed(watch, stuck, 20, kind="trivial")
        assert len(said) == 1 and "trivial loss" in said[0]


@pytest.mark.parametrize(
    "changes", [{"loss": 45.0, "negative_mean": 0.4}, {"loss": 51.2}], ids=["loss", "gap"]
)
def test_max_margin_away_from_its_trivial_point_is_left_alone(changes):
    said = []
    feed(
        watch_with(said, on_collapse="stop"),
        GOOD._replace(positive_share=0.0, **changes),
        20,
        kind="trivial",
    )
    assert not said


@pytest.mark.parametrize(
    "share, collapsed", [(0.0, True), (0.049, True), (1 - 0.95, True), (0.051, False)]
)
def test_hal_has_collapsed_where_19_of_20_pairs_are_not_positive(share, collapsed):
    said = []
    feed(watch_with(said, on_collapse="warn"), GOOD._replace(positive_share=share), 5)
    assert len(said) == collapsed


@pytest.mark.parametrize(
    "loss, gap, stuck",
    [
        (51.2, 0.0, True),
        (53.7, 0.0, True),
        (53.8, 0.0, False),
        (48.7, 0.0, True),
        (48.6, 0.0, False),
        (51.2, 0.0099, True),
        (51.2, 0.0101, False),
        (51.2, -0.0099, True),
        (51.2, -0.0101, False),
    ],
)
def test_max_margin_is_stuck_within_a_twentieth_of_its_trivial_point(loss, gap, stuck):
    """The loss of 2 x 128 x 0.2, the pairs' lead over the others of the margin of 0.2."""
    said = []
    feed(
        watch_with(said),
        GOOD._replace(loss=loss, positive_mean=0.4, negative_mean=0.4 - gap),
        5,
        kind="trivial",
    )
    assert len(said) == stuck


@pytest.mark.parametrize(
    "loss, gap, stuck", [(0.25, 0.125, True), (0.75, 0.0, True), (0.25, 0.1875, False)]
)
def test_the_bounds_themselves_are_stuck(monkeypatch, loss, gap, stuck):
    """Where all numbers are exact.

    A trivial loss of 0.5, half of it and half the margin of 0.25 allowed.
    """
    monkeypatch.setattr("training.watch.STUCK_WITHIN", 0.5)
    said = []
    feed(
        watch_with(said, margin=0.25),
        GOOD._replace(loss=loss, positive_mean=0.5, negative_mean=0.5 - gap),
        5,
        kind="trivial",
        batch=1,
    )
    assert len(said) == stuck


def test_max_margin_of_no_margin_has_no_trivial_point():
    said = []
    feed(
        watch_with(said, margin=0.0),
        GOOD._replace(loss=0.0, positive_mean=0.4, negative_mean=0.4),
        9,
        kind="trivial",
    )
    assert not said


def test_chance_is_what_random_rankings_do_not_exceed():
    """1,000 images with five captions each, which rank alike at worst.

    Of 2,000 such rankings 19 in 20 stay below.
    """
    generator = torch.Generator().manual_seed(0)
    among_ten = torch.randint(1000, (2000, 1000), generator=generator) < 10
    r10 = 100 * among_ten.float().mean(1)
    assert 0.95 <= float((r10 <= chance_r10(1000)).float().mean()) < 1
    assert r10.mean() == pytest.approx(1, abs=0.05) and chance_r10(1000) == pytest.approx(
        1 + 2 * 0.3146, abs=1e-3
    )


STUCK = GOOD._replace(loss=1.08 * 51.2)  # of 2 x 128 x 0.2


@pytest.mark.parametrize(
    "figures, step, r10, n_images, collapse, warned",
    [
        (STUCK, 500, (1.3, 1.1), 1000, "trivial", True),
        (STUCK, 500, (6.0, 1.1), 1000, "trivial", True),
        (STUCK, 500, (1.1, 6.0), 1000, "trivial", True),
        (STUCK, 500, (1.7, 1.7), 1000, "trivial", False),
        (STUCK, 249, (1.3, 1.1), 1000, "trivial", False),
        (STUCK, 250, (1.3, 1.1), 1000, "trivial", True),
        (STUCK, 500, (11.0, 13.0), 99, "trivial", False),
        (STUCK, 500, (11.0, 13.0), 100, "trivial", True),
        (STUCK._replace(loss=0.94 * 51.2), 500, (1.3, 1.1), 1000, "trivial", False),
        (STUCK._replace(loss=1.5 * 51.2), 500, (1.3, 1.1), 1000, "trivial", True),
        (STUCK, 500, (1.3, 1.1), 1000, "no positives", False),
        (STUCK, 500, (1.3, 1.1), 1000, None, False),
    ],
)
def test_max_margin_at_chance_is_warned_of_once_at_validation(
    figures, step, r10, n_images, collapse, warned
):
    """However far above its trivial loss, but not in the first 200 steps, after a warm-up of 50 here."""
    said = []
    watch = watch_with(said, lr_warmup_steps=50)
    feed(watch, figures, 1, collapse)
    for _ in range(2):
        watch.see_recalls(step, 0.001, r10, n_images, collapse)
    assert len(said) == warned
    if warned:
        assert (
            f"step {step}: dev recalls are no better than chance" in said[0]
            and "below 0.001" in said[0]
        )
        assert (
            f"{r10[0]:.1f}, text to image {r10[1]:.1f}, by chance {1000 / n_images:.1f}" in said[0]
        )
        assert f"{figures.loss / 51.2:.2f} times its trivial loss" in said[0]


def test_max_margin_at_chance_stops_by_request():
    watch = watch_with(on_collapse="stop")
    feed(watch, STUCK, 1, "trivial")
    with pytest.raises(GaveUp, match="no better than chance"):
        watch.see_recalls(500, 0.001, (1.0, 1.0), 1000, "trivial")


def test_sum_margin_is_not_watched_for_collapse():
    said = []
    feed(watch_with(said), COLLAPSED, 20, kind="sum")
    assert not said


def test_a_step_that_is_not_finite_stops_with_the_last_good_loss(tmp_path, monkeypatch):
    watch = watch_with()
    feed(watch, GOOD, 1)
    with pytest.raises(
        InputError, match=r"step 1: .*not finite.*0\.001.*0\.5.*Start again with a lower"
    ):
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
    """They neither count nor reset the count."""
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
