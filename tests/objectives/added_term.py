"""Two terms that the package does not have, in one file; docs/extending.md shows it."""

import dataclasses

import jax.numpy as jnp

from endistill_jax.core.model_io import Reads, segment_ids
from endistill_jax.objectives import Term, TokenTerm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation(TokenTerm):
    """Half the L1 distance of both distributions over the vocabulary, summed over tokens."""

    def token_loss(self, student, teacher, targets):
        return student.sum(jnp.abs(jnp.exp(student.log_softmax()) - jnp.exp(teacher.log_softmax()))) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedMean(Term):
    """Squared distance of the means of both encoders' outputs, the student's scaled by a learned vector."""

    def reads(self, role):
        return Reads(encoded=True)

    def weight(self, batch):
        return jnp.sum(segment_ids(batch, "encoder") != 0, dtype=jnp.float32)

    def init_params(self, key, student, teacher):
        return {"scale": jnp.ones((student.d_model,))}

    def sum(self, inputs):
        student, teacher = (
            jnp.mean(inputs.student.encoded * inputs.params["scale"], -1),
            jnp.mean(inputs.teacher.encoded, -1),
        )
        return jnp.sum(jnp.square(student - teacher), where=segment_ids(inputs.batch, "encoder") != 0)
