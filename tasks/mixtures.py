"""The mixture of the downstream tasks of two fields, language understanding and summarization."""

import os

import seqio

from endistill_jax.data.vocabulary import EXTRA_IDS
from endistill_jax.tasks import summarization
from endistill_jax.tasks.glue import glue_mixture, glue_sizes
from endistill_jax.tasks.pretraining import T5_VOCABULARY
from endistill_jax.tasks.registration import LARGEST_RATE, proportional_mixture


def downstream_mixture(
    *,
    prefix: str = "",
    vocabulary: str | os.PathLike[str] = T5_VOCABULARY,
    extra_ids: int = EXTRA_IDS,
    largest_rate: int = LARGEST_RATE,
) -> seqio.Mixture:
    """Registers `{prefix}downstream`: GLUE but for WNLI, CNN/DailyMail and XSum, at T5's examples-proportional rates.

    Args:
      prefix: before the names of the mixtures and of all tasks; needed where the vocabulary is another than T5's.
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: see `load_vocabulary`.
      largest_rate: what one task can count for at most, in examples.

    Raises:
      UserError: no such vocabulary, a limit below 1, or a name is taken.
    """
    reading = {"vocabulary": vocabulary, "extra_ids": extra_ids}
    glue_mixture(benchmark=f"{prefix}glue", largest_rate=largest_rate, **reading)
    news = summarization.cnn_dailymail_task(name=f"{prefix}cnn_dailymail_v1", **reading)
    xsum = summarization.xsum_task(name=f"{prefix}xsum_v1", **reading)
    sizes = glue_sizes(f"{prefix}glue") | {
        news.name: summarization.CNN_DAILYMAIL_TRAIN_EXAMPLES,
        xsum.name: summarization.XSUM_TRAIN_EXAMPLES,
    }
    return proportional_mixture(f"{prefix}downstream", sizes, largest_rate=largest_rate)


downstream_mixture()
