"""Result tables: rows of plain numbers to a terminal, to Markdown and to JSON.

A cell is a number, a text, None (empty), or a list of numbers, one a seed, shown as mean and spread. Numbers
are rounded for reading only; the JSON file holds the rows as they are.
"""

import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

import jax

from endistill_jax.evaluation.denoising import DenoisingReport
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.reports.files import json_text, write_atomically

Row = Mapping[str, Any]
_MISSING = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table: the key of its cells in the rows, and a heading with the unit where it is not plain.

    Attributes:
        kind: how numbers are shown: "count" 5.7 M, "loss" three decimals, "number" at least three digits, "share" 0.123
            as 12.3 %, "seconds" 412 s, "difference" three decimals with their sign, "text" as it is.
    """

    key: str
    title: str
    kind: Literal["text", "count", "loss", "number", "share", "seconds", "difference"] = "text"


def format_count(count: float) -> str:
    """1234567 -> "1.2 M", in thousands k, M, B and T. Below a thousand, the number itself."""
    if round(count) < 1000:
        return f"{count:.0f}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "B")):
        # Compared after rounding, so that 999,951 is 1.0 M and not 1000.0 k.
        if round(count / size, 1) < 1000:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e12:.1f} T"


def _format_number(value: float, kind: str) -> str:
    if not math.isfinite(value):
        return str(value)
    match kind:
        case "count":
            return format_count(value)
        case "loss":
            return f"{value:.3f}"
        case "difference":
            return f"{value:+.3f}"
        case "number":
            decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
            return f"{value:.{min(max(decimals, 0), 9)}f}"
        case "share":
            return f"{100 * value:.1f} %"
        case "seconds":
            return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return str(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; both NaN unless all values are finite, the deviation of one value too."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def format_cell(value: Any, kind: str) -> str:
    """The text of one cell; a list becomes "mean ± spread", the spread being the sample standard deviation."""
    if value is None:
        return _MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        if not value:
            return _MISSING
        mean, deviation = spread(value)
        text = _format_number(mean, kind)
        deviation_kind = "loss" if kind == "difference" else kind  # it has no sign
        return text if len(value) == 1 else f"{text} ± {_format_number(deviation, deviation_kind)}"
    return _format_number(value, kind)


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    return [[format_cell(row.get(column.key), column.kind) for column in columns] for row in rows]


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A GitHub-flavoured Markdown table, texts to the left and numbers to the right, ending in a newline."""
    lines = [
        [column.title for column in columns],
        [":---" if column.kind == "text" else "---:" for column in columns],
        *_cells(rows, columns),
    ]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def plain_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Aligned plain text for logs, two spaces between columns, ending in a newline."""
    lines = [[column.title for column in columns], *_cells(rows, columns)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def aligned(cell: str, column: Column, width: int) -> str:
        return cell.ljust(width) if column.kind == "text" else cell.rjust(width)

    return "".join("  ".join(map(aligned, line, columns, widths)).rstrip() + "\n" for line in lines)


def print_table(
    rows: Sequence[Row], columns: Sequence[Column], *, title: str = "", stream: TextIO | None = None
) -> None:
    """Prints the table: drawn by `rich` on a terminal, aligned plain text elsewhere. Standard output by default."""
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write((f"{title}\n" if title else "") + plain_table(rows, columns))
        stream.flush()
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None)
    for column in columns:
        table.add_column(column.title, justify="left" if column.kind == "text" else "right")
    for line in _cells(rows, columns):
        table.add_row(*map(Text, line))  # as Text, so that brackets in a cell are not taken for markup
    Console(file=stream).print(table)


def write_table(
    directory: str | os.PathLike, name: str, rows: Sequence[Row], columns: Sequence[Column], *, title: str = ""
) -> None:
    """Writes `name.md` (columns, rounded) and `name.json` (the rows with all their keys, exact), each atomically."""
    path = f"{os.fspath(directory)}/{name}"
    write_atomically(f"{path}.json", json_text([dict(row) for row in rows], indent=2) + "\n")
    heading = f"## {title}\n\n" if title else ""
    write_atomically(f"{path}.md", heading + markdown_table(rows, columns))


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
