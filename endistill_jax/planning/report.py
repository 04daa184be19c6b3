"""Reports of plans: one step in full, several as a table, both as Markdown and JSON."""

import os
from collections.abc import Sequence
from typing import Any

from endistill_jax.planning.planned import PlannedStep, Range
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import Column, format_count, markdown_table

GIB = 2**30
PROXY = (
    "compiled by the CPU's compiler on as many devices: shapes and what is kept are right, temporaries are a proxy only"
)
_TABLE = {
    "stage": "stage",
    "topology": "topology",
    "mesh": "mesh (data x fsdp x tensor)",
    "batch": "examples a chip",
    "remat": "remat",
    "teacher": "teacher",
    "status": "",
    "memory": "GiB a chip",
    "temporaries": "of it temporaries",
    "flops": "TFLOP a chip",
    "sent": "GB sent a chip",
    "seconds": "step, s",
    "tokens": "tokens a day",
    "chip_hours": "chip-hours",
    "cost": "cost",
    "compiling": "compiling, s",
}
_TEXTS = ("stage", "topology", "mesh", "remat", "teacher", "status")


def describe_plan(plan: PlannedStep) -> str:
    """One step in full, as Markdown."""
    request, result = plan.request, plan.result
    topology = request.topology
    entries = {"mesh": _mesh(plan), "batch": _batch(plan), "settings": _settings(plan)}
    if plan.compiled:
        entries |= _sizes(plan)
    entries["model FLOPs a step, by formula"] = f"{plan.model_flops:.4g}"
    if plan.run is not None:
        entries |= _times(plan)
    if "host_memory" in result:
        seconds = f"{result['compile_seconds']:.0f} s, " if plan.compiled else ""
        entries["compiling took, on this machine"] = f"{seconds}{result['host_memory'] / GIB:.1f} GiB of memory"
    columns = [Column(key="name", title=""), Column(key="value", title="")]
    lines = [
        f"## {topology.name}: {topology.chips} chips, {plan.status}" + (f" ({plan.reason})" if plan.reason else ""),
        "",
        markdown_table([{"name": name, "value": value} for name, value in entries.items()], columns),
    ]
    if plan.compiled and result["collectives"]:
        lines += ["Collectives of one chip in one step, times the trip counts of loops:", "", _collectives(plan)]
    if result.get("uncounted_loops"):
        lines += [f"{result['uncounted_loops']} loops have an unknown trip count: what is in them counts once.", ""]
    if topology.is_proxy:
        lines += [f"A proxy: {PROXY}.", ""]
    if plan.seconds is not None:
        lines += [f"Assumed: {plan.assumptions}. Specifications of the chip: {topology.chip.source}.", ""]
    return "\n".join(lines)


def plans_table(plans: Sequence[PlannedStep], stages: Sequence[int] = ()) -> str:
    """One row a step, as Markdown; with the stage that each is of, where there are stages."""
    rows = [_row(plan) for plan in plans]
    for row, stage in zip(rows, stages, strict=False):
        row["stage"] = str(stage)
    shown = [key for key in _TABLE if any(row.get(key) is not None for row in rows)]
    columns = [Column(key=key, title=_TABLE[key], kind="text" if key in _TEXTS else "number") for key in shown]
    notes = [
        f"- {plan.request.topology.name}, {_mesh(plan)}, {plan.request.batch_per_chip:g} a chip, {_settings(plan)}: "
        f"{plan.reason}\n"
        for plan in plans
        if plan.reason
    ]
    return markdown_table(rows, columns) + ("\n" + "".join(notes) if notes else "")


def chain_text(planned: Sequence[Sequence[PlannedStep]]) -> str:
    """The first plan of every stage and topology in one table, and the chip-hours of all stages together.

    Args:
        planned: the plans of each stage, in order.
    """
    first: dict[tuple[str, int], PlannedStep] = {}
    for number, plans in enumerate(planned, 1):
        for plan in plans:
            first.setdefault((plan.request.topology.name, number), plan)
    lines = [plans_table(list(first.values()), [number for _, number in first])]
    for name in dict.fromkeys(name for name, _ in first):
        runs = [plan.run for (topology, _), plan in first.items() if topology == name]
        if len(runs) == len(planned) and None not in runs:
            hours = Range(
                least=sum(run.chip_hours.least for run in runs), most=sum(run.chip_hours.most for run in runs)
            )
            lines.append(f"{name}: {_range(hours)} chip-hours for all stages, estimated.\n")
    return "\n".join(lines)


def rank(plans: Sequence[PlannedStep]) -> list[PlannedStep]:
    """Plans that fit first, by the geometric mean of the bounds of tokens a day; the rest in order."""

    def key(plan: PlannedStep) -> tuple[bool, float]:
        tokens = plan.run and plan.run.tokens_a_day
        return not plan.fits, -((tokens.least * tokens.most) ** 0.5) if tokens else 0.0

    return sorted(plans, key=key)


def write_plans(folder: str | os.PathLike[str], name: str, plans: Sequence[PlannedStep], text: str) -> None:
    """Writes `name.md` and `name.json` to a folder."""
    path = f"{os.fspath(folder)}/{name}"
    write_atomically(f"{path}.json", json_text([plan.as_json() for plan in plans], indent=1) + "\n")
    write_atomically(f"{path}.md", text)


def _mesh(plan: PlannedStep) -> str:
    sizes = plan.result["mesh"].values() if plan.compiled else plan.request.mesh
    return " x ".join(map(str, sizes))


def _batch(plan: PlannedStep) -> str:
    batch, source, target = plan.request.lengths
    return (
        f"{plan.request.batch_per_chip:g} examples a chip, {batch} in all, of {source} + {target} positions; "
        f"{format_count(plan.request.tokens)} a step"
    )


def _settings(plan: PlannedStep) -> str:
    request = plan.request
    parts = [f"remat {request.student.remat}"]
    if request.teacher is not None:
        parts.append(f"teacher {request.teacher_sharding} in {request.teacher.dtype}")
    if request.micro_batches > 1:
        parts.append(f"{request.micro_batches} micro-batches")
    if request.compiler_options:
        parts.append(f"compiler options {request.compiler_options}")
    return ", ".join(parts)


def _sizes(plan: PlannedStep) -> dict[str, str]:
    """Parameters, memory and FLOPs of a compiled step."""
    result, topology = plan.result, plan.request.topology
    held, memory, flops = result["held"], result["memory"], result["flops"]
    of_chip = "" if topology.chip.memory is None else f" of {topology.chip.memory / GIB:.4g}"
    kept = ", ".join(f"{owner} {size / GIB:.2f}" for owner, size in held.items() if size)
    rest = ("temporaries", "outputs", "aliases", "program")
    share = f", {flops * topology.chips / plan.model_flops:.2f} times the formula's" if plan.model_flops else ""
    teacher = {"teacher": f"{format_count(result['teacher_params'])} parameters"} if plan.request.teacher else {}
    return teacher | {
        "student": f"{format_count(result['student_params'])} parameters",
        "memory a chip, GiB": f"{plan.memory / GIB:.2f}{of_chip}",
        "its arguments, GiB": f"{memory['arguments'] / GIB:.2f} as laid out; by shapes {kept}",
        "the rest, GiB": ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in rest),
        "FLOPs a chip, of the compiled program": f"{flops:.4g}{share}",
    }


def _times(plan: PlannedStep) -> dict[str, str]:
    run = plan.run
    times = {
        "step, estimated": f"{_range(plan.seconds)} s",
        "tokens a day": _range(run.tokens_a_day, counts=True),
        "chip-hours of the run": f"{_range(run.chip_hours)} for {format_count(plan.run_tokens)} tokens",
    }
    return times if run.cost is None else times | {"cost": f"{_range(run.cost)} at {plan.price:g} a chip-hour"}


def _collectives(plan: PlannedStep) -> str:
    rows = [
        {
            "kind": each["kind"] + (", between slices" if each["crosses_slices"] else ""),
            "count": str(each["count"]),
            "payload": f"{each['payload'] / 1e9:.3f}",
            "sent": f"{each['sent'] / 1e9:.3f}",
        }
        for each in plan.result["collectives"]
    ]
    titles = {"count": "times", "payload": "GB gathered, reduced or exchanged", "sent": "GB that a chip sends"}
    columns = [Column(key="kind", title="kind")]
    columns += [Column(key=key, title=title, kind="number") for key, title in titles.items()]
    return markdown_table(rows, columns)


def _row(plan: PlannedStep) -> dict[str, Any]:
    request, run = plan.request, plan.run
    row: dict[str, Any] = {
        "topology": request.topology.name,
        "mesh": _mesh(plan),
        "batch": f"{request.batch_per_chip:g}",
        "remat": request.student.remat,
        "teacher": request.teacher_sharding if request.teacher is not None else None,
        "status": plan.status,
    }
    if plan.compiled:
        result = plan.result
        row |= {
            "memory": f"{plan.memory / GIB:.1f}",
            "temporaries": f"{result['memory']['temporaries'] / GIB:.1f}",
            "flops": f"{result['flops'] / 1e12:.3g}",
            "sent": f"{sum(each['sent'] for each in result['collectives']) / 1e9:.3g}",
            "compiling": f"{result['compile_seconds']:.0f}",
        }
    if run is not None:
        row |= {
            "seconds": _range(plan.seconds),
            "tokens": _range(run.tokens_a_day, counts=True),
            "chip_hours": _range(run.chip_hours),
            "cost": None if run.cost is None else _range(run.cost),
        }
    return row


def _range(bounds: Range, counts: bool = False) -> str:
    show = format_count if counts else _three_digits
    return f"{show(bounds.least)} to {show(bounds.most)}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
