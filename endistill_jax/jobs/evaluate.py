"""Evaluation of a trained model on a SeqIO task or mixture; writes metrics and predictions."""

from typing import Any

import jax
from etils import epath

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.models import CHECKPOINTS, open_model, print_notes
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.task_metrics import TaskResult, check_task_metrics, prepare_task_metrics
from endistill_jax.models.family import check_batches
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.multihost import agree
from endistill_jax.reports.files import json_text, write_atomically, write_run_files
from endistill_jax.reports.table import Column, print_results
from endistill_jax.sharding import make_mesh, param_shardings
from endistill_jax.train.experiment import Data
from endistill_jax.train.metrics import MetricWriter
from endistill_jax.train.training import check_same_vocabulary, check_vocabularies

COLUMNS = (
    Column(key="task", title="task"),
    Column(key="split", title="split"),
    Column(key="examples", title="examples"),
    Column(key="metric", title="metric"),
    Column(key="value", title="value", kind="number"),
)


def evaluate(
    *,
    model_dir: str,
    model: str,
    data: Data,
    scored_by: str = "generation",
    decoding: Decoding | None = None,
    dtype: str = "float32",
    mesh: tuple[int, int, int] = (-1, 1, 1),
    placement: str = "sharded",
    seed: int = 0,
    tensorboard: bool = True,
    dry_run: bool = False,
) -> list[dict[str, Any]] | None:
    """Computes the metrics of every task of a mixture, and writes the predictions.

    Args:
        model_dir: receives `results.md` and `results.json`, `metrics.jsonl`, TensorBoard scalars, for each task
            `predictions/<task>.jsonl`, and for a whole test set of GLUE its file in `submission/`.
        model: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run (its
            last checkpoint) or `checkpoints/<step>` in it.
        data: the task or mixture; of it `eval_split`, `eval_batch_size`, `eval_batches` and the lengths.
        scored_by: "generation"; "rank" takes the most likely label where a task has labels; "both" does both there.
        decoding: how text is generated; None for greedy decoding of up to `targets_length` tokens.
        dtype: float32 or bfloat16, of parameters and computations.
        mesh: sizes of the axes data, fsdp and tensor; -1 is inferred from the number of devices.
        placement: how the parameters are sharded: "sharded" or "replicated".
        seed: for sampling.
        tensorboard: write TensorBoard scalars in addition to metrics.jsonl.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table, one a metric; None after a dry run.
    """
    from endistill_jax.data.text_pipeline import resolve_task

    trained = open_model(model, dtype)
    print_notes(trained)
    if (epath.Path(model_dir).expanduser() / CHECKPOINTS).exists():
        raise UserError(f"evaluate.model_dir {model_dir} is that of a training run; give a folder of its own")
    task = resolve_task(data.task)
    vocabulary = task.output_features["targets"].vocabulary
    agree("vocabulary and model", {"vocabulary": fingerprint_vocabulary(vocabulary), "step": trained.step})
    check_vocabularies(vocabulary, trained.config, None)
    check_batches(trained.config, vocabulary.eos_id)
    check_same_vocabulary(vocabulary, trained, "the model")
    if decoding is not None:
        decoding.validate(trained.config)
    check_task_metrics(data, scored_by)
    devices = make_mesh(*mesh)
    param_shardings(trained.config, devices, placement)
    if dry_run:
        print(f"{model}: {trained.config}\nwould evaluate {task.name}, {data.eval_split}, on {dict(devices.shape)}")
        return None
    metrics = prepare_task_metrics(data, devices, scored_by=scored_by, decoding=decoding, seed=seed)
    metrics.predictor(trained.config, placement)  # fails before the model is read
    is_primary = jax.process_index() == 0
    if is_primary:
        write_run_files(model_dir)

    def keep(result: TaskResult) -> None:
        if is_primary:
            path = epath.Path(model_dir).expanduser() / "predictions" / f"{result.task}.jsonl"
            write_atomically(path, "".join(json_text(record) + "\n" for record in result.records))
            if _is_submitted(result, data, scored_by):
                submit(model_dir, result)

    params = trained.load_on(devices, placement)
    report = metrics.evaluate(trained.config, params, placement, at_result=keep)
    if is_primary:
        with MetricWriter(model_dir, tensorboard=tensorboard) as writer:
            writer.write(trained.step, report.scalars())
    rows = [
        {"task": result.task, "split": data.eval_split, "examples": str(len(result.records))} | found
        for result in report.results
        for found in (
            [{"metric": name, "value": value} for name, value in result.metrics.items()]
            or [{"metric": "none: the targets are hidden", "value": None}]
        )
    ]
    print_results(model_dir, rows, f"{model}, step {trained.step}", COLUMNS)
    return rows


def _is_submitted(result: TaskResult, data: Data, scored_by: str) -> bool:
    """Whether predictions are of a whole test split; of two of one task, those by rank, which are always labels."""
    from endistill_jax.tasks.text_to_text import task_labels

    ranked_too = scored_by == "both" and bool(task_labels(result.task))
    return data.eval_split.startswith("test") and data.eval_batches is None and not ranked_too


def submit(model_dir: str, result: TaskResult) -> None:
    """Writes the file that GLUE's server takes, if these are predictions of one of its test sets."""
    from endistill_jax.tasks.glue_submission import submitted_config, write_submission

    config = submitted_config(result.task)
    if config is None or result.row_numbers is None:
        return
    folder = epath.Path(model_dir).expanduser() / "submission"
    path = write_submission(config, folder, result.row_numbers, result.values)
    print(f"wrote {path}")
