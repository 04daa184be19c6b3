"""The README.md of an exported model: what it is, how it was made, what it reached."""

from collections.abc import Mapping
from typing import Any

from endistill_jax import __version__
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.objectives.objective import SITES
from endistill_jax.reports.table import format_count

_HELD_OUT = {
    "loss": "loss, nats a token",
    "piece_loss": "loss on pieces, nats a token",
    "wrong_input_cost": "cost of a wrong input, nats a token",
    "accuracy": "token accuracy",
    "piece_accuracy": "token accuracy on pieces",
}


def model_card(name: str, config: ModelConfig, facts: Mapping[str, Any], step: int) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        name: title.
        config: of the model.
        facts: what its checkpoint was saved with; empty for a model that was only converted.
        step: optimizer steps it was trained for.
    """
    teacher = facts.get("teacher")
    tags = ["t5", "endistill-jax", *(["distillation"] if teacher else [])]
    parts = [
        "---\nlibrary_name: transformers\ntags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---",
        f"# {name}",
        _what_it_is(config, teacher),
        _usage(config),
    ]
    if "path" in facts.get("run", {}):
        parts.append(_training(facts, step))
    if "import" in facts:
        parts.append(f"Converted from `{facts['import']['source']}`.")
    if facts.get("held_out"):
        rows = [f"| {title} | {facts['held_out'][key]:.4g} |" for key, title in _HELD_OUT.items()]
        parts.append("## Held-out text\n\n| | |\n|---|---|\n" + "\n".join(rows))
    parts.append(f"Written by endistill-jax {__version__}.")
    return "\n\n".join(parts) + "\n"


def _what_it_is(config: ModelConfig, teacher: Mapping[str, Any] | None) -> str:
    size = format_count(count_params(abstract_params(config)))
    what = "encoder-decoder" if config.depth("decoder") else "encoder"
    text = f"A {config.family.name.upper()} {what} of {size} parameters: {config.family.describe(config)}."
    if teacher is None:
        return text
    return f"{text} It was distilled, task-agnostically, from `{teacher['source']}` and is meant to be fine-tuned."


def _usage(config: ModelConfig) -> str:
    loader = "AutoModelForSeq2SeqLM" if config.depth("decoder") else config.family.huggingface.usage(config)
    return (
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )


def _training(facts: Mapping[str, Any], step: int) -> str:
    run, progress, teacher = facts["run"], facts.get("progress", {}), facts.get("teacher")
    lengths = f"{run['data']['inputs_length']} / {run['data']['targets_length']}"
    rows = {
        "task": f"`{run['task']}`, rows of {lengths} tokens, {run['data']['batch_size']} a step",
        "steps": f"{step:,} of {run['steps']:,}",
        "tokens": format_count(progress["tokens"]) if "tokens" in progress else None,
        "teacher": f"`{teacher['source']}`" if teacher else None,
        "teacher's fingerprint": f"`{run['teacher']}`" if teacher else None,
        "path": _path(run["path"]),
        "initial parameters": _initial(run.get("student_init")),
        "optimizer": f"{run['optimizer']['name']}, learning rate {run['optimizer']['learning_rate']}",
        "seed": run["seed"],
        "vocabulary's fingerprint": f"`{run['vocabulary']}`",
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)


def _path(path: Mapping[str, Any]) -> str:
    """The parts of a path that teach, such as "encoder_self: qq kk vv; logits (weight 1.0)"."""
    sites = {name: path[name] for name in SITES if path[name] and path[name]["weight"] > 0}
    parts = [
        f"{name}: {' '.join(site['relations'])} (weight {site['weight']}, {site['relation_heads']} relation heads, "
        f"layer {site['student_layer']} to the teacher's {site['teacher_layer']})"
        for name, site in sites.items()
    ]
    for name, title in (("logits_weight", "logits"), ("lm_weight", "targets")):
        if path[name] > 0:
            parts.append(f"{title} (weight {path[name]})")
    return "; ".join(parts)


def _initial(student_init: Mapping[str, Any] | None) -> str | None:
    if student_init is None or student_init["kind"] == "random":
        return "random"
    return ", ".join(f"{name} {value}" for name, value in student_init.items() if value is not None)
