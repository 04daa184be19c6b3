"""Distance of a student from its teacher by each term of an objective, whether or not it is trained on them.

Relations in nats a row, distributions over the vocabulary in nats a token, without dropout, over held-out text. What a
student is not trained on shows here: a term that stays where it began.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import LossImplementation, MeshAxes, Objective
from endistill_jax.sharding import activation_sharding, host_rows, param_shardings, place_batch
from endistill_jax.train.state import init_objective
from endistill_jax.train.step import LossFunction

ProbeStep = Callable[[Any, Any, Any], dict[str, tuple[jax.Array, jax.Array]]]

PREFIX = "probe/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Distances of a student from its teacher on held-out text."""

    terms: Mapping[str, float]  # by name (`cross/qk`, `logits`): the sum over all batches divided by its weight
    loss: float  # the terms' sum by their coefficients; by those of the first step, where they move

    def scalars(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{PREFIX}{name}": value for name, value in self.terms.items()}

    def summary(self) -> str:
        return f"from the teacher {self.loss:.3f}"


def make_probe_step(
    *,
    objective: Objective,
    student: ModelConfig,
    teacher: ModelConfig,
    mesh: Mesh,
    teacher_sharding: str = "sharded",
) -> ProbeStep:
    """Builds the jitted step of a probe; reuse it, as each new one compiles again.

    The target is the teacher, also where targets are interpolated in training.

    Returns:
        (params, teacher_params, batch) -> by the terms' names their sum and weight over the batch, float32 scalars.
    """
    student = dataclasses.replace(student, dropout_rate=0.0)
    carried = jax.eval_shape(lambda: init_objective(objective, jax.random.key(0), student, teacher))
    if "params" in carried:
        names = ", ".join(carried["params"])
        raise UserError(f"a probe cannot compute {names}: its own parameters are no part of a model; leave it out")
    loss_function = LossFunction(
        student=student,
        teacher=teacher,
        objective=objective,
        implementation=LossImplementation(axes=MeshAxes(mesh=mesh)),
        teacher_sharding=teacher_sharding,
    )

    @jax.jit
    def step(params: Any, teacher_params: Any, batch: Mapping[str, jax.Array]) -> dict[str, tuple[Any, Any]]:
        with activation_sharding(mesh):
            weights = objective.weights(batch)
            _, sums = loss_function(params, teacher_params, batch, weights=weights)
        return {name: (sums[name], weight) for name, weight in weights.items()}

    return step


def evaluate_probe(
    step: ProbeStep,
    objective: Objective,
    params: Any,
    teacher_params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    place: Callable[[Mapping[str, np.ndarray]], Any] = lambda batch: batch,
) -> ProbeReport:
    """Runs over held-out batches of one shape; sums and weights are each added up before they are divided, once.

    `step` is from `make_probe_step`; `place` puts a global batch onto its devices.
    """
    sums: Counter[str] = Counter()  # Python floats: float64 sums of the steps' float32 sums
    weights: Counter[str] = Counter()
    for batch in batches:
        for name, (value, weight) in jax.device_get(step(params, teacher_params, place(batch))).items():
            sums[name] += float(value)
            weights[name] += float(weight)
    if empty := [name for name in objective.term_names if not weights[name]]:
        raise UserError(f"the held-out batches have nothing to compare for {', '.join(empty)}; give more of them")
    terms = {name: sums[name] / weights[name] for name in objective.term_names}
    coefficients = objective.coefficients()
    return ProbeReport(terms=terms, loss=sum(float(coefficients[name]) * value for name, value in terms.items()))


@dataclasses.dataclass(kw_only=True)
class Probe:
    """How far students are from a teacher, by the terms of an objective; an `Evaluation`."""

    objective: Objective
    teacher: TrainedModel
    mesh: Mesh  # where student and teacher are evaluated
    batches: list[dict[str, np.ndarray]]  # unpacked, of held-out text, complete on every host
    teacher_sharding: str = "sharded"  # see `sharding.logical_rules`
    _steps: dict[ModelConfig, ProbeStep] = dataclasses.field(default_factory=dict)

    def evaluate(self, config: ModelConfig, params: Any) -> ProbeReport:
        """The terms of one student, its parameters on the host or on the mesh; compiled once for a configuration."""
        if config not in self._steps:
            self._steps[config] = make_probe_step(
                objective=self.objective,
                student=config,
                teacher=self.teacher.config,
                mesh=self.mesh,
                teacher_sharding=self.teacher_sharding,
            )
        return evaluate_probe(
            self._steps[config],
            self.objective,
            jax.device_put(params, param_shardings(config, self.mesh)),
            self.teacher.load_on(self.mesh, self.teacher_sharding),
            self.batches,
            place=lambda batch: place_batch(host_rows(batch, self.mesh), self.mesh),
        )
