"""The divergence of some rows of some relation heads, and its gradient, formed together."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite, so that masked minus masked is 0 and not NaN; so low that its softmax is exactly 0 beside any real score.
MASKED_SCORE = -1e30

# The two sets of vectors that a relation compares, queries and keys, of one width.
Pair = tuple[Float[Array, "*batch query _"], Float[Array, "*batch key _"]]


def rows_divergence(
    student: Pair, teacher: Pair, visible: Bool[Array, "1 rows key"], with_gradient: bool
) -> tuple[
    Float[Array, ""], Float[Array, "heads rows relation_dim"] | None, Float[Array, "heads relation_dim key"] | None
]:
    """The sum of the divergences of all rows given, and its gradient by the student's queries and keys.

    That by the keys is turned: so the large factor of its product is read in the order of memory, which is five times
    as fast on a CPU.

    Args:
        student: its rows and keys, [heads, rows or key, dim].
        teacher: likewise, of its own width.
        visible: which keys a row sees.
        with_gradient: whether to form it.
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
    d_keys = _product("hqd,hqk->hdk", queries, d_scores) * scale
    return total, d_queries, d_keys


def _product(axes: str, first: jax.Array, second: jax.Array) -> jax.Array:
    # Float32 factors in full, which accelerators would otherwise round; products of two of half precision are exact.
    return jnp.einsum(axes, first, second, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
