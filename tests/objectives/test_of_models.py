"""Terms of what models return: attention with the models' own bias, hidden states through a projection."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import STUDENT, TEACHER, packed_batch, random_params

from endistill_jax.core.attention import row_masks, visible_keys
from endistill_jax.core.model_io import batch_segments
from endistill_jax.models.family import apply
from endistill_jax.models.t5 import attention as attention_module
from endistill_jax.objectives import AttentionKL, HiddenDistance, InterpolatedTargets, LossImplementation, Objective
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.train.step import LossFunction

LAYER = {"encoder_self": 1, "decoder_self": 0, "cross": 0}


@pytest.fixture(scope="module")
def batch():
    return packed_batch()


@pytest.fixture(scope="module")
def params():
    return {config: random_params(config, seed) for seed, config in enumerate((STUDENT, TEACHER))}


@pytest.fixture(scope="module")
def own_weights(batch, params):
    """The attention weights that the models themselves compute, by model and site, of the layer in `LAYER`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        for config in params:
            seen, compute = [], attention_module.attention_weights

            def record(*arguments, seen=seen, compute=compute):
                weights = compute(*arguments)
                if not isinstance(weights, jax.core.Tracer):  # Flax looks at the shapes of fresh parameters first
                    seen.append(weights)
                return weights

            patch.setattr(attention_module, "attention_weights", record)
            apply(config, params[config], batch)
            patch.setattr(attention_module, "attention_weights", compute)
            encoder, decoder = config.num_encoder_layers, 2 * config.num_decoder_layers
            assert len(seen) == encoder + decoder
            found[config] = {"encoder_self": seen[1], "decoder_self": seen[encoder], "cross": seen[encoder + 1]}
    return found


FORMS = {"dense": DENSE, "blocked": LossImplementation()}


def _sums_and_gradient(objective, implementation, batch, params, own=None, step=None):
    """The sums of the terms, and the gradient of the loss by all that is trained."""
    function = LossFunction(student=STUDENT, teacher=TEACHER, objective=objective, implementation=implementation)
    trained = params[STUDENT] if own is None else {"student": params[STUDENT], "objective": own}

    def loss(trained, teacher_params, batch):
        return function(trained, teacher_params, batch, weights=objective.weights(batch), step=step)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, sums), gradient = run(trained, params[TEACHER], batch)
    return sums, gradient


def _visible(site, batch):
    return np.asarray(visible_keys(*row_masks(site, "qk", batch_segments(batch))))[:, None]


def _kl(p, q, visible):
    """Summed over rows, mean over the eight heads."""
    return np.sum(np.where(visible, p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-30))), 0)) / 8


def test_attention_is_that_of_the_models_own_layer_and_the_bias_learns_alike_in_both_forms(batch, params, own_weights):
    objective = Objective(
        terms=tuple(
            AttentionKL(site=site, num_heads=8, teacher_layer=layer, student_layer=layer, label=site)
            for site, layer in LAYER.items()
        )
    )
    objective.validate(STUDENT, TEACHER)
    runs = {form: _sums_and_gradient(objective, each, batch, params) for form, each in FORMS.items()}
    for site in LAYER:
        p, q = (np.asarray(own_weights[config][site], np.float64) for config in (TEACHER, STUDENT))
        visible = _visible(site, batch)
        assert float(objective.weights(batch)[site]) == visible.any(-1).sum()
        for sums, _ in runs.values():
            np.testing.assert_allclose(sums[site], _kl(p, q, visible), rtol=1e-4)
    for stack in ("encoder", "decoder"):
        dense, blocked = (
            np.asarray(gradient[stack]["relpos_bias"]["rel_embedding"], np.float64) for _, gradient in runs.values()
        )
        assert np.linalg.norm(dense) > 1e-3
        assert np.linalg.norm(blocked - dense) < 2e-6 * np.linalg.norm(dense)


def test_interpolated_attention_is_that_of_the_interpolated_scores(batch, params, own_weights):
    """softmax((1 - t) s + t s') is proportional to softmax(s)^(1 - t) softmax(s')^t."""
    objective = Objective(
        terms=(AttentionKL(site="encoder_self", num_heads=8, teacher_layer=1, student_layer=1),),
        interpolated_targets=InterpolatedTargets(start=0.2, steps=4),
    )
    visible = _visible("encoder_self", batch)
    p, q = (np.maximum(np.asarray(own_weights[c]["encoder_self"], np.float64), 1e-30) for c in (TEACHER, STUDENT))
    target = np.where(visible, p**0.4 * q**0.6, 0)
    target /= np.maximum(target.sum(-1, keepdims=True), 1e-30)
    sums, _ = _sums_and_gradient(objective, FORMS["blocked"], batch, params, step=jnp.int32(0))
    np.testing.assert_allclose(sums["encoder_self/attention@1:1"], _kl(target, q, visible), rtol=1e-3)


def test_hidden_distance_is_its_definition(batch, params):
    places = {"encoder": (1, 0), "decoder": (-1, -1), "encoded": (-1, -1)}
    terms = tuple(
        HiddenDistance(
            of=of, teacher_layer=layers[0], student_layer=layers[1], distance=distance, label=f"{of} {distance}"
        )
        for of, layers in places.items()
        for distance in ("cosine", "l2")
    )
    objective = Objective(terms=terms)
    objective.validate(STUDENT, TEACHER)
    own = nn.meta.unbox(objective.init_params(jax.random.key(0), STUDENT, TEACHER))
    sums, gradient = _sums_and_gradient(objective, DENSE, batch, params, own)
    outputs = {
        role: jax.jit(functools.partial(apply, config, reads=objective.reads(role)))(params[config], batch)
        for role, config in (("student", STUDENT), ("teacher", TEACHER))
    }
    for term in terms:
        kernel = np.asarray(own[term.name]["kernel"], np.float64)
        assert kernel.shape == (STUDENT.d_model, TEACHER.d_model)
        assert np.linalg.norm(gradient["objective"][term.name]["kernel"]) > 0
        real = batch["decoder_segment_ids" if term.of == "decoder" else "encoder_segment_ids"] != 0
        assert float(objective.weights(batch)[term.name]) == real.sum()
        layers = {"student": term.student_layer, "teacher": term.teacher_layer}
        student, teacher = (
            np.asarray(
                outputs[role].encoded if term.of == "encoded" else outputs[role].hidden[term.of, layers[role]],
                np.float64,
            )[real]
            for role in ("student", "teacher")
        )
        student = student @ kernel
        if term.distance == "l2":
            expected = np.mean((student - teacher) ** 2, axis=-1)
        else:
            norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
            expected = 1 - np.sum(student * teacher, axis=-1) / norms
        np.testing.assert_allclose(sums[term.name], expected.sum(), rtol=1e-4, err_msg=term.name)


def test_hidden_distance_without_a_projection_needs_one_width_and_no_parameters():
    objective = Objective(terms=(HiddenDistance(project=False),))
    objective.validate(STUDENT, STUDENT)
    assert objective.init_params(jax.random.key(0), STUDENT, STUDENT) == {}
