"""Which of the student's parameters an objective trains, and which it leaves alone: exactly, leaf by leaf.

Why self-attention relations are not enough for an encoder-decoder: what lies above the last decoder layer's queries,
keys and values gets no gradient from them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.models.family import unstack_layers
from endistill_jax.objectives import CrossEntropy, Objective, presets
from endistill_jax.train.step import LossFunction

ATTENTION = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
MLP = {"pre_mlp_layer_norm/scale", "mlp/wi_0/kernel", "mlp/wi_1/kernel", "mlp/wo/kernel"}
HEAD = {"decoder/decoder_norm/scale", "decoder/logits_dense/kernel"}
CROSS_ATTENTION = {"pre_cross_attention_layer_norm/scale"} | {f"encoder_decoder_attention/{name}" for name in ATTENTION}
SELF_ATTENTION = {"pre_self_attention_layer_norm/scale"} | {f"self_attention/{name}" for name in ATTENTION}


def in_layer(layer, names):
    return {f"{layer}/{name}" for name in names}


LAST = "decoder/layers_1"
# Above the last decoder layer's self-attention projections, and above its cross-attention's.
ABOVE_SELF = in_layer(LAST, {"self_attention/out/kernel"} | CROSS_ATTENTION | MLP) | HEAD
ABOVE_CROSS = in_layer(LAST, {"encoder_decoder_attention/out/kernel"} | MLP) | HEAD
DECODER_LAYERS = {
    f"decoder/layers_{index}/{name}" for index in (0, 1) for name in SELF_ATTENTION | CROSS_ATTENTION | MLP
}

HEADS = {"relation_heads": 4}
# Preset -> the parameters without any gradient; all others have one.
UNTRAINED = {
    "scratch": (presets.scratch(), set()),
    "logits": (presets.logits(), set()),
    "minilm": (presets.minilm(**HEADS), ABOVE_SELF),
    "implicit": (presets.implicit(**HEADS), set()),
    "miniend_d": (presets.miniend_d(**HEADS), set()),
    "miniend_d without logits": (presets.miniend_d(with_logits=False, **HEADS), ABOVE_CROSS),
    "miniend_e": (presets.miniend_e(**HEADS), set()),
    "miniend_e without logits": (presets.miniend_e(with_logits=False, **HEADS), ABOVE_SELF),
    "union": (presets.union(**HEADS), set()),
    "encoder": (
        presets.encoder(**HEADS),
        in_layer("encoder/layers_1", {"attention/out/kernel"} | MLP)
        | {"encoder/encoder_norm/scale", "decoder/relpos_bias/rel_embedding"}
        | DECODER_LAYERS
        | HEAD,
    ),
}

# Every term that any of them has, and relations of a layer below the last.
UNION = Objective(terms=(*presets.union(**HEADS).terms, CrossEntropy()))
BELOW = presets.miniend_d(with_logits=False, student_layer=0, **HEADS)


@pytest.fixture(scope="module")
def gradients(student, teacher, make_params, teacher_params):
    """Objective -> gradient of its loss by the student's parameters, one subtree a layer, by name."""
    deep = dataclasses.replace(student, num_encoder_layers=2, num_decoder_layers=2)
    rng = np.random.default_rng(3)
    source, target = (rng.integers(1, deep.vocab_size, (2, length)).astype(np.int32) for length in (5, 4))
    batch = {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones((2, 4), np.float32),
    }

    def gradient_of_terms(objective):
        """Gradient of the terms, each times a rate that is given later: one program for many objectives."""
        function = LossFunction(student=deep, teacher=teacher, objective=objective)

        def loss(params, rates):
            weights = objective.weights(batch)
            sums = function(params, teacher_params, batch, weights=weights)[1]
            return sum(rate * sums[name] / weights[name] for name, rate in rates.items())

        return jax.jit(jax.grad(loss))

    programs = {UNION: gradient_of_terms(UNION), BELOW: gradient_of_terms(BELOW)}

    def gradient(objective):
        of = BELOW if objective is BELOW else UNION
        assert set(objective.term_names) <= set(of.term_names)
        rates = dict.fromkeys(of.term_names, 0.0) | objective.coefficients()
        flat = unstack_layers(programs[of](make_params(deep, 0), rates))
        leaves = jax.tree_util.tree_leaves_with_path(flat)
        return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}

    return gradient


def assert_trains_all_but(untrained, gradient):
    assert untrained <= gradient.keys()
    assert {leaf for leaf, values in gradient.items() if not values.any()} == untrained
    assert all(np.isfinite(values).all() for values in gradient.values())


@pytest.mark.parametrize("name", UNTRAINED)
def test_preset_trains_exactly_these_parameters(gradients, name):
    objective, untrained = UNTRAINED[name]
    assert_trains_all_but(untrained, gradients(objective))
    # The logits are computed exactly where the head is trained.
    assert objective.reads("student").head == (not HEAD & untrained)


def test_relations_of_a_lower_layer_train_nothing_above_it(gradients):
    above = in_layer("decoder/layers_0", {"encoder_decoder_attention/out/kernel"} | MLP)
    above |= in_layer(LAST, SELF_ATTENTION | CROSS_ATTENTION | MLP) | HEAD
    assert_trains_all_but(above, gradients(BELOW))
