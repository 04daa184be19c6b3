"""The tables of a study, from the content of `study.json`: means, spreads over seeds, differences paired by seed."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from endistill_jax.reports.table import Column, markdown_table
from endistill_jax.studies.figures import (
    PROBE,
    BySeed,
    Raw,
    arm_runs,
    curve,
    downstream,
    final,
    paired,
    sites,
    task_metrics,
    trains_on,
)

# Name of a held-out metric, its heading, its format, and whether differences to the baseline are shown.
_HELD_OUT = (
    ("token_loss", "loss on non-sentinel tokens", "loss", True),
    ("shuffled_input_gap", "shuffled-input gap", "loss", True),
    ("token_accuracy", "accuracy on non-sentinel tokens", "share", False),
)
ARM = Column(key="arm", title="arm")


class Table(NamedTuple):
    """A table with its title.

    Attributes:
        title: a heading.
        columns: of the table.
        rows: plain values; a list has a number for each seed.
    """

    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]


def study_tables(raw: Raw) -> list[Table]:
    """Held-out metrics, downstream metrics if there are tasks, and the probe if there is one."""
    tables = [_held_out(raw)]
    if task_metrics(raw):
        tables.append(_downstream(raw))
    if sites(raw):
        tables.append(_probe(raw))
    return tables


def study_markdown(raw: Raw) -> str:
    """All tables as one Markdown text."""
    seeds = ", ".join(map(str, raw["seeds"]))
    head = (
        f"Seeds {seeds}. Values are means over them ± sample standard deviation. Each difference is that to the arm "
        f"`{raw['baseline']}` of the same seed, then mean and deviation.\n\n"
    )
    if len(raw["runs"]) < (planned := len(raw["arms"]) * len(raw["seeds"])):
        head += f"{len(raw['runs'])} of {planned} runs have ended: arms may have values of fewer seeds.\n\n"
    return head + "\n".join(
        f"## {table.title}\n\n{markdown_table(table.rows, table.columns)}" for table in study_tables(raw)
    )


def _held_out(raw: Raw) -> Table:
    columns = [ARM]
    rows = _arm_rows(raw)
    for name, title, kind, compared in _HELD_OUT:
        columns += _add_figure(raw, rows, name, title, kind, compared, lambda arm, name=name: final(raw, arm, name))
    for row in rows:
        runs, arm = arm_runs(raw, row["arm"]), raw["arms"][row["arm"]]
        row["steps"] = " + ".join(map(str, arm["steps"]))
        row |= {"flops": f"{arm['flops']:.3g}", "parameters": arm["parameters"]}
        row["tokens"] = statistics.fmean(run["tokens"] for run in runs)
        row["seconds"] = [run["seconds"] for run in runs]
    columns += [
        Column(key="parameters", title="parameters", kind="count"),
        Column(key="steps", title="steps", kind="count"),
        Column(key="tokens", title="tokens seen", kind="count"),
        Column(key="flops", title="FLOPs", kind="number"),
        Column(key="seconds", title="training", kind="seconds"),
    ]
    figures = raw["teacher_figures"]
    rows.append({"arm": "teacher", "parameters": figures["parameters"]} | {x: figures.get(x) for x, *_ in _HELD_OUT})
    for ngram in ("unigram", "bigram"):
        if f"{ngram}_loss" in figures:
            rows.append({"arm": ngram, "token_loss": figures[f"{ngram}_loss"]})
    return Table("Held-out text after training, nats a token", tuple(columns), rows)


def _downstream(raw: Raw) -> Table:
    columns, rows = [ARM], _arm_rows(raw)
    for task, metric in task_metrics(raw):
        name = f"{task}/{metric}"
        columns += _add_figure(
            raw,
            rows,
            name,
            f"{task}: {metric}",
            "number",
            True,
            lambda arm, of=(task, metric): downstream(raw, arm, *of),
        )
    return Table("After the same fine-tuning", tuple(columns), rows)


def _probe(raw: Raw) -> Table:
    columns, rows = [ARM], _arm_rows(raw)
    for site in sites(raw):
        _add_figure(raw, rows, site, site, "loss", False, lambda arm, site=site: final(raw, arm, PROBE + site))
        columns.append(Column(key=site, title=site, kind="loss"))
        for row in rows:
            row[f"{site}/trained"] = trains_on(raw, row["arm"], site)
    if start := curve(raw, raw["baseline"], PROBE + sites(raw)[0]).get(0):
        untrained = {site: list(curve(raw, raw["baseline"], PROBE + site)[0].values()) for site in sites(raw)}
        # Other arms may begin elsewhere: with layers of the teacher, or with another shape.
        rows.insert(0, {"arm": f"{raw['baseline']} before training ({len(start)} seeds)"} | untrained)
    return Table("Divergence from the teacher on held-out text, mean of a site's relations, nats", tuple(columns), rows)


def _arm_rows(raw: Raw) -> list[dict[str, Any]]:
    return [{"arm": arm} for arm in raw["arms"] if arm_runs(raw, arm)]


def _add_figure(
    raw: Raw,
    rows: list[dict[str, Any]],
    name: str,
    title: str,
    kind: str,
    compared: bool,
    values_of: Callable[[str], BySeed],
) -> list[Column]:
    """Adds a metric to the rows, and if requested its difference to the baseline; returns the columns."""
    baseline = values_of(raw["baseline"])
    for row in rows:
        values = values_of(row["arm"])
        row[name] = list(values.values())
        if compared:
            row[f"{name}/difference"] = None if row["arm"] == raw["baseline"] else paired(values, baseline)
    columns = [Column(key=name, title=title, kind=kind)]
    if compared:
        columns.append(Column(key=f"{name}/difference", title="difference", kind="difference"))
    return columns
