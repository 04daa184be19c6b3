"""The loop counts updates from the state, and a window's mean is a ratio of sums."""

import itertools
import math

import jax.numpy as jnp
import pytest

from endistill_jax.train.loop import train_loop, window_means
from endistill_jax.train.state import TrainState

# (sum, weight) of the metric "loss" at updates 1, 2, ...
METRICS = [(6.0, 2.0), (1.0, 1.0), (30.0, 3.0), (8.0, 4.0), (5.0, 1.0), (2.0, 4.0), (9.0, 3.0)]


class Run:
    """Runs the loop over a counting step, and keeps what it was called with."""

    def __init__(self, *, first=0, steps=7, log_every=3):
        self.trained, self.logs = [], []
        batches = ({"number": number} for number in itertools.count())
        state = TrainState(step=jnp.int32(first), params=jnp.float32(first), opt_state=())
        settings = {"steps": steps, "log_every": log_every, "at_log": self._at_log}
        self.state = train_loop(self._step, state, "teacher", batches, **settings)

    def _step(self, state, teacher_params, batch):
        assert teacher_params == "teacher"
        self.trained.append(batch["number"])
        total, weight = METRICS[int(state.step)]
        metrics = {"loss": (jnp.float32(total), jnp.float32(weight))}
        return TrainState(step=state.step + 1, params=state.params + 1, opt_state=()), metrics

    def _at_log(self, step, state, means):
        assert int(state.step) == step
        self.logs.append((step, means["loss"]))


def _mean(first, last):
    totals, weights = zip(*METRICS[first:last], strict=True)
    return sum(totals) / sum(weights)


def test_window_divides_summed_sums_by_summed_weights_and_the_last_may_be_shorter():
    assert Run().logs == [(3, _mean(0, 3)), (6, _mean(3, 6)), (7, _mean(6, 7))]
    assert _mean(0, 3) != pytest.approx(sum(total / weight for total, weight in METRICS[:3]) / 3)


def test_no_window_is_logged_twice_when_the_last_step_is_a_multiple():
    assert [step for step, _ in Run(steps=6).logs] == [3, 6]


def test_steps_are_counted_from_the_states_step_and_each_takes_one_batch():
    whole = Run()
    assert int(whole.state.step) == 7 and whole.trained == list(range(7))
    resumed = Run(first=4)
    assert int(resumed.state.step) == 7 and float(resumed.state.params) == 7.0
    assert resumed.trained == [0, 1, 2]  # the iterator was restored, not counted anew


def test_windows_of_a_resumed_run_end_at_the_same_steps():
    resumed = Run(first=3)
    assert resumed.logs == Run().logs[1:]


def test_finished_run_takes_no_batch_and_logs_nothing():
    finished = Run(first=7)
    assert finished.trained == [] and finished.logs == [] and int(finished.state.step) == 7


def test_weights_are_summed_exactly_even_when_they_are_beyond_float32():
    # 2**24 + 1 is no float32: summed in float32, the mean would miss the second step.
    window = [{"loss": (jnp.float32(2**24), jnp.float32(2**24))}, {"loss": (jnp.float32(0), jnp.float32(1))}]
    assert window_means(window)["loss"] == 2**24 / (2**24 + 1)


def test_metric_without_any_weight_is_not_a_number_and_does_not_stop_the_run():
    window = [{"loss": (jnp.float32(0), jnp.float32(0)), "norm": (jnp.float32(3), jnp.float32(1))}]
    means = window_means(window)
    assert math.isnan(means["loss"]) and means["norm"] == 3.0
