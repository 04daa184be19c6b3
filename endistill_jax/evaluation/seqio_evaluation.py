"""Metrics of SeqIO tasks, computed by SeqIO's own evaluator: of what a model generates, or of how it ranks labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.metrics import check_packages
from endistill_jax.evaluation.report import TaskResult

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
