"""Records the golden of checkpoint format 2: what a run left, for later versions to load and resume.

    python record_format_2.py OUTPUT

writes to the folder OUTPUT

    format_2.tar.xz    corpus.txt    the text that the run reads
                       teacher/      its teacher, a Hugging Face folder
                       distilled/    a distillation of 8 steps as a kill after its checkpoint of step 4 leaves it
    format_2.json      what the run logged and ended with, to its step 8

The objective carries what those of format 1 did not: a term with parameters of its own, a coefficient and interpolated
targets that move, the latter with a state. The run is made in the folder that is packed, and knows it by relative names
only: tf.data keeps the name of an open file in its saved position. All is computed on one CPU device, in float32.

This script uses the interfaces of the commit that it was written for, and stays as it is.
"""

import contextlib
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile
from typing import Any

import jax
import optax
import orbax.checkpoint
import tensorflow as tf
from endistill_jax.checkpoints.reading import finished_steps, read_manifest_of_step

import endistill_jax
from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.models import open_model
from endistill_jax.jobs import Data, Experiment, Run, Teacher, distill
from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import ForwardKL, HiddenDistance, InterpolatedTargets, Objective, Ramp, relations
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig

NAME = "format_2"
KILLED_AT, STEPS = 4, 8


def small_model(width: int) -> T5Config:
    """A model of 1 + 1 layers for the byte vocabulary."""
    return T5Config(
        vocab_size=384,
        d_model=width,
        num_heads=2,
        head_dim=2,
        mlp_dim=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        tied_head=True,
        scan_layers=False,
    )


def experiment() -> Experiment:
    """The distillation, in the folder of its corpus and teacher."""
    task = text_files_task(f"golden_{NAME}", "corpus.txt", "bytes", held_out=0.1)
    terms = (
        *relations("cross", ("qk", "vv"), relation_heads=2),
        HiddenDistance(coefficient=Ramp(start=0.5, steps=6)),
        ForwardKL(),
    )
    return Experiment(
        student=small_model(4),
        teacher=Teacher(source="teacher", dtype="float32"),
        objective=Objective(terms=terms, interpolated_targets=InterpolatedTargets(steps=7, adaptive_rate=0.1)),
        data=Data(task=task, inputs_length=8, targets_length=4, batch_size=4, eval_batch_size=4, eval_batches=2),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        run=Run(steps=STEPS, log_every=1, checkpoint_every=KILLED_AT, keep_last=2, tensorboard=False),
    )


def record() -> dict[str, Any]:
    """Makes the run in the current folder; returns what a test expects of it."""
    pathlib.Path("corpus.txt").write_text("".join(f"{number}: the cat sat on the mat.\n" for number in range(500)))
    params = jax.device_get(init_params(small_model(8), jax.random.key(1)))
    huggingface.save("teacher", params, small_model(8), dtype="bfloat16", embedding_copies=False)
    distill(model_dir="distilled", experiment=experiment())
    modules = (endistill_jax, jax, optax, orbax.checkpoint, tf)
    manifest = read_manifest_of_step("distilled/checkpoints", STEPS)
    records = read_metrics("distilled/metrics.jsonl")
    return {
        "made_with": {module.__name__: module.__version__ for module in modules},
        "teacher": {"fingerprint": open_model("teacher").fingerprint},
        "distilled": {
            "metrics": [{name: value for name, value in each.items() if name != "timing"} for each in records],
            "fingerprints": {
                str(step): open_model(f"distilled/checkpoints/{step}").fingerprint
                for step in finished_steps("distilled/checkpoints")
            },
            "held_out": manifest["held_out"],
            "tokens": manifest["progress"]["tokens"],
        },
    }


def leave_as_killed(model_dir: pathlib.Path) -> None:
    """Takes from a finished run all that it wrote after its checkpoint of step `KILLED_AT`."""
    shutil.rmtree(model_dir / "checkpoints" / str(STEPS))
    for file in model_dir.iterdir():
        if file.name not in ("checkpoints", "metrics.jsonl"):
            file.unlink()
    metrics = model_dir / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= KILLED_AT]
    metrics.write_text("".join(kept))


def pack(folder: pathlib.Path, archive: pathlib.Path) -> None:
    """Packs what is in a folder, by names relative to it, without times and owners."""

    def bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name, filter=bare)


def main(output: pathlib.Path) -> None:
    """Makes the run in a temporary folder and packs what is kept of it."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.chdir(folder):
            expected = record()
        leave_as_killed(pathlib.Path(folder, "distilled"))
        pack(pathlib.Path(folder), output / f"{NAME}.tar.xz")
    (output / f"{NAME}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
