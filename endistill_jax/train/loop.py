"""The training loop: fetch, place, step, and every so often a look at what happened."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from endistill_jax.core.batch import Batch
from endistill_jax.train.state import TrainState
from endistill_jax.train.step import Metrics


def train_loop(
    train_step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    teacher_params: Any,
    batches: Iterator[Batch],
    *,
    steps: int,
    log_every: int,
    at_log: Callable[[int, TrainState, dict[str, float]], bool | None],
) -> TrainState:
    """Trains from the state's step to `steps`.

    Devices run ahead of the host: between two logs nothing waits for a result, so the next batch is fetched and placed
    while a step runs.

    Args:
        train_step: from `make_train_step`; donates the state.
        state: where to start.
        teacher_params: passed to every step.
        batches: placed batches, one a step.
        steps: updates in all, counted from the state's step 0.
        log_every: `at_log` is called at its multiples and after the last step.
        at_log: gets the step, the state and the means since the last call: sums of each term over the window, divided
            once by its summed weight. It may save the state, but not keep it. Training ends early if it returns True.

    Returns:
        The state after the last update.
    """
    window: list[Metrics] = []
    for step in range(int(state.step) + 1, steps + 1):
        state, metrics = train_step(state, teacher_params, next(batches))
        window.append(metrics)
        if step % log_every == 0 or step == steps:
            if at_log(step, state, window_means(window)):
                break
            window.clear()
    return state


def window_means(window: list[Metrics]) -> dict[str, float]:
    """Mean of every metric over some steps: summed sums over summed weights, in float64."""
    fetched = jax.device_get(window)
    means = {}
    for name in fetched[0]:
        sums, weights = np.asarray([metrics[name] for metrics in fetched], np.float64).T
        means[name] = float(sums.sum() / weights.sum()) if weights.sum() else float("nan")
    return means
