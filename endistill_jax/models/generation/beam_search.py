"""Beam search: extends the most likely live hypotheses, and returns the best finished one.

The rules are those of Hugging Face's `generate` with `early_stopping=False`, whose outputs the tests replay: of the
`2 * beams` best continuations of an example, those among the first `beams` that end are candidates for the answer, and
the best `beams` that do not end stay live. An example is done when it has `beams` candidates and the best live
hypothesis, if it ended now, would be no better than the worst of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.sampling import largest


class Hypotheses(NamedTuple):
    """Several hypotheses of each example, the best first.

    Attributes:
        scores: float32 [batch, beams]; -inf where there is none.
        tokens: int32 [batch, beams, max_length], then padding.
    """

    scores: jax.Array
    tokens: jax.Array


class BeamState(NamedTuple):
    """The loop state of the search.

    Attributes:
        cache: of the positions read so far.
        running: live hypotheses, with their log-probabilities.
        ancestors: int32 [batch, beams, max_length], the beam each of them was in at each position; see `read_tokens`.
        ended: finished hypotheses, with their penalized scores.
        done: bool [batch], whether an example's answer is found.
    """

    cache: Any
    running: Hypotheses
    ancestors: jax.Array
    ended: Hypotheses
    done: jax.Array


def beam_search(
    config: ModelConfig, params: Any, tokens: jax.Array, max_length: int, eos_id: int, beams: int, length_penalty: float
) -> tuple[jax.Array, jax.Array]:
    """The best hypothesis of each example.

    Args:
        config: the model's settings; its vocabulary has at least `2 * beams` tokens.
        params: all its parameters.
        tokens: int [batch, source], padded with `pad_id`; an example without input gets no text and the score 0.
        max_length: tokens generated at most, the end included; what has not ended by then ends there.
        eos_id: the token that ends an example.
        beams: number of live hypotheses.
        length_penalty: the score of n tokens is their log-probability / n ** length_penalty.

    Returns:
        int32 [batch, max_length] up to and with the end, then `pad_id`; and the penalized scores, float32 [batch].
    """
    source = config.family.read_source(config, params, tokens)
    rows = len(tokens)

    def unfinished(state: BeamState) -> jax.Array:
        return (state.cache.index < max_length) & ~jnp.all(state.done)

    def generate(state: BeamState) -> BeamState:
        position = state.cache.index
        last = state.running.tokens[:, :, jnp.maximum(position - 1, 0)]
        read = jnp.where(position == 0, config.decoder_start_id, last)
        logits, cache = config.family.read_tokens(config, source, state.cache, read, state.ancestors)
        scores, beam, token = _best_continuations(logits, state.running.scores, 2 * beams)
        texts = _set_at(_of_beam(state.running.tokens, beam), position, token)
        ends = (token == eos_id) | (position + 1 == max_length)
        penalty = (position + 1).astype(jnp.float32) ** length_penalty

        candidate = ends & (jnp.arange(2 * beams) < beams) & ~state.done[:, None]
        ended = _best_of(state.ended, Hypotheses(jnp.where(candidate, scores / penalty, -jnp.inf), texts))

        running_scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
        ancestors = _of_beam(state.ancestors, jnp.take_along_axis(beam, kept, axis=1))
        # Positions after the last are never read, so writes there have no effect.
        ancestors = _set_at(ancestors, position + 1, jnp.broadcast_to(jnp.arange(beams), (rows, beams)))
        done = state.done | (running_scores[:, 0] / penalty <= ended.scores[:, -1])
        return BeamState(cache, Hypotheses(running_scores, _of_beam(texts, kept)), ancestors, ended, done)

    nothing = jnp.full((rows, beams, max_length), config.pad_id, jnp.int32)
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # identical hypotheses count once
    ancestors = jnp.zeros_like(nothing).at[:, :, 0].set(jnp.arange(beams))
    start = BeamState(
        cache=config.family.init_cache(config, rows, max_length, beams),
        running=Hypotheses(jnp.broadcast_to(first, (rows, beams)), nothing),
        ancestors=ancestors,
        ended=Hypotheses(jnp.full((rows, beams), -jnp.inf), nothing),
        done=jnp.all(source.segments == 0, axis=1),
    )
    ended = jax.lax.while_loop(unfinished, generate, start).ended
    return ended.tokens[:, 0], jnp.where(jnp.isneginf(ended.scores[:, 0]), 0.0, ended.scores[:, 0])


def _best_continuations(logits: jax.Array, scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations of all live hypotheses: log-probability, hypothesis and token, each [batch, count].

    Args:
        logits: float32 [batch, beams, vocab_size].
        scores: float32 [batch, beams], log-probabilities of the hypotheses.
        count: how many.
    """
    each = min(count, logits.shape[-1])
    best, token = largest(logits, each)  # [batch, beams, each]
    before = scores - jax.nn.logsumexp(logits, axis=-1)
    best, index = jax.lax.top_k((best + before[..., None]).reshape(len(logits), -1), count)
    token = jnp.take_along_axis(token.reshape(len(logits), -1), index, axis=1)
    return best, index // each, token


def _best_of(one: Hypotheses, other: Hypotheses) -> Hypotheses:
    """The best of both, as many as the first has."""
    together = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), one, other)
    scores, kept = jax.lax.top_k(together.scores, one.scores.shape[1])
    return Hypotheses(scores, _of_beam(together.tokens, kept))


def _of_beam(texts: jax.Array, beam: jax.Array) -> jax.Array:
    """[batch, beams, length] and int [batch, count] -> [batch, count, length]."""
    return jnp.take_along_axis(texts, beam[..., None], axis=1)


def _set_at(texts: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """Writes [batch, beams] at a position of [batch, beams, length]; nothing if there is no such position."""
    return jnp.where(jnp.arange(texts.shape[-1]) == position, token[..., None], texts)
