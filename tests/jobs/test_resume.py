"""A run that is killed and started again ends as if it had never been killed: bit for bit."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.reading import finished_steps, restore_params
from endistill_jax.train.metrics import read_metrics

STEPS = 60


@pytest.fixture(scope="module")
def command(distill_gin):
    """The words that start the run in a given model directory."""
    main = [sys.executable, "-m", "endistill_jax.main", f"--gin_file={distill_gin}", f"--gin.jobs.Run.steps={STEPS}"]
    return lambda model_dir: [*main, f"--gin.MODEL_DIR={model_dir}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(command(folder), check=True, capture_output=True)
    return folder


def interrupt(command: list[str], model_dir: pathlib.Path, number: int, lines: int) -> int:
    """Starts the run, sends the signal once `lines` lines of metrics are there; returns the exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = model_dir / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=120)


def without_timing(folder: pathlib.Path) -> list[dict]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "timing"} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "lines", "code"), [(signal.SIGKILL, 4, -9), (signal.SIGKILL, 9, -9), (signal.SIGTERM, 6, 143)]
)
def test_an_interrupted_run_ends_bit_identical_to_one_that_was_not(
    tmp_path, command, uninterrupted, number, lines, code
):
    folder = tmp_path / "run"
    assert interrupt(command(folder), folder, number, lines) == code
    seen = len(without_timing(folder))
    assert lines <= seen < len(without_timing(uninterrupted)), "it was interrupted before its end"
    saved = finished_steps(str(folder / "checkpoints"))
    assert saved or number == signal.SIGKILL, "a run that is asked to stop saves first"
    again = subprocess.run(command(folder), check=True, capture_output=True, text=True)
    assert (f"resumed from step {saved[-1]} of" if saved else "step 5/") in again.stderr
    wanted, got = (restore_params(str(each / "checkpoints"))[0] for each in (uninterrupted, folder))
    jax.tree.map(np.testing.assert_array_equal, wanted, got)
    assert without_timing(folder) == without_timing(uninterrupted)
