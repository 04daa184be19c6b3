"""Chooses the next token: greedily, or by sampling with temperature, top-k and top-p.

Each row has random numbers of its own, which depend only on the key, the row's id and the position, so a
row is sampled the same whatever its neighbors and batch are.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128


def largest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest values along the last axis and their indices, each [..., count]; the same as `jax.lax.top_k`.

    They are in the `count` blocks with the largest maxima, which are cheap to compute: on a CPU this takes a small
        fraction of the time of `top_k` or `argmax` over a vocabulary.
    """
    *rows, size = values.shape
    if size % _BLOCK or size < 4 * _BLOCK * count:
        return jax.lax.top_k(values, count)
    blocks = values.reshape(*rows, size // _BLOCK, _BLOCK)
    # In their order, so that of equal values the first comes first.
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)  # [..., count, block]
    found, index = jax.lax.top_k(candidates.reshape(*rows, count * _BLOCK), count)
    return found, jnp.take_along_axis(chosen, index // _BLOCK, axis=-1) * _BLOCK + index % _BLOCK


def filter_logits(logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Logits at a temperature, -inf where a token may not be drawn; the filters apply one after the other, in order.

    Args:
        logits: float32 [batch, vocab_size].
        temperature: what logits are divided by.
        top_k: keeps the k most likely tokens, and all that are as likely as the k-th; 0 keeps all.
        top_p: keeps the smallest set of most likely tokens with at least this total probability (nucleus sampling,
            Holtzman et al., arXiv 1904.09751); tokens as likely as the last one kept are kept too.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = largest(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities >= _nucleus_threshold(probabilities, top_p), logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, key: jax.Array, row_ids: jax.Array, position: jax.Array) -> jax.Array:
    """One token of each row: int32 [batch].

    Args:
        logits: float32 [batch, vocab_size], -inf where a token may not be drawn.
        key: of the whole search.
        row_ids: int [batch], distinguishes rows.
        position: int scalar, of the token in its row.
    """
    key = jax.random.fold_in(key, position)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus_threshold(probabilities: jax.Array, top_p: float) -> jax.Array:
    """The largest probability t of each row such that tokens of at least t together have `top_p`: [batch, 1].

    By halving an interval of the bit patterns, which are ordered as the positive numbers are: 31 sums over the
    vocabulary instead of a sort, which takes many times as long on a CPU.
    """

    def as_number(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
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
