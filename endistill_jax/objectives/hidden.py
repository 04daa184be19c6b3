"""The distance between hidden states of student and teacher, through a projection that is learned with the student."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from endistill_jax.core.attention import STACKS, Stack
from endistill_jax.core.errors import UserError, require_choice
from endistill_jax.core.model_io import Batch, Lengths, Output, Reads, segment_ids
from endistill_jax.objectives.term import LayerTerm, ModelShape, Role, TermInputs

ENCODED = "encoded"
DISTANCES = ("cosine", "l2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenDistance(LayerTerm):
    """Distance of the student's states, projected to the teacher's width, from the teacher's; summed over real tokens.

    Interpolated targets do not move it: the target is the teacher's state from the first step on.
    """

    of: str = ENCODED  # the encoder's output, which has no layers; or the residual stream of "encoder" or "decoder"
    distance: str = "cosine"  # 1 - cosine; or "l2", the mean over the width of the squared difference
    project: bool = True  # through a learned projection; without one, the widths must be equal

    def __post_init__(self):
        require_choice(self, of=(*STACKS, ENCODED), distance=DISTANCES)

    @property
    def side(self) -> Stack:
        """The side of the batch that the states are of."""
        return "decoder" if self.of == "decoder" else "encoder"

    def default_name(self) -> str:
        return self.named(f"hidden/{self.of}")

    def reads(self, role: Role) -> Reads:
        if self.of == ENCODED:
            return Reads(encoded=True)
        return Reads(hidden=frozenset({(self.of, self.layer(role))}))

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Real tokens of the side."""
        return jnp.sum(segment_ids(batch, self.side) != 0, dtype=jnp.float32)

    def sum(self, inputs: TermInputs) -> Float[Array, ""]:
        real = segment_ids(inputs.batch, self.side) != 0  # [batch, length]

        def states(output: Output, role: Role) -> Float[Array, "batch length d_model"]:
            found = output.encoded if self.of == ENCODED else output.hidden[self.of, self.layer(role)]
            return jnp.where(real[..., None], found.astype(jnp.float32), 0.0)

        student, teacher = states(inputs.student, "student"), states(inputs.teacher, "teacher")
        if self.project:
            kernel = inputs.params["kernel"]
            # Accelerators would otherwise round float32 factors to fewer bits.
            student = jnp.einsum("bld,de->ble", student, kernel, precision=jax.lax.Precision.HIGHEST)
        if self.distance == "l2":
            distances = jnp.mean(jnp.square(student - teacher), axis=-1)
        else:
            squares = [jnp.sum(jnp.square(x), axis=-1) for x in (student, teacher)]
            # A vector of zeros, as at padding, has no direction: a distance of 1, and no gradient.
            scales = [jnp.where(x > 1e-12, jax.lax.rsqrt(jnp.where(x > 1e-12, x, 1.0)), 0.0) for x in squares]
            distances = 1 - jnp.sum(student * teacher, axis=-1) * scales[0] * scales[1]
        return jnp.sum(jnp.where(real, distances, 0.0))

    def init_params(self, key: jax.Array, student: ModelShape, teacher: ModelShape | None) -> Any:
        if not self.project:
            return None
        init = nn.with_logical_partitioning(nn.initializers.normal(student.d_model**-0.5), ("embed", None))
        return {"kernel": init(key, (student.d_model, teacher.d_model), jnp.float32)}

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        if self.of != ENCODED:
            self.validate_layers(self.of, student, teacher)
        if not self.project and student.d_model != teacher.d_model:
            widths = f"the teacher's width is {teacher.d_model} and the student's {student.d_model}"
            raise UserError(f"{self.name}: {widths}; give it a projection (project = True)")

    def flops(self, lengths: Lengths, student: ModelShape, teacher: ModelShape) -> int:
        length = lengths.target if self.side == "decoder" else lengths.source
        return 6 * lengths.batch * length * student.d_model * teacher.d_model if self.project else 0
