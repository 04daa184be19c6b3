"""Supervised text-to-text tasks with metrics, and with labels to rank by likelihood where targets are a closed set."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.metrics import NO_LABEL, MetricFn, rank_metrics
from endistill_jax.tasks.registration import described, register_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToText:
    """What a task is, apart from its name and its vocabulary.

    Attributes:
      source: of the examples.
      to_text: dataset -> dataset whose examples have strings `inputs` and `targets`; other features are kept.
      metric_fns: functions (targets, predictions) -> scalars by name, on what `value_of` returns.
      value_of: of a target's or a prediction's text, what the metrics compare: the text itself, a label's index, ...
      labels: every string that can be a target, where these are a closed set.
      counted_as: the name under which it counts in a mean over tasks, where that is not its own. Tasks of one such name
        count as one, as the evaluation sets of one benchmark task do.
      settings: what the task depends on besides its source, to distinguish two tasks of one name.
    """

    source: seqio.DataSource
    to_text: Callable[[tf.data.Dataset], tf.data.Dataset]
    metric_fns: tuple[MetricFn, ...]
    value_of: Callable[[str], Any] = str
    labels: tuple[str, ...] = ()
    counted_as: str = ""
    settings: tuple[object, ...] = ()


_definitions: dict[str, tuple[TextToText, seqio.Vocabulary]] = {}


def text_to_text_task(name: str, definition: TextToText, vocabulary: seqio.Vocabulary) -> seqio.Task:
    """Registers a task, with an end token after inputs and targets; the same call again returns the same task.

    Inputs and targets longer than asked for are cut. Metrics see the targets' text as it was before it became tokens.

    Raises:
      UserError: a task of that name with other settings exists already.
    """

    def value(text: str, **_) -> Any:
        return definition.value_of(text)

    task = _register(name, definition, vocabulary, (definition.to_text,), value, definition.metric_fns)
    _definitions[name] = (definition, vocabulary)
    return task


def task_labels(task: str | seqio.Task) -> tuple[str, ...]:
    """The label strings of a task registered here, in the order of their indices; empty for open targets."""
    name = task if isinstance(task, str) else task.name
    return _definitions[name][0].labels if name in _definitions else ()


def counted_as(task: str | seqio.Task) -> str:
    """The name under which a task counts in a mean over tasks: its own, if it was not registered here with another."""
    name = task if isinstance(task, str) else task.name
    return (_definitions[name][0].counted_as if name in _definitions else "") or name


def ranked_task(task: str | seqio.Task) -> seqio.Task:
    """Registers the same task scored by rank: each example once for every label, the metrics on the most likely one.

    It is named after the task, with `_ranked` before the version. Its metrics have SeqIO's score form
    (targets, scores), where a score is the log-likelihood of one label's tokens and of the end after them, summed. An
    example's labels follow each other in the order of `task_labels`.

    Raises:
      UserError: the task is not one registered here, or has no closed set of labels.
    """
    name = task if isinstance(task, str) else task.name
    if not task_labels(name):
        ranked = ", ".join(known for known in sorted(_definitions) if task_labels(known)) or "none"
        raise UserError(f"task {name!r} has no labels to rank; tasks that have: {ranked}")
    definition, vocabulary = _definitions[name]
    metric_fn = functools.partial(
        rank_metrics,
        values=tuple(definition.value_of(label) for label in definition.labels),
        metric_fns=definition.metric_fns,
    )

    def correct_value(_text: str, *, example: Mapping[str, Any], **_) -> Any:
        return definition.value_of(tf.compat.as_text(example["correct"]))

    steps = (definition.to_text, functools.partial(with_every_label, labels=definition.labels))
    ranked_name = re.sub(r"(_v\d+)?$", r"_ranked\1", name, count=1)
    return _register(ranked_name, definition, vocabulary, steps, correct_value, (metric_fn,))


def with_every_label(dataset: tf.data.Dataset, *, labels: tuple[str, ...]) -> tf.data.Dataset:
    """Every example once for each label, which is its `targets`; what these were is kept as `correct`."""

    def copies(example: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        label = tf.data.Dataset.from_tensor_slices(list(labels))
        return label.map(lambda text: {**example, "targets": text, "correct": example["targets"]})

    return dataset.flat_map(copies)


def label_index(text: str, labels: tuple[str, ...]) -> int:
    """Index of the label that a text is, white space around it aside; `NO_LABEL` if it is none."""
    text = text.strip()
    return labels.index(text) if text in labels else NO_LABEL


def _register(
    name: str,
    definition: TextToText,
    vocabulary: seqio.Vocabulary,
    to_text: tuple[Callable[[tf.data.Dataset], tf.data.Dataset], ...],
    postprocess: Callable[..., Any],
    metric_fns: tuple[Callable[..., Any], ...],
) -> seqio.Task:
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    preprocessors = [
        *to_text,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ]
    return register_once(
        name,
        (definition.source, described(vocabulary), definition.labels, definition.settings),
        lambda: seqio.TaskRegistry.add(
            name,
            source=definition.source,
            preprocessors=preprocessors,
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=postprocess,
            metric_fns=list(metric_fns),
        ),
    )
