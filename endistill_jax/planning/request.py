"""The request of one compilation: everything the training step depends on, as picklable data."""

import dataclasses

from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import LossImplementation, Objective
from endistill_jax.planning.topologies import Topology
from endistill_jax.train.compiler_options import CompilerOptions
from endistill_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A training step on a topology.

    Attributes:
        topology: to compile for.
        student: settings of the student.
        teacher: settings of the teacher; None if the objective needs none.
        objective: the terms of the loss.
        optimizer: optimizer and learning-rate schedule.
        steps: updates of the run.
        lengths: size of the global batch.
        eval_rows: of an evaluation's batch, which the mesh must spread too; None where there is none.
        packed: whether the batch has segment ids and positions.
        mesh: sizes of the axes data, fsdp and tensor; -1 takes what the others leave.
        micro_batches: parts of a batch whose gradients are accumulated.
        implementation: in which form the losses are computed.
        teacher_sharding: "sharded" or "replicated".
        compiler_options: of XLA, by platform.
        slices: as in `make_mesh`.
    """

    topology: Topology
    student: ModelConfig
    teacher: ModelConfig | None
    objective: Objective
    optimizer: OptimizerConfig
    steps: int
    lengths: Lengths
    eval_rows: int | None = None
    packed: bool = True
    mesh: tuple[int, int, int] = (-1, 1, 1)
    micro_batches: int = 1
    implementation: LossImplementation = LossImplementation()
    teacher_sharding: str = "sharded"
    compiler_options: CompilerOptions | None = None
    slices: int | None = None

    @property
    def tokens(self) -> int:
        """Positions of a step's batch, both sides, padding included."""
        return self.lengths.batch * (self.lengths.source + self.lengths.target)

    @property
    def batch_per_chip(self) -> float:
        """Examples of the global batch a chip."""
        return self.lengths.batch / self.topology.chips
