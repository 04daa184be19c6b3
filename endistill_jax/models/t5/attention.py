"""Attention of split heads, T5's way: unscaled scores, an additive position bias, a float32 softmax.

Optionally computed in blocks of examples and heads: then only a block's scores are in memory, and if they fit a chip's
vector memory they never leave it. The values are the same.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from endistill_jax.core.attention import Groups, choose_groups

# Finite, so that a row that sees no key gets a uniform softmax and finite gradients instead of NaN.
MASKED_SCORE = -1e10

Queries = Float[Array, "batch heads query head_dim"]
Keys = Float[Array, "batch heads key head_dim"]
Scores = Float[Array, "batch heads query key"]
Bias = Float[Array, "1 heads #query key"]
Mask = Bool[Array, "batch 1 #query key"]  # true where a key is visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention_weights(scores: Scores, position_bias: Bias | None, mask: Mask, dtype: jnp.dtype) -> Scores:
    """softmax(scores + position_bias) over the visible keys, computed in float32 and returned in `dtype`.

    Saves only its output for the backward pass. A row that sees no key gets uniform weights and no gradient.
    """
    if position_bias is not None:
        scores = scores + position_bias
    return jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE), axis=-1).astype(dtype)


def _weights_forward(scores, position_bias, mask, dtype) -> tuple[jax.Array, tuple]:
    weights = attention_weights(scores, position_bias, mask, dtype)
    return weights, (weights, position_bias is not None, mask)


def _weights_backward(dtype, kept: tuple, by_weights: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    weights, has_bias, mask = kept
    weights, by_weights = weights.astype(jnp.float32), by_weights.astype(jnp.float32)
    expected = jnp.sum(weights * by_weights, axis=-1, keepdims=True)
    by_scores = jnp.where(mask, weights * (by_weights - expected), 0)
    if not has_bias:
        return by_scores, None, None
    # The sum over examples as a product: XLA's CPU compiler takes thirty times as long for a sum over the first axis.
    examples = jnp.ones((1, len(by_scores)), jnp.float32)
    by_bias = jnp.dot(examples, by_scores.reshape(len(by_scores), -1), precision=jax.lax.Precision.HIGHEST)
    return by_scores, by_bias.reshape(1, *by_scores.shape[1:]), None


attention_weights.defvjp(_weights_forward, _weights_backward)


def attend(
    query: Queries,
    key: Keys,
    value: Keys,
    mask: Mask,
    position_bias: Bias | None,
    drop: Callable[[Scores], Scores] = lambda weights: weights,
) -> Queries:
    """The sum of the values, weighted by attention; `drop` is applied to the weights."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = drop(attention_weights(scores, position_bias, mask, value.dtype))
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value)


def attend_in_groups(
    query: Queries, key: Keys, value: Keys, mask: Mask, position_bias: Bias | None, group_bytes: int
) -> Queries:
    """As `attend`, with at most `group_bytes` of scores at a time on a device, or those of two heads of one example.

    The gradient computes a group's scores again. A mesh that does not divide examples and heads computes all at once.
    """
    arrays = (query, key, value, mask, position_bias)
    mesh = jax.sharding.get_abstract_mesh()
    parts = (1, 1) if mesh.empty else tuple(_parts(mesh, logical) for logical in ("batch", "heads"))
    if query.shape[0] % parts[0] or query.shape[1] % parts[1]:
        return attend(*arrays)
    examples, heads = query.shape[0] // parts[0], query.shape[1] // parts[1]  # of one device
    groups = choose_groups(examples, heads, query.shape[2], key.shape[2], group_bytes)
    if (groups.examples, groups.heads) == (examples, heads):
        return attend(*arrays)
    run = functools.partial(_run_groups, groups)
    if parts == (1, 1):
        return run(*arrays)
    # Each device loops over its own examples and heads: a loop that the compiler had to split would gather its slices.
    vectors, masks, biases = (
        nn.logical_to_mesh_axes((*axes, None, None)) for axes in (("batch", "heads"), ("batch", None), (None, "heads"))
    )
    specs = (vectors, vectors, vectors, masks, biases)
    return jax.shard_map(run, in_specs=specs, out_specs=vectors, check_vma=False)(*arrays)


def _parts(mesh: jax.sharding.AbstractMesh, logical: str) -> int:
    """Into how many parts a mesh splits a logical axis."""
    (names,) = nn.logical_to_mesh_axes((logical,))
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def _run_groups(groups: Groups, query, key, value, mask, position_bias) -> jax.Array:
    """Examples one after the other; within them, where not all fit, heads."""
    num_heads = query.shape[1]
    one_group = jax.checkpoint(attend, prevent_cse=False)

    def some_examples(arrays: tuple) -> jax.Array:
        *vectors, mask = arrays  # [examples, num_heads, length, head_dim]
        if groups.heads == num_heads:
            return one_group(*vectors, mask, position_bias)
        *vectors, bias = jax.tree.map(functools.partial(_cut, axis=1, size=groups.heads), (*vectors, position_bias))
        attended = jax.lax.map(lambda group: one_group(*group[:-1], mask, group[-1]), (*vectors, bias))
        return jnp.moveaxis(attended, 0, 1).reshape(arrays[0].shape)

    cut = [_cut(x, axis=0, size=groups.examples) for x in (query, key, value, mask)]
    return jax.lax.map(some_examples, tuple(cut)).reshape(query.shape)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Parts of `size` along an axis, side by side on a new first axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
