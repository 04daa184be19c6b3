"""Searches for the text of each input: greedy decoding, sampling, and beam search.

A sampled row has random numbers of its own, which depend only on the key, the row's id and the position, so it is
sampled the same whatever its neighbors and batch are.

Beam search follows the rules of Hugging Face's `generate` with `early_stopping=False`, whose outputs the tests replay:
of the `2 * beams` best continuations of an example, those among the first `beams` that end are candidates for the
answer, and the best `beams` that do not end stay live. An example is done when it has `beams` candidates and the best
live hypothesis, if it ended now, would be no better than the worst of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from endistill_jax.models.family import ModelConfig

Logits = Float[Array, "batch vocab"]

_BLOCK = 128


class SearchState(NamedTuple):
    """The loop state of a search with one hypothesis."""

    cache: Any  # of the tokens read so far
    token: Int[Array, " batch"]  # to be read next
    tokens: Int[Array, "batch max_length"]  # what was generated, then `pad_id`
    scores: Float[Array, " batch"]  # sum of the log-probabilities of what was generated
    finished: Bool[Array, " batch"]  # whether the end was generated


def search(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "batch source"],
    max_length: int,
    eos_id: int,
    choose: Callable[[Logits, SearchState], Int[Array, " batch"]],
) -> SearchState:
    """Generates until every example has ended or `max_length` tokens, the end included, were generated.

    The input tokens are padded with `pad_id`; an example without any, which fills a batch up, has ended before it
    begins. `choose` takes float32 logits and the state before them, and returns the next token of each example.
    """
    source = config.family.read_source(config, params, tokens)
    rows = len(source.segments)

    def unfinished(state: SearchState) -> jax.Array:
        return (state.cache.index < max_length) & ~jnp.all(state.finished)

    def generate(state: SearchState) -> SearchState:
        logits, cache = config.family.read_tokens(config, source, state.cache, state.token[:, None])
        logits = logits[:, 0]
        token = jnp.where(state.finished, config.pad_id, choose(logits, state))
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return SearchState(
            cache=cache,
            token=token,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.cache.index)),
            scores=state.scores + jnp.where(state.finished, 0.0, chosen),
            finished=state.finished | (token == eos_id),
        )

    start = SearchState(
        cache=config.family.init_cache(config, rows, max_length),
        token=jnp.full(rows, config.decoder_start_id, jnp.int32),
        tokens=jnp.full((rows, max_length), config.pad_id, jnp.int32),
        scores=jnp.zeros(rows, jnp.float32),
        finished=jnp.all(source.segments == 0, axis=1),
    )
    return jax.lax.while_loop(unfinished, generate, start)


def filter_logits(logits: Logits, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Logits:
    """Logits at a temperature, -inf where a token may not be drawn; the filters apply one after the other, in order.

    `top_k` keeps the k most likely tokens, 0 all of them. `top_p` keeps the smallest set of most likely tokens with at
    least this total probability (nucleus sampling, Holtzman et al., arXiv 1904.09751). Both also keep the tokens that
    are as likely as the last one kept.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = largest(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities >= _nucleus_threshold(probabilities, top_p), logits, -jnp.inf)
    return logits


def _nucleus_threshold(probabilities: Float[Array, "batch vocab"], top_p: float) -> Float[Array, "batch 1"]:
    """The largest probability t of each row such that tokens of at least t together have `top_p`."""

    # By halving an interval of the bit patterns, which are ordered as the positive numbers are: 31 sums over the
    # vocabulary instead of a sort, which takes many times as long on a CPU.
    def as_number(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: Any, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # At `low` the tokens have enough, at `high` they have not.
        low, high = interval
        middle = low + (high - low) // 2
        kept = jnp.where(probabilities >= as_number(middle), probabilities, 0.0)
        enough = jnp.sum(kept, axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((len(probabilities), 1), jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.full_like(low, 2, jnp.float32), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, above_one))
    return as_number(low)


def draw(
    logits: Logits, key: Key[Array, ""], row_ids: Int[Array, " batch"], position: Int[Array, ""] | int
) -> Int[Array, " batch"]:
    """One token of each row, by its id and the token's position; -inf where a token may not be drawn."""
    key = jax.random.fold_in(key, position)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def largest(
    values: Float[Array, "*rows size"], count: int
) -> tuple[Float[Array, "*rows {count}"], Int[Array, "*rows {count}"]]:
    """The largest values along the last axis and their indices; the same as `jax.lax.top_k`."""
    *rows, size = values.shape
    if size % _BLOCK or size < 4 * _BLOCK * count:
        return tuple(jax.lax.top_k(values, count))
    # They are in the `count` blocks with the largest maxima, which are cheap to compute: on a CPU this takes a small
    # fraction of the time of `top_k` or `argmax` over a vocabulary.
    blocks = values.reshape(*rows, size // _BLOCK, _BLOCK)
    # In their order, so that of equal values the first comes first.
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)  # [..., count, block]
    found, index = jax.lax.top_k(candidates.reshape(*rows, count * _BLOCK), count)
    return found, jnp.take_along_axis(chosen, index // _BLOCK, axis=-1) * _BLOCK + index % _BLOCK


class Hypotheses(NamedTuple):
    """Several hypotheses of each example, the best first; the score is -inf where there is none."""

    scores: Float[Array, "batch beams"]
    tokens: Int[Array, "batch beams max_length"]


class BeamState(NamedTuple):
    """The loop state of beam search."""

    cache: Any  # of the positions read so far
    running: Hypotheses  # live, with their log-probabilities
    ancestors: Int[Array, "batch beams max_length"]  # the beam of each at each position; see `Family.read_tokens`
    ended: Hypotheses  # finished, with their penalized scores
    done: Bool[Array, " batch"]  # whether an example's answer is found


def beam_search(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "batch source"],
    max_length: int,
    eos_id: int,
    beams: int,
    length_penalty: float,
) -> tuple[Int[Array, "batch max_length"], Float[Array, " batch"]]:
    """The best hypothesis of each example, up to and with the end, then `pad_id`; and its score.

    The score of n tokens, the end included, is their log-probability / n ** length_penalty. What has not ended after
    `max_length` tokens ends there. An example without input gets no text and the score 0. The vocabulary has at least
    `2 * beams` tokens.
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


def _best_continuations(
    logits: Float[Array, "batch beams vocab"], scores: Float[Array, "batch beams"], count: int
) -> tuple[Float[Array, "batch {count}"], Int[Array, "batch {count}"], Int[Array, "batch {count}"]]:
    """The best continuations of all live hypotheses: log-probability, hypothesis and token."""
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


def _of_beam(
    texts: Int[Array, "batch beams length"], beam: Int[Array, "batch count"]
) -> Int[Array, "batch count length"]:
    return jnp.take_along_axis(texts, beam[..., None], axis=1)


def _set_at(
    texts: Int[Array, "batch beams length"], position: Int[Array, ""], token: Int[Array, "batch beams"]
) -> Int[Array, "batch beams length"]:
    """Writes tokens at a position; nothing if there is no such position."""
    return jnp.where(jnp.arange(texts.shape[-1]) == position, token[..., None], texts)
