"""Generates one text per input by greedy decoding or sampling."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from endistill_jax.core.batch import Batch
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.sampling import largest


class SearchState(NamedTuple):
    """The loop state of the search.

    Attributes:
        cache: of the tokens read so far.
        token: int32 [batch], the one to be read next.
        tokens: int32 [batch, max_length], what was generated, then `pad_id`.
        scores: float32 [batch], the sum of the log-probabilities of what was generated.
        finished: bool [batch], whether the end was generated.
    """

    cache: Any
    token: jax.Array
    tokens: jax.Array
    scores: jax.Array
    finished: jax.Array


def search(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    max_length: int,
    eos_id: int,
    choose: Callable[[jax.Array, SearchState], jax.Array],
) -> SearchState:
    """Generates until every example has ended or `max_length` tokens were generated.

    An example without input, which fills a batch up, has ended before it begins.

    Args:
        config: the model's settings.
        params: all its parameters.
        batch: `encoder_input_tokens` [batch, source], padded with `pad_id`; not packed.
        max_length: tokens generated at most, the end included.
        eos_id: the token that ends an example.
        choose: from float32 logits [batch, vocab_size] and the state before, the next token of each example.

    Raises:
        UserError: if the batch is packed.
    """
    if "encoder_segment_ids" in batch:
        raise UserError("text is generated for one example a row, and this batch is packed; give it unpacked")
    source = config.family.read_source(config, params, batch["encoder_input_tokens"])
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


def most_likely(logits: jax.Array, state: SearchState) -> jax.Array:
    """The greedy choice: int32 [batch] from [batch, vocab_size]."""
    return largest(logits, 1)[1][:, 0]


@functools.partial(jax.jit, static_argnames=("config", "max_length", "eos_id"))
def greedy(config: ModelConfig, params: Any, batch: Batch, max_length: int, eos_id: int | None = None) -> jax.Array:
    """The most likely token at every step: int32 [batch, max_length], up to and with the end, then `pad_id`.

    The end is the model's, unless another is given.
    """
    eos_id = config.eos_id if eos_id is None else eos_id
    return search(config, params, batch, max_length, eos_id, most_likely).tokens
