"""Cross-entropy with the real next token: the language model's own loss."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """`lse(logits) - logits[target] + z_loss * lse(logits)^2`, summed over tokens.

    The z-loss term keeps the logits' normaliser near one. What stands at positions of weight zero, be it NaN or an
    impossible target, changes neither value nor gradient; elsewhere a target outside the vocabulary gives NaN rather
    than a plausible number.

    Args:
      logits: `[batch, target, vocabulary]`.
      targets: int `[batch, target]`.
      weights: float or int `[batch, target]`, not negative; 0 at padding.
      z_loss: coefficient of the squared normaliser; not negative.

    Returns:
      `(sum, weight)`, float32 scalars: weighted nats (with the z-loss term), and the sum of the weights.
    """
    weights = weights.astype(jnp.float32)  # [batch, target]
    real = weights != 0
    # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
    logits = jnp.where(real[..., None], logits.astype(jnp.float32), 0.0)  # [batch, target, vocabulary]
    normaliser = jax.nn.logsumexp(logits, axis=-1)  # [batch, target]
    # A comparison and a sum rather than a gather: stays local, up to one small sum, where the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # [batch, target, vocabulary]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)  # [batch, target]
    losses = normaliser - target_logit + z_loss * jnp.square(normaliser)
    known = (targets >= 0) & (targets < logits.shape[-1])
    losses = jnp.where(real & ~known, jnp.nan, losses)
    return jnp.sum(weights * losses), jnp.sum(weights)
