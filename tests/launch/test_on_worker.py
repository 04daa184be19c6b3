"""launch/tpu/on_worker.sh: the training command outlives its caller, and its end is on record."""

import pathlib
import shutil
import signal
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch/tpu/on_worker.sh"

# Stands for the package: says its arguments, ends as the second one says.
PYTHON = """#!/usr/bin/env bash
echo "arguments: ${*:3}"
trap 'echo saved; exit 143' TERM
case "$4" in
    wait) echo "$$" >python_pid; while :; do sleep 0.02; done ;;
    *) exit "$4" ;;
esac
"""


@pytest.fixture
def worker(fakes):
    """Runs the script in a folder as a worker has it, and ends what it left running."""
    folder = fakes.folder / "endistill"
    (folder / "environment/bin").mkdir(parents=True)
    shutil.copy(SCRIPT, folder)
    (folder / "environment/bin/python").write_text(PYTHON)
    (folder / "environment/bin/python").chmod(0o755)

    def run(*words):
        command = ["bash", folder / "on_worker.sh", *words]
        environment = {**fakes.environment, "ENDISTILL_STOP_SECONDS": "5"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    run.folder = folder
    yield run
    run("stop")


def state(worker):
    return worker("state").stdout.split()[3:]


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_fresh_worker_has_no_job(worker):
    assert worker("state").stdout.split()[0::2] == ["endistill-worker", "none"]
    assert state(worker) == ["absent"]


@pytest.mark.parametrize("code", ["0", "2", "1"])
def test_the_exit_code_is_on_record(worker, code):
    assert worker("start", "job", "--gin.NAMES=('a b',)", code).returncode == 0
    until(lambda: state(worker) == ["exit", code])
    assert worker("state").stdout.split()[2] == "job"
    assert worker("log", "5").stdout == f"arguments: --gin.NAMES=('a b',) {code}\n"


def test_a_started_command_runs_on_and_no_second_one_starts(worker):
    worker("start", "job", "x", "wait")
    assert state(worker) == ["running"]
    second = worker("start", "job", "x", "0")
    assert second.returncode == 4 and "runs already" in second.stderr
    assert state(worker) == ["running"]


def test_stop_lets_the_command_save_and_records_how_it_ended(worker):
    worker("start", "job", "x", "wait")
    until((worker.folder / "python_pid").exists)
    assert worker("stop").returncode == 0
    assert state(worker) == ["exit", "143"]
    assert "saved" in worker("log", "5").stdout


def test_a_command_that_vanished_is_lost_and_starts_again(worker):
    worker("start", "job", "x", "0")  # its exit code must not be taken for the next one's
    until(lambda: state(worker) == ["exit", "0"])
    worker("start", "job", "x", "wait")
    until((worker.folder / "python_pid").exists)
    group = int((worker.folder / "process_group").read_text())
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", "--", f"-{group}"], check=True)
    until(lambda: state(worker) == ["lost"])
    assert worker("start", "job", "x", "0").returncode == 0
    until(lambda: state(worker) == ["exit", "0"])


def test_an_archive_is_unpacked_and_installed_with_its_extras(worker, fakes):
    (worker.folder / "pyproject.toml").write_text("")
    subprocess.run(["tar", "-C", worker.folder, "-czf", worker.folder / "run.tgz", "pyproject.toml"], check=True)
    fakes.write("uv", '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$FAKES/uv"\n')
    assert worker("install", "run.tgz", "tpu,gcs").returncode == 0
    assert (worker.folder / "source/pyproject.toml").exists()
    installed = (fakes.folder / "uv").read_text().splitlines()
    assert installed[-1] == f"endistill-jax[tpu,gcs] @ file://{worker.folder}/source"


def test_any_other_package_is_installed_as_named(worker, fakes):
    fakes.write("uv", '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$FAKES/uv"\n')
    assert worker("install", "endistill-jax[tpu]==1").returncode == 0
    assert (fakes.folder / "uv").read_text().splitlines()[-1] == "endistill-jax[tpu]==1"
