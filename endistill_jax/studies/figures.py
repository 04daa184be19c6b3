"""The metrics of a study, read from the content of `study.json`. Pure; uses the standard library only.

`study.json` is an object:

    baseline, seeds       the arm that others are compared with; all seeds
    arms                  name -> path, terms (those of the loss), optimizer, student, parameters, student_init,
                          steps (of each stage), flops (of all training steps, by formula), stages (of a chain)
    teacher, data, run    settings
    tasks                 settings of the fine-tunings by name
    judged_by             eval_spec of the held-out metrics: teacher, task, data, probe
    versions, devices     of what wrote the file
    teacher_figures       the teacher's held-out metrics
    runs                  one an arm and seed: arm, seed, tokens, seconds,
                          evaluations: objects with step and every held-out metric, those of the probe as probe/<term>
                          stages: of a chain, tokens, seconds and evaluations of each
                          downstream: task -> metrics, step, tokens, seconds
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

Raw = Mapping[str, Any]
BySeed = dict[int, float]

PROBE = "probe/"


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
    found: Iterable[tuple[str, str]] = (
        (task, metric)
        for run in raw["runs"]
        for task in run["downstream"]
        for metric in run["downstream"][task]["metrics"]
    )
    return list(dict.fromkeys(found))
