"""Initialization of a student from its teacher: some of its layers and, if narrower, a slice of every width.

Which layers is decided here, by what the user lists or evenly spaced; which indices of a width, and what values are
multiplied by to keep the sizes of sums, by the family: see, of T5, `models/t5/cutting.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.core.attention import STACKS
from endistill_jax.core.errors import UserError, as_tuple, is_whole, require, require_choice
from endistill_jax.models.family import ModelConfig, evenly_spaced
from endistill_jax.sharding import param_shardings

KINDS = ("random", "layers", "slice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentInit:
    """How a student is initialized.

    Attributes:
        kind: "random": fresh parameters. "layers": layers of the teacher, whose widths the student must share. "slice":
            layers of the teacher, each cut to the student's widths, none of which may exceed the teacher's.
        encoder_layers: the teacher's layers, from 0, one for each encoder layer of the student, in its order and with
            repetition if so listed; None takes evenly spaced ones.
        decoder_layers: the same for the decoder.
    """

    kind: Literal["random", "layers", "slice"] = "random"
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        require_choice(self, kind=KINDS)
        for name in ("encoder_layers", "decoder_layers"):
            listed = getattr(self, name)
            if listed is not None:
                require(self, name, self.kind != "random", "kind must be 'layers' or 'slice' then")
                layers = as_tuple(listed, f"StudentInit.{name}", "layers, such as (0, 3) or (3,)", is_whole)
                object.__setattr__(self, name, layers)

    def layers(self, stack: str, teacher: ModelConfig, student: ModelConfig) -> tuple[int, ...]:
        """The teacher's layers that become the student's, of "encoder" or "decoder"."""
        name = f"StudentInit.{stack}_layers"
        theirs, ours = (config.depth(stack) for config in (teacher, student))
        listed = getattr(self, f"{stack}_layers")
        if listed is None:
            if ours > theirs:
                raise UserError(
                    f"the student has {ours} {stack} layers and the teacher {theirs}; "
                    f"list {name} (a layer may be taken more than once)"
                )
            return tuple(evenly_spaced(theirs, ours).tolist())
        if len(listed) != ours:
            raise UserError(f"{name} lists {len(listed)} layers, but the student has {ours}; list one for each")
        if max(listed, default=-1) >= theirs:
            raise UserError(f"{name} has {max(listed)}, but the teacher's {stack} has layers 0 to {theirs - 1}")
        return listed

    def check(self, teacher: ModelConfig | None, student: ModelConfig) -> None:
        """Checks that the student can be initialized from the teacher."""
        if self.kind == "random":
            return
        start = f"StudentInit.kind is {self.kind!r}, but"
        if teacher is None:
            raise UserError(f"{start} there is no teacher; choose 'random'")
        if student.family is not teacher.family:
            names = f"the student is a {student.family.name} and the teacher a {teacher.family.name}"
            raise UserError(f"{start} {names}; choose 'random'")
        teacher.family.check_cut(teacher, student, equal_widths=self.kind == "layers")
        for stack in STACKS:
            self.layers(stack, teacher, student)

    def facts(self, teacher: ModelConfig | None, student: ModelConfig) -> dict[str, Any]:
        """The settings with resolved layers, as plain data: equal if and only if initial parameters are."""
        if self.kind == "random":
            return {"kind": self.kind}
        return {"kind": self.kind} | {f"{stack}_layers": list(self.layers(stack, teacher, student)) for stack in STACKS}


RANDOM = StudentInit()


def init_from_teacher(
    init: StudentInit, params: Mapping[str, Any], *, teacher: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Any:
    """The student's first parameters, float32 and on their shards.

    The teacher's parameters are of any float type. Arrays on the mesh are cut there, by its devices together; NumPy
    arrays are cut on the host.
    """
    shardings = param_shardings(student, mesh)

    def cut(params: Mapping[str, Any]) -> Any:
        return cut_params(init, params, teacher=teacher, student=student)

    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        return jax.device_put(cut(params), shardings)
    return jax.jit(cut, out_shardings=shardings)(params)


def cut_params(init: StudentInit, params: Mapping[str, Any], *, teacher: ModelConfig, student: ModelConfig) -> Any:
    """The teacher's parameters at the chosen indices, scaled, in float32; NumPy arrays if the teacher's are."""
    layers = {stack: np.array(init.layers(stack, teacher, student), int) for stack in STACKS}
    return teacher.family.cut(params, teacher=teacher, student=student, layers=layers)
