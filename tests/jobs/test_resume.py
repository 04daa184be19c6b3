"""A run that is killed and started again ends as if it had never been killed: bit for bit."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.manager import finished_steps, restore_params
from endistill_jax.main import main
from endistill_jax.train.metrics import read_metrics

STEPS = 60


@pytest.fixture(scope="module")
def words(distill_gin):
    """Function (folder) -> the words after `python -m endistill_jax.main` that run the distillation in it."""
    return lambda folder: [f"--gin_file={distill_gin}", f"--gin.jobs.Run.steps={STEPS}", f"--gin.MODEL_DIR={folder}"]


def interrupt(words: list[str], model_dir: pathlib.Path, number: int, lines: int) -> tuple[int, str]:
    """Starts the run, sends the signal once `lines` lines of metrics are there; its exit code and standard error."""
    command = [sys.executable, "-m", "endistill_jax.main", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    file = model_dir / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def without_timing(folder: pathlib.Path) -> list[dict]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "timing"} for record in records]


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_ends_bit_identical_to_one_that_was_not(tmp_path, words, capfd):
    """Killed before and after the first checkpoint, and asked to stop; then it comes to its end."""
    folder, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    assert main(words(uninterrupted)) == 0
    wanted = without_timing(uninterrupted)
    resumed_from = None
    for number, lines, code in ((signal.SIGKILL, 1, -9), (signal.SIGTERM, 6, 143), (signal.SIGKILL, 10, -9)):
        ended, errors = interrupt(words(folder), folder, number, lines)
        assert ended == code and without_timing(folder)[-1]["step"] < STEPS, "it was interrupted before its end"
        assert (f"resumed from step {resumed_from} of" if resumed_from else "starts at step 0 in") in errors
        steps = finished_steps(str(folder / "checkpoints"))
        if number == signal.SIGTERM:
            assert steps[-1] == without_timing(folder)[-1]["step"], "a run that is asked to stop saves first"
        resumed_from = steps[-1] if steps else None
    capfd.readouterr()
    assert main(words(folder)) == 0
    assert f"resumed from step {resumed_from} of" in capfd.readouterr().err
    params = [restore_params(str(each / "checkpoints"))[0] for each in (uninterrupted, folder)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert without_timing(folder) == wanted
