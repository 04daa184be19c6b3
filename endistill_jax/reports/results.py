"""The result table of a training job."""

from collections.abc import Sequence
from typing import Any

import jax

from endistill_jax.evaluation.denoising import DenoisingReport
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.reports.table import Column, print_table, write_table

DENOISING_COLUMNS = (
    Column(key="model", title="model"),
    Column(key="parameters", title="parameters", kind="count"),
    Column(key="train_tokens", title="tokens seen", kind="count"),
    Column(key="loss", title="loss", kind="loss"),
    Column(key="token_loss", title="loss on non-sentinel tokens", kind="loss"),
    Column(key="shuffled_input_gap", title="shuffled-input gap", kind="loss"),
    Column(key="accuracy", title="accuracy", kind="share"),
    Column(key="token_accuracy", title="accuracy on non-sentinel tokens", kind="share"),
    Column(key="seconds", title="training", kind="seconds"),
)


def model_row(
    name: str, config: ModelConfig, report: DenoisingReport, tokens: int | None, seconds: float | None
) -> dict[str, Any]:
    """A trained model's row; tokens and seconds are None for a model that was trained elsewhere."""
    size = {"model": name, "parameters": count_params(abstract_params(config))}
    return size | report.scalars() | {"train_tokens": tokens, "seconds": seconds}


def reference_rows(report: DenoisingReport) -> list[dict[str, Any]]:
    """The n-gram references on the same tokens."""
    rows = {"unigram": report.unigram_loss, "bigram": report.bigram_loss}
    return [{"model": name, "token_loss": loss} for name, loss in rows.items() if loss is not None]


def merge_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds: a list of numbers where they measured something, the common value elsewhere."""
    if len(rows) == 1:
        return rows[0]

    def merged(values: list[Any]) -> Any:
        common = isinstance(values[0], int) or (isinstance(values[0], str) and len(set(values)) == 1)
        return values[0] if common else values

    return {key: merged([row[key] for row in rows]) for key in rows[0]}


def print_results(
    model_dir: str, rows: list[dict[str, Any]], title: str, columns: Sequence[Column] = DENOISING_COLUMNS
) -> None:
    """Prints the table and writes it as results.md and results.json, on the primary host only."""
    if jax.process_index() == 0:
        print_table(rows, columns, title=title)
        write_table(model_dir, "results", rows, columns, title=title)
