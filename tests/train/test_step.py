"""One step: what it computes does not depend on how the batch is cut, and nothing but the student is changed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.objectives import CrossEntropy, InterpolatedTargets, Objective, relations
from endistill_jax.sharding import param_shardings
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import init_state, state_shardings
from endistill_jax.train.step import LossFunction, make_train_step, split_micro_batches, window_means

ADAM = make_optimizer(OptimizerConfig(learning_rate=0.01, schedule="constant"), 100)
TERMS = {
    "encoder_self/qq",
    "encoder_self/kk",
    "decoder_self/qk",
    "decoder_self/vv",
    "cross/qk",
    "cross/vv",
    "logits",
    "lm",
}


@pytest.fixture(scope="module")
def make_step(student, teacher, objective, mesh):
    """Steps by optimizer and settings, each compiled once for the whole file."""

    @functools.cache
    def make(optimizer, micro_batches=1, student=student, teacher=teacher, objective=objective, seed=None):
        return make_train_step(
            student=student,
            teacher=teacher,
            objective=objective,
            optimizer=optimizer,
            mesh=mesh,
            micro_batches=micro_batches,
            # This generator's code takes a third of the time to compile.
            base_key=None if seed is None else jax.random.key(seed, impl="unsafe_rbg"),
        )

    return make


@pytest.fixture
def gradient(make_step, gradient_descent, new_state, teacher_params):
    """(batch, micro_batches) -> (gradient, metrics), by a step whose update is the gradient."""

    def measure(batch, micro_batches=1):
        state = new_state(gradient_descent)
        before = jax.device_get(state.params)
        state, metrics = make_step(gradient_descent, micro_batches)(state, teacher_params, batch)
        return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params), jax.device_get(metrics)

    return measure


def assert_same_gradient(actual, expected):
    # An update is the difference of parameters of order one, so it carries their rounding: some 2^-23.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), actual, expected)


def keep_rows(batch, rows):
    """The same batch with all other rows blank: every array zero there."""
    kept = np.isin(np.arange(len(batch["encoder_input_tokens"])), list(rows))
    return {name: np.where(kept[:, None], x, 0).astype(x.dtype) for name, x in batch.items()}


# --- what is computed ---


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_update_and_metrics_do_not_depend_on_microbatching(gradient, batch, micro_batches):
    whole, metrics = gradient(batch)
    parts, metrics_of_parts = gradient(batch, micro_batches)
    assert_same_gradient(parts, whole)
    assert metrics.keys() == metrics_of_parts.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-4, err_msg=name)


def test_mean_of_the_gradients_of_microbatches_is_another_gradient(gradient, batch):
    whole, _ = gradient(batch)
    first, second = (gradient(keep_rows(batch, range(start, 8, 2)))[0] for start in (0, 1))
    # Else the test of micro-batching would show nothing: each part would have to have the same weights.
    error = optax.global_norm(jax.tree.map(lambda a, b, c: (a + b) / 2 - c, first, second, whole))
    assert error > 0.05 * optax.global_norm(whole)


def test_microbatches_are_strided_and_keep_every_row_once(batch):
    parts = split_micro_batches(batch, 4)
    for name, x in batch.items():
        assert parts[name].shape == (4, 2, *x.shape[1:])
        for index in range(4):
            np.testing.assert_array_equal(parts[name][index], x[index::4])


def test_interpolated_targets_move_from_near_the_students_own_to_the_teachers(
    make_step, objective, gradient_descent, new_state, teacher_params, batch
):
    of_teacher = tuple(term for term in objective.terms if term.needs_teacher)

    def loss_at(step, targets=None):
        moving = Objective(terms=of_teacher, interpolated_targets=targets)
        state = new_state(gradient_descent).replace(step=jnp.asarray(step, jnp.int32))
        return float(make_step(gradient_descent, objective=moving)(state, teacher_params, batch)[1]["loss"][0])

    losses = [loss_at(step, InterpolatedTargets(steps=100)) for step in (0, 49, 99)]
    of_the_teacher = loss_at(0)
    # Near the student's own, a divergence grows with the square of the share, here a hundredth.
    assert 0 < losses[0] < 0.001 * of_the_teacher
    assert 0.05 * of_the_teacher < losses[1] < 0.95 * of_the_teacher
    np.testing.assert_allclose(losses[2], of_the_teacher, rtol=1e-4)


def test_metrics_are_sums_and_weights_of_the_dense_losses_and_norms_of_the_update(
    gradient, batch, student, teacher, objective, make_params, teacher_params
):
    update, metrics = gradient(batch)
    params, weights = make_params(student, 0), objective.weights(batch)
    dense = jax.jit(LossFunction(student=student, teacher=teacher, objective=objective).__call__)
    loss, sums = dense(params, teacher_params, batch, weights=weights)
    head = {"logits_dense": update["decoder"]["logits_dense"]}
    decoder = {name: part for name, part in update["decoder"].items() if name not in head}
    norms = {
        "gradient_norm": update,
        "gradient_norm/encoder": update["encoder"],
        "gradient_norm/decoder": decoder,
        "gradient_norm/embedding": (update["token_embedder"], head),
        "update_norm": update,
        "parameter_norm": jax.tree.map(np.subtract, params, update),
    }
    expected = {name: (total, weights.get(name, np.sum(batch["decoder_loss_weights"]))) for name, total in sums.items()}
    expected |= {"loss": (loss, 1.0)} | {name: (optax.global_norm(tree), 1.0) for name, tree in norms.items()}
    assert metrics.keys() == expected.keys() and set(expected) > TERMS
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-4, err_msg=name)


def test_gradient_does_not_depend_on_the_scale_of_the_loss_weights(gradient, batch):
    whole, metrics = gradient(batch)
    small = batch | {"decoder_loss_weights": batch["decoder_loss_weights"] / 64}  # together below one
    scaled, scaled_metrics = gradient(small)
    assert_same_gradient(scaled, whole)
    assert scaled_metrics["lm"][1] == metrics["lm"][1] / 64


def test_batch_of_padding_alone_changes_nothing_and_has_no_weight(gradient, batch):
    update, metrics = gradient(keep_rows(batch, []))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(update))
    assert all(metrics[name] == (0.0, 0.0) for name in TERMS)
    assert metrics["loss"] == (0.0, 1.0)


# --- what a step does to the state ---


@pytest.fixture
def adam(make_step, new_state, teacher_params, batch):
    """Runs some steps on one batch: (final state, metrics of each)."""

    def run(steps, **settings):
        step, state, metrics = make_step(ADAM), new_state(ADAM, **settings), []
        for _ in range(steps):
            state, told = step(state, teacher_params, batch)
            metrics.append(jax.device_get(told))
        return state, metrics

    return run


@pytest.fixture
def ten_steps(adam):
    return adam(10)


def test_loss_falls_on_a_repeated_batch(ten_steps):
    _, metrics = ten_steps
    losses = [float(told["loss"][0]) for told in metrics]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_teacher_is_neither_in_the_state_nor_changed(ten_steps, student, teacher, teacher_params, make_params):
    state, metrics = ten_steps
    widths = {teacher.inner_dim, teacher.mlp_dim}
    assert not widths & {student.d_model, student.inner_dim, student.mlp_dim, student.vocab_size}
    assert not any(widths & set(leaf.shape) for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher_params), make_params(teacher, 1))
    # Bit for bit the same figure at every step: no dropout and no change of the teacher.
    assert len({float(told["teacher_cross_entropy"][0]) for told in metrics}) == 1
    assert len({float(told["cross_entropy"][0]) for told in metrics}) == len(metrics)


def test_steps_are_counted_and_every_parameter_is_updated(ten_steps, make_params, student):
    state, _ = ten_steps
    assert int(state.step) == 10
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), make_params(student, 0), state.params)
    ):
        assert leaf, path


def test_same_start_gives_the_same_numbers_bit_for_bit(adam):
    first, second = (jax.device_get(adam(3)) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_stopping_between_two_steps_changes_nothing(adam, make_step, student, mesh, teacher_params, batch):
    halfway = jax.device_put(jax.device_get(adam(2)[0]), state_shardings(student, ADAM, mesh))
    resumed, _ = make_step(ADAM)(halfway, teacher_params, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(adam(3)[0]))


def test_old_state_is_donated(make_step, new_state, teacher_params, batch):
    old = new_state(ADAM)
    make_step(ADAM)(old, teacher_params, batch)
    kept = [path for path, leaf in jax.tree_util.tree_leaves_with_path(old) if not leaf.is_deleted()]
    assert not kept
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher_params))


@pytest.mark.parametrize("place", ["host", "device", "mesh"])
def test_parameters_that_a_state_starts_from_are_not_donated_with_it(
    make_step, mesh, student, make_params, teacher_params, batch, place
):
    params = make_params(student, 0)
    if place != "host":
        where = jax.devices()[0] if place == "device" else param_shardings(student, mesh)
        params = jax.device_put(params, where)
    state = init_state(student, ADAM, mesh, jax.random.key(0), params)
    make_step(ADAM)(state, teacher_params, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), make_params(student, 0))


def test_step_is_compiled_once(make_step, ten_steps):
    assert make_step(ADAM)._cache_size() == 1


# --- dropout ---


def test_dropout_follows_from_the_key_and_the_step_alone(
    make_step, gradient_descent, new_state, teacher_params, student, batch
):
    dropping = dataclasses.replace(student, dropout_rate=0.3)
    step = make_step(gradient_descent, student=dropping, seed=0)

    def after(number):
        state = new_state(gradient_descent)
        state, metrics = step(state.replace(step=jnp.int32(number)), teacher_params, batch)
        return jax.device_get((state.params, metrics))

    first, again, other = after(0), after(0), after(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first[1]["loss"] != other[1]["loss"]
    assert first[1]["teacher_cross_entropy"] == other[1]["teacher_cross_entropy"]  # the teacher drops nothing


def test_dropout_without_a_key_is_refused(make_step, gradient_descent, student):
    with pytest.raises(UserError, match="base_key"):
        make_step(gradient_descent, student=dataclasses.replace(student, dropout_rate=0.3))


# --- mistakes, and objectives that need less ---


def test_objective_that_compares_needs_a_teacher(make_step):
    with pytest.raises(UserError, match="no teacher is given"):
        make_step(ADAM, teacher=None)


def test_microbatches_that_do_not_divide_the_batch_are_refused(make_step, new_state, teacher_params, batch):
    with pytest.raises(UserError, match="batch of 8 examples does not split into 3 micro-batches"):
        make_step(ADAM, micro_batches=3).eval_shape(new_state(ADAM), teacher_params, batch)


@pytest.mark.parametrize(
    ("terms", "metrics"),
    [
        ((CrossEntropy(),), {"lm", "cross_entropy"}),
        (relations("decoder_self", ("vv",), relation_heads=4), {"decoder_self/vv"}),
        ((*relations("cross", ("qk",), relation_heads=4), CrossEntropy()), {"cross/qk", "lm", "cross_entropy"}),
    ],
    ids=["scratch", "relations", "both"],
)
def test_step_reports_the_terms_of_its_objective_and_cross_entropy_where_there_are_logits(
    make_step, new_state, teacher, teacher_params, batch, terms, metrics
):
    chosen = Objective(terms=terms)
    step = make_step(ADAM, objective=chosen, teacher=teacher if chosen.needs_teacher else None)
    _, reported = step.eval_shape(new_state(ADAM), teacher_params if chosen.needs_teacher else None, batch)
    norms = {"gradient_norm", "update_norm", "parameter_norm"}
    norms |= {f"gradient_norm/{stack}" for stack in ("encoder", "decoder", "embedding")}
    assert set(reported) == metrics | norms | {"loss"}
    assert all(isinstance(pair, tuple) and [x.shape for x in pair] == [(), ()] for pair in reported.values())


# --- means over some steps ---


def test_window_divides_summed_sums_by_summed_weights():
    window = [{"loss": (jnp.float32(6), jnp.float32(2))}, {"loss": (jnp.float32(1), jnp.float32(1))}]
    assert window_means(window) == {"loss": 7 / 3}


def test_weights_are_summed_exactly_even_when_they_are_beyond_float32():
    # 2**24 + 1 is no float32: summed in float32, the mean would miss the second step.
    window = [{"loss": (jnp.float32(2**24), jnp.float32(2**24))}, {"loss": (jnp.float32(0), jnp.float32(1))}]
    assert window_means(window)["loss"] == 2**24 / (2**24 + 1)


def test_metric_without_any_weight_is_not_a_number_and_does_not_stop_the_run():
    window = [{"loss": (jnp.float32(0), jnp.float32(0)), "norm": (jnp.float32(3), jnp.float32(1))}]
    means = window_means(window)
    assert np.isnan(means["loss"]) and means["norm"] == 3.0
