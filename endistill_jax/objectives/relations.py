"""Relations of attention vectors, compared between a teacher and a student: the plain dense form.

A relation of two sets of vectors is the distribution that each vector of the first puts on those of the second by
scaled dot products, per relation head (MiniLMv2, arXiv 2012.15828). It has the same shape for models of any width.
"""

import math

import jax
import jax.numpy as jnp

from endistill_jax.core.batch import visible_keys
from endistill_jax.core.errors import UserError
from endistill_jax.objectives.divergence import categorical_kl

# Finite, so that masked minus masked is 0 and not NaN; so low that its softmax is exactly 0 beside any real score.
MASKED_SCORE = -1e30


def check_relation_heads(
    relation_heads: int, teacher_dim: int, student_dim: int, where: str = "relation_heads"
) -> None:
    """Raises UserError, naming the valid choices, unless `relation_heads` divides both inner dimensions."""
    common = math.gcd(teacher_dim, student_dim)
    if relation_heads < 1 or common % relation_heads:
        choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"{where} is {relation_heads}, which does not divide the inner dimensions (num_heads * head_dim) "
            f"{teacher_dim} of the teacher and {student_dim} of the student; choose one of {choices}"
        )


def relation_weight(query_segments: jax.Array, key_segments: jax.Array, causal: bool) -> jax.Array:
    """The number of rows of a relation, float32 scalar: real query positions with at least one visible key."""
    return jnp.sum(jnp.any(visible_keys(query_segments, key_segments, causal), axis=-1), dtype=jnp.float32)


def relation_scores(
    queries: jax.Array, keys: jax.Array, query_segments: jax.Array, key_segments: jax.Array, relation_heads: int
) -> jax.Array:
    """Scaled dot products of vectors that are split anew into relation heads, without a mask.

    Args:
      queries: `[batch, query_length, inner]`, heads joined.
      keys: `[batch, key_length, inner]`.
      query_segments: int `[batch, query_length]`; vectors at segment 0 count as zero.
      key_segments: int `[batch, key_length]`.
      relation_heads: divides `inner`.

    Returns:
      `queries_r @ keys_r^T / sqrt(inner / relation_heads)`, float32
      `[batch, relation_heads, query_length, key_length]`.
    """

    def split(vectors: jax.Array, segments: jax.Array) -> jax.Array:
        # Padding is cleared before the arithmetic, not only after: the gradient of a product whose result is later
        # thrown away by a `where` is 0 * NaN = NaN if a factor is not finite.
        vectors = jnp.where(segments[:, :, None] != 0, vectors.astype(jnp.float32), 0.0)
        return vectors.reshape(*vectors.shape[:2], relation_heads, -1)  # [batch, length, relation_heads, relation_dim]

    queries, keys = split(queries, query_segments), split(keys, key_segments)
    # Accelerators would otherwise round float32 factors to fewer bits.
    scores = jnp.einsum("bqrd,bkrd->brqk", queries, keys, precision=jax.lax.Precision.HIGHEST)
    return scores / math.sqrt(queries.shape[-1])  # [batch, relation_heads, query_length, key_length]


def relation_kl(
    teacher: tuple[jax.Array, jax.Array],
    student: tuple[jax.Array, jax.Array],
    *,
    relation_heads: int,
    query_segments: jax.Array,
    key_segments: jax.Array,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Divergence of the student's relation from the teacher's, for one pair of vectors of one site.

    Per row and relation head `KL(softmax(teacher scores) || softmax(student scores))` over the visible keys; summed
    over rows, averaged over relation heads. A row is a real query position with at least one visible key; the rows are
    the same for both models. What stands at padding positions, be it NaN, changes neither value nor gradient.

    Args:
      teacher: two arrays `[batch, query_length, teacher_inner]`, `[batch, key_length, teacher_inner]`; a constant.
      student: two arrays `[batch, query_length, student_inner]`, `[batch, key_length, student_inner]`.
      relation_heads: number of heads into which both models' vectors are split; divides both inner dimensions.
      query_segments: int `[batch, query_length]`; 0 is padding, equal ids may see each other.
      key_segments: int `[batch, key_length]`.
      causal: whether a query sees no key after itself.

    Returns:
      `(sum, weight)`, float32 scalars in nats and rows.

    Raises:
      UserError: if `relation_heads` does not divide both inner dimensions.
    """
    check_relation_heads(relation_heads, teacher[0].shape[-1], student[0].shape[-1])
    visible = visible_keys(query_segments, key_segments, causal)[:, None]  # [batch, 1, query_length, key_length]

    def masked_scores(vectors: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores = relation_scores(*vectors, query_segments, key_segments, relation_heads)
        return jnp.where(visible, scores, MASKED_SCORE)  # [batch, relation_heads, query_length, key_length]

    divergence = categorical_kl(masked_scores(teacher), masked_scores(student))  # [batch, relation_heads, query_length]
    # Rows that see nothing need no further mask: their scores are the same constants in both models, which differ by
    # exactly 0, and `where` passes no gradient to what it replaced.
    return jnp.sum(divergence) / relation_heads, relation_weight(query_segments, key_segments, causal)
