"""Span-corruption tasks: the offline corpus, C4, Wikipedia, and files of the user's own.

A task's name ends in its version: its meaning never changes; a change of the data gets a new name.
"""

import functools
from collections.abc import Sequence

import seqio

from endistill_jax.data import span_corruption
from endistill_jax.data.python_docs import PythonDocs, PythonDocsSource
from endistill_jax.data.text_files import Documents, TextFilesSource
from endistill_jax.data.vocabulary import EXTRA_IDS, bundled_vocabulary, load_vocabulary
from endistill_jax.tasks.registration import described, register_once

# T5's public vocabulary: 32,000 pieces and 100 sentinels. Read when a task that uses it is first read.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"


def span_corruption_task(
    name: str,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    *,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    concatenate: bool = True,
    text_field: str = "text",
) -> seqio.Task:
    """Registers a span-corruption task and returns it; the same call again returns the same task.

    Args:
      name: of the task; versioned names, such as `my_texts_span_corruption_v1`, are a good habit.
      source: whose examples have a string feature `text_field`.
      vocabulary: with enough sentinels (`extra_ids`, or pieces at its end, as mT5's) for the spans of one text.
      noise_density: share of the tokens that is masked.
      mean_span_length: mean number of tokens in a span.
      concatenate: whether texts run on into each other to fill the inputs (see `split_into_chunks`).
      text_field: feature of the source that holds the text.

    Raises:
      UserError: settings out of range, or a task of that name with other settings exists already.
    """
    span_corruption.check_corruption(noise_density, mean_span_length)
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    corrupted = functools.partial(
        span_corruption.span_corruption,
        noise_density=noise_density,
        mean_span_length=mean_span_length,
        concatenate=concatenate,
    )
    settings = (source, described(vocabulary), noise_density, mean_span_length, concatenate, text_field)
    return register_once(
        name,
        settings,
        lambda: seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[
                functools.partial(seqio.preprocessors.rekey, key_map={"targets": text_field}),
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                seqio.CacheDatasetPlaceholder(),
                corrupted,
            ],
            output_features={"inputs": feature, "targets": feature},
            metric_fns=[],
        ),
    )


def text_files_task(
    name: str,
    train: str | Sequence[str],
    vocabulary: str,
    *,
    extra_ids: int = EXTRA_IDS,
    validation: str | Sequence[str] | None = None,
    field: str = "text",
    documents: Documents = "line",
    held_out: float = 0.01,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    concatenate: bool = True,
) -> seqio.Task:
    """Registers span corruption over the user's own text or JSONL files; the same call again returns the same task.

    Args:
      name: of the task.
      train: glob or globs of the training files (`.txt`, `.jsonl`, ..., plain or `.gz`).
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: sentinels above its own pieces; 0 for a model that ends with sentinels, as mT5's.
      validation: of the validation files; without it a share `held_out` of the documents is held out.
      field: field of the JSON objects that holds the text.
      documents: what a document of a text file is: a `line`, or the text between two empty lines (`blank_line`).
      held_out: share of the documents that is held out where `validation` is not given.
      noise_density: see `span_corruption_task`, as for the settings after it.

    Raises:
      UserError: no such file or vocabulary, settings out of range, or the name is taken.
    """
    source = TextFilesSource(train, validation, field=field, documents=documents, held_out=held_out)
    return span_corruption_task(
        name,
        source,
        load_vocabulary(vocabulary, extra_ids=extra_ids),
        noise_density=noise_density,
        mean_span_length=mean_span_length,
        concatenate=concatenate,
    )


def register_all() -> None:
    """Registers the tasks of this module; nothing is read yet."""
    bundled = bundled_vocabulary()
    for config in PythonDocs.BUILDER_CONFIGS:
        source = PythonDocsSource(config)
        span_corruption_task(f"python_docs_{config.name}_span_corruption_v1", source, bundled)
        # Half of the text, in longer spans: small models learn more from it than from mostly easy sentinels.
        span_corruption_task(
            f"python_docs_{config.name}_half_corruption_v1", source, bundled, noise_density=0.5, mean_span_length=5.0
        )
    public = seqio.SentencePieceVocabulary(T5_VOCABULARY, extra_ids=EXTRA_IDS)
    c4 = seqio.TfdsDataSource("c4/en:3.1.0", splits=("train", "validation"))
    span_corruption_task("c4_v310_span_corruption_v1", c4, public)
    # TFDS has Wikipedia as one split; the last hundredth of it is held out here.
    wikipedia = seqio.TfdsDataSource(
        "wikipedia/20230601.en:1.0.0", splits={"train": "train[:99%]", "validation": "train[99%:]"}
    )
    span_corruption_task("wikipedia_20230601_en_span_corruption_v1", wikipedia, public)


register_all()
