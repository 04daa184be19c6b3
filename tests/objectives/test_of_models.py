"""Terms of what models return: attention with the models' own bias, hidden states through a projection."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import STUDENT, TEACHER, packed_batch, random_params

from endistill_jax.core.batch import batch_segments, visible_keys
from endistill_jax.core.sites import row_masks
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
                seen.append(compute(*arguments))
                return seen[-1]

            patch.setattr(attention_module, "attention_weights", record)
            apply(config, params[config], batch)
            patch.setattr(attention_module, "attention_weights", compute)
            encoder, decoder = config.num_encoder_layers, 2 * config.num_decoder_layers
            assert len(seen) == encoder + decoder
            found[config] = {"encoder_self": seen[1], "decoder_self": seen[encoder], "cross": seen[encoder + 1]}
    return found


def _loss(objective, implementation, batch, params, step=None, share=None):
    """(loss, sums) of the student's parameters."""
    function = LossFunction(student=STUDENT, teacher=TEACHER, objective=objective, implementation=implementation)
    weights = objective.weights(batch)
    return functools.partial(
        function, teacher_params=params[TEACHER], batch=batch, weights=weights, step=step, share=share
    )


@pytest.mark.parametrize("site", LAYER)
def test_attention_is_that_of_the_models_own_layer(site, batch, params, own_weights):
    term = AttentionKL(site=site, num_heads=8, teacher_layer=LAYER[site], student_layer=LAYER[site])
    objective = Objective(terms=(term,))
    objective.validate(STUDENT, TEACHER)
    visible = np.asarray(visible_keys(*row_masks(site, "qk", batch_segments(batch))))[:, None]
    p, q = (np.asarray(own_weights[config][site], np.float64) for config in (TEACHER, STUDENT))
    terms = np.where(visible, p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-30))), 0)
    assert float(objective.weights(batch)[term.name]) == visible.any(-1).sum()
    for implementation in (DENSE, LossImplementation()):
        _, sums = _loss(objective, implementation, batch, params)(params[STUDENT])
        np.testing.assert_allclose(sums[term.name], terms.sum() / 8, rtol=1e-4)


def test_the_relative_position_bias_learns_alike_in_both_forms(batch, params):
    objective = Objective(terms=tuple(AttentionKL(site=site, num_heads=8) for site in LAYER))
    gradients = [
        jax.jit(jax.grad(_loss(objective, implementation, batch, params), has_aux=True))(params[STUDENT])[0]
        for implementation in (DENSE, LossImplementation())
    ]
    for stack in ("encoder", "decoder"):
        dense, blocked = (np.asarray(each[stack]["relpos_bias"]["rel_embedding"]) for each in gradients)
        assert np.linalg.norm(dense) > 1e-3
        assert np.linalg.norm(blocked - dense) < 1e-6 * np.linalg.norm(dense)


def test_interpolated_attention_is_that_of_the_interpolated_scores(batch, params, own_weights):
    """softmax((1 - t) s + t s') is proportional to softmax(s)^(1 - t) softmax(s')^t."""
    objective = Objective(
        terms=(AttentionKL(site="encoder_self", num_heads=8, teacher_layer=1, student_layer=1),),
        interpolated_targets=InterpolatedTargets(start=0.2, steps=4),
    )
    segments = batch_segments(batch)
    visible = np.asarray(visible_keys(*row_masks("encoder_self", "qk", segments)))[:, None]
    p, q = (np.maximum(np.asarray(own_weights[c]["encoder_self"], np.float64), 1e-30) for c in (TEACHER, STUDENT))
    target = np.where(visible, p**0.4 * q**0.6, 0)
    target /= np.maximum(target.sum(-1, keepdims=True), 1e-30)
    expected = np.where(visible, target * (np.log(np.maximum(target, 1e-30)) - np.log(q)), 0).sum() / 8
    for implementation in (DENSE, LossImplementation()):
        _, sums = _loss(objective, implementation, batch, params, step=jnp.int32(0))(params[STUDENT])
        np.testing.assert_allclose(sums["encoder_self/attention@1:1"], expected, rtol=1e-3)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize(("of", "layers"), [("encoder", (1, 0)), ("decoder", (-1, -1)), ("encoded", (-1, -1))])
def test_hidden_distance_is_its_definition(of, layers, distance, batch, params):
    term = HiddenDistance(of=of, teacher_layer=layers[0], student_layer=layers[1], distance=distance)
    objective = Objective(terms=(term,))
    objective.validate(STUDENT, TEACHER)
    own = objective.init_params(jax.random.key(0), STUDENT, TEACHER)
    kernel = np.asarray(jax.tree.leaves(nn.meta.unbox(own))[0], np.float64)
    assert kernel.shape == (STUDENT.d_model, TEACHER.d_model)

    def states(config, role):
        output = apply(config, params[config], batch, term.reads(role))
        return np.asarray(output.encoded if of == "encoded" else next(iter(output.hidden.values())), np.float64)

    real = batch["decoder_segment_ids" if of == "decoder" else "encoder_segment_ids"] != 0
    student, teacher = (states(STUDENT, "student") @ kernel)[real], states(TEACHER, "teacher")[real]
    if distance == "l2":
        expected = np.mean((student - teacher) ** 2, axis=-1)
    else:
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
        expected = 1 - np.sum(student * teacher, axis=-1) / norms
    trained = {"student": params[STUDENT], "objective": nn.meta.unbox(own)}
    _, sums = _loss(objective, DENSE, batch, params)(trained)
    np.testing.assert_allclose(sums[term.name], expected.sum(), rtol=1e-5)
    assert float(objective.weights(batch)[term.name]) == real.sum()


def test_hidden_distance_without_a_projection_needs_one_width(batch, params):
    objective = Objective(terms=(HiddenDistance(project=False),))
    objective.validate(STUDENT, STUDENT)
    assert objective.init_params(jax.random.key(0), STUDENT, STUDENT) == {}
    function = LossFunction(student=STUDENT, teacher=STUDENT, objective=objective)
    loss, _ = function(params[STUDENT], params[STUDENT], batch, objective.weights(batch))
    assert abs(loss) < 1e-6
