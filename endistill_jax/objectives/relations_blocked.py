"""The relation loss in little memory: the scores of a few heads at a time, value and gradient in one pass.

The sum over heads and rows is taken group by group. The divergence's gradient is formed beside its value: it is linear
in the cotangent, so the backward pass has nothing to do but scale it, and no score outlives its group. With groups that
fit a chip's own memory the scores never leave it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from endistill_jax.core.batch import visible_keys
from endistill_jax.core.groups import choose_groups
from endistill_jax.objectives.implementation import DEFAULT, Computation, Placement
from endistill_jax.objectives.relation_rows import Pair, rows_divergence
from endistill_jax.objectives.relations import check_relation_heads, relation_weight

# Most that one model's scores of one group take: a fraction of a TPU core's vector memory, of a CPU core's cache, and
# for GPUs, which want wide work, a small part of their memory.
GROUP_BYTES = {"tpu": 8 << 20, "cpu": 2 << 20, "gpu": 256 << 20}


def relation_kl_grouped(
    teacher: Pair,
    student: Pair,
    *,
    relation_heads: int,
    query_segments: jax.Array,
    key_segments: jax.Array,
    causal: bool,
    computation: Computation = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
    """As `relation_kl`, in memory that does not grow with heads or examples.

    Vectors of less than float32 are multiplied as they are, with float32 sums, which is exact; the gradient by the
    student's scores is rounded to the student's type before its products.

    Args:
      teacher: as for `relation_kl`, as are all others but the last.
      student: two arrays.
      relation_heads: divides both inner dimensions.
      query_segments: int `[batch, query_length]`.
      key_segments: int `[batch, key_length]`.
      causal: whether a query sees no key after itself.
      computation: size of the groups, and the mesh that the arrays are spread over.

    Returns:
      `(sum, weight)`, float32 scalars in nats and rows.

    Raises:
      UserError: if `relation_heads` does not divide both inner dimensions.
    """
    check_relation_heads(relation_heads, teacher[0].shape[-1], student[0].shape[-1])
    relation = _Relation(
        heads=relation_heads,
        causal=causal,
        group_bytes=computation.group_bytes or GROUP_BYTES.get(computation.platform(), GROUP_BYTES["gpu"]),
        placement=computation.placement,
    )
    total = _relation_sum(relation, tuple(student), tuple(teacher), (query_segments, key_segments))
    return total, relation_weight(query_segments, key_segments, causal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Relation:
    """What is known of a relation before its arrays are."""

    heads: int
    causal: bool
    group_bytes: int
    placement: Placement | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relation_sum(relation: _Relation, student: Pair, teacher: Pair, segments: Pair) -> jax.Array:
    return _everywhere(relation, student, teacher, segments, with_gradient=False)[0]


def _forward(relation: _Relation, student: Pair, teacher: Pair, segments: Pair) -> tuple[jax.Array, Pair]:
    # The gradient of the sum over heads, not yet of their mean.
    return _everywhere(relation, student, teacher, segments, with_gradient=True)


def _backward(relation: _Relation, gradients: Pair, cotangent: jax.Array) -> tuple[Pair, None, None]:
    factor = cotangent / relation.heads
    return tuple((gradient.astype(jnp.float32) * factor).astype(gradient.dtype) for gradient in gradients), None, None


_relation_sum.defvjp(_forward, _backward)


def _everywhere(
    relation: _Relation, student: Pair, teacher: Pair, segments: Pair, with_gradient: bool
) -> tuple[jax.Array, Pair | None]:
    """The sum and its gradient by the student's vectors: each device runs over its own examples and heads."""
    placement = relation.placement
    run = functools.partial(_run, relation, with_gradient=with_gradient)
    if placement is None or placement.mesh.size == 1:
        total, gradients = run(student, teacher, segments)
        return total[0], gradients
    split_heads = relation.heads % placement.model_parts == 0
    vectors = PartitionSpec(placement.batch_axes, None, placement.model_axis if split_heads else None)
    # One sum a part, added outside: a scalar of every term, which the compiler can gather into one exchange.
    parts = PartitionSpec((*placement.batch_axes, placement.model_axis) if split_heads else placement.batch_axes)
    totals, gradients = jax.shard_map(
        run,
        mesh=placement.mesh,
        in_specs=(vectors, vectors, PartitionSpec(placement.batch_axes)),
        out_specs=(parts, vectors if with_gradient else None),
        check_vma=False,
    )(student, teacher, segments)
    return jnp.sum(totals), gradients


def _run(
    relation: _Relation, student: Pair, teacher: Pair, segments: Pair, with_gradient: bool
) -> tuple[jax.Array, Pair | None]:
    """One device's part, some examples at a time: its sum `[1]` and the gradient by its vectors."""
    placement = relation.placement
    split = 1 if placement is None or relation.heads % placement.model_parts else placement.model_parts
    heads = relation.heads // split
    batch, query_length = segments[0].shape
    groups = choose_groups(batch, heads, query_length, segments[1].shape[1], relation.group_bytes)

    def one_example(arrays: tuple[Pair, Pair, Pair]) -> tuple[jax.Array, Pair | None]:
        student, teacher, segments = arrays
        vectors = tuple(
            tuple(_split_heads(x, ids, heads, groups.heads) for x, ids in zip(pair, segments, strict=True))
            for pair in (student, teacher)
        )
        some_heads = functools.partial(_over_rows, segments, groups.queries, relation.causal, with_gradient)
        totals, gradients = jax.lax.map(some_heads, vectors)
        if with_gradient:
            gradients = tuple(map(_join_heads, gradients, student))
        return jnp.sum(totals), gradients

    together = groups.examples if groups.examples > 1 else None
    totals, gradients = jax.lax.map(one_example, (student, teacher, segments), batch_size=together)
    return jnp.sum(totals, keepdims=True) / relation.heads, gradients


def _split_heads(vectors: jax.Array, segments: jax.Array, heads: int, together: int) -> jax.Array:
    """`[length, inner]` -> `[heads / together, together, length, relation_dim]`, padding cleared."""
    # Before the arithmetic: what is not finite would spoil the products of the positions that see it with weight 0.
    vectors = jnp.where(segments[:, None] != 0, vectors, 0)
    vectors = vectors.reshape(len(vectors), heads // together, together, -1)
    return vectors.transpose(1, 2, 0, 3)


def _join_heads(vectors: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `_split_heads`, in the shape and type of `like`."""
    return vectors.transpose(2, 0, 1, 3).reshape(like.shape).astype(like.dtype)


def _over_rows(
    segments: Pair, rows: int, causal: bool, with_gradient: bool, vectors: tuple[Pair, Pair]
) -> tuple[jax.Array, Pair | None]:
    """Some heads of an example, a block of rows at a time.

    Args:
      segments: `[query_length]`, `[key_length]`.
      rows: queries in a block.
      causal: whether a query sees no key after itself.
      with_gradient: whether to form it.
      vectors: of student and teacher, `[heads, query_length or key_length, relation_dim]`.

    Returns:
      The sum over rows and heads, and the gradient by the student's vectors, float32.
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
        total, by_queries, by_keys = rows_divergence(
            (student_queries, student_keys), (teacher_queries, teacher_keys), visible, with_gradient
        )
        return (key_gradient + by_keys if with_gradient else None), (total, by_queries)

    start = jnp.zeros_like(student_keys.swapaxes(1, 2), jnp.float32) if with_gradient else None
    positions = jnp.arange(blocks * rows).reshape(blocks, rows)
    xs = (cut(student_queries, 1), cut(teacher_queries, 1), cut(query_segments, 0), positions)
    by_keys, (totals, by_queries) = jax.lax.scan(one_block, start, xs)
    if not with_gradient:
        return jnp.sum(totals), None
    by_queries = jnp.moveaxis(by_queries, 0, 1)  # [heads, blocks, rows, relation_dim]
    by_queries = by_queries.reshape(len(by_queries), blocks * rows, -1)[:, :query_length]
    return jnp.sum(totals), (by_queries, by_keys.swapaxes(1, 2))
