"""Metrics of a task or mixture, prepared once and used by every model and every evaluation of a job."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.predictor import Predictor
from endistill_jax.evaluation.report import TaskResult
from endistill_jax.evaluation.seqio_evaluation import TaskEvaluator, check_tasks, make_evaluators
from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.train.experiment import Data

MEAN = "mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The results of a model on each task.

    Attributes:
        results: of each task.
    """

    results: tuple[TaskResult, ...]

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Metrics by name: of one task by their own; of several as `task/metric`, and `mean`.

        `mean` is that of the tasks, of each the mean of its metrics. Results that are counted as one task, such as
        MNLI's two evaluation sets, or a task's by generation and by rank, are first averaged themselves.
        """
        if len(self.results) == 1:
            return {prefix + name: value for name, value in self.results[0].metrics.items()}
        found = {
            f"{prefix}{result.task}/{name}": value for result in self.results for name, value in result.metrics.items()
        }
        tasks: dict[str, list[float]] = {}
        for result in self.results:
            if result.metrics:
                tasks.setdefault(result.counted_as, []).append(statistics.fmean(result.metrics.values()))
        mean = {prefix + MEAN: statistics.fmean(map(statistics.fmean, tasks.values()))} if tasks else {}
        return found | mean

    def summary(self) -> str:
        """The mean of several tasks; of one, every metric."""
        scalars = self.scalars()
        shown = {MEAN: scalars[MEAN]} if MEAN in scalars and len(self.results) > 1 else scalars
        return ", ".join(f"{name} {value:.2f}" for name, value in shown.items())


@dataclasses.dataclass(kw_only=True)
class TaskMetrics:
    """The examples of one or several tasks, and how a model is evaluated on them.

    Attributes:
        mesh: where models are evaluated.
        data: lengths and batch.
        decoding: how text is generated.
        evaluators: one a task.
        seed: for sampling.
    """

    mesh: Mesh
    data: Data
    decoding: Decoding
    evaluators: list[TaskEvaluator]
    seed: int = 0
    _predictors: dict[tuple[ModelConfig, str], Predictor] = dataclasses.field(default_factory=dict)

    def evaluate(
        self,
        config: ModelConfig,
        params: Any,
        placement: str = "sharded",
        at_result: Callable[[TaskResult], None] = lambda result: None,
    ) -> TaskReport:
        """The metrics of one model, its parameters on the host or on the mesh; compiled once for a configuration.

        Args:
            config: its settings.
            params: its parameters.
            placement: how they are sharded; see `sharding.logical_rules`.
            at_result: called as soon as a task is done.
        """
        predictor = self.predictor(config, placement)
        params = jax.device_put(params, predictor.shardings)
        results = []
        for evaluator in self.evaluators:
            result = evaluator.evaluate(
                lambda dataset: predictor.predict(params, dataset), lambda dataset: predictor.score(params, dataset)
            )
            at_result(result)
            results.append(result)
        return TaskReport(results=tuple(results))

    def predictor(self, config: ModelConfig, placement: str = "sharded") -> Predictor:
        """The compiled functions of a model of these settings."""
        config = dataclasses.replace(config, dropout_rate=0.0)  # which they do without
        if (config, placement) not in self._predictors:
            self._predictors[config, placement] = Predictor(
                config,
                self.decoding,
                self.mesh,
                batch_size=self.data.eval_batch_size,
                inputs_length=self.data.inputs_length,
                seed=self.seed,
                placement=placement,
            )
        return self._predictors[config, placement]

    def check_metric(self, name: str | None) -> None:
        """Checks that a metric will be among the scalars.

        Raises:
            UserError: naming those that will.
        """
        if name is None:
            return
        results = [
            TaskResult(
                task=each.task.name,
                counted_as=each.counted_as,
                metrics=dict.fromkeys(each.metric_names(), 0.0),
                records=[],
                values=[],
                row_numbers=None,
            )
            for each in self.evaluators
        ]
        known = TaskReport(results=tuple(results)).scalars()
        if name not in known:
            raise UserError(f"Run.keep_best is {name!r}, which no task has; there is {', '.join(known) or 'no metric'}")


def check_task_metrics(data: Data, scored_by: str) -> None:
    """Validates the settings of an evaluation, without reading any example.

    Raises:
        UserError: naming the setting and valid values.
    """
    from endistill_jax.data.registry import resolve_task

    task = resolve_task(data.task)
    check_tasks(task, split=data.eval_split, lengths=data.feature_lengths, scored_by=scored_by)


def scoring_spec(data: Data, scored_by: str, decoding: Decoding | None) -> dict[str, Any]:
    """How examples are scored, as plain values: see `prepare_task_metrics`."""
    return {"scored_by": scored_by, "decoding": dataclasses.asdict(decoding or likeliest(data))}


def likeliest(data: Data) -> Decoding:
    """Greedy decoding of up to `targets_length` tokens."""
    return Decoding(max_length=data.targets_length)


def prepare_task_metrics(
    data: Data, mesh: Mesh, *, scored_by: str = "generation", decoding: Decoding | None = None, seed: int = 0
) -> TaskMetrics:
    """Reads the examples of the evaluation split: at most `eval_batches` batches of each task.

    Args:
        data: which task, split, lengths and batches.
        mesh: where models will be evaluated.
        scored_by: "generation", "rank" or "both"; see `make_evaluators`.
        decoding: how text is generated; None for greedy decoding of up to `targets_length` tokens.
        seed: for sampling.

    Raises:
        UserError: as of `check_task_metrics`, and for a split without examples.
    """
    from endistill_jax.data.registry import resolve_task

    settings = {"split": data.eval_split, "lengths": data.feature_lengths, "scored_by": scored_by}
    tasks = check_tasks(resolve_task(data.task), **settings)
    return TaskMetrics(
        mesh=mesh,
        data=data,
        decoding=decoding or likeliest(data),
        evaluators=make_evaluators(tasks, max_examples=data.eval_examples, **settings),
        seed=seed,
    )
