"""The losses over the vocabulary together, with the heads' projection inside: the logits of some tokens at a time.

One pass over chunks of tokens multiplies the hidden states of both models by their heads, adds up divergence,
cross-entropy and normaliser, and forms the gradient of their weighted sum beside them: it is linear in the cotangent,
so the backward pass only scales it, and no logits outlive their chunk.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.implementation import DEFAULT, Computation, Placement
from endistill_jax.objectives.vocabulary_tokens import (
    Factors,
    Head,
    Settings,
    Tokens,
    VocabularySums,
    product,
    token_sums,
)

# Most that one model's logits of one chunk take on a device.
CHUNK_BYTES = {"tpu": 64 << 20, "cpu": 128 << 20, "gpu": 256 << 20}


def vocabulary_loss(
    student: Head,
    teacher: Head | None,
    targets: jax.Array,
    weights: jax.Array,
    *,
    logits_factor: jax.Array | float | None = None,
    lm_factor: jax.Array | float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    computation: Computation = DEFAULT,
) -> tuple[jax.Array, VocabularySums]:
    """`logits_factor * logits_kl + lm_factor * cross_entropy`, both summed over tokens, without holding all logits.

    What stands at positions of weight zero, be it NaN, changes neither value nor gradient.

    Args:
      student: the student's head.
      teacher: the teacher's, a constant; None without a divergence.
      targets: int `[batch, target]`.
      weights: float or int `[batch, target]`, not negative; 0 at padding.
      logits_factor: of the divergence; None leaves it out. The gradient is formed together with the value, so the
        factors must be known here; they are constants.
      lm_factor: of the cross-entropy with its z-loss term; None leaves it out.
      temperature: softens both distributions of the divergence.
      z_loss: coefficient of the squared normaliser.
      computation: size of the chunks, and the mesh that the arrays are spread over.

    Returns:
      The weighted sum, float32 scalar, and the sums by themselves.

    Raises:
      UserError: if the two vocabularies differ in size.
    """
    vocabulary = student.kernel.shape[1]
    if teacher is not None and teacher.kernel.shape[1] != vocabulary:
        raise UserError(
            f"the teacher's logits have {teacher.kernel.shape[1]} entries and the student's {vocabulary}; "
            "distilling logits needs one vocabulary for both"
        )
    placement = computation.placement if computation.placement and computation.placement.mesh.size > 1 else None
    split = placement is not None and placement.model_parts > 1 and vocabulary % placement.model_parts == 0
    settings = Settings(
        temperature=temperature,
        z_loss=z_loss,
        chunk_bytes=computation.chunk_bytes or CHUNK_BYTES.get(computation.platform(), CHUNK_BYTES["gpu"]),
        placement=placement,
        vocabulary_axis=placement.model_axis if split else None,
    )
    factors = Factors(*(None if x is None else jnp.float32(x) for x in (logits_factor, lm_factor)))
    loss, sums = _loss(settings, student, teacher, (targets, weights.astype(jnp.float32)), factors)
    return loss, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    settings: Settings, student: Head, teacher: Head | None, tokens: tuple[jax.Array, jax.Array], factors: Factors
) -> tuple[jax.Array, VocabularySums]:
    sums, _ = _everywhere(settings, student, teacher, tokens, factors, with_gradient=False)
    return _weighted(sums, factors), sums


def _forward(settings: Settings, student: Head, teacher: Head | None, tokens: Any, factors: Factors) -> tuple:
    sums, gradient = _everywhere(settings, student, teacher, tokens, factors, with_gradient=True)
    return (_weighted(sums, factors), sums), gradient


def _backward(_: Settings, gradient: Head, cotangents: tuple[jax.Array, VocabularySums]) -> tuple:
    loss_cotangent, _ = cotangents  # the sums are constants to whoever asks for them
    scaled = jax.tree.map(lambda x: (x.astype(jnp.float32) * loss_cotangent).astype(x.dtype), gradient)
    return scaled, None, None, None


_loss.defvjp(_forward, _backward)


def _weighted(sums: VocabularySums, factors: Factors) -> jax.Array:
    terms = zip(factors, (sums.logits, sums.lm), strict=True)
    return sum((factor * total for factor, total in terms if factor is not None), jnp.zeros((), jnp.float32))


def _everywhere(
    settings: Settings, student: Head, teacher: Head | None, tokens: Any, factors: Factors, with_gradient: bool
) -> tuple[VocabularySums, Head | None]:
    """The sums and the gradient of the loss: each device runs over its own tokens and part of the vocabulary."""
    # In the type that they are multiplied in before they are gathered, once for all chunks.
    kernels = [None if head is None else head.kernel.astype(head.hidden.dtype) for head in (student, teacher)]
    hidden = [None if head is None else head.hidden for head in (student, teacher)]
    run = functools.partial(_run, settings, kernel_dtype=student.kernel.dtype, with_gradient=with_gradient)
    placement = settings.placement
    if placement is not None:
        examples = PartitionSpec(placement.batch_axes)
        kernel = PartitionSpec(None, settings.vocabulary_axis)
        by_kernel = PartitionSpec(_scatter_axis(placement, len(student.kernel)), settings.vocabulary_axis)
        run = jax.shard_map(
            run,
            mesh=placement.mesh,
            in_specs=(examples, kernel, examples, PartitionSpec()),
            out_specs=(examples, Head(examples, by_kernel) if with_gradient else None),
            check_vma=False,
        )
    sums, gradient = run(hidden, kernels, tokens, factors)
    return jax.tree.map(jnp.sum, sums), gradient


def _scatter_axis(placement: Placement, d_model: int) -> str | None:
    """The mesh axis over which the summed gradient of the head is spread, as the head itself is; None for no axis."""
    axis, parts = placement.embed_axis, placement.mesh.shape[placement.embed_axis]
    return axis if axis in placement.batch_axes and parts > 1 and d_model % parts == 0 else None


def _run(
    settings: Settings,
    hidden: Sequence[jax.Array | None],
    kernels: Sequence[jax.Array | None],
    tokens: tuple[jax.Array, jax.Array],
    factors: Factors,
    kernel_dtype: Any,
    with_gradient: bool,
) -> tuple[VocabularySums, Head | None]:
    """One device's part, some tokens at a time: its sums, each `[1]`, and its gradient of the loss."""
    student_hidden, (targets, weights) = hidden[0], tokens
    real = weights != 0
    # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
    hidden = [None if x is None else jnp.where(real[..., None], x, 0) for x in hidden]
    chunks = _cut(Tokens(*hidden, targets, weights), settings.chunk_bytes // (4 * kernels[0].shape[1]))

    def one_chunk(kernel_gradient: jax.Array | None, chunk: Tokens) -> tuple[jax.Array | None, tuple]:
        sums, by_logits = token_sums(settings, kernels, chunk, factors, with_gradient)
        if not with_gradient:
            return None, (sums, None)
        by_logits = by_logits.astype(chunk.student.dtype)
        by_hidden = product("tv,dv->td", by_logits, kernels[0])
        if settings.vocabulary_axis is None:
            by_hidden = by_hidden.astype(chunk.student.dtype)  # else only after parts of the vocabulary are added up
        return kernel_gradient + product("td,tv->dv", chunk.student, by_logits), (sums, by_hidden)

    start = jnp.zeros(kernels[0].shape, jnp.float32) if with_gradient else None
    by_kernel, (sums, by_hidden) = jax.lax.scan(one_chunk, start, chunks)
    sums = jax.tree.map(lambda x: jnp.sum(x, keepdims=True), sums)
    if not with_gradient:
        return sums, None
    by_hidden = by_hidden.reshape(-1, by_hidden.shape[-1])[: targets.size].reshape(student_hidden.shape)
    if settings.vocabulary_axis is not None:
        by_hidden = jax.lax.psum(by_hidden, settings.vocabulary_axis)
    if settings.placement is not None:
        by_kernel = _sum_over_devices(settings.placement, by_kernel)
    return sums, Head(by_hidden.astype(student_hidden.dtype), by_kernel.astype(kernel_dtype))


def _sum_over_devices(placement: Placement, by_kernel: jax.Array) -> jax.Array:
    scatter = _scatter_axis(placement, len(by_kernel))
    others = [axis for axis in placement.batch_axes if axis != scatter and placement.mesh.shape[axis] > 1]
    if others:
        by_kernel = jax.lax.psum(by_kernel, tuple(others))
    return by_kernel if scatter is None else jax.lax.psum_scatter(by_kernel, scatter, tiled=True)


def _cut(tokens: Tokens, most: int) -> Tokens:
    """`[batch, target, ...]` -> `[chunks, tokens, ...]` of at most about `most` tokens, filled up with weight 0."""
    count = tokens.weights.size
    chunks = math.ceil(count / max(most, 8))
    # Vector registers have eight rows on TPU.
    size = count if chunks == 1 else 8 * math.ceil(count / chunks / 8)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, [(0, chunks * size - count), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(cut, tokens)
