"""Test submissions in the file format of GLUE's server."""

import csv
import io
import os
import re
from collections.abc import Sequence

from etils import epath

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.metrics import NO_LABEL
from endistill_jax.tasks.glue import SCORES, TASKS, GlueTask, known_task


def submitted_config(task_name: str) -> str | None:
    """The GLUE configuration whose test set a task of `glue_task` reads, ranked or not; None if it is no such task.

    Only tasks with a test set of one file count, so not `glue_mnli_v1`.
    """
    named = re.fullmatch(rf".+?_({'|'.join(TASKS)})(?:_ranked)?_v\d+", task_name)
    return named[1] if named and TASKS[named[1]].file else None


def write_submission(
    config: str, folder: str | os.PathLike[str], indices: Sequence[int], predictions: Sequence[int | float]
) -> str:
    """Writes the file that GLUE's server takes for one test set, such as `MNLI-m.tsv`, and returns its path.

    It has a header and a row `index<TAB>prediction` for each example, in order of the index. A prediction that is no
    label, which the server would refuse, is written as the first label; STS-B's are kept within 0 and 5.

    Args:
      config: a name in `TASKS`; `mnli` has two test sets: `mnli_matched` and `mnli_mismatched`.
      folder: of the file; created if need be.
      indices: `idx` of each example, every number from 0 once.
      predictions: of each example, as the metrics have them: the label's index, or STS-B's score.

    Raises:
      UserError: no such configuration, or an example is missing or there twice.
    """
    task = known_task(config)
    if not task.file:
        raise UserError(f"GLUE has no test set {config!r}; it has mnli_matched and mnli_mismatched")
    rows = dict(zip(indices, predictions, strict=True))
    if sorted(rows) != list(range(len(indices))):
        raise UserError(
            f"a submission for {config} takes one prediction for every row of the test set: "
            f"{len(indices)} predictions for {len(rows)} rows, the last of which is {max(rows, default=None)}"
        )
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(("index", "prediction"))
    writer.writerows((index, _submitted(task, rows[index])) for index in range(len(rows)))
    path = epath.Path(folder) / f"{task.file}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.getvalue())
    return os.fspath(path)


def _submitted(task: GlueTask, prediction: int | float) -> str:
    if task.labels is SCORES:
        return f"{min(max(float(prediction), 0.0), 5.0):.3f}"
    index = 0 if prediction == NO_LABEL else int(prediction)
    return task.labels[index] if task.submits_words else str(index)
