"""One step: what it computes does not depend on how the batch is cut, and nothing but the student is changed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from endistill_jax.core.batch import batch_segments
from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.t5 import T5
from endistill_jax.objectives import InterpolatedTargets, Path, cross_entropy, logits_kl, relation_kl
from endistill_jax.sharding import param_shardings
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import init_state, state_shardings
from endistill_jax.train.step import make_train_step, split_micro_batches

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
def make_step(student, teacher, path, mesh):
    """Steps by optimizer and settings, each compiled once for the whole file."""

    @functools.cache
    def make(optimizer, micro_batches=1, student=student, teacher=teacher, path=path, seed=None):
        return make_train_step(
            student=student,
            teacher=teacher,
            path=path,
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
    make_step, path, gradient_descent, new_state, teacher_params, batch
):
    path = dataclasses.replace(path, lm_weight=0.0, z_loss=0.0)

    def loss_at(step, **settings):
        state = new_state(gradient_descent).replace(step=jnp.asarray(step, jnp.int32))
        run = make_step(gradient_descent, path=dataclasses.replace(path, **settings))
        return float(run(state, teacher_params, batch)[1]["loss"][0])

    moving = {"interpolated_targets": InterpolatedTargets(steps=10)}
    losses = [loss_at(step, **moving) for step in (0, 4, 9)]
    taught = loss_at(0)
    # Near the student's own, a divergence grows with the square of the share, here a tenth.
    assert 0 < losses[0] < 0.03 * taught
    assert 0.05 * taught < losses[1] < 0.95 * taught
    np.testing.assert_allclose(losses[2], taught, rtol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def dense_losses(path, student, teacher, params, teacher_params, batch):
    """Every term as (sum, weight), and the loss, from the models' outputs and the losses' dense forms."""
    layers = dict.fromkeys(path.sites, 0)
    learned = T5(student).apply({"params": params}, batch, tap_layers=layers)
    taught = T5(teacher).apply({"params": teacher_params}, batch, tap_layers=layers)
    encoder, decoder = batch_segments(batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    vectors = {"q": "query", "k": "key", "v": "value"}
    terms = {
        "logits": logits_kl(taught.logits, learned.logits, weights, path.temperature),
        "lm": cross_entropy(learned.logits, targets, weights, path.z_loss),
    }
    rates = {"logits": path.logits_weight, "lm": path.lm_weight}
    for site, settings in path.sites.items():
        for relation in settings.relations:
            # Of cross, qk is target x source and vv source x source.
            keys = decoder if site == "decoder_self" else encoder
            queries = decoder if site == "cross" and relation[0] == "q" else keys
            terms[f"{site}/{relation}"] = relation_kl(
                tuple(getattr(taught.taps[site], vectors[letter]) for letter in relation),
                tuple(getattr(learned.taps[site], vectors[letter]) for letter in relation),
                relation_heads=settings.relation_heads,
                query_segments=queries,
                key_segments=keys,
                causal=site == "decoder_self",
            )
            rates[f"{site}/{relation}"] = settings.weight / len(settings.relations)
    loss = sum(rates[name] * total / weight for name, (total, weight) in terms.items())
    terms["cross_entropy"] = cross_entropy(learned.logits, targets, weights)
    terms["teacher_cross_entropy"] = cross_entropy(taught.logits, targets, weights)
    return terms | {"loss": (loss, 1.0)}


def test_metrics_are_sums_and_weights_of_the_dense_losses_and_norms_of_the_update(
    gradient, batch, student, teacher, path, make_params, teacher_params
):
    update, metrics = gradient(batch)
    params = make_params(student, 0)
    norm = optax.global_norm(update)
    expected = dense_losses(path, student, teacher, params, teacher_params, batch) | {
        "gradient_norm": (norm, 1.0),
        "update_norm": (norm, 1.0),
        "parameter_norm": (optax.global_norm(jax.tree.map(np.subtract, params, update)), 1.0),
    }
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


def test_identical_teacher_and_student_give_no_loss_and_no_gradient(
    make_step, gradient_descent, new_state, make_params, student, teacher, path, batch
):
    taught = Path(
        encoder_self=path.encoder_self,
        decoder_self=path.decoder_self,
        cross=path.cross,
        logits_weight=path.logits_weight,
        temperature=path.temperature,
    )
    step = make_step(gradient_descent, student=teacher, path=taught)
    norms = []
    for seed in (1, 2):
        state, metrics = step(new_state(gradient_descent, teacher, seed), make_params(teacher, 1), batch)
        norms.append(float(metrics["gradient_norm"][0]))
        if seed == 1:
            assert all(abs(metrics[name][0]) < 1e-4 * metrics[name][1] for name in TERMS - {"lm"})
            assert abs(metrics["loss"][0]) < 1e-5
    # Rounding of float32 probabilities alone, beside the same step from another student.
    assert norms[0] < 1e-5 * norms[1]


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
    widths = {teacher.d_model, teacher.inner_dim, teacher.mlp_dim}
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


# --- mistakes, and paths that need less ---


def test_path_that_compares_needs_a_teacher(make_step):
    with pytest.raises(UserError, match="no teacher is given"):
        make_step(ADAM, teacher=None)


def test_microbatches_that_do_not_divide_the_batch_are_refused(make_step, new_state, teacher_params, batch):
    with pytest.raises(UserError, match="batch of 8 examples does not split into 3 micro-batches"):
        make_step(ADAM, micro_batches=3).eval_shape(new_state(ADAM), teacher_params, batch)


@pytest.mark.parametrize(
    ("parts", "metrics"),
    [
        ({"lm_weight": 1.0}, {"lm", "cross_entropy"}),
        ({"decoder_self": ("vv",)}, {"decoder_self/vv"}),
        ({"cross": ("qk",), "lm_weight": 1.0}, {"cross/qk", "lm", "cross_entropy"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_step_tells_the_terms_of_its_path_and_cross_entropy_where_there_are_logits(
    make_step, new_state, student, teacher, teacher_params, batch, path, parts, metrics
):
    sites = {
        name: dataclasses.replace(path.cross, relations=value) if isinstance(value, tuple) else value
        for name, value in parts.items()
    }
    chosen = Path(**sites)
    step = make_step(ADAM, path=chosen, teacher=teacher if chosen.needs_teacher else None)
    _, told = step.eval_shape(new_state(ADAM), teacher_params if chosen.needs_teacher else None, batch)
    assert set(told) == metrics | {"loss", "gradient_norm", "update_norm", "parameter_norm"}
    assert all(isinstance(pair, tuple) and [x.shape for x in pair] == [(), ()] for pair in told.values())
