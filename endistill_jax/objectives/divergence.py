"""The divergence that every distillation term shares."""

import jax
import jax.numpy as jnp


def categorical_kl(teacher_scores: jax.Array, student_scores: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over the last axis, in nats.

    Computed as `sum_j p_t (s_t - s_s) - lse_t + lse_s`, whose gradient with respect to the student's scores is
    `p_s - p_t`; for equal scores both are zero up to rounding. The teacher is a constant.

    Args:
      teacher_scores: finite float32 `[..., choices]`.
      student_scores: finite float32 `[..., choices]`.

    Returns:
      float32 `[...]`.
    """
    teacher_scores = jax.lax.stop_gradient(teacher_scores)
    teacher_lse = jax.nn.logsumexp(teacher_scores, axis=-1)  # [...]
    student_lse = jax.nn.logsumexp(student_scores, axis=-1)  # [...]
    teacher_probabilities = jnp.exp(teacher_scores - teacher_lse[..., None])  # [..., choices]
    expected_difference = jnp.sum(teacher_probabilities * (teacher_scores - student_scores), axis=-1)
    return expected_difference - teacher_lse + student_lse
