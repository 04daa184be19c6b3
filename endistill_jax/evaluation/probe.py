"""How far a student is from its teacher, term by term of a path, whether or not it is trained on them.

The terms are those of the objective (relations in nats a row, the divergence of the words in nats a token), without
dropout, over held-out text. What a student is not taught shows here: a term that stays where it began.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Computation, Path, Placement, coefficients, term_weights
from endistill_jax.sharding import activation_sharding
from endistill_jax.train.step import loss_and_sums

ProbeStep = Callable[[Any, Any, Any], dict[str, tuple[jax.Array, jax.Array]]]

PREFIX = "probe/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """How far a student is from its teacher on held-out text.

    Attributes:
        terms: of each term of the path by name (`cross/qk`, `logits`), its sum over all batches divided by its weight.
        loss: the terms' sum by the path's weights.
    """

    terms: Mapping[str, float]
    loss: float

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The terms as `probe/<term>`."""
        return {f"{prefix}{PREFIX}{name}": value for name, value in self.terms.items()}

    def summary(self) -> str:
        """The terms in one number."""
        return f"from the teacher {self.loss:.3f}"


def make_probe_step(
    *,
    path: Path,
    student: T5Config,
    teacher: T5Config,
    mesh: Mesh,
    computation: Computation | None = None,
    teacher_placement: str = "sharded",
) -> ProbeStep:
    """Builds the jitted step of a probe; make it once for a pair of models and keep it, or it compiles again.

    Args:
        path: the terms; its weights matter for `ProbeReport.loss` alone.
        student: settings of the student; it runs without dropout.
        teacher: settings of the teacher.
        mesh: where both lie.
        computation: in which form the losses are computed; by default chosen by platform and shape.
        teacher_placement: how the teacher's parameters lie on the mesh; see `sharding.logical_rules`.

    Returns:
        (params, teacher_params, batch) -> by the terms' names their sum and weight over the batch, float32 scalars.
    """
    student = dataclasses.replace(student, dropout_rate=0.0)
    computation = dataclasses.replace(computation or Computation(), placement=Placement(mesh=mesh))

    @jax.jit
    def step(params: Any, teacher_params: Any, batch: Mapping[str, jax.Array]) -> dict[str, tuple[Any, Any]]:
        with activation_sharding(mesh):
            weights = term_weights(path, batch)
            _, sums = loss_and_sums(
                params,
                teacher_params,
                batch,
                weights,
                None,
                student=student,
                teacher=teacher,
                path=path,
                computation=computation,
                teacher_placement=teacher_placement,
            )
        return {name: (sums[name], weight) for name, weight in weights.items()}

    return step


def evaluate_probe(
    step: ProbeStep,
    path: Path,
    params: Any,
    teacher_params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    place: Callable[[Mapping[str, np.ndarray]], Any] = lambda batch: batch,
) -> ProbeReport:
    """Runs over held-out batches; sums and weights are each added up before they are divided, once.

    Args:
        step: from `make_probe_step`.
        path: of the step.
        params: the student's, on the mesh.
        teacher_params: the teacher's, on the mesh.
        batches: NumPy batches of one shape.
        place: puts a whole batch where the step wants it.

    Raises:
        UserError: a term has no row or token in any batch.
    """
    sums: Counter[str] = Counter()  # Python floats: float64 sums of the steps' float32 sums
    weights: Counter[str] = Counter()
    for batch in batches:
        for name, (value, weight) in jax.device_get(step(params, teacher_params, place(batch))).items():
            sums[name] += float(value)
            weights[name] += float(weight)
    factors = coefficients(path)
    if empty := [name for name in factors if not weights[name]]:
        raise UserError(f"the held-out batches have nothing to compare for {', '.join(empty)}; give more of them")
    terms = {name: sums[name] / weights[name] for name in factors}
    return ProbeReport(terms=terms, loss=sum(factor * terms[name] for name, factor in factors.items()))
