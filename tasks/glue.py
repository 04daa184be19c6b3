"""GLUE (Wang et al. 2019) as text to text in T5's format (Raffel et al. 2020, appendix D), with its official metrics.

The name of the task comes first, then each text after its field's name, fields in the alphabet's order, so that MNLI's
hypothesis comes before its premise: `mnli hypothesis: ... premise: ...`. Targets are words; STS-B's are its scores,
rounded to the nearest fifth (`3.8`). The test splits' labels are hidden: their targets are `<unk>`, and no metric is
computed from them.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping

import seqio
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.data.vocabulary import EXTRA_IDS, load_vocabulary
from endistill_jax.evaluation import metrics
from endistill_jax.evaluation.metrics import NO_LABEL, MetricFn
from endistill_jax.tasks.pretraining import T5_VOCABULARY
from endistill_jax.tasks.registration import LARGEST_RATE, proportional_mixture
from endistill_jax.tasks.text_to_text import TextToText, label_index, text_to_text_task

HIDDEN = "<unk>"
SCORES = tuple(f"{fifths / 5:.1f}" for fifths in range(26))  # 0.0, 0.2, ..., 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task of the benchmark; texts, labels and splits are those of its TFDS configuration.

    Attributes:
      texts: features with text, in the order in which they are printed.
      labels: the targets; a label's index is what TFDS has.
      metric_fns: the official metrics.
      file: name of its file in a submission, without `.tsv`.
      prefix: what the inputs start with, where it is not the configuration's name.
      submits_words: whether a submission has label names; else their indices, or STS-B's scores.
      train_examples: size of the training split; 0 where there is none.
      splits: that TFDS has.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metric_fns: tuple[MetricFn, ...]
    file: str
    prefix: str = ""
    submits_words: bool = False
    train_examples: int = 0
    splits: tuple[str, ...] = ("train", "validation", "test")


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_F1_AND_ACCURACY = (metrics.f1, metrics.accuracy)
_inference = functools.partial(
    GlueTask,
    texts=("hypothesis", "premise"),
    labels=("entailment", "neutral", "contradiction"),
    metric_fns=(metrics.accuracy,),
    prefix="mnli",
    submits_words=True,
)

TASKS = {
    "cola": GlueTask(
        texts=("sentence",),
        labels=("unacceptable", "acceptable"),
        metric_fns=(metrics.matthews_corrcoef,),
        file="CoLA",
        train_examples=8_551,
    ),
    "sst2": GlueTask(
        texts=("sentence",),
        labels=("negative", "positive"),
        metric_fns=(metrics.accuracy,),
        file="SST-2",
        train_examples=67_349,
    ),
    "mrpc": GlueTask(
        texts=_PAIR,
        labels=("not_equivalent", "equivalent"),
        metric_fns=_F1_AND_ACCURACY,
        file="MRPC",
        train_examples=3_668,
    ),
    "qqp": GlueTask(
        texts=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metric_fns=_F1_AND_ACCURACY,
        file="QQP",
        train_examples=363_849,
    ),
    "stsb": GlueTask(
        texts=_PAIR,
        labels=SCORES,
        metric_fns=(metrics.pearson_corrcoef, metrics.spearman_corrcoef),
        file="STS-B",
        train_examples=5_749,
    ),
    "mnli": _inference(
        file="",
        train_examples=392_702,
        splits=("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "mnli_matched": _inference(file="MNLI-m", splits=("validation", "test")),
    "mnli_mismatched": _inference(file="MNLI-mm", splits=("validation", "test")),
    "qnli": GlueTask(
        texts=("question", "sentence"),
        labels=_ENTAILMENT,
        metric_fns=(metrics.accuracy,),
        file="QNLI",
        submits_words=True,
        train_examples=104_743,
    ),
    "rte": GlueTask(
        texts=_PAIR,
        labels=_ENTAILMENT,
        metric_fns=(metrics.accuracy,),
        file="RTE",
        submits_words=True,
        train_examples=2_490,
    ),
    "wnli": GlueTask(
        texts=_PAIR,
        labels=("not_entailment", "entailment"),
        metric_fns=(metrics.accuracy,),
        file="WNLI",
        train_examples=635,
    ),
    "ax": _inference(file="AX", metric_fns=(metrics.matthews_corrcoef,), splits=("test",)),
}


def glue_task(
    config: str,
    *,
    benchmark: str = "glue",
    vocabulary: str | os.PathLike[str] = T5_VOCABULARY,
    extra_ids: int = EXTRA_IDS,
) -> seqio.Task:
    """Registers `{benchmark}_{config}_v1` and returns it; the same call again returns the same task.

    Args:
      config: a name in `TASKS`.
      benchmark: what the task's name begins with; another than `glue` where the vocabulary is another than T5's.
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: see `load_vocabulary`.

    Raises:
      UserError: no such configuration or vocabulary, or the name is taken.
    """
    task = known_task(config)
    definition = TextToText(
        source=seqio.TfdsDataSource(f"glue/{config}:2.0.0", splits=task.splits),
        to_text=functools.partial(to_text, config=config),
        metric_fns=task.metric_fns,
        value_of=similarity if config == "stsb" else functools.partial(label_index, labels=task.labels),
        labels=task.labels,
        counted_as=f"{benchmark}_mnli" if config.startswith("mnli") else "",
    )
    return text_to_text_task(f"{benchmark}_{config}_v1", definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def glue_mixture(
    *,
    benchmark: str = "glue",
    vocabulary: str | os.PathLike[str] = T5_VOCABULARY,
    extra_ids: int = EXTRA_IDS,
    largest_rate: int = LARGEST_RATE,
) -> seqio.Mixture:
    """Registers every task and the mixture `{benchmark}` of all but WNLI, which T5 does not train on either.

    Rates are T5's: the number of training examples, at most `largest_rate`. So a task without a training split (MNLI's
    two evaluation sets, AX) has rate 0. `{benchmark}_mnli` is MNLI with its two evaluation sets.

    Raises:
      UserError: as of `glue_task` and `proportional_mixture`.
    """
    for config in TASKS:
        glue_task(config, benchmark=benchmark, vocabulary=vocabulary, extra_ids=extra_ids)
    sizes = glue_sizes(benchmark)
    mnli = {name: size for name, size in sizes.items() if "_mnli_" in name}
    proportional_mixture(f"{benchmark}_mnli", mnli, largest_rate=largest_rate)
    return proportional_mixture(benchmark, sizes, largest_rate=largest_rate)


def glue_sizes(benchmark: str = "glue") -> dict[str, int]:
    """Number of training examples of each task of the mixture, by the task's name."""
    return {f"{benchmark}_{config}_v1": task.train_examples for config, task in TASKS.items() if config != "wnli"}


def to_text(dataset: tf.data.Dataset, *, config: str) -> tf.data.Dataset:
    """GLUE's examples with string `inputs` and `targets`, and `idx`, the number of the row in GLUE's file."""
    task = TASKS[config]
    targets = tf.constant((HIDDEN, *task.labels))

    def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        words: list[str | tf.Tensor] = [task.prefix or config]
        for name in task.texts:
            words += [f"{name}:", example[name]]
        label = example["label"]
        if config == "stsb":
            label = tf.where(label < 0, float(NO_LABEL), tf.round(5 * label))
        target = tf.gather(targets, tf.cast(label, tf.int32) + 1)
        return {"inputs": tf.strings.join(words, separator=" "), "targets": target, "idx": example["idx"]}

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def similarity(text: str) -> float:
    """STS-B's score in a text; `NO_LABEL`, which is far off, if it is not a number."""
    try:
        score = float(text)
    except ValueError:
        return float(NO_LABEL)
    return score if math.isfinite(score) else float(NO_LABEL)


def known_task(config: str) -> GlueTask:
    """The task of that name.

    Raises:
      UserError: GLUE has none.
    """
    if config not in TASKS:
        raise UserError(f"GLUE has no task {config!r}; it has {', '.join(TASKS)}")
    return TASKS[config]


glue_mixture()
