"""Divergence of the student's vocabulary distribution from the teacher's."""

import jax
import jax.numpy as jnp

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.divergence import categorical_kl


def logits_kl(
    teacher_logits: jax.Array, student_logits: jax.Array, weights: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))`, summed over tokens.

    The factor `temperature^2` keeps the size of the gradient about the same at all temperatures (Hinton et al.,
    arXiv 1503.02531). What stands at positions of weight zero, be it NaN, changes neither value nor gradient.

    Args:
      teacher_logits: `[batch, target, vocabulary]`; a constant.
      student_logits: `[batch, target, vocabulary]`.
      weights: float or int `[batch, target]`, not negative; 0 at padding.
      temperature: positive.

    Returns:
      `(sum, weight)`, float32 scalars: weighted nats, and the sum of the weights.

    Raises:
      UserError: if the two vocabularies differ in size.
    """
    if teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise UserError(
            f"the teacher's logits have {teacher_logits.shape[-1]} entries and the student's "
            f"{student_logits.shape[-1]}; distilling logits needs one vocabulary for both"
        )
    weights = weights.astype(jnp.float32)  # [batch, target]
    real = weights != 0

    def scores(logits: jax.Array) -> jax.Array:
        # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
        return jnp.where(real[..., None], logits.astype(jnp.float32), 0.0) / temperature  # [batch, target, vocabulary]

    divergence = categorical_kl(scores(teacher_logits), scores(student_logits))  # [batch, target]
    return temperature**2 * jnp.sum(weights * divergence), jnp.sum(weights)
