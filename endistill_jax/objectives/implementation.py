"""How the losses, and the teacher they compare with, are computed, as data: speed and memory, never the values."""

import dataclasses
from typing import Literal

import jax
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """On which mesh the arrays of the losses lie, and how. The losses need to know so that they stay on their device.

    Attributes:
      mesh: the devices.
      batch_axes: mesh axes over which examples are spread.
      model_axis: mesh axis over which heads and vocabulary are spread.
      embed_axis: mesh axis over which the head's rows, the residual width, are spread.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    model_axis: str = "tensor"
    embed_axis: str = "fsdp"

    @property
    def batch_parts(self) -> int:
        """Into how many parts the examples are split."""
        parts = 1
        for axis in self.batch_axes:
            parts *= self.mesh.shape[axis]
        return parts

    @property
    def model_parts(self) -> int:
        """Into how many parts heads and vocabulary are split."""
        return self.mesh.shape[self.model_axis]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Which form of each loss runs. The default chooses by platform and shape.

    Attributes:
      relations: `dense` holds every score of both models at once; `grouped` only those of a few heads; `auto` is
        grouped wherever the examples spread evenly over the mesh.
      group_bytes: most that the float32 scores of one model in one group take; None chooses by platform.
      vocabulary: `dense` holds the logits of both models at once; `chunked` only those of some tokens; `auto` as above.
      chunk_bytes: most that the float32 logits of one model in one chunk take on a device; None chooses by platform.
      attention_bytes: most that the float32 scores of the teacher's attention take at a time on a device; None chooses
        by platform. The student's is a setting of its own, in its `T5Config`.
      placement: the mesh that the arrays are spread over; None for one device.
    """

    relations: Literal["auto", "dense", "grouped"] = "auto"
    group_bytes: int | None = None
    vocabulary: Literal["auto", "dense", "chunked"] = "auto"
    chunk_bytes: int | None = None
    attention_bytes: int | None = None
    placement: Placement | None = None

    def groups_relations(self, examples: int) -> bool:
        """Whether the grouped form runs for so many examples.

        Raises:
          UserError: if it is forced, but the mesh does not divide the examples.
        """
        return self._is_fast(self.relations, "grouped", "relations", examples)

    def chunks_vocabulary(self, examples: int) -> bool:
        """Whether the chunked form runs for so many examples, and the model therefore must not apply its head.

        Raises:
          UserError: if it is forced, but the mesh does not divide the examples.
        """
        return self._is_fast(self.vocabulary, "chunked", "vocabulary", examples)

    def _is_fast(self, chosen: str, fast: str, where: str, examples: int) -> bool:
        if chosen not in ("auto", "dense", fast):
            raise UserError(f"computation.{where} is {chosen!r}; choose auto, dense or {fast}")
        parts = 1 if self.placement is None else self.placement.batch_parts
        if examples % parts and chosen == fast:
            raise UserError(
                f"computation.{where} is {fast!r}, but {parts} devices do not divide {examples} examples; "
                "make the (micro-)batch a multiple, or choose dense"
            )
        return chosen != "dense" and examples % parts == 0

    def platform(self) -> str:
        """The kind of device that computes: that of the mesh, else JAX's default; "cpu", "gpu" or "tpu"."""
        if self.placement is None:
            return jax.default_backend()
        kind = self.placement.mesh.devices.flat[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind


DEFAULT = Computation()
