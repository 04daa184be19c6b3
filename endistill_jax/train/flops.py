"""Floating-point operations of a training step's matrix products; see `models/t5/flops.py` for what counts.

    step        teacher forward + 3 x student forward + relations
    relation    2 B Q K (I_teacher + 3 I_student)      Q and K positions compared, I the inner widths

The teacher runs forward only and computes what the path reads. The student's backward pass is two forward passes, also
of the relations; those of the last two lines are all scores, masked or not. The divergence of the logits has no product
of its own: the heads' are the models'. The scores of interpolated targets are products of both models' vectors put
together: a teacher of I_teacher + I_student, and the student's head once more.
"""

from typing import NamedTuple

from endistill_jax.models.family import ForwardFlops, Lengths, forward_flops
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.flops import Read
from endistill_jax.objectives import Path
from endistill_jax.objectives.objective import Role


class StepFlops(NamedTuple):
    """Operations of one training step.

    Attributes:
        teacher: its forward pass, and what interpolated targets add to its head; 0 without a teacher.
        student: its forward and backward pass.
        relations: scores of both models and the gradient of the student's.
    """

    teacher: int
    student: int
    relations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def path_flops(config: T5Config, path: Path, role: Role, lengths: Lengths) -> ForwardFlops:
    """Operations of the forward pass of the path's "teacher" or its "student", without the relations."""
    tap_layers = path.tap_layers(role)
    reads = {name: Read(tap_layers[name], "".join(site.relations)) for name, site in path.sites.items()}
    return forward_flops(config, lengths, reads, path.needs_logits(role))


def relation_flops(path: Path, lengths: Lengths, teacher_inner: int, student_inner: int) -> int:
    """Operations of all relations of a path, value and gradient."""
    total = 0
    for name, site in path.sites.items():
        side = dict.fromkeys("qkv", lengths.source if name == "encoder_self" else lengths.target)
        if name == "cross":
            side |= dict.fromkeys("kv", lengths.source)
        for first, second in site.relations:
            total += 2 * lengths.batch * side[first] * side[second] * (teacher_inner + 3 * student_inner)
    return total


def step_flops(student: T5Config, teacher: T5Config | None, path: Path, lengths: Lengths) -> StepFlops:
    """Operations of one training step on a batch; micro-batches and devices do not change them."""
    backward = 3 * path_flops(student, path, "student", lengths).total
    if not path.needs_teacher:
        return StepFlops(teacher=0, student=backward, relations=0)
    forward, target_inner = path_flops(teacher, path, "teacher", lengths).total, teacher.inner_dim
    if path.interpolated_targets is not None:
        target_inner += student.inner_dim
        if path.needs_logits("teacher"):
            forward += path_flops(student, path, "student", lengths).head
    return StepFlops(
        teacher=forward,
        student=backward,
        relations=relation_flops(path, lengths, target_inner, student.inner_dim),
    )
