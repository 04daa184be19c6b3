"""What a term of an objective is: a pure function of what a student and a teacher return, and of the batch.

A term is a frozen dataclass; its fields are plain data and become part of a checkpoint's manifest. To add one, subclass
`Term`, or `TokenTerm` for a loss of the distributions over the vocabulary; nothing else has to change. See
docs/extending.md.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from endistill_jax.core.attention import Stack
from endistill_jax.core.errors import require_at_least, require_not_negative
from endistill_jax.core.model_io import Batch, Lengths, Output, Reads, resolve_layer
from endistill_jax.objectives.implementation import DEFAULT, LossImplementation

Role = Literal["teacher", "student"]


@runtime_checkable
class ModelShape(Protocol):
    """What a term must know of a model to be checked against it; every model's configuration has these."""

    vocab_size: int
    d_model: int
    num_heads: int
    inner_dim: int

    def depth(self, stack: str) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A coefficient that moves linearly from `start` at step 0 to `end` at `steps`, and stays there."""

    start: float = 0.0
    end: float = 1.0
    steps: int

    def __post_init__(self):
        require_not_negative(self, "start", "end")
        require_at_least(self, 1, "steps")

    def __call__(self, step: jax.Array) -> jax.Array:
        return self.start + (self.end - self.start) * jnp.clip(step.astype(jnp.float32) / self.steps, 0.0, 1.0)

    def scaled(self, factor: float) -> "Ramp":
        """The same, times a number."""
        return dataclasses.replace(self, start=self.start * factor, end=self.end * factor)


Coefficient = float | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermInputs:
    """What a term is computed from: everything that it reads of both models, and the batch."""

    student: Output
    teacher: Output | None  # a constant; None where no term needs one
    batch: Batch
    params: Any = None  # what `init_params` made, as it is now
    share: Float[Array, ""] | None = None  # the teacher's, of interpolated targets, from 0 to 1; None for its own
    implementation: LossImplementation = DEFAULT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of the loss, `coefficient(step) * sum / weight`."""

    coefficient: Coefficient = 1.0  # a number, or a function of the step such as a `Ramp`
    label: str | None = None  # the name of its metric; None takes the term's own

    @property
    def name(self) -> str:
        """What its metric is called; no two terms of an objective may have the same."""
        return self.label or self.default_name()

    def default_name(self) -> str:
        """The class's name in snake case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def needs_teacher(self) -> bool:
        return True

    def reads(self, role: Role) -> Reads:
        """What must be computed of the teacher or of the student."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The normalizer, float32, from the masks alone: rows or tokens. Known before anything has run."""
        raise NotImplementedError

    def sum(self, inputs: TermInputs) -> Float[Array, ""]:
        """The unnormalized sum over a (micro-)batch, float32; differentiable with respect to the student."""
        raise NotImplementedError

    def init_params(self, key: jax.Array, student: ModelShape, teacher: ModelShape | None) -> Any:
        """Parameters of its own, trained beside the student's and never exported; None for none.

        Leaves may be boxed by `nn.with_logical_partitioning`; those that are not are replicated.
        """
        return None

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        """Checks the term against the models, before anything runs; a `UserError` names it and what would be right."""

    def flops(self, lengths: Lengths, student: ModelShape, teacher: ModelShape | None) -> int:
        """Operations of its own matrix products, value and gradient, beyond the two models'."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTerm(Term):
    """A term that compares one layer of each model; negative layers count from the end of a stack."""

    teacher_layer: int = -1
    student_layer: int = -1

    def layer(self, role: Role) -> int:
        return self.teacher_layer if role == "teacher" else self.student_layer

    def named(self, what: str) -> str:
        """`what`, and the layers where they are not the last ones."""
        last = self.teacher_layer == self.student_layer == -1
        return what if last else f"{what}@{self.teacher_layer}:{self.student_layer}"

    def validate_layers(self, stack: Stack, student: ModelShape, teacher: ModelShape | None) -> None:
        """Refuses layers that the models' stacks do not have."""
        for role, model in (("teacher", teacher), ("student", student)):
            resolve_layer(self.layer(role), model.depth(stack), f"{self.name} in the {role}")
