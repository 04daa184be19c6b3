"""The report of a study: `study.md` and its plots, made from `study.json` alone.

    python -m endistill_jax.studies.report FOLDER

recreates them from FOLDER/study.json.
"""

import io
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.extras import STUDIES, require
from endistill_jax.reports.files import write_atomically
from endistill_jax.reports.table import print_table, spread
from endistill_jax.studies.results import (
    PROBE,
    BySeed,
    Raw,
    arm_runs,
    curve,
    downstream,
    read_raw,
    sites,
    study_markdown,
    study_tables,
    task_metrics,
    trains_on,
    value_of,
)

# Okabe and Ito's colorblind-safe palette; then further shades of it.
_COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#8A8A8A", "#B8A800", "#7B4FA3")
_MARKERS = "osv^DXP*<>"
_DOTS_PER_INCH = 110


def check_packages() -> None:
    """Checks that plots can be drawn: before anything is trained, not at the end."""
    require("matplotlib", "drawing the plots of a study", STUDIES)


def write_report(folder: str | os.PathLike, raw: Raw) -> None:
    """Writes `study.md` and the plots."""
    plots = study_plots(raw)
    for name, image in plots.items():
        write_atomically(f"{os.fspath(folder)}/{name}", image)
    pictures = "".join(f"\n![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in plots)
    write_atomically(f"{os.fspath(folder)}/study.md", study_markdown(raw) + pictures)


def print_study(raw: Raw) -> None:
    """Prints the tables."""
    for table in study_tables(raw):
        print_table(table.rows, table.columns, title=table.title)


def study_plots(raw: Raw) -> dict[str, bytes]:
    """PNG images by file name: held-out loss; downstream metrics and the probe where there are such."""
    check_packages()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = {"held_out_loss.png": _held_out_loss(raw)}
    if task_metrics(raw):
        figures["downstream.png"] = _downstream(raw)
    if sites(raw):
        figures["divergence.png"] = _divergence(raw)
    plots = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        plots[name] = file.getvalue()
    return plots


def _held_out_loss(raw: Raw) -> Any:
    """The loss on non-sentinel tokens over steps: of an arm's seeds the mean, in a band of their standard deviation."""
    figure, (axes,) = _panels(1, 1, width=7.5, height=4.8)
    for arm in _arms(raw):
        _draw_curve(axes, raw, arm, curve(raw, arm, "token_loss"))
    teacher = raw["teacher_metrics"]
    for name, key in (("teacher", "token_loss"), ("bigram", "bigram_loss")):
        loss = value_of(teacher, key) if key in teacher else math.nan
        if math.isfinite(loss):
            axes.axhline(loss, color="0.5", linestyle=":", linewidth=1)
            axes.annotate(name, (1, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
    axes.set(xlabel="step", ylabel="held-out loss on non-sentinel tokens, nats a token")
    _legend(figure, axes)
    return figure


def _downstream(raw: Raw) -> Any:
    """A panel a metric: a bar for the mean of an arm's seeds, their standard deviation, and a dot for each."""
    metrics, arms = task_metrics(raw), _arms(raw)
    figure, panels = _panels(len(metrics), 3, width=4.6, height=0.6 + 0.36 * len(arms))
    for panel, (task, metric) in zip(panels, metrics, strict=True):
        for place, arm in enumerate(arms):
            values = list(downstream(raw, arm, task, metric).values())
            mean, deviation = spread(values)
            panel.barh(place, mean, xerr=deviation, color=_style(raw, arm)["color"], alpha=0.65, capsize=3)
            panel.plot(values, [place] * len(values), ".", color="black", markersize=4)
        panel.set_yticks(range(len(arms)), arms)
        panel.invert_yaxis()
        panel.set_title(f"{task}: {metric}", fontsize=10)
    return figure


def _divergence(raw: Raw) -> Any:
    """A panel a site: how far each arm is from the teacher over training, dashed where it is not trained on that."""
    figure, panels = _panels(len(sites(raw)), 2, width=4.6, height=3.3)
    for panel, site in zip(panels, sites(raw), strict=True):
        for arm in _arms(raw):
            trained = trains_on(raw, arm, site)
            _draw_curve(panel, raw, arm, curve(raw, arm, PROBE + site), linestyle="-" if trained else "--")
        panel.set_title(site, fontsize=10)
        panel.set(xlabel="step", ylabel="nats a token" if site == "logits" else "nats a row")
        # Matplotlib warns of a logarithmic axis without a positive number.
        if any(mean > 0 for line in panel.get_lines() for mean in line.get_ydata()):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(_minor_tick)
    figure.suptitle("divergence from the teacher on held-out text (dashed: not trained on)", fontsize=11)
    _legend(figure, panels[0])
    return figure


def _draw_curve(axes: Any, raw: Raw, arm: str, points: dict[int, BySeed], linestyle: str = "-") -> None:
    steps = list(points)
    means, deviations = zip(*(spread(list(values.values())) for values in points.values()), strict=True)
    style = _style(raw, arm)
    label = f"{arm} (last stage)" if len(raw["arms"][arm]["steps"]) > 1 else arm
    axes.plot(steps, means, label=label, linestyle=linestyle, markersize=4, linewidth=1.5, **style)
    low, high = ([x + sign * y for x, y in zip(means, deviations, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _arms(raw: Raw) -> list[str]:
    return [arm for arm in raw["arms"] if arm_runs(raw, arm)]


def _style(raw: Raw, arm: str) -> dict[str, str]:
    """An arm's color and marker, the same in every plot."""
    place = list(raw["arms"]).index(arm)
    return {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}


def _panels(count: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its panels in rows of at most `columns`, each of the size in inches."""
    from matplotlib.figure import Figure  # and not pyplot, which has global state

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    for panel in axes[count:]:
        panel.set_visible(False)
    return figure, axes[:count]


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right center", frameon=False)
    for line in legend.get_lines():
        line.set_linestyle("-")  # an arm's line may be solid in one panel and dashed in another


def _minor_tick(value: float, _: int) -> str:
    """The text of a minor tick of a logarithmic axis: of 2, 3 and 5 times a power of ten alone."""
    text = f"{value:g}"
    return text if text.strip("0.") in ("2", "3", "5") else ""


def main(folders: Sequence[str]) -> int:
    """Recreates the tables and plots of each folder."""
    if not folders:
        print("usage: python -m endistill_jax.studies.report FOLDER ...", file=sys.stderr)
        return 2
    for folder in folders:
        try:
            write_report(folder, read_raw(folder))
        except (UserError, StorageFailure) as error:
            print(f"endistill: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
