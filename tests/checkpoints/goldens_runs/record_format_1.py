# ruff: noqa: I001  its imports are of then
"""Records the goldens of checkpoint format 1: what runs of endistill-jax 0 left, for its successors to load and resume.

    python record.py OUTPUT

writes to the folder OUTPUT

    format_1.tar.xz     corpus.txt    the text that both runs read
                        teacher/      the distillation's teacher, a Hugging Face folder
                        distilled/    a distillation of 8 steps as a kill after its checkpoint of step 4 leaves it
                        pretrained/   a finished pretraining of 4 steps
    expected.json       what the runs told and ended with, the distillation to its step 8

The runs are made in the folder that is packed, which they know by relative names only: tf.data keeps the name of a file
that it has open in its saved position, so the distillation can be resumed in the folder that has corpus.txt. Everything
is computed on one CPU device, in float32. For the archive's size, texts are short and alike (a position holds a shuffle
buffer of 2,048 examples) and the teacher is kept in bfloat16. How many files a checkpoint has, and how large the
archive is, changes from one recording to the next, with the moments at which arrays are written.

This script uses the interfaces of the commit that it was written for, and stays as it is.
"""

import contextlib
import hashlib
import io
import itertools
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile
import zipfile
from typing import Any

import jax
import optax
import orbax.checkpoint
import tensorflow as tf

import endistill_jax
from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.reading import finished_steps
from endistill_jax.data.pipeline import make_iterator
from endistill_jax.jobs import Data, Run, distill, pretrain
from endistill_jax.jobs.finished import has_ended, last_facts
from endistill_jax.jobs.models import open_model
from endistill_jax.losses import Path, Site
from endistill_jax.model.config import T5Config
from endistill_jax.model.t5 import init_params
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig

TASK = "golden_format_1"
CORPUS, TEACHER, DISTILLED, PRETRAINED = "corpus.txt", "teacher", "distilled", "pretrained"
KILLED_AT = 4
LINES = 500  # so many that the position is within the file, in its second epoch
BATCHES = 400  # after the kill; enough to come to the third


def main(output: pathlib.Path) -> None:
    """Makes the runs in a temporary folder and packs what is kept of them."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.chdir(folder):
            expected = make_runs()
            leave_as_killed(pathlib.Path(DISTILLED))
        pack(pathlib.Path(folder), output / "format_1.tar.xz")
    (output / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_runs() -> dict[str, Any]:
    """Writes corpus, teacher and both runs to the current folder; returns what a test expects of them."""
    pathlib.Path(CORPUS).write_text("".join(f"{number}: the cat sat on the mat.\n" for number in range(LINES)))
    save_teacher()
    task = text_files_task(TASK, CORPUS, "bytes", held_out=0.1)
    data = Data(task=task, inputs_length=8, targets_length=4, batch_size=4, eval_batch_size=4, eval_batches=2)
    student = small_model(width=8, layers=1)
    distill(
        model_dir=DISTILLED,
        teacher=TEACHER,
        teacher_dtype="float32",
        student=student,
        path=full_path(),
        data=data,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        run=Run(steps=8, log_every=1, checkpoint_every=KILLED_AT, keep_last=2, tensorboard=False),
    )
    pretrain(
        model_dir=PRETRAINED,
        model=student,
        data=data,
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-2),
        run=Run(steps=4, log_every=1, checkpoint_every=4, keep_last=1, tensorboard=False),
        z_loss=1e-4,
    )
    check_position(pathlib.Path(DISTILLED, "checkpoints", str(KILLED_AT)))
    versions = {module.__name__: module.__version__ for module in (endistill_jax, jax, optax, orbax.checkpoint, tf)}
    return {
        "made_with": versions,
        TEACHER: {"fingerprint": open_model(TEACHER).fingerprint},
        DISTILLED: expectations(DISTILLED),
        PRETRAINED: expectations(PRETRAINED),
        "batches": {"number": BATCHES, "sha256": digest_of_batches(data)},
    }


def small_model(*, width: int, layers: int) -> T5Config:
    """A model for the byte vocabulary."""
    return T5Config(
        vocab_size=384,
        d_model=width,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        scan_layers=False,
    )


def full_path() -> Path:
    """Relations of all three sites, and the logits."""
    own = Site(relations=("qq", "kk", "vv"), relation_heads=2)
    cross = Site(relations=("qk", "vv"), relation_heads=2)
    return Path(encoder_self=own, decoder_self=own, cross=cross, logits_weight=1.0)


def save_teacher() -> None:
    """An untrained teacher: what it knows does not matter here."""
    config = small_model(width=16, layers=2)
    params = jax.device_get(init_params(config, jax.random.key(1)))
    huggingface.save(TEACHER, params, config, dtype="bfloat16", embedding_copies=False)


def check_position(step: pathlib.Path) -> None:
    """Makes sure that a file was open: its name is in the position then."""
    position = zipfile.ZipFile(io.BytesIO((step / "data" / "shard_0_of_1").read_bytes()))
    assert any(CORPUS.encode() in position.read(name) for name in position.namelist())


def digest_of_batches(data: Data) -> str:
    """A digest of the batches that the distillation has not seen when it is killed, of a stream that never stopped."""
    lengths, digest = data.feature_lengths, hashlib.sha256()
    batches = make_iterator(data.task, split="train", task_feature_lengths=lengths, batch_size=data.batch_size, seed=0)
    for number, batch in enumerate(itertools.islice(batches, KILLED_AT + BATCHES)):
        if number >= KILLED_AT:
            digest.update(batch["encoder_input_tokens"].tobytes() + batch["decoder_target_tokens"].tobytes())
    return digest.hexdigest()


def expectations(model_dir: str) -> dict[str, Any]:
    """What a finished run told of itself, but for the times it took, and the fingerprints of its checkpoints."""
    assert has_ended(model_dir)
    steps = finished_steps(f"{model_dir}/checkpoints")
    _, facts = last_facts(model_dir)
    rows = json.loads(pathlib.Path(model_dir, "results.json").read_text())
    return {
        "metrics": [without(record, "timing") for record in read_metrics(f"{model_dir}/metrics.jsonl")],
        "fingerprints": {str(step): open_model(f"{model_dir}/checkpoints/{step}").fingerprint for step in steps},
        "held_out": facts["held_out"],
        "tokens": facts["progress"]["tokens"],
        "results": [without(row, "seconds") for row in rows],
    }


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record but for one of its values."""
    return {key: value for key, value in record.items() if key != name}


def leave_as_killed(model_dir: pathlib.Path) -> None:
    """Takes from a finished run all that it wrote after the checkpoint at which it is to seem killed."""
    for step in finished_steps(str(model_dir / "checkpoints")):
        if step > KILLED_AT:
            shutil.rmtree(model_dir / "checkpoints" / str(step))
    for file in model_dir.glob("results.*"):
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


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
