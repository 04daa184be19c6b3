"""Downstream tasks of the offline corpus: a docstring's first paragraph from the rest, and the package it is from.

Both keep the corpus' splits, in which no text, nor a near-copy of it, is on two sides.
"""

import functools
import os
import re
from collections.abc import Callable

import seqio
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.data.python_docs import PythonDocsConfig, PythonDocsSource
from endistill_jax.data.vocabulary import BUNDLED, EXTRA_IDS, load_vocabulary
from endistill_jax.evaluation.metrics import accuracy, rouge
from endistill_jax.tasks.registration import proportional_mixture
from endistill_jax.tasks.text_to_text import TextToText, label_index, text_to_text_task

SUMMARY_WORDS = range(4, 49)
SUMMARIZED_WORDS = 16
CLASSIFIED_WORDS = 8
MASK = "_"

# Top-level packages with about a hundred training texts (`stdlib`) or two hundred (`packages`) and more. Left out are
# what later versions of Python no longer have, private modules, and tensorflow, which would be a third of all texts and
# has copies of keras and others within.
# fmt: off
MODULES = {
    "stdlib": (
        "asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "turtle",
        "unittest", "xml",
    ),
    "packages": (
        "absl", "asyncio", "email", "etils", "flax", "google", "grpc", "idlelib", "importlib", "jax", "jaxlib",
        "keras", "logging", "numpy", "optax", "orbax", "packaging", "pyglove", "pygments", "rich", "scipy",
        "seqio", "setuptools", "tensorflow_datasets", "tkinter", "treescope",
    ),
}
# fmt: on

TextPair = tuple[str, str]


def python_docs_summary_task(
    config: str | PythonDocsConfig,
    *,
    name: str | None = None,
    vocabulary: str | os.PathLike[str] = BUNDLED,
    extra_ids: int = EXTRA_IDS,
) -> seqio.Task:
    """Registers `python_docs_{config}_summary_v1` (see `summary_pair`); the same call again returns the same task.

    Args:
      config: `stdlib`, `packages`, or a configuration of one's own.
      name: of the task, where it is not that; another one for another vocabulary.
      vocabulary: path of a SentencePiece model, or `bytes`.
      extra_ids: see `load_vocabulary`.

    Raises:
      UserError: no such configuration or vocabulary, or the name is taken.
    """
    definition = TextToText(
        source=PythonDocsSource(config),
        to_text=functools.partial(in_python, pair_of=lambda text, module: summary_pair(text)),
        metric_fns=(rouge,),
    )
    name = name or f"python_docs_{_name_of(config)}_summary_v1"
    return text_to_text_task(name, definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def python_docs_module_task(
    config: str | PythonDocsConfig,
    *,
    modules: tuple[str, ...] | None = None,
    name: str | None = None,
    vocabulary: str | os.PathLike[str] = BUNDLED,
    extra_ids: int = EXTRA_IDS,
) -> seqio.Task:
    """Registers `python_docs_{config}_module_v1` (see `module_pair`); the same call again returns the same task.

    Args:
      config: `stdlib`, `packages`, or a configuration of one's own.
      modules: the labels, names of top-level packages or modules; by default those in `MODULES`. Texts of others are
        left out.
      name: as of `python_docs_summary_task`, as for the arguments after it.

    Raises:
      UserError: no such configuration or vocabulary, no modules for it, or the name is taken.
    """
    labels = modules or MODULES.get(_name_of(config), ())
    if len(labels) < 2:
        raise UserError(f"python_docs_module of configuration {_name_of(config)!r} needs `modules`, two names at least")
    pattern = names_pattern(labels)
    definition = TextToText(
        source=PythonDocsSource(config),
        to_text=functools.partial(
            in_python, pair_of=functools.partial(module_pair, labels=frozenset(labels), pattern=pattern)
        ),
        metric_fns=(accuracy,),
        value_of=functools.partial(label_index, labels=labels),
        labels=labels,
    )
    name = name or f"python_docs_{_name_of(config)}_module_v1"
    return text_to_text_task(name, definition, load_vocabulary(vocabulary, extra_ids=extra_ids))


def python_docs_mixture(config: str) -> seqio.Mixture:
    """Registers both tasks of a configuration and the mixture `python_docs_{config}_downstream`, at equal rates.

    Raises:
      UserError: no such configuration.
    """
    tasks = (python_docs_summary_task(config), python_docs_module_task(config))
    return proportional_mixture(f"python_docs_{config}_downstream", {task.name: 1 for task in tasks})


def summary_pair(text: str) -> TextPair | None:
    """(`summarize: ` and the rest of a docstring, its first paragraph), white space collapsed.

    None for a docstring that does not serve: its first paragraph is no sentence (no period at the end, or not 4 to 48
    words), the rest has fewer than 16 words, or says the first paragraph again.
    """
    first, *rest = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip(), maxsplit=1))
    if not rest or not first.endswith(".") or len(first.split()) not in SUMMARY_WORDS:
        return None
    if len(rest[0].split()) < SUMMARIZED_WORDS or first.casefold() in rest[0].casefold():
        return None
    return f"summarize: {rest[0]}", first


def module_pair(text: str, module: str, *, labels: frozenset[str], pattern: re.Pattern[str]) -> TextPair | None:
    """(`module: ` and the text, the top-level package it is from), white space collapsed, the packages' names masked.

    None for a text of another package, or with fewer than 8 words of two letters or more once the names are masked.
    """
    package = module.partition(".")[0]
    masked = pattern.sub(MASK, " ".join(text.split()))
    if package not in labels or len(re.findall(r"[A-Za-z]{2,}", masked)) < CLASSIFIED_WORDS:
        return None
    return f"module: {masked}", package


def names_pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a word or dotted name with any of the labels as a part between dots and underscores, in any case.

    For `jax` that is `jax.numpy`, `my_jax_array` and `JAX`, but not `ajax`. All labels' names are masked in every text:
    masking only its own would reveal that the label is none of those left.
    """
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    before, after = r"(?<![A-Za-z0-9_])(?:[A-Za-z0-9_.]*[._])?", r"(?:[._]+[A-Za-z0-9_]+)*_*(?![A-Za-z0-9_])"
    return re.compile(f"{before}(?:{names}){after}", re.IGNORECASE)


def in_python(dataset: tf.data.Dataset, *, pair_of: Callable[[str, str], TextPair | None]) -> tf.data.Dataset:
    """Examples of the corpus as `inputs` and `targets` by a Python function of (text, module); None leaves one out."""

    def convert(text: bytes, module: bytes) -> tuple[bytes, bytes]:
        inputs, targets = pair_of(text.decode(), module.decode()) or ("", "")
        return inputs.encode(), targets.encode()

    def example(document: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        pair = tf.numpy_function(convert, [document["text"], document["module"]], [tf.string] * 2, stateful=False)
        return {name: tf.ensure_shape(text, []) for name, text in zip(("inputs", "targets"), pair, strict=True)}

    return dataset.map(example).filter(lambda pair: tf.strings.length(pair["targets"]) > 0)


def _name_of(config: str | PythonDocsConfig) -> str:
    return config if isinstance(config, str) else config.name


for _config in MODULES:
    python_docs_mixture(_config)
