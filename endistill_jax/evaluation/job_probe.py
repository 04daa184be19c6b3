"""The probe of a job: one teacher, the held-out batches, and a step for every student that is compared with it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.evaluation.probe import ProbeReport, ProbeStep, evaluate_probe, make_probe_step
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.sharding import host_rows, param_shardings, place_batch


@dataclasses.dataclass(kw_only=True)
class Probe:
    """How far students are from a teacher, by the terms of a path; an `Evaluation`.

    Attributes:
        path: the terms.
        teacher: what they are compared with.
        mesh: where both are evaluated.
        batches: unpacked NumPy batches of held-out text, whole ones on every host.
        teacher_placement: how the teacher's parameters lie on the mesh; see `sharding.logical_rules`.
    """

    path: Path
    teacher: TrainedModel
    mesh: Mesh
    batches: list[dict[str, np.ndarray]]
    teacher_placement: str = "sharded"
    _steps: dict[T5Config, ProbeStep] = dataclasses.field(default_factory=dict)

    def evaluate(self, config: T5Config, params: Any) -> ProbeReport:
        """The terms of one student, its parameters on the host or on the mesh; compiled once for a configuration."""
        if config not in self._steps:
            self._steps[config] = make_probe_step(
                path=self.path,
                student=config,
                teacher=self.teacher.config,
                mesh=self.mesh,
                teacher_placement=self.teacher_placement,
            )
        return evaluate_probe(
            self._steps[config],
            self.path,
            jax.device_put(params, param_shardings(config, self.mesh)),
            self.teacher.load_on(self.mesh, self.teacher_placement),
            self.batches,
            place=lambda batch: place_batch(host_rows(batch, self.mesh), self.mesh),
        )
