"""Metrics of SeqIO tasks, computed by SeqIO's own evaluator: of what a model generates, or of how it ranks labels."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The results of a model on one task.

    Attributes:
        task: name of the task.
        counted_as: in a mean over tasks, results of one such name count as one.
        metrics: scalars by name; none where the targets are hidden.
        records: of each example `index`, `inputs`, `target`, `prediction` and `score`, a log-likelihood; by rank also
            the `scores` of all labels.
        values: of each example, what the metrics compare with targets: a text, the index of a label, ...
        row_numbers: the examples' `idx`, where they have one.
    """

    task: str
    counted_as: str
    metrics: dict[str, float]
    records: list[dict[str, Any]]
    values: list[Any]
    row_numbers: list[int] | None


SCORED_BY = ("generation", "rank", "both")


class TaskEvaluator:
    """One task's examples with SeqIO's evaluator over them; the examples are read once, for any number of models."""

    def __init__(
        self,
        task: Any,
        *,
        split: str,
        lengths: Mapping[str, int],
        max_examples: int | None = None,
        by_rank: bool = False,
    ):
        """Reads the examples.

        Args:
            task: a SeqIO task with metrics.
            split: which of its splits.
            lengths: of `inputs` and `targets`, in tokens; longer ones are cut.
            max_examples: at most so many are read.
            by_rank: score every label of the task and take the most likely, instead of generating.

        Raises:
            UserError: no example in the split.
        """
        from endistill_jax.tasks.text_to_text import counted_as, ranked_task, task_labels

        self.base, self.labels = task, task_labels(task) if by_rank else ()
        self.counted_as = counted_as(task)
        self.task = ranked_task(task) if by_rank else task
        self._split, self._lengths = split, dict(lengths)
        choices = len(self.labels) or 1
        self._seen: dict[str, Any] = {}
        self._evaluator = self._make_evaluator(None if max_examples is None else max_examples * choices)
        self._examples = list(self._evaluator.cached_task_datasets[self.task.name].as_numpy_iterator())
        if not self._examples:
            raise UserError(f"task {task.name} has no example in split {split!r}")

    @property
    def size(self) -> int:
        """How many examples, each counted once."""
        return len(self._examples) // (len(self.labels) or 1)

    def metric_names(self) -> list[str]:
        """The names of the metrics, from two examples with targets for predictions."""
        evaluator = self._make_evaluator(2 * (len(self.labels) or 1))
        metrics, _ = evaluator.evaluate(
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
        found = {name: float(value) for name, value in metrics.result()[self.task.name].items()}
        records, values = self._ranked() if self.labels else self._generated(generated)
        rows = self._examples[:: len(self.labels) or 1]
        numbers = [int(example["idx"]) for example in rows] if "idx" in rows[0] else None
        return TaskResult(
            task=self.task.name,
            counted_as=self.counted_as,
            metrics=found,
            records=records,
            values=values,
            row_numbers=numbers,
        )

    def _make_evaluator(self, num_examples: int | None) -> Any:
        from endistill_jax.data.text_pipeline import seqio

        return seqio.Evaluator(
            self.task.name,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=self._split,
            sequence_length=self._lengths,
            num_examples=num_examples,
            # SeqIO's hook for decoded and postprocessed outputs.
            logger_cls=[lambda output_dir: self._keep],
            log_dir="unused",
            async_compute_metrics=False,
        )

    def _keep(self, *, inferences: Mapping[str, Any] | None, **_: Any) -> None:
        self._seen = dict(inferences or {})

    def _generated(self, scores: Mapping[int, float]) -> tuple[list[dict[str, Any]], list[Any]]:
        seen = self._seen
        texts = seen.get("output", [None] * len(self._examples))
        records = []
        for index, (example, text) in enumerate(zip(self._examples, texts, strict=True)):
            score = scores[index] if index in scores else seen["score"][index]
            record = {"index": index, "inputs": self._text(example, "inputs"), "target": self._text(example, "targets")}
            records.append(record | {"prediction": text, "score": float(score)})
        return records, list(seen.get("prediction", texts))

    def _ranked(self) -> tuple[list[dict[str, Any]], list[Any]]:
        choices = len(self.labels)
        scores = np.asarray(self._seen["score"], np.float64).reshape(-1, choices)  # [examples, choices]
        records, values = [], []
        for index, (example, row) in enumerate(zip(self._examples[::choices], scores, strict=True)):
            best = int(row.argmax())
            records.append(
                {
                    "index": index,
                    "inputs": self._text(example, "inputs"),
                    "target": example["correct"].decode(),
                    "prediction": self.labels[best],
                    "score": float(row[best]),
                    "scores": dict(zip(self.labels, row.tolist(), strict=True)),
                }
            )
            values.append(self.base.postprocess_fn(self.labels[best], example=example, is_target=False))
        return records, values

    def _text(self, example: Mapping[str, Any], name: str) -> str:
        text = example.get(f"{name}_pretokenized")
        if text is None:
            return self.task.output_features[name].vocabulary.decode(example[name].tolist())
        return text.decode("utf-8", errors="replace")


def check_tasks(task: Any, *, split: str, lengths: Mapping[str, int], scored_by: str = "generation") -> list[Any]:
    """The tasks of a SeqIO task or mixture that can be evaluated on a split; reads none of their examples.

    Raises:
        UserError: nothing to evaluate, labels truncated by `lengths`, none to rank, or a metric whose package is not
            installed.
    """
    from endistill_jax.data.text_pipeline import seqio
    from endistill_jax.tasks.text_to_text import task_labels

    if scored_by not in SCORED_BY:
        raise UserError(f"scored_by is {scored_by!r}; choose one of {', '.join(SCORED_BY)}")
    tasks = seqio.get_subtasks(task)
    splits = sorted({str(name) for each in tasks for name in each.splits})
    found = [each for each in tasks if split in each.splits]
    if not found:
        raise UserError(f"{task.name} has no split {split!r} to evaluate; it has {', '.join(splits)}")
    found = [each for each in found if each.metric_objs]
    if not found:
        raise UserError(f"{task.name} has no metrics to evaluate; choose a task with metric_fns, or add some")
    for each in found:
        check_packages(each.metric_fns)
        vocabulary = each.output_features["targets"].vocabulary
        needed = max((len(vocabulary.encode(label)) + 1 for label in task_labels(each)), default=0)
        if needed > lengths["targets"]:
            raise UserError(
                f"the longest label of {each.name} has {needed} tokens with its end, and targets_length is "
                f"{lengths['targets']}; make it at least {needed}"
            )
    if scored_by == "rank" and not any(task_labels(each) for each in found):
        raise UserError(f"no task of {task.name} has labels to rank; use scored_by = 'generation'")
    return found


def make_evaluators(
    tasks: Sequence[Any],
    *,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    scored_by: str = "generation",
) -> list[TaskEvaluator]:
    """An evaluator for each of the tasks; two for a task with labels that is scored by "both".

    With "rank", tasks with labels are scored by rank and others by generation.

    Raises:
        UserError: a split without examples.
    """
    from endistill_jax.tasks.text_to_text import task_labels

    settings = {"split": split, "lengths": lengths, "max_examples": max_examples}
    evaluators = []
    for task in tasks:
        ranked = scored_by != "generation" and bool(task_labels(task))
        if not ranked or scored_by == "both":
            evaluators.append(TaskEvaluator(task, **settings))
        if ranked:
            evaluators.append(TaskEvaluator(task, **settings, by_rank=True))
    return evaluators


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
    from endistill_jax.data.text_pipeline import resolve_task

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
    from endistill_jax.data.text_pipeline import resolve_task

    settings = {"split": data.eval_split, "lengths": data.feature_lengths, "scored_by": scored_by}
    tasks = check_tasks(resolve_task(data.task), **settings)
    return TaskMetrics(
        mesh=mesh,
        data=data,
        decoding=decoding or likeliest(data),
        evaluators=make_evaluators(tasks, max_examples=data.eval_examples, **settings),
        seed=seed,
    )
