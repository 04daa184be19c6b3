"""launch/slurm.sh, the job it submits, and launch/gpu_host.sh, with fakes of SLURM and of the package."""

import shlex
import signal
import subprocess
import time

import pytest

TRAINING = ["--", "--gin_file=x.gin", "--gin.NAMES=('a b',)"]


def test_sbatch_gets_one_process_a_node_that_may_be_requeued(fakes):
    words = [
        "run",
        "--nodes=2",
        "--gpus_per_node=4",
        "--time=24:00:00",
        "--partition=long",
        "--sbatch_flag=--account=lab",
    ]
    assert fakes.run("slurm.sh", *words, "--log_dir=logs", *TRAINING).returncode == 0
    assert (fakes.folder / "logs").is_dir()
    assert fakes.calls == [
        [
            *[
                "sbatch",
                "--job-name=run",
                "--nodes=2",
                "--ntasks-per-node=1",
                "--gpus-per-node=4",
                "--cpus-per-task=16",
            ],
            *["--time=24:00:00", "--partition=long", "--requeue", "--signal=B:USR1@300", "--open-mode=append"],
            *["--output=logs/%x-%j.log", "--account=lab", str(fakes.launch / "slurm_job.sh"), *TRAINING[1:]],
        ]
    ]


def test_dry_run_prints_the_sbatch_command_and_submits_nothing(fakes):
    printed = fakes.run("slurm.sh", "run", "--dry_run", *TRAINING)
    assert fakes.calls == []
    fakes.run("slurm.sh", "run", *TRAINING)
    assert shlex.split(printed.stdout.splitlines()[-1]) == fakes.calls[0]


# As the real one it does not hand SIGTERM on to its tasks, but kills them; what scancel sends to a job reaches them.
SRUN = """#!/usr/bin/env bash
echo "srun $JAX_LOCAL_DEVICE_IDS $JAX_PLATFORMS $*" >>"$FAKES/calls"
trap 'exit 137' TERM
touch "$FAKES/started"
if [[ $SRUN == wait ]]; then
    until [[ -e $FAKES/told ]]; do sleep 0.02; done
    exit "$ON_TERM"
fi
exit "$SRUN"
"""
SCANCEL = """#!/usr/bin/env bash
if [[ $* == "--signal=TERM 17" ]]; then touch "$FAKES/told"; fi
"""
JOB = {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "16"}


@pytest.mark.parametrize("code", ["0", "2", "1", "143"])
def test_a_job_that_ends_by_itself_or_is_cancelled_stays_out_of_the_queue(fakes, code):
    fakes.write("srun", SRUN)
    ended = fakes.run("slurm_job.sh", *TRAINING[1:], **JOB, SRUN=code, ON_TERM="0")
    assert ended.returncode == int(code)
    [call] = fakes.calls
    assert call[:3] == ["srun", "0,1,2,3", "cuda"]
    assert call[3:6] == ["--cpus-per-task=16", "--kill-on-bad-exit=1", "python"]


@pytest.mark.parametrize(("code", "requeued"), [("143", True), ("0", False)])
def test_at_the_end_of_its_time_a_run_saves_and_is_requeued_unless_it_finished(fakes, code, requeued):
    fakes.write("srun", SRUN)
    fakes.write("scancel", SCANCEL)
    environment = {**fakes.environment, **JOB, "SRUN": "wait", "ON_TERM": code}
    job = subprocess.Popen([fakes.launch / "slurm_job.sh", *TRAINING[1:]], env=environment)
    deadline = time.monotonic() + 30
    while not (fakes.folder / "started").exists():
        assert time.monotonic() < deadline, "srun never came"
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == int(code)
    assert (["scontrol", "requeue", "17"] in fakes.calls) == requeued


PACKAGE = """#!/usr/bin/env bash
echo "python $JAX_PLATFORMS ${CUDA_VISIBLE_DEVICES:-all} ${*@Q}" >>"$FAKES/calls"
echo trained
read -r code <"$FAKES/codes"
sed -i 1d "$FAKES/codes"
exit "$code"
"""


def gpu_host(fakes, codes, *words):
    (fakes.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    return fakes.run("gpu_host.sh", *words, *TRAINING, PYTHON=str(fakes.write("package", PACKAGE)))


def test_one_process_has_the_gpus_it_was_given(fakes):
    ended = gpu_host(fakes, [0], "--gpus=0,3", "--log=logs/run.log")
    assert ended.returncode == 0
    assert fakes.calls == [["python", "cuda", "0,3", "-m", "endistill_jax.main", *TRAINING[1:]]]
    assert (fakes.folder / "logs/run.log").read_text() == "trained\n"


@pytest.mark.parametrize("code", [2, 130, 143])
def test_a_mistake_or_a_signal_ends_it(fakes, code):
    assert gpu_host(fakes, [code]).returncode == code
    assert len(fakes.calls) == 1


def test_a_crash_starts_it_again_as_often_as_allowed(fakes):
    assert gpu_host(fakes, [1, 139, 0]).returncode == 0
    assert len(fakes.calls) == 3
    assert gpu_host(fakes, [1, 139, 0], "--max_crashes=1").returncode == 139


def test_crashes_far_apart_are_no_reason_to_give_up(fakes):
    fakes.clock(2000)
    assert gpu_host(fakes, [1, 1, 1, 1, 0], "--max_crashes=1").returncode == 0


SLOW_PACKAGE = """#!/usr/bin/env bash
trap 'sleep 0.2; touch "$FAKES/saved"; exit 143' TERM
touch "$FAKES/started"
while :; do sleep 0.02; done
"""


def test_a_run_whose_script_is_asked_to_end_saves_first(fakes):
    package = fakes.write("package", SLOW_PACKAGE)
    environment = {**fakes.environment, "PYTHON": str(package)}
    script = subprocess.Popen([fakes.launch / "gpu_host.sh", *TRAINING], env=environment)
    deadline = time.monotonic() + 30
    while not (fakes.folder / "started").exists():
        assert time.monotonic() < deadline, "the package never came"
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 143
    assert (fakes.folder / "saved").exists()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("slurm.sh", TRAINING, "give the job a name"),
        ("slurm.sh", ["run", "--nodes=0", *TRAINING], "--nodes=0"),
        ("slurm.sh", ["run", "--gpus=8", *TRAINING], "unknown flag --gpus=8"),
        ("slurm.sh", ["run"], "give the training command after --"),
        ("gpu_host.sh", ["--gpus=all", *TRAINING], "--gpus=all"),
        ("gpu_host.sh", ["run", *TRAINING], "unknown argument run"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_called(fakes, script, words, message):
    ended = fakes.run(script, *words)
    assert (ended.returncode, ended.stdout, fakes.calls) == (2, "", [])
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
