"""The README.md of an exported model: what it is, how it was made, what it reached."""

from collections.abc import Mapping
from typing import Any

from endistill_jax import __version__
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.reports.table import format_count

_HELD_OUT = {
    "loss": "loss, nats a token",
    "token_loss": "loss on non-sentinel tokens, nats a token",
    "shuffled_input_gap": "shuffled-input gap, nats a token",
    "accuracy": "token accuracy",
    "token_accuracy": "accuracy on non-sentinel tokens",
}


def model_card(name: str, config: ModelConfig, manifest: Mapping[str, Any], step: int) -> str:
    """Markdown with the header that the Hugging Face hub reads; the manifest of a converted model is empty."""
    teacher = manifest.get("teacher")
    tags = ["t5", "endistill-jax", *(["distillation"] if teacher else [])]
    parts = [
        "---\nlibrary_name: transformers\ntags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---",
        f"# {name}",
        _what_it_is(config, teacher),
        _usage(config),
    ]
    if "objective" in manifest.get("run", {}):
        parts.append(_training(manifest, step))
    if "import" in manifest:
        parts.append(f"Converted from `{manifest['import']['source']}`.")
    if manifest.get("held_out"):
        metrics = manifest["held_out"]  # of an encoder alone, the distances from its teacher
        titles = {key: title for key, title in _HELD_OUT.items() if key in metrics} or {key: key for key in metrics}
        rows = [f"| {title} | {metrics[key]:.4g} |" for key, title in titles.items()]
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


def _training(manifest: Mapping[str, Any], step: int) -> str:
    run, progress, teacher = manifest["run"], manifest.get("progress", {}), manifest.get("teacher")
    lengths = f"{run['data']['inputs_length']} / {run['data']['targets_length']}"
    rows = {
        "task": f"`{run['task']}`, rows of {lengths} tokens, {run['data']['batch_size']} a step",
        "steps": f"{step:,} of {run['steps']:,}",
        "tokens": format_count(progress["tokens"]) if "tokens" in progress else None,
        "teacher": f"`{teacher['source']}`" if teacher else None,
        "teacher's fingerprint": f"`{run['teacher']}`" if teacher else None,
        # Such as "cross/qk 0.5, cross/vv 0.5, logits 1".
        "objective": ", ".join(f"{n} {_coefficient(t['coefficient'])}" for n, t in run["objective"]["terms"].items()),
        "initial parameters": _initial(run.get("student_init")),
        "optimizer": f"{run['optimizer']['name']}, learning rate {run['optimizer']['learning_rate']}",
        "seed": run["seed"],
        "vocabulary's fingerprint": f"`{run['vocabulary']}`",
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)


def _coefficient(saved: Any) -> str:
    """A number, or a schedule with its settings."""
    if isinstance(saved, Mapping):
        return " ".join(f"{name} {value}" if name != "type" else value for name, value in saved.items())
    return f"{saved:.3g}" if isinstance(saved, (int, float)) else str(saved)


def _initial(student_init: Mapping[str, Any] | None) -> str | None:
    if student_init is None or student_init["kind"] == "random":
        return "random"
    return ", ".join(f"{name} {value}" for name, value in student_init.items() if value is not None)
