"""Meters: the latest value, the mean so far, and the line that they make."""

from argparse import Namespace

import pytest

from training.meters import AverageMeter, LogCollector


@pytest.mark.parametrize(
    "updates, now, mean",
    [([(2.0, 1), (4.0, 3)], 4.0, 3.5), ([(5.0, 0)], 5.0, 5.0), ([(1.0, 10), (9.0, 0)], 9.0, 1.0)],
    ids=str,
)
def test_a_meter_keeps_the_latest_value_and_the_weighted_mean(updates, now, mean):
    meter = AverageMeter()
    for value, count in updates:
        meter.update(value, count)
    assert (meter.val, meter.avg) == (now, pytest.approx(mean))


def test_meters_are_printed_in_the_order_they_came():
    meters = LogCollector()
    meters.update("Eit", 7)
    meters.update("Loss", 0.5, 4)
    meters.update("Loss", 0.25, 4)
    assert str(meters) == "Eit 7  Loss 0.2500 (0.3750)"


def test_a_meter_that_is_reset_starts_anew():
    meter = AverageMeter()
    meter.update(8.0, 5)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0, 1)
    assert meter.avg == 2.0


@pytest.mark.parametrize(
    "named, expected",
    [
        ({}, [("Eit", 7, None), ("Loss", 0.25, None)]),
        ({"prefix": "data/", "step": 7}, [("data/Eit", 7, 7), ("data/Loss", 0.25, 7)]),
    ],
    ids=["plain", "prefix and step"],
)
def test_meters_log_their_latest_values(named, expected):
    meters, logged = LogCollector(), []
    meters.update("Eit", 7)
    meters.update("Loss", 0.5, 4)
    meters.update("Loss", 0.25, 4)
    logger = Namespace(log_value=lambda tag, value, step: logged.append((tag, value, step)))
    meters.tb_log(logger, **named)
    assert logged == expected
