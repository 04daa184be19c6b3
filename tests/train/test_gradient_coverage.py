"""Which of the student's parameters a path teaches, and which it leaves alone: exactly, leaf by leaf, layer by layer.

Why self-attention relations are not enough for an encoder-decoder: what lies above the last decoder layer's queries,
keys and values gets no gradient from them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.models.layout import unstack_layers
from endistill_jax.objectives import Path, Site, coefficients, term_sums, term_weights
from endistill_jax.train.step import forward

SELF = Site(relations=("qq", "kk", "vv"), relation_heads=4)
CROSS = Site(relations=("qk", "vv"), relation_heads=4)

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

# path -> the parameters without any gradient; all others have one.
UNTAUGHT = {
    "scratch": (Path(lm_weight=1.0), set()),
    "logits": (Path(logits_weight=1.0), set()),
    "minilm": (Path(encoder_self=SELF, decoder_self=SELF), ABOVE_SELF),
    "minilm_logits": (Path(encoder_self=SELF, decoder_self=SELF, logits_weight=1.0), set()),
    "decoder": (Path(decoder_self=SELF, cross=CROSS), ABOVE_CROSS),
    "minend": (Path(encoder_self=SELF, decoder_self=SELF, cross=CROSS, logits_weight=1.0), set()),
    "minend, relations alone": (Path(encoder_self=SELF, decoder_self=SELF, cross=CROSS), ABOVE_CROSS),
    "encoder relations alone": (
        Path(encoder_self=SELF),
        in_layer("encoder/layers_1", {"attention/out/kernel"} | MLP)
        | {"encoder/encoder_norm/scale", "decoder/relpos_bias/rel_embedding"}
        | DECODER_LAYERS
        | HEAD,
    ),
}

# Everything that any of them has, at the last layers.
UNION = Path(encoder_self=SELF, decoder_self=SELF, cross=CROSS, logits_weight=1.0, lm_weight=1.0)
BELOW = Path(decoder_self=dataclasses.replace(SELF, student_layer=0), cross=dataclasses.replace(CROSS, student_layer=0))


@pytest.fixture(scope="module")
def gradients(student, teacher, make_params, teacher_params):
    """path -> gradient of its loss by the student's parameters, one subtree a layer, by name."""
    deep = dataclasses.replace(student, num_encoder_layers=2, num_decoder_layers=2)
    rng = np.random.default_rng(3)
    source, target = (rng.integers(1, deep.vocab_size, (2, length)).astype(np.int32) for length in (5, 4))
    batch = {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones((2, 4), np.float32),
    }

    def gradient_of_terms(path):
        """Gradient of the path's terms, each times a rate that is given later: one program for many paths."""

        def loss(params, rates):
            taught = forward(teacher, teacher_params, batch, path, "teacher")
            sums, weights = (
                term_sums(path, forward(deep, params, batch, path, "student"), taught, batch),
                term_weights(path, batch),
            )
            return sum(rates[term] * sums[term] / weights[term] for term in sums)

        return jax.jit(jax.grad(loss))

    of_union, of_below = gradient_of_terms(UNION), gradient_of_terms(BELOW)

    def gradient(path):
        terms = of_below if path is BELOW else of_union
        everything = coefficients(BELOW if path is BELOW else UNION)
        assert coefficients(path).keys() <= everything.keys()
        flat = unstack_layers(terms(make_params(deep, 0), dict.fromkeys(everything, 0.0) | coefficients(path)))
        leaves = jax.tree_util.tree_leaves_with_path(flat)
        return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}

    return gradient


def assert_taught_all_but(untaught, gradient):
    assert untaught <= gradient.keys()
    assert {leaf for leaf, values in gradient.items() if not values.any()} == untaught
    assert all(np.isfinite(values).all() for values in gradient.values())


@pytest.mark.parametrize("name", UNTAUGHT)
def test_path_teaches_exactly_these_parameters(gradients, name):
    path, untaught = UNTAUGHT[name]
    assert_taught_all_but(untaught, gradients(path))


def test_relations_of_a_lower_layer_teach_nothing_above_it(gradients):
    above = in_layer("decoder/layers_0", {"encoder_decoder_attention/out/kernel"} | MLP)
    above |= in_layer(LAST, SELF_ATTENTION | CROSS_ATTENTION | MLP) | HEAD
    assert_taught_all_but(above, gradients(BELOW))


def test_students_logits_are_computed_exactly_where_a_path_teaches_the_head():
    for name, (path, untaught) in UNTAUGHT.items():
        assert path.needs_logits("student") == (not HEAD & untaught), name
