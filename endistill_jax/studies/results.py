"""The results of a study, `study.json`, and the tables made from it: means, spreads over seeds, paired differences.

`study.json` is an object:

    baseline, seeds       the arm that others are compared with; all seeds
    arms                  name -> objective, terms (those of the loss), optimizer, student, parameters, init,
                          steps (of each stage), flops (of all training steps, by formula), stages (of a chain)
    teacher, data, run    settings
    tasks                 settings of the fine-tunings by name
    eval_spec             what the held-out metrics depend on: teacher, task, data, probe
    versions, devices     of what wrote the file
    teacher_metrics       the teacher's held-out metrics
    runs                  one an arm and seed: arm, seed, tokens, seconds,
                          evaluations: objects with step and every held-out metric, those of the probe as probe/<term>
                          stages: of a chain, tokens, seconds and evaluations of each
                          downstream: task -> metrics, step, tokens, seconds
"""

import json
import os
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from endistill_jax.checkpoints.manifest import objective_of_path, plain, renamed_metrics
from endistill_jax.core.errors import UserError
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import Column, markdown_table
from endistill_jax.storage import reading_failure, stored_path

Raw = Mapping[str, Any]
BySeed = dict[int, float]

PROBE = "probe/"
ARM = Column(key="arm", title="arm")
# A held-out metric, its heading and format, and whether differences to the baseline are shown.
_HELD_OUT = (
    ("token_loss", "loss on non-sentinel tokens", "loss", True),
    ("shuffled_input_gap", "shuffled-input gap", "loss", True),
    ("token_accuracy", "accuracy on non-sentinel tokens", "share", False),
)


def raw_file(folder: str | os.PathLike) -> epath.Path:
    """The path of a folder's `study.json`."""
    return stored_path(folder) / "study.json"


def read_raw(folder: str | os.PathLike) -> Raw:
    """Reads `study.json`.

    Raises:
        UserError: there is none, or it is not of a study.
        StorageFailure: the storage could not be read.
    """
    file = raw_file(folder)
    try:
        raw = json.loads(file.read_text())
        _rename(raw)
    except OSError as error:
        raise reading_failure(f"{file}, the record of a study, cannot be read", error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is no record of a study; move it away") from None
    return raw


def _rename(raw: dict[str, Any]) -> None:
    """Brings what earlier versions wrote to present names: keys, metrics and the probe."""
    for old, new in (("judged_by", "eval_spec"), ("teacher_figures", "teacher_metrics")):
        if old in raw:
            raw[new] = raw.pop(old)
    raw["teacher_metrics"] = renamed_metrics(raw["teacher_metrics"])
    for run in raw["runs"]:
        for each in (run, *run.get("stages", ())):
            each["evaluations"] = [renamed_metrics(evaluation) for evaluation in each["evaluations"]]
    probe = raw["eval_spec"].get("probe")
    if probe and "path" in probe:
        probe["objective"] = plain(objective_of_path(probe.pop("path")).described())


def write_raw(folder: str | os.PathLike, raw: Raw) -> None:
    """Writes `study.json`."""
    write_atomically(raw_file(folder), json_text(raw, indent=1) + "\n")


def arm_runs(raw: Raw, arm: str) -> list[Raw]:
    """The existing runs of an arm, by seed."""
    return sorted((run for run in raw["runs"] if run["arm"] == arm), key=lambda run: run["seed"])


def final(raw: Raw, arm: str, name: str) -> BySeed:
    """A held-out metric at the end of each run of an arm; of a site, `probe/cross`, the mean of its terms."""
    return {run["seed"]: value_of(run["evaluations"][-1], name) for run in arm_runs(raw, arm)}


def downstream(raw: Raw, arm: str, task: str, metric: str) -> BySeed:
    """A metric of a task after each fine-tuning of an arm."""
    return {run["seed"]: float(run["downstream"][task]["metrics"][metric]) for run in arm_runs(raw, arm)}


def curve(raw: Raw, arm: str, name: str) -> dict[int, BySeed]:
    """A held-out metric over the steps at which it was measured, by step and seed; names as of `final`."""
    points: dict[int, BySeed] = {}
    for run in arm_runs(raw, arm):
        for evaluation in run["evaluations"]:
            points.setdefault(evaluation["step"], {})[run["seed"]] = value_of(evaluation, name)
    return dict(sorted(points.items()))


def paired(values: BySeed, baseline: BySeed) -> list[float]:
    """The differences to the baseline, seed by seed, of the seeds that both have."""
    return [values[seed] - baseline[seed] for seed in values if seed in baseline]


def value_of(evaluation: Raw, name: str) -> float:
    """A metric of one evaluation; NaN and infinities, strings in JSON, as floats."""
    if name in evaluation:
        return float(evaluation[name])
    return statistics.fmean(float(evaluation[term]) for term in evaluation if term.startswith(f"{name}/"))


def sites(raw: Raw) -> list[str]:
    """The parts of the probe, each with a curve: sites of attention, and `logits`."""
    terms = {name for run in raw["runs"] for evaluation in run["evaluations"] for name in evaluation}
    found = {name.removeprefix(PROBE).partition("/")[0] for name in terms if name.startswith(PROBE)}
    known = ("encoder_self", "decoder_self", "cross", "logits")
    return [name for name in known if name in found] + sorted(found.difference(known))


def trains_on(raw: Raw, arm: str, site: str) -> bool:
    """Whether an arm's loss has a term of a site, or of the logits."""
    return any(term.partition("/")[0] == site for term in raw["arms"][arm]["terms"])


def task_metrics(raw: Raw) -> list[tuple[str, str]]:
    """Every task with each of its metrics."""
    tasks = [(task, result) for run in raw["runs"] for task, result in run["downstream"].items()]
    return list(dict.fromkeys((task, metric) for task, result in tasks for metric in result["metrics"]))


class Table(NamedTuple):
    """A table with its title; a list in a row has a number for each seed."""

    title: str
    columns: list[Column]
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
    columns, rows = [ARM], _arm_rows(raw)
    for name, title, kind, compared in _HELD_OUT:
        values = {arm: final(raw, arm, name) for arm in raw["arms"]}
        columns += _add_metric(raw, rows, values, Column(key=name, title=title, kind=kind), compared)
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
    teacher = raw["teacher_metrics"]
    rows.append({"arm": "teacher", "parameters": teacher["parameters"]} | {x: teacher.get(x) for x, *_ in _HELD_OUT})
    for ngram in ("unigram", "bigram"):
        if f"{ngram}_loss" in teacher:
            rows.append({"arm": ngram, "token_loss": teacher[f"{ngram}_loss"]})
    return Table("Held-out text after training, nats a token", columns, rows)


def _downstream(raw: Raw) -> Table:
    columns, rows = [ARM], _arm_rows(raw)
    for task, metric in task_metrics(raw):
        values = {arm: downstream(raw, arm, task, metric) for arm in raw["arms"]}
        column = Column(key=f"{task}/{metric}", title=f"{task}: {metric}", kind="number")
        columns += _add_metric(raw, rows, values, column, compared=True)
    return Table("After the same fine-tuning", columns, rows)


def _probe(raw: Raw) -> Table:
    columns, rows = [ARM], _arm_rows(raw)
    for site in sites(raw):
        values = {arm: final(raw, arm, PROBE + site) for arm in raw["arms"]}
        columns += _add_metric(raw, rows, values, Column(key=site, title=site, kind="loss"), compared=False)
    at_start = {site: curve(raw, raw["baseline"], PROBE + site).get(0, {}) for site in sites(raw)}
    if seeds := len(next(iter(at_start.values()))):
        # Other arms may begin elsewhere: with layers of the teacher, or with another shape.
        start = {site: list(values.values()) for site, values in at_start.items()}
        rows.insert(0, {"arm": f"{raw['baseline']} before training ({seeds} seeds)"} | start)
    return Table("Divergence from the teacher on held-out text, mean of a site's relations, nats", columns, rows)


def _arm_rows(raw: Raw) -> list[dict[str, Any]]:
    return [{"arm": arm} for arm in raw["arms"] if arm_runs(raw, arm)]


def _add_metric(
    raw: Raw, rows: list[dict[str, Any]], values: Mapping[str, BySeed], column: Column, compared: bool
) -> list[Column]:
    """Adds a metric to the rows, and if requested its difference to the baseline; returns the columns."""
    difference = f"{column.key}/difference"
    for row in rows:
        arm, of_arm = row["arm"], values[row["arm"]]
        row[column.key] = list(of_arm.values())
        if compared:
            row[difference] = None if arm == raw["baseline"] else paired(of_arm, values[raw["baseline"]])
    return [column, Column(key=difference, title="difference", kind="difference")] if compared else [column]
