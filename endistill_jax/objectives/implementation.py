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
    """The mesh that the arrays of a loss are sharded over, and the roles of its axes.

    Attributes:
        mesh: the devices.
        batch: axes over which examples are split.
        model: axis over which heads and vocabulary are split.
        embed: axis over which the head's rows, the residual width, are split.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ("data", "fsdp")
    model: str = "tensor"
    embed: str = "fsdp"

    @property
    def model_parts(self) -> int:
        """Into how many parts heads and vocabulary are split."""
        return self.mesh.shape[self.model]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossImplementation:
    """Which form of each loss runs. The default chooses by platform and shape.

    Attributes:
        relations: "dense" holds every score of both models at once, "blocked" those of a few heads; "auto" is blocked
            wherever the examples split evenly over the mesh.
        relation_bytes: most that the float32 scores of one model in one block take; None chooses by platform.
        vocabulary: "dense" holds the logits of both models at once, "blocked" those of some tokens; "auto" as above.
        vocabulary_bytes: most that the float32 logits of one model in one block take on a device; None as above.
        attention_bytes: most that the float32 scores of the teacher's attention take at a time on a device; None as
            above. The student's is a setting of its own, in its configuration.
        axes: the mesh that the arrays are sharded over; None for one device.
    """

    relations: str = "auto"
    relation_bytes: int | None = None
    vocabulary: str = "auto"
    vocabulary_bytes: int | None = None
    attention_bytes: int | None = None
    axes: MeshAxes | None = None

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
        """The kind of device that computes: that of the mesh, else JAX's default; "cpu", "gpu" or "tpu"."""
        if self.axes is None:
            return jax.default_backend()
        kind = self.axes.mesh.devices.flat[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind


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
