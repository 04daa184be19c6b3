"""In which form losses are computed, as data: speed and memory, never the values."""

import dataclasses

import jax
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.core.settings import require_choice

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
    def batch_parts(self) -> int:
        """Into how many parts the examples are split."""
        parts = 1
        for axis in self.batch:
            parts *= self.mesh.shape[axis]
        return parts

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
        """Whether the blocked form of "relations" or "vocabulary" runs for so many examples.

        Raises:
            UserError: if it is forced, but the mesh does not divide the examples.
        """
        form, parts = getattr(self, what), 1 if self.axes is None else self.axes.batch_parts
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
