"""What `--dry_run` prints: the resolved settings, shapes and parameter counts of a training, without starting it."""

import dataclasses

import jax

from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.reports.table import format_count
from endistill_jax.train.training import Training


def describe(training: Training) -> str:
    """One setting per line, then one parameter with its shape per line."""
    lines = [f"model_dir: {training.model_dir}", f"mesh: {dict(training.mesh().shape)}"]
    if training.teacher is not None:
        lines.append(f"teacher: {training.teacher.source}, {_size(training.teacher.config)}")
        lines.append(f"  {training.teacher.config}")
    if training.initial is not None:
        lines.append(f"starts from: {training.initial.source}, step {training.initial.step}")
    lines.append(f"student: {_size(training.student)}" if training.teacher else f"model: {_size(training.student)}")
    lines.append(f"  {training.student}")
    if training.teacher is not None:
        lines.append(f"init: {training.experiment.init.facts(training.teacher.config, training.student)}")
    lines.append(f"task: {training.task().name}")
    lines += [f"objective: {term}" for term in training.objective.terms]
    for name in ("data", "optimizer", "run"):
        settings = getattr(training.experiment, name)
        shown = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        shown.pop("task", None)
        lines.append(f"{name}: {shown}")
    tokens = training.data.batch_size * (training.data.inputs_length + training.data.targets_length)
    lines.append(f"tokens: at most {format_count(tokens)} a step, {format_count(tokens * training.run.steps)} in all")
    lines.append("parameters:")
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(training.student)):
        lines.append(f"  {'/'.join(entry.key for entry in path)} {list(leaf.shape)}")
    return "\n".join(lines)


def _size(config: ModelConfig) -> str:
    return f"{format_count(count_params(abstract_params(config)))} parameters"
