"""Estimates: the arithmetic, by hand."""

import dataclasses

import pytest

from endistill_jax.planning.planned import Assumptions, Range, estimate_run, step_seconds
from endistill_jax.planning.topologies import CHIPS, Chip

CHIP = Chip(name="toy", platform="tpu", peak_flops=100.0, link_bandwidth=10.0, network_bandwidth=1.0)
HALF = Assumptions(best_utilisation=1.0, worst_utilisation=0.5, best_bandwidth=1.0, worst_bandwidth=0.5)


def test_the_least_time_hides_the_exchange_and_the_most_adds_it():
    computing = step_seconds(CHIP, flops=200, link_bytes=10, assumptions=HALF)
    assert computing == Range(least=2.0, most=4.0 + 2.0)
    exchanging = step_seconds(CHIP, flops=200, link_bytes=50, assumptions=HALF)
    assert exchanging == Range(least=5.0, most=4.0 + 10.0)


def test_no_step_is_shorter_than_reading_its_arguments_from_memory_once():
    chip = dataclasses.replace(CHIP, memory_bandwidth=20.0)
    assert step_seconds(chip, flops=200, argument_bytes=60, assumptions=HALF) == Range(least=3.0, most=4.0)
    assert step_seconds(chip, flops=200, argument_bytes=30, assumptions=HALF) == Range(least=2.0, most=4.0)
    assert step_seconds(chip, flops=200, argument_bytes=100, assumptions=HALF) == Range(least=5.0, most=5.0)


def test_the_network_between_slices_has_a_bandwidth_of_its_own():
    both = step_seconds(CHIP, flops=0, link_bytes=10, network_bytes=3, assumptions=HALF)
    assert both == Range(least=1.0 + 3.0, most=2.0 + 6.0)


def test_what_is_not_known_of_a_chip_is_not_estimated():
    assert step_seconds(CHIPS["cpu"], flops=1) is None
    # v4's network between slices has no published figure; without such traffic nothing is missing.
    assert step_seconds(CHIPS["v4"], flops=1, network_bytes=1) is None
    assert step_seconds(CHIPS["v4"], flops=1, link_bytes=1) is not None


def test_tokens_chip_hours_and_cost_follow_from_the_step():
    run = estimate_run(Range(least=2.0, most=4.0), tokens_a_step=100, run_tokens=180_000, chips=8, price=0.5)
    assert run.tokens_a_day == Range(least=86400 * 25, most=86400 * 50)
    assert run.chip_hours == Range(least=8.0, most=16.0)  # 1,800 steps on 8 chips
    assert run.cost == Range(least=4.0, most=8.0)
    assert estimate_run(Range(least=2.0, most=4.0), tokens_a_step=1, run_tokens=1, chips=1, price=None).cost is None


@pytest.mark.parametrize("field", ["best_utilisation", "worst_utilisation", "best_bandwidth", "worst_bandwidth"])
def test_every_assumption_is_spelled_out(field):
    assert "13%" in str(Assumptions(**{field: 0.13}))


def test_chips_of_a_kind_with_figures_name_their_source():
    for chip in CHIPS.values():
        assert (chip.peak_flops is None) == (chip.source == "")
