"""The manifest of a checkpoint: the settings of its run as plain values, and their comparison on resume.

    schema     2; the first checkpoints have none
    run        what changes the mathematics or the order of the data; see `train.training.Training.identity`
    progress   tokens, seconds, the best evaluation, whether the run is complete
    teacher, initial   where the other models were
    held_out   metrics of the step's evaluation, if there was one

Adding an option never orphans a checkpoint: a field that a manifest does not have counts as having its default.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from endistill_jax.core.errors import UserError

SCHEMA = 2

Manifest = dict[str, Any]

_ABSENT = "absent"
_METRICS_OF_SCHEMA_1 = {
    "piece_loss": "token_loss",
    "piece_accuracy": "token_accuracy",
    "unigram_piece_loss": "unigram_loss",
    "bigram_piece_loss": "bigram_loss",
    "wrong_input_piece_loss": "shuffled_input_loss",
    "wrong_input_cost": "shuffled_input_gap",
    "pieces": "non_sentinel_tokens",
}


def plain(value: Any) -> Any:
    """Settings as they are in a manifest: dataclasses with their type, tuples as lists, functions by name."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, Callable) else value


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested plain values as dotted names and JSON texts: a tuple equals the list it becomes in a file."""
    flat = {}
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            flat |= flattened(each, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(each, sort_keys=True)
    return flat


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any], where: str = "the checkpoint") -> None:
    """Refuses to resume from a checkpoint of a different run, naming every difference with both values.

    Values of `current` may be dataclasses, whose defaults stand for what `saved`, of a manifest, lacks.
    """
    differences = [f"{name} is {there} there and {here} here" for name, there, here in _differences(saved, current)]
    if differences:
        raise UserError(
            f"{where} was made with other settings: {'; '.join(sorted(differences))}. "
            "Give the settings it was made with, or another model directory"
        )


def upgraded(manifest: Manifest) -> Manifest:
    """A manifest of any earlier schema, in the present one."""
    schema = manifest.get("schema", 1)
    if schema > SCHEMA:
        raise UserError(
            f"a checkpoint's manifest has schema {schema}, and this version reads up to {SCHEMA}; "
            "use the version that wrote it, or a later one"
        )
    return _from_schema_1(manifest) if schema == 1 else manifest


def _from_schema_1(manifest: Manifest) -> Manifest:
    upgraded = manifest | {"schema": SCHEMA}
    run, progress = dict(manifest.get("run", {})), dict(manifest.get("progress", {}))
    if "path" in run:
        run["objective"] = plain(objective_of_path(run.pop("path")).described())
    if run.get("evaluation", {}).get("keep_best"):
        chosen = run["evaluation"]["keep_best"]
        run["evaluation"] = run["evaluation"] | {"keep_best": _METRICS_OF_SCHEMA_1.get(chosen, chosen)}
    if "best" in progress:
        progress["best"] = progress["best"] | {"metrics": renamed_metrics(progress["best"]["metrics"])}
    for name, value in (("run", run), ("progress", progress)):
        if value:
            upgraded[name] = value
    if manifest.get("held_out"):
        upgraded["held_out"] = renamed_metrics(manifest["held_out"])
    return upgraded


def renamed_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of schema 1, with or without `held_out/` before their names, by their present names."""

    def present(name: str) -> str:
        before, slash, own = name.rpartition("/")
        return before + slash + _METRICS_OF_SCHEMA_1.get(own, own)

    return {present(name): value for name, value in metrics.items()}


def objective_of_path(path: Mapping[str, Any]) -> Any:
    """The objective that a path of schema 1 was: three sites, each with a weight and one layer, logits and LM loss."""
    from endistill_jax.core.attention import SITES
    from endistill_jax.objectives import CrossEntropy, ForwardKL, InterpolatedTargets, Objective, relations

    terms: list[Any] = []
    for name in SITES:
        site = path.get(name)
        if site and site["weight"] > 0:
            options = {key: site[key] for key in ("relation_heads", "teacher_layer", "student_layer")}
            terms += relations(name, tuple(site["relations"]), coefficient=site["weight"], **options)
    if path["logits_weight"] > 0:
        terms.append(ForwardKL(coefficient=path["logits_weight"], temperature=path["temperature"]))
    if path["lm_weight"] > 0:
        terms.append(CrossEntropy(coefficient=path["lm_weight"], z_loss=path["z_loss"]))
    targets = path.get("interpolated_targets")
    return Objective(terms=tuple(terms), interpolated_targets=targets and InterpolatedTargets(**targets))


def _differences(saved: Any, current: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, value there, value here) of everything that differs."""

    def shown(value: Any) -> str:
        return json.dumps(plain(value), sort_keys=True)

    if isinstance(saved, Mapping) and (dataclasses.is_dataclass(current) or isinstance(current, Mapping)):
        defaults, here = _fields(current)
        for key in sorted(saved.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            if key not in here and not (saved[key] is None or key == "type"):
                yield inner, shown(saved[key]), _ABSENT
            elif key in here and key not in saved and key != "type":
                if key not in defaults or plain(defaults[key]) != plain(here[key]):
                    yield inner, _ABSENT, shown(here[key])
            elif key in here and key in saved:
                yield from _differences(saved[key], here[key], inner)
    elif not _equal(plain(saved), plain(current)):
        yield name, shown(saved), shown(current)


def _equal(saved: Any, current: Any) -> bool:
    """Whether two plain values are the same, 1 and 1.0 too."""
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (saved, current)]
    return (
        saved == current if all(numbers) else json.dumps(saved, sort_keys=True) == json.dumps(current, sort_keys=True)
    )


def _fields(current: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The defaults of settings, and their values, with the type."""
    if not dataclasses.is_dataclass(current):
        return {key: None for key, value in current.items() if value is None}, dict(current)
    values, defaults = {"type": type(current).__name__}, {}
    for field in dataclasses.fields(current):
        values[field.name] = getattr(current, field.name)
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults, values
