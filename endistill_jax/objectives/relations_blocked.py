"""The relation loss in little memory: the scores of a few heads at a time, value and gradient in one pass.

With blocks that fit a chip's own memory the scores never leave it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from endistill_jax.core.attention import RowMasks, choose_groups, visible_keys
from endistill_jax.objectives.implementation import LossImplementation, MeshAxes, per_device, with_formed_gradient

# Finite, so that masked minus masked is 0 and not NaN; so low that its softmax is exactly 0 beside any real score.
MASKED_SCORE = -1e30

# Most that one model's scores of one block take: a fraction of a TPU core's vector memory, of a CPU core's cache, and
# for GPUs, which want wide work, a small part of their memory.
RELATION_BYTES = {"tpu": 8 << 20, "cpu": 2 << 20, "gpu": 256 << 20}

# Of queries and keys, of all examples or of one.
Segments = tuple[Int[Array, "*batch query"], Int[Array, "*batch key"]]

# The two sets of vectors that a relation compares, queries and keys, of one width.
Pair = tuple[Float[Array, "*batch query _"], Float[Array, "*batch key _"]]


def rows_divergence(
    student: Pair, teacher: Pair, visible: Bool[Array, "1 rows key"], with_gradient: bool
) -> tuple[
    Float[Array, ""], Float[Array, "heads rows relation_dim"] | None, Float[Array, "heads relation_dim key"] | None
]:
    """The sum of the divergences of some rows of some heads, and its gradient by the student's queries and keys.

    Both pairs are [heads, rows or key, dim], of their own width; `visible` is which keys a row sees.
    """

    def shifted_scores(pair: Pair) -> Float[Array, "heads rows key"]:  # 0 at a row's largest
        queries, keys = pair
        scores = _product("hqd,hkd->hqk", queries, keys) / math.sqrt(queries.shape[-1])
        scores = jnp.where(visible, scores, MASKED_SCORE)
        return scores - jnp.max(scores, axis=-1, keepdims=True)

    student_scores, teacher_scores = shifted_scores(student), shifted_scores(teacher)
    student_exp, teacher_exp = jnp.exp(student_scores), jnp.exp(teacher_scores)
    student_sum, teacher_sum = (jnp.sum(x, axis=-1, keepdims=True) for x in (student_exp, teacher_exp))
    # One reciprocal a row, and products, rather than a division a score.
    student_share, teacher_share = 1 / student_sum, 1 / teacher_sum
    expected = jnp.sum(teacher_exp * (teacher_scores - student_scores), axis=-1, keepdims=True) * teacher_share
    # Rows that see nothing have equal scores in both models: their divergence and gradient are exactly 0.
    total = jnp.sum(expected + jnp.log(student_sum) - jnp.log(teacher_sum))
    if not with_gradient:
        return total, None, None
    queries, keys = student
    d_scores = (student_exp * student_share - teacher_exp * teacher_share).astype(queries.dtype)
    scale = 1 / math.sqrt(queries.shape[-1])
    d_queries = _product("hqk,hkd->hqd", d_scores, keys) * scale
    # Transposed: so the large factor of its product is read in the order of memory, five times as fast on a CPU.
    d_keys = _product("hqd,hqk->hdk", queries, d_scores) * scale
    return total, d_queries, d_keys


def _product(axes: str, first: jax.Array, second: jax.Array) -> jax.Array:
    # Float32 factors in full, which accelerators would otherwise round; products of two of half precision are exact.
    return jnp.einsum(axes, first, second, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def relation_kl_blocked(
    teacher: Pair, student: Pair, relation_heads: int, masks: RowMasks, implementation: LossImplementation
) -> Float[Array, ""]:
    """As `relations.relation_kl`, in memory that does not grow with heads or examples.

    Vectors of less than float32 are multiplied as they are, with float32 sums, which is exact; the gradient by the
    student's scores is rounded to the student's type before its products.
    """
    blocks = _Blocks(
        heads=relation_heads,
        causal=masks.causal,
        block_bytes=implementation.relation_bytes or RELATION_BYTES[implementation.platform],
        axes=implementation.sharded_axes,
    )
    constants = (tuple(teacher), (masks.query_segments, masks.key_segments))
    total, _ = with_formed_gradient(functools.partial(_sharded, blocks), tuple(student), constants)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """What is known of a relation before its arrays are."""

    heads: int
    causal: bool
    block_bytes: int
    axes: MeshAxes | None

    @property
    def parts(self) -> int:
        """Devices that the relation heads are split over."""
        return 1 if self.axes is None or self.heads % self.axes.model_parts else self.axes.model_parts


def _sharded(
    blocks: _Blocks, student: Pair, constants: tuple[Pair, Segments], with_gradient: bool
) -> tuple[jax.Array, None, Pair | None]:
    """The mean over heads of the sum over rows, and the gradient: each device runs over its own examples and heads."""
    run, axes = functools.partial(_per_device, blocks, with_gradient=with_gradient), blocks.axes
    in_specs = out_specs = None
    if axes is not None:
        vectors = PartitionSpec(axes.batch, None, axes.model if blocks.parts > 1 else None)
        # One sum a part, added outside: a scalar of every term, which the compiler can gather into one exchange.
        parts = PartitionSpec((*axes.batch, axes.model) if blocks.parts > 1 else axes.batch)
        in_specs = (vectors, vectors, PartitionSpec(axes.batch))
        out_specs = (parts, vectors if with_gradient else None)
    totals, gradients = per_device(run, axes, in_specs, out_specs)(student, *constants)
    return jnp.sum(totals), None, gradients


def _per_device(
    blocks: _Blocks, student: Pair, teacher: Pair, segments: Segments, with_gradient: bool
) -> tuple[Float[Array, " 1"], Pair | None]:
    """One device's part, some examples at a time: its sum `[1]` and the gradient by its vectors."""
    heads = blocks.heads // blocks.parts
    batch, query_length = segments[0].shape
    groups = choose_groups(batch, heads, query_length, segments[1].shape[1], blocks.block_bytes)

    def one_example(arrays: tuple[Pair, Pair, Segments]) -> tuple[jax.Array, Pair | None]:
        student, teacher, segments = arrays
        vectors = tuple(
            tuple(_split_heads(x, ids, heads, groups.heads) for x, ids in zip(pair, segments, strict=True))
            for pair in (student, teacher)
        )
        some_heads = functools.partial(_over_rows, segments, groups.queries, blocks.causal, with_gradient)
        totals, gradients = jax.lax.map(some_heads, vectors)
        if with_gradient:
            # Of the sum over heads so far; the loss is their mean.
            gradients = tuple(_join_heads(x / blocks.heads, like) for x, like in zip(gradients, student, strict=True))
        return jnp.sum(totals), gradients

    together = groups.examples if groups.examples > 1 else None
    totals, gradients = jax.lax.map(one_example, (student, teacher, segments), batch_size=together)
    return jnp.sum(totals, keepdims=True) / blocks.heads, gradients


def _split_heads(
    vectors: Float[Array, "length inner"], segments: Int[Array, " length"], heads: int, together: int
) -> Float[Array, "groups {together} length relation_dim"]:
    """The heads in groups, padding cleared."""
    # Before the arithmetic: what is not finite would spoil the products of the positions that see it with weight 0.
    vectors = jnp.where(segments[:, None] != 0, vectors, 0)
    vectors = vectors.reshape(len(vectors), heads // together, together, -1)
    return vectors.transpose(1, 2, 0, 3)


def _join_heads(
    vectors: Float[Array, "groups together length relation_dim"], like: Float[Array, "length inner"]
) -> Float[Array, "length inner"]:
    """The reverse of `_split_heads`, in the shape and type of `like`."""
    return vectors.transpose(2, 0, 1, 3).reshape(like.shape).astype(like.dtype)


def _over_rows(
    segments: tuple[Int[Array, " query"], Int[Array, " key"]],
    rows: int,
    causal: bool,
    with_gradient: bool,
    vectors: tuple[Pair, Pair],
) -> tuple[jax.Array, Pair | None]:
    """Some heads of an example, blocks of so many `rows` at a time: their sum, and its gradient, float32.

    The vectors are those of student and teacher, [heads, query or key, relation_dim].
    """
    (student_queries, student_keys), (teacher_queries, teacher_keys) = vectors
    query_segments, key_segments = segments
    query_length, key_length = len(query_segments), len(key_segments)
    blocks = math.ceil(query_length / rows)

    def cut(x: jax.Array, axis: int) -> jax.Array:  # [..., query_length, ...] -> [blocks, ..., rows, ...]
        padding = [(0, blocks * rows - query_length if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding)  # with segment 0, which is in no sum
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :]), axis, 0)

    def one_block(key_gradient: jax.Array | None, block: tuple) -> tuple[jax.Array | None, tuple]:
        student_queries, teacher_queries, query_segments, positions = block
        visible = visible_keys(query_segments[None], key_segments[None], causal=False)  # [1, rows, key_length]
        if causal:
            visible &= positions[:, None] >= jnp.arange(key_length)
        total, d_queries, d_keys = rows_divergence(
            (student_queries, student_keys), (teacher_queries, teacher_keys), visible, with_gradient
        )
        return (key_gradient + d_keys if with_gradient else None), (total, d_queries)

    start = jnp.zeros_like(student_keys.swapaxes(1, 2), jnp.float32) if with_gradient else None
    positions = jnp.arange(blocks * rows).reshape(blocks, rows)
    xs = (cut(student_queries, 1), cut(teacher_queries, 1), cut(query_segments, 0), positions)
    d_keys, (totals, d_queries) = jax.lax.scan(one_block, start, xs)
    if not with_gradient:
        return jnp.sum(totals), None
    d_queries = jnp.moveaxis(d_queries, 0, 1)  # [heads, blocks, rows, relation_dim]
    d_queries = d_queries.reshape(len(d_queries), blocks * rows, -1)[:, :query_length]
    return jnp.sum(totals), (d_queries, d_keys.swapaxes(1, 2))
