"""Floating-point operations of a training step's matrix products; see `models/t5/flops.py` for what counts.

    step    teacher forward + 3 x student forward + terms

The teacher runs forward only and computes what the objective reads. The student's backward pass is two forward passes.
A term counts its own products, such as a relation's scores; the heads' are the models'. The scores of interpolated
targets are products of both models' concatenated vectors: a teacher of both inner widths, and the student's head once
more.
"""

from typing import NamedTuple

from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import ModelConfig, forward_flops
from endistill_jax.objectives import Objective


class StepFlops(NamedTuple):
    """Operations of one training step.

    Attributes:
        teacher: its forward pass, and what interpolated targets add to its head; 0 without a teacher.
        student: its forward and backward pass.
        terms: those of the terms themselves, value and gradient.
    """

    teacher: int
    student: int
    terms: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def step_flops(student: ModelConfig, teacher: ModelConfig | None, objective: Objective, lengths: Lengths) -> StepFlops:
    """Operations of one training step on a batch; micro-batches and devices do not change them."""
    own = forward_flops(student, lengths, objective.reads("student"))
    forward, target = 0, teacher
    if objective.needs_teacher:
        reads = objective.reads("teacher")
        forward = forward_flops(teacher, lengths, reads).total
        if objective.interpolated_targets is not None:
            target = _Joined(teacher, student)
            forward += own.head if reads.head else 0
    return StepFlops(
        teacher=forward,
        student=3 * own.total,
        terms=sum(term.flops(lengths, student, target) for term in objective.terms),
    )


class _Joined:
    """The shape of interpolated targets: a teacher whose vectors are both models' concatenated."""

    def __init__(self, teacher: ModelConfig, student: ModelConfig):
        self._teacher = teacher
        self.inner_dim = teacher.inner_dim + student.inner_dim

    def __getattr__(self, name: str) -> object:
        return getattr(self._teacher, name)
