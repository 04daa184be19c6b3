"""In which form losses are computed: speed and memory, never the values.

The gradient of a loss is linear in its cotangent. So the blocked forms compute it while a block's scores or logits are
at hand, and the backward pass only scales it; nothing of a block outlives it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError, require_choice

FORMS = ("auto", "dense", "blocked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The mesh that the arrays of a loss are sharded over, and the axes over which it splits them."""

    mesh: Mesh
    batch: tuple[str, ...] = ("data", "fsdp")  # examples
    model: str = "tensor"  # heads and vocabulary
    embed: str = "fsdp"  # the head's rows, the residual width

    @property
    def model_parts(self) -> int:
        """Into how many parts heads and vocabulary are split."""
        return self.mesh.shape[self.model]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossImplementation:
    """Which form of each loss runs, and how much memory it takes at a time on a device; None chooses by platform.

    "dense" holds every score, or all logits, of both models at once; "blocked" the scores of a few heads, or the logits
    of some tokens; "auto" is blocked wherever the examples split evenly over the mesh.
    """

    relations: str = "auto"
    relation_bytes: int | None = None  # of one model's float32 scores in one block
    vocabulary: str = "auto"
    vocabulary_bytes: int | None = None  # of one model's float32 logits in one block
    attention_bytes: int | None = None  # of the teacher's float32 attention scores; the student's is in its settings
    axes: MeshAxes | None = None  # the mesh that the arrays are sharded over; None for one device

    def __post_init__(self):
        require_choice(self, relations=FORMS, vocabulary=FORMS)

    def blocks(self, what: str, examples: int) -> bool:
        """Whether the blocked form of "relations" or "vocabulary" runs for so many examples."""
        form, axes = getattr(self, what), self.axes
        parts = 1 if axes is None else math.prod(axes.mesh.shape[axis] for axis in axes.batch)
        if form == "blocked" and examples % parts:
            raise UserError(
                f"LossImplementation.{what} is 'blocked', but {parts} devices do not divide {examples} examples; "
                "make the (micro-)batch a multiple, or choose dense"
            )
        return form != "dense" and examples % parts == 0

    @property
    def sharded_axes(self) -> MeshAxes | None:
        """The mesh, where it has more than one device."""
        return self.axes if self.axes is not None and self.axes.mesh.size > 1 else None

    @property
    def platform(self) -> str:
        """The kind of device that computes, of the mesh or JAX's default: "cpu", "tpu" or, for any other, "gpu"."""
        kind = jax.default_backend() if self.axes is None else self.axes.mesh.devices.flat[0].platform
        return kind if kind in ("cpu", "tpu") else "gpu"


DEFAULT = LossImplementation()
DENSE = LossImplementation(relations="dense", vocabulary="dense")


def with_formed_gradient(run: Callable[..., tuple[jax.Array, Any, Any]], student: Any, constants: Any) -> Any:
    """`(value, aux)` of `run(student, constants, with_gradient) -> (value, aux, gradient by student)`.

    Differentiable with respect to `student` through the value alone, a float32 scalar.
    """

    @jax.custom_vjp
    def total(student: Any, constants: Any) -> tuple[jax.Array, Any]:
        value, aux, _ = run(student, constants, False)
        return value, aux

    def forward(student: Any, constants: Any) -> tuple[tuple[jax.Array, Any], Any]:
        value, aux, gradient = run(student, constants, True)
        return (value, aux), gradient

    def backward(gradient: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        factor, _ = cotangents
        return jax.tree.map(lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype), gradient), None

    total.defvjp(forward, backward)
    value, aux = total(student, constants)
    return value, jax.lax.stop_gradient(aux)


def per_device(run: Callable, axes: MeshAxes | None, in_specs: Any, out_specs: Any) -> Callable:
    """`run` on every device of a mesh, over the part of its arguments that is there."""
    if axes is None:
        return run
    return jax.shard_map(run, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
