"""Abstractive summarization in T5's format: CNN/DailyMail, XSum, and JSONL files of the user's own, scored by ROUGE.

Inputs are `summarize: ` and the article, targets the summary.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_files import PairFilesSource
from endistill_jax.data.vocabulary import EXTRA_IDS, load_vocabulary
from endistill_jax.evaluation.metrics import rouge
from endistill_jax.tasks.pretraining import T5_VOCABULARY
from endistill_jax.tasks.text_to_text import TextToText, text_to_text_task

CNN_DAILYMAIL_TRAIN_EXAMPLES = 287_113
XSUM_TRAIN_EXAMPLES = 204_045
XSUM_ARCHIVE = "xsum-extracts-from-downloads.tar.gz"

_SPLITS = ("train", "validation", "test")


class XsumSource(seqio.TfdsDataSource):
    """TFDS's XSum, which cannot be downloaded: articles are fetched by their publishers' addresses, by hand."""

    def __init__(self):
        super().__init__("xsum:1.1.0", splits=_SPLITS)

    def get_dataset(self, *args, **kwargs) -> tf.data.Dataset:
        """Reads a split.

        Raises:
          UserError: the data are neither prepared nor there to be prepared.
        """
        prepared = pathlib.Path(self.tfds_dataset.builder.data_dir)
        archive = prepared.parent.parent / "downloads" / "manual" / XSUM_ARCHIVE
        # A bucket's path looks like a missing folder here; TFDS itself will say what it lacks.
        if "://" not in str(self.tfds_dataset.builder.data_dir) and not (prepared.exists() or archive.exists()):
            raise UserError(
                f"XSum is not at {prepared}, and TFDS cannot download it: put {XSUM_ARCHIVE} at {archive}, made as "
                "github.com/EdinburghNLP/XSum describes, or read JSONL files with summarization_files_task"
            )
        return super().get_dataset(*args, **kwargs)


def cnn_dailymail_task(
    *,
    name: str = "cnn_dailymail_v1",
    vocabulary: str | os.PathLike[str] = T5_VOCABULARY,
    extra_ids: int = EXTRA_IDS,
) -> seqio.Task:
    """Registers CNN/DailyMail 3.4.0 (not anonymized, cased); the same call again returns the same task.

    The period that ends a highlight is set apart by spaces, as in version 3.1.0, which T5's task used: T5's vocabulary
        drops newlines, and ` . ` is where ROUGE-Lsum can still separate two highlights in a prediction.

    Args:
      name: of the task; another one for another vocabulary.
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: see `load_vocabulary`.

    Raises:
      UserError: no such vocabulary, or the name is taken.
    """
    definition = TextToText(
        source=seqio.TfdsDataSource("cnn_dailymail:3.4.0", splits=_SPLITS),
        to_text=functools.partial(summarize, article_field="article", summary_field="highlights", periods_alone=True),
        metric_fns=(rouge,),
    )
    return text_to_text_task(name, definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def xsum_task(
    *, name: str = "xsum_v1", vocabulary: str | os.PathLike[str] = T5_VOCABULARY, extra_ids: int = EXTRA_IDS
) -> seqio.Task:
    """Registers XSum 1.1.0, whose articles must be fetched by hand (see `XsumSource`); arguments as above.

    Raises:
      UserError: no such vocabulary, or the name is taken.
    """
    definition = TextToText(
        source=XsumSource(),
        to_text=functools.partial(summarize, article_field="document", summary_field="summary"),
        metric_fns=(rouge,),
    )
    return text_to_text_task(name, definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def summarization_files_task(
    name: str,
    files: Mapping[str, str | Sequence[str]],
    vocabulary: str | os.PathLike[str],
    *,
    extra_ids: int = EXTRA_IDS,
    article_field: str = "document",
    summary_field: str = "summary",
) -> seqio.Task:
    """Registers summarization of JSONL files, such as XSum's or one's own; the same call again returns the same task.

    Args:
      name: of the task.
      files: glob or globs of the JSONL files of each split, such as {"train": "news/*.jsonl.gz", "validation": ...}.
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: see `load_vocabulary`.
      article_field: field of the JSON objects that holds the article.
      summary_field: field that holds the summary.

    Raises:
      UserError: no such file or vocabulary, or the name is taken.
    """
    definition = TextToText(
        source=PairFilesSource(files, (article_field, summary_field)),
        to_text=functools.partial(summarize, article_field=article_field, summary_field=summary_field),
        metric_fns=(rouge,),
    )
    return text_to_text_task(name, definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def summarize(
    dataset: tf.data.Dataset, *, article_field: str, summary_field: str, periods_alone: bool = False
) -> tf.data.Dataset:
    """Articles and summaries as `inputs` and `targets`.

    Args:
      dataset: of examples with the two string features.
      article_field: name of the article.
      summary_field: name of the summary.
      periods_alone: whether a period that ends a line of the summary is set apart from the word before it.
    """

    def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        summary = example[summary_field]
        if periods_alone:
            summary = tf.strings.regex_replace(summary, r"([^\s.])\.(\n|$)", r"\1 .\2")
        return {"inputs": tf.strings.join(["summarize: ", example[article_field]]), "targets": summary}

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


cnn_dailymail_task()
xsum_task()
