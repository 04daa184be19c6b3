"""All token terms of an objective together, the heads' projection inside: the logits of some tokens at a time.

One pass over blocks of tokens multiplies the hidden states of both models by their heads, adds up every term, and forms
the gradient of their weighted sum beside them; no logits outlive their block.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num

from endistill_jax.core.model_io import Head
from endistill_jax.objectives.implementation import LossImplementation, MeshAxes, per_device, with_formed_gradient
from endistill_jax.objectives.token_terms import Sums, TokenDistribution, TokenTerm, cross_entropy_sums, weighted_sum

# Most that one model's logits of one block take on a device.
VOCABULARY_BYTES = {"tpu": 64 << 20, "cpu": 128 << 20, "gpu": 256 << 20}


class Tokens(NamedTuple):
    """Some tokens: the hidden states of both models, targets and weights."""

    student: Float[Array, "tokens d_model"]
    teacher: Float[Array, "tokens teacher_d_model"] | None
    targets: Int[Array, " tokens"]
    weights: Float[Array, " tokens"]


def token_loss(
    terms: Sequence[TokenTerm],
    student: Head,
    teacher: Head | None,
    targets: Int[Array, "batch target"],
    weights: Num[Array, "batch target"],
    factors: Mapping[str, Float[Array, ""] | float],
    implementation: LossImplementation,
) -> tuple[Float[Array, ""], Sums]:
    """`sum over terms of factor * sum over tokens`, and the sums of `dense_token_sums`, without holding all logits.

    What is at positions of weight zero, be it NaN, changes neither value nor gradient. The gradient is formed together
    with the value, so the factors, by term name, must be known here; they are constants.
    """
    axes, columns = implementation.sharded_axes, student.kernel.shape[1]
    split = axes is not None and axes.model_parts > 1 and columns % axes.model_parts == 0
    blocks = _Blocks(
        terms=tuple(terms),
        block_bytes=implementation.vocabulary_bytes or VOCABULARY_BYTES[implementation.platform],
        axes=axes,
        vocabulary_axis=axes.model if split else None,
    )
    factors = {term.name: jnp.float32(factors[term.name]) for term in terms}
    constants = (teacher, targets, weights.astype(jnp.float32), factors)
    return with_formed_gradient(functools.partial(_sharded, blocks), student, constants)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """What is known before the arrays are; `vocabulary_axis` is the mesh axis over which the vocabulary is split."""

    terms: tuple[TokenTerm, ...]
    block_bytes: int
    axes: MeshAxes | None
    vocabulary_axis: str | None


def _sharded(
    blocks: _Blocks, student: Head, constants: tuple, with_gradient: bool
) -> tuple[jax.Array, Sums, Head | None]:
    """The loss, the sums and the gradient: each device runs over its own tokens and part of the vocabulary."""
    teacher, targets, weights, factors = constants
    # In the type that they are multiplied in before they are gathered, once for all blocks.
    kernels = [None if head is None else head.kernel.astype(head.hidden.dtype) for head in (student, teacher)]
    hidden = [None if head is None else head.hidden for head in (student, teacher)]
    run = functools.partial(_per_device, blocks, kernel_dtype=student.kernel.dtype, with_gradient=with_gradient)
    axes, in_specs, out_specs = blocks.axes, None, None
    if axes is not None:
        examples = PartitionSpec(axes.batch)
        in_specs = (examples, PartitionSpec(None, blocks.vocabulary_axis), examples, PartitionSpec())
        d_kernel = PartitionSpec(_scatter_axis(axes, len(student.kernel)), blocks.vocabulary_axis)
        out_specs = (examples, Head(examples, d_kernel) if with_gradient else None)
    sums, gradient = per_device(run, axes, in_specs, out_specs)(hidden, kernels, (targets, weights), factors)
    sums = jax.tree.map(jnp.sum, sums)
    loss = sum((factor * sums[name] for name, factor in factors.items()), jnp.zeros((), jnp.float32))
    return loss, sums, gradient


def _scatter_axis(axes: MeshAxes, d_model: int) -> str | None:
    """The mesh axis over which the summed gradient of the head is sharded, as the head itself is; None for no axis."""
    parts = axes.mesh.shape[axes.embed]
    return axes.embed if axes.embed in axes.batch and parts > 1 and d_model % parts == 0 else None


def _per_device(
    blocks: _Blocks,
    hidden: Sequence[jax.Array | None],
    kernels: Sequence[jax.Array | None],
    tokens: tuple[jax.Array, jax.Array],
    factors: Mapping[str, jax.Array],
    kernel_dtype: Any,
    with_gradient: bool,
) -> tuple[dict[str, Float[Array, " 1"]], Head | None]:
    """One device's part, a block of tokens at a time: its sums, each [1], and its gradient of the loss."""
    student_hidden, (targets, weights) = hidden[0], tokens
    real = weights != 0
    # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
    hidden = [None if x is None else jnp.where(real[..., None], x, 0) for x in hidden]
    parts = _cut(Tokens(*hidden, targets, weights), blocks.block_bytes // (4 * kernels[0].shape[1]))

    def one_block(d_kernel: jax.Array | None, block: Tokens) -> tuple[jax.Array | None, tuple]:
        sums, d_logits = _block_sums(blocks, kernels, block, factors, with_gradient)
        if not with_gradient:
            return None, (sums, None)
        d_logits = d_logits.astype(block.student.dtype)
        d_hidden = _product("tv,dv->td", d_logits, kernels[0])
        if blocks.vocabulary_axis is None:
            d_hidden = d_hidden.astype(block.student.dtype)  # else only after parts of the vocabulary are added up
        return d_kernel + _product("td,tv->dv", block.student, d_logits), (sums, d_hidden)

    start = jnp.zeros(kernels[0].shape, jnp.float32) if with_gradient else None
    d_kernel, (sums, d_hidden) = jax.lax.scan(one_block, start, parts)
    sums = jax.tree.map(lambda x: jnp.sum(x, keepdims=True), sums)
    if not with_gradient:
        return sums, None
    d_hidden = d_hidden.reshape(-1, d_hidden.shape[-1])[: targets.size].reshape(student_hidden.shape)
    if blocks.vocabulary_axis is not None:
        d_hidden = jax.lax.psum(d_hidden, blocks.vocabulary_axis)
    if blocks.axes is not None:
        d_kernel = _sum_over_devices(blocks.axes, d_kernel)
    return sums, Head(d_hidden.astype(student_hidden.dtype), d_kernel.astype(kernel_dtype))


def _block_sums(
    blocks: _Blocks,
    kernels: Sequence[jax.Array | None],
    block: Tokens,
    factors: Mapping[str, jax.Array],
    with_gradient: bool,
) -> tuple[Sums, Float[Array, "tokens columns"] | None]:
    """The sums of a block, and the gradient of the loss by the student's logits, float32."""

    def distribution(hidden: jax.Array | None, kernel: jax.Array | None) -> TokenDistribution | None:
        if kernel is None:
            return None
        return TokenDistribution(_product("td,dv->tv", hidden, kernel), block.targets, blocks.vocabulary_axis)

    student, teacher = distribution(block.student, kernels[0]), distribution(block.teacher, kernels[1])
    sums = cross_entropy_sums(student, teacher, block.weights)
    d_logits = jnp.zeros_like(student.logits)
    for term in blocks.terms:
        losses, by_logits = term.loss_and_gradient(student, teacher, block.targets)
        sums[term.name] = weighted_sum(losses, block.weights)
        d_logits += (factors[term.name] * block.weights)[:, None] * by_logits
    return sums, d_logits if with_gradient else None


def _sum_over_devices(axes: MeshAxes, d_kernel: Float[Array, "d_model columns"]) -> Float[Array, "rows columns"]:
    scatter = _scatter_axis(axes, len(d_kernel))
    others = [axis for axis in axes.batch if axis != scatter and axes.mesh.shape[axis] > 1]
    if others:
        d_kernel = jax.lax.psum(d_kernel, tuple(others))
    return d_kernel if scatter is None else jax.lax.psum_scatter(d_kernel, scatter, tiled=True)


def _cut(tokens: Tokens, most: int) -> Tokens:
    """[batch, target, ...] -> [blocks, tokens, ...] of at most about `most` tokens, filled up with weight 0."""
    count = tokens.weights.size
    blocks = math.ceil(count / max(most, 8))
    # Vector registers have eight rows on TPU.
    size = count if blocks == 1 else 8 * math.ceil(count / blocks / 8)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, [(0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(cut, tokens)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
