"""Metrics of a SeqIO task or mixture: of what a model generates, or of how it ranks labels.

SeqIO's own evaluator computes them. Examples are read once, for every model and every evaluation of a job.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.metrics import check_packages
from endistill_jax.evaluation.predictor import Predictor
from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.train.experiment import Data

SCORED_BY = ("generation", "rank", "both")
MEAN = "mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The results of a model on one task."""

    task: str
    counted_as: str  # in a mean over tasks, results of one such name count as one
    metrics: dict[str, float]  # none where the targets are hidden
    # Of each example `index`, `inputs`, `target`, `prediction` and `score`, a log-likelihood; by rank also the `scores`
    # of all labels.
    records: Sequence[dict[str, Any]] = ()
    values: Sequence[Any] = ()  # of each example, what metrics compare with targets: a text, the index of a label, ...
    row_numbers: Sequence[int] | None = None  # the examples' `idx`, where they have one


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The results of a model on each task."""

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
    """The examples of one or several tasks, and how a model is evaluated on them; an `Evaluation`."""

    mesh: Mesh
    data: Data
    decoding: Decoding
    evaluators: "list[TaskEvaluator]"
    seed: int = 0
    _predictors: dict[tuple[ModelConfig, str], Predictor] = dataclasses.field(default_factory=dict)

    def evaluate(
        self,
        config: ModelConfig,
        params: Any,
        sharding: str = "sharded",
        at_result: Callable[[TaskResult], None] = lambda result: None,
    ) -> TaskReport:
        """The metrics of one model, its parameters on the host or on the mesh; compiled once for a configuration.

        `sharding` is how the parameters are sharded, see `sharding.logical_rules`; `at_result` is called as soon as a
        task is done.
        """
        predictor = self.predictor(config, sharding)
        params = jax.device_put(params, predictor.shardings)
        results = []
        for evaluator in self.evaluators:
            result = evaluator.evaluate(
                lambda dataset: predictor.predict(params, dataset), lambda dataset: predictor.score(params, dataset)
            )
            at_result(result)
            results.append(result)
        return TaskReport(results=tuple(results))

    def predictor(self, config: ModelConfig, sharding: str = "sharded") -> Predictor:
        config = dataclasses.replace(config, dropout_rate=0.0)  # which they do without
        if (config, sharding) not in self._predictors:
            self._predictors[config, sharding] = Predictor(
                config,
                self.decoding,
                self.mesh,
                batch_size=self.data.eval_batch_size,
                inputs_length=self.data.inputs_length,
                seed=self.seed,
                sharding=sharding,
            )
        return self._predictors[config, sharding]

    def check_metric(self, name: str | None) -> None:
        """Checks that `Run.keep_best` will be among the scalars, if it is set."""
        if name is None:
            return
        results = (
            TaskResult(task=each.task.name, counted_as=each.counted_as, metrics=dict.fromkeys(each.metric_names(), 0.0))
            for each in self.evaluators
        )
        known = TaskReport(results=tuple(results)).scalars()
        if name not in known:
            raise UserError(f"Run.keep_best is {name!r}, which no task has; there is {', '.join(known) or 'no metric'}")


def check_task_metrics(data: Data, scored_by: str = "generation") -> list[Any]:
    """The tasks of `data.task` that can be evaluated on `data.eval_split`; reads none of their examples.

    Refuses a task with nothing to evaluate, labels that would be cut, none to rank, and a metric whose package is not
    installed.
    """
    from endistill_jax.data.text_pipeline import resolve_task, seqio
    from endistill_jax.tasks.text_to_text import task_labels

    if scored_by not in SCORED_BY:
        raise UserError(f"scored_by is {scored_by!r}; choose one of {', '.join(SCORED_BY)}")
    task, split = resolve_task(data.task), data.eval_split
    tasks = seqio.get_subtasks(task)
    splits = sorted({str(name) for each in tasks for name in each.splits})
    if split not in splits:
        raise UserError(f"{task.name} has no split {split!r} to evaluate; it has {', '.join(splits)}")
    found = [each for each in tasks if split in each.splits and each.metric_objs]
    if not found:
        raise UserError(f"{task.name} has no metrics to evaluate; choose a task with metric_fns, or add some")
    for each in found:
        check_packages(each.metric_fns)
        vocabulary = each.output_features["targets"].vocabulary
        needed = max((len(vocabulary.encode(label)) + 1 for label in task_labels(each)), default=0)
        if needed > data.targets_length:
            raise UserError(
                f"the longest label of {each.name} has {needed} tokens with its end, and targets_length is "
                f"{data.targets_length}; make it at least {needed}"
            )
    if scored_by == "rank" and not any(task_labels(each) for each in found):
        raise UserError(f"no task of {task.name} has labels to rank; use scored_by = 'generation'")
    return found


def prepare_task_metrics(
    data: Data, mesh: Mesh, *, scored_by: str = "generation", decoding: Decoding | None = None, seed: int = 0
) -> TaskMetrics:
    """Reads the examples of the evaluation split: at most `eval_batches` batches of each task.

    Args:
        data: which task, split, lengths and batches.
        mesh: where models will be evaluated.
        scored_by: "generation"; "rank", where tasks with labels are scored by rank and others by generation; or "both",
            where tasks with labels are scored in both ways.
        decoding: how text is generated; None for greedy decoding of up to `targets_length` tokens.
        seed: for sampling.
    """
    from endistill_jax.tasks.text_to_text import task_labels

    settings = {"split": data.eval_split, "lengths": data.feature_lengths, "max_examples": data.eval_examples}
    evaluators = []
    for task in check_task_metrics(data, scored_by):
        ranked = scored_by != "generation" and bool(task_labels(task))
        if not ranked or scored_by == "both":
            evaluators.append(TaskEvaluator(task, **settings))
        if ranked:
            evaluators.append(TaskEvaluator(task, **settings, by_rank=True))
    return TaskMetrics(
        mesh=mesh,
        data=data,
        decoding=decoding or Decoding(max_length=data.targets_length),
        evaluators=evaluators,
        seed=seed,
    )


def scoring_spec(data: Data, scored_by: str, decoding: Decoding | None) -> dict[str, Any]:
    """How examples are scored, as plain values: see `prepare_task_metrics`."""
    return {
        "scored_by": scored_by,
        "decoding": dataclasses.asdict(decoding or Decoding(max_length=data.targets_length)),
    }


class TaskEvaluator:
    """One task's examples with SeqIO's evaluator over them; the examples are read once, for any number of models.

    Args:
        lengths: of `inputs` and `targets`, in tokens; longer ones are cut.
        max_examples: at most so many are read.
        by_rank: score every label of the task and take the most likely, instead of generating.
    """

    def __init__(
        self,
        task: Any,
        *,
        split: str,
        lengths: Mapping[str, int],
        max_examples: int | None = None,
        by_rank: bool = False,
    ):
        from endistill_jax.tasks.text_to_text import counted_as, ranked_task, task_labels

        self.counted_as = counted_as(task)
        self.task = ranked_task(task) if by_rank else task
        self._base, self._labels = task, task_labels(task) if by_rank else ()
        self._choices = len(self._labels) or 1  # examples by rank come once for every label
        self._split, self._lengths = split, dict(lengths)
        self._seen: dict[str, Any] = {}
        self._evaluator = self._make_evaluator(max_examples)
        self._examples = list(self._evaluator.cached_task_datasets[self.task.name].as_numpy_iterator())
        if not self._examples:
            raise UserError(f"task {task.name} has no example in split {split!r}")

    def metric_names(self) -> list[str]:
        """The names of the metrics, from two examples with targets for predictions."""
        metrics, _ = self._make_evaluator(2).evaluate(
            compute_metrics=True,
            predict_fn=lambda dataset: [
                (index, example["decoder_target_tokens"]) for index, example in dataset.as_numpy_iterator()
            ],
            score_fn=lambda dataset: [(index, 0.0) for index, _ in dataset.as_numpy_iterator()],
        )
        return sorted(metrics.result()[self.task.name])

    def evaluate(
        self,
        predict_fn: Callable[[Any], tuple[list[tuple[int, Any]], Sequence[float]]],
        score_fn: Callable[[Any], list[tuple[int, float]]],
    ) -> TaskResult:
        """Runs SeqIO's evaluator.

        Args:
            predict_fn: from SeqIO's enumerated dataset of the model's features, (index, tokens) of each example, and
                the scores of these in the same order.
            score_fn: SeqIO's: (index, log-likelihood) of each example.
        """
        generated: dict[int, float] = {}

        def predict_with_aux(dataset: Any) -> tuple[list[tuple[int, Any]], dict[str, list[float]]]:
            indexed, scores = predict_fn(dataset)
            generated.update(zip((index for index, _ in indexed), scores, strict=True))
            return indexed, {"scores": [float(score) for score in scores]}

        metrics, _ = self._evaluator.evaluate(
            compute_metrics=True,
            predict_fn=lambda dataset: predict_with_aux(dataset)[0],
            predict_with_aux_fn=predict_with_aux,
            score_fn=score_fn,
        )
        records, values = self._ranked() if self._labels else self._generated(generated)
        rows = self._examples[:: self._choices]
        return TaskResult(
            task=self.task.name,
            counted_as=self.counted_as,
            metrics={name: float(value) for name, value in metrics.result()[self.task.name].items()},
            records=records,
            values=values,
            row_numbers=[int(example["idx"]) for example in rows] if "idx" in rows[0] else None,
        )

    def _make_evaluator(self, max_examples: int | None) -> Any:
        from endistill_jax.data.text_pipeline import seqio

        return seqio.Evaluator(
            self.task.name,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=self._split,
            sequence_length=self._lengths,
            num_examples=None if max_examples is None else max_examples * self._choices,
            # SeqIO's hook for decoded and postprocessed outputs.
            logger_cls=[lambda output_dir: self._keep],
            log_dir="unused",
            async_compute_metrics=False,
        )

    def _keep(self, *, inferences: Mapping[str, Any] | None, **_: Any) -> None:
        self._seen = dict(inferences or {})

    def _generated(self, scores: Mapping[int, float]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Records and values of the generated texts."""
        seen = self._seen
        texts = seen.get("output", [None] * len(self._examples))
        records = []
        for index, (example, text) in enumerate(zip(self._examples, texts, strict=True)):
            score = scores[index] if index in scores else seen["score"][index]
            record = {"index": index, "inputs": self._text(example, "inputs"), "target": self._text(example, "targets")}
            records.append(record | {"prediction": text, "score": float(score)})
        return records, list(seen.get("prediction", texts))

    def _ranked(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """Records and values of the labels with the highest score."""
        scores = np.asarray(self._seen["score"], np.float64).reshape(-1, self._choices)  # [examples, choices]
        records, values = [], []
        for index, (example, row) in enumerate(zip(self._examples[:: self._choices], scores, strict=True)):
            best = int(row.argmax())
            records.append(
                {
                    "index": index,
                    "inputs": self._text(example, "inputs"),
                    "target": example["correct"].decode(),
                    "prediction": self._labels[best],
                    "score": float(row[best]),
                    "scores": dict(zip(self._labels, row.tolist(), strict=True)),
                }
            )
            values.append(self._base.postprocess_fn(self._labels[best], example=example, is_target=False))
        return records, values

    def _text(self, example: Mapping[str, Any], name: str) -> str:
        text = example.get(f"{name}_pretokenized")
        if text is None:
            return self.task.output_features[name].vocabulary.decode(example[name].tolist())
        return text.decode("utf-8", errors="replace")
