"""Log-likelihoods of given targets; several targets of one input share its encoder pass."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from endistill_jax.models.family import ModelConfig, apply
from endistill_jax.sharding import activation_sharding

ScoreStep = Callable[[Any, jax.Array, jax.Array], jax.Array]


def make_score_step(config: ModelConfig, mesh: Mesh, placement: str = "sharded") -> ScoreStep:
    """Builds the jitted function (params, inputs, targets) -> log-likelihoods; reuse it.

    `inputs` are int32 [batch, source] and `targets` int32 [batch, choices, target], both padded with the model's
    `pad_id`; the result is float32 [batch, choices]: the sum over the tokens of a target, its end included, of their
    log-probabilities given the input and the target's tokens before, and 0 for a target of nothing but padding. Without
    dropout.
    """

    @jax.jit
    def step(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def of_one_choice(target: jax.Array) -> jax.Array:  # [batch, target] -> [batch]
            previous = jnp.pad(target, ((0, 0), (1, 0)), constant_values=config.decoder_start_id)[:, :-1]
            batch = {
                "encoder_input_tokens": inputs,
                "decoder_input_tokens": previous,
                "decoder_target_tokens": target,
                "encoder_segment_ids": jnp.asarray(inputs != config.pad_id, jnp.int32),
                "decoder_segment_ids": jnp.asarray(target != config.pad_id, jnp.int32),
            }
            logits = apply(config, params, batch).logits  # [batch, target, vocab_size]
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)  # [batch, target]
            return -jnp.sum(jnp.where(target != config.pad_id, nats, 0.0), axis=-1)

        with activation_sharding(mesh, placement):
            # vmapped over choices only: the encoder does not depend on them and runs once.
            return jax.vmap(of_one_choice, in_axes=1, out_axes=1)(targets)

    return step


def choices_of_each_input(inputs: Sequence[Sequence[int]]) -> int:
    """How many consecutive examples share an input, at least, everywhere: the number of labels that are ranked; else 1.

    Two examples with the same input may follow each other, so that one run may be twice as long as others.
    """
    return math.gcd(*(len(list(run)) for _, run in groupby(inputs)))


def target_shape(targets: Sequence[Sequence[int]]) -> int:
    """One length for all targets: the longest's, rounded up to a multiple of 8."""
    return -(-max(map(len, targets), default=1) // 8) * 8
