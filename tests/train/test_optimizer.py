"""Schedules have the values that the settings say; decay, clipping and scale treat the parameters they should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule, matrices

PEAK = 0.4


def values(steps, at, **settings):
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **settings), steps)
    return [float(schedule(step)) for step in at]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Of 12 steps, 4 are warm-up; the remaining 8 fall from the peak to the end, which step 12 would have.
        ({"schedule": "constant"}, {4: 0.4, 8: 0.4, 11: 0.4}),
        ({"schedule": "linear"}, {4: 0.4, 8: 0.2, 11: 0.05, 12: 0.0}),
        ({"schedule": "linear", "end_fraction": 0.5}, {4: 0.4, 8: 0.3, 11: 0.225, 12: 0.2}),
        ({"schedule": "cosine"}, {4: 0.4, 8: 0.2, 11: 0.2 * (1 + np.cos(np.pi * 7 / 8)), 12: 0.0}),
        ({"schedule": "cosine", "end_fraction": 0.1}, {4: 0.4, 8: 0.22, 12: 0.04}),
        ({"schedule": "rsqrt"}, {4: 0.4, 9: 0.4 * (4 / 9) ** 0.5, 11: 0.4 * (4 / 11) ** 0.5}),
    ],
)
def test_schedule_warms_up_to_the_peak_and_then_follows_its_curve(settings, expected):
    warm_up = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}  # the first step moves already, the fourth is the first at the peak
    expected = warm_up | expected
    np.testing.assert_allclose(values(12, expected, warmup_steps=4, **settings), list(expected.values()), atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule):
    np.testing.assert_allclose(values(10, [0], schedule=schedule), [PEAK], rtol=1e-6)


def test_warm_up_of_one_step_is_none():
    assert values(10, range(10), warmup_steps=1)[:2] == pytest.approx([PEAK, PEAK])


def test_schedule_gives_the_same_for_traced_steps_and_plain_numbers():
    for schedule in ("constant", "linear", "cosine", "rsqrt"):
        function = make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=3, learning_rate=PEAK), 10)
        np.testing.assert_allclose(
            jax.jit(jax.vmap(function))(jnp.arange(10)), [float(function(step)) for step in range(10)], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"name": "adam"}, "adamw or adafactor"),
        ({"schedule": "step"}, "constant, linear, cosine, rsqrt"),
        ({"learning_rate": 0.0}, "positive"),
        ({"learning_rate": float("nan")}, "positive"),
        ({"schedule": "rsqrt"}, "warmup_steps of at least 1"),
        ({"warmup_steps": -1}, "0 or more"),
        ({"weight_decay": -0.1}, "0 or more"),
        ({"clip_norm": 0.0}, "positive"),
        ({"end_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_setting_is_refused_with_what_would_be_right(settings, advice):
    with pytest.raises(UserError, match=advice) as error:
        OptimizerConfig(**settings)
    assert "\n" not in str(error.value)


def test_warm_up_longer_than_the_run_is_refused_before_it_starts():
    with pytest.raises(UserError, match="warmup_steps is 10, but the run has 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), 10)


# --- updates ---

PARAMS = {
    "kernel": np.full((3, 2), 2.0, np.float32),
    "embedding": np.full((4, 3), -2.0, np.float32),
    "scale": np.full(3, 2.0, np.float32),
    "rel_embedding": np.full((2, 4), 2.0, np.float32),
}


def one_update(gradients, steps=10, **settings):
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", **settings), steps)
    state = optimizer.init(PARAMS)
    updates, state = jax.jit(optimizer.update)(gradients, state, PARAMS)
    return updates, state


def test_matrices_are_kernels_and_the_embedding_of_a_real_model(student):
    chosen = matrices(abstract_params(student))
    not_chosen = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(chosen) if not yes}
    chosen = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(chosen) if yes}
    assert chosen == {"kernel", "embedding"} and not_chosen == {"scale", "rel_embedding"}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_shrinks_matrices_by_learning_rate_times_decay_and_nothing_else(name):
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    updates, _ = one_update(zeros, name=name, learning_rate=0.5, weight_decay=0.1)
    for leaf, expected in {"kernel": -0.1, "embedding": 0.1, "scale": 0.0, "rel_embedding": 0.0}.items():
        np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_without_decay_a_parameter_without_gradient_stays(name):
    updates, _ = one_update(jax.tree.map(np.zeros_like, PARAMS), name=name)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(("clip_norm", "factor"), [(1.0, 0.1), (20.0, 1.0), (None, 1.0)])
def test_gradients_above_the_largest_global_norm_are_scaled_down_to_it(clip_norm, factor):
    gradients = jax.tree.map(np.zeros_like, PARAMS)
    gradients["kernel"][0, 0], gradients["scale"][1] = 6.0, 8.0  # norm 10
    _, state = one_update(gradients, clip_norm=clip_norm, b1=0.75)
    moment = optax.tree_utils.tree_get(state, "mu")
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.25 * factor * g, rtol=1e-6), moment, gradients)


def test_first_adamw_update_is_the_learning_rate_against_the_gradients_sign():
    gradients = jax.tree.map(lambda leaf: np.where(np.arange(leaf.size).reshape(leaf.shape) % 2, 3.0, -0.2), PARAMS)
    updates, _ = one_update(gradients, learning_rate=0.01)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.01 * np.sign(g), rtol=1e-5), updates, gradients)


def test_adafactor_steps_are_scaled_by_the_size_of_the_parameter():
    gradients = jax.tree.map(np.ones_like, PARAMS)
    updates, _ = one_update(gradients, name="adafactor", learning_rate=0.01)
    np.testing.assert_allclose(updates["kernel"], -0.01 * 2.0, rtol=1e-4)  # root mean square of the kernel: 2


def test_adafactor_keeps_a_row_and_a_column_instead_of_a_large_matrix():
    params = {"kernel": np.zeros((2, 128, 256), np.float32)}  # two stacked layers
    state = make_optimizer(OptimizerConfig(name="adafactor"), 10).init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(2, 128), (2, 256)} <= shapes and (2, 128, 256) not in shapes
