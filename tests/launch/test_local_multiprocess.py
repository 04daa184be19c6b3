"""launch/local_multiprocess.sh with a fake of the package: who is started how, and what happens when one fails."""

import shlex
import signal
import subprocess
import time

import pytest

TRAINING = ["--", "--gin_file=x.gin", "--gin.NAMES=('a b',)"]

# Ends with the code in the file of its index, or waits for SIGTERM.
PACKAGE = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 12345 && exit 0; fi
echo "process $ENDISTILL_PROCESS_ID of $ENDISTILL_NUM_PROCESSES at $ENDISTILL_COORDINATOR, $JAX_PLATFORMS $XLA_FLAGS"
echo "${*@Q}"
trap 'echo saved; touch "$FAKES/saved_$ENDISTILL_PROCESS_ID"; exit 143' TERM
touch "$FAKES/started_$ENDISTILL_PROCESS_ID"
if [[ ! -e $FAKES/code_$ENDISTILL_PROCESS_ID ]]; then while :; do sleep 0.02; done; fi
while [[ ! -e $FAKES/started_0 || ! -e $FAKES/started_1 ]]; do sleep 0.02; done
exit "$(cat "$FAKES/code_$ENDISTILL_PROCESS_ID")"
"""


@pytest.fixture
def package(fakes):
    fakes.environment |= {"PYTHON": str(fakes.write("package", PACKAGE)), "XLA_FLAGS": "--xla_dump_to=x"}
    return fakes


def ending(fakes, *codes):
    for index, code in enumerate(codes):
        if code is not None:
            (fakes.folder / f"code_{index}").write_text(str(code))


def test_each_process_knows_its_place_and_has_its_devices_and_log(package):
    ending(package, 0, 0)
    ended = package.run("local_multiprocess.sh", "2", "--devices_per_process=4", "--log_dir=logs", *TRAINING)
    assert ended.returncode == 0, ended.stderr
    for index in range(2):
        place, arguments = (package.folder / f"logs/process_{index}.log").read_text().splitlines()
        assert place == (
            f"process {index} of 2 at 127.0.0.1:12345, cpu --xla_dump_to=x --xla_force_host_platform_device_count=4"
        )
        assert shlex.split(arguments) == ["-m", "endistill_jax.main", *TRAINING[1:]]
    assert ended.stdout == (package.folder / "logs/process_0.log").read_text()


@pytest.mark.parametrize(("codes", "others"), [((None, 3), 0), ((7, None), 1)])
def test_one_that_fails_ends_the_others_and_gives_the_exit_code(package, codes, others):
    ending(package, *codes)
    ended = package.run("local_multiprocess.sh", "2", *TRAINING)
    assert ended.returncode == max(code or 0 for code in codes)
    assert f"process {1 - others} ended with" in ended.stderr
    assert (package.folder / f"saved_{others}").exists()


def test_one_that_does_not_end_when_asked_to_is_killed(package):
    stubborn = PACKAGE.replace("exit 143' TERM", "' TERM")
    package.write("package", stubborn)
    ending(package, None, 3)
    assert package.run("local_multiprocess.sh", "2", "--grace_seconds=1", *TRAINING).returncode == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_all_of_them_save(package, number, code):
    command = [package.launch / "local_multiprocess.sh", "2", *TRAINING]
    script = subprocess.Popen(
        command,
        env=package.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Tests that run in the background are started with SIGINT ignored, which a shell cannot undo.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while len(list(package.folder.glob("started_*"))) < 2:
        assert time.monotonic() < deadline, "they never started"
        time.sleep(0.02)
    script.send_signal(number)
    assert script.wait(timeout=30) == code
    assert len(list(package.folder.glob("saved_*"))) == 2


def test_dry_run_prints_the_commands_and_starts_nothing(package):
    ended = package.run("local_multiprocess.sh", "3", "--port=99", "--dry_run", *TRAINING)
    lines = [shlex.split(line) for line in ended.stdout.splitlines()]
    assert [line[3] for line in lines] == [f"ENDISTILL_PROCESS_ID={index}" for index in range(3)]
    assert all(line[1] == "ENDISTILL_COORDINATOR=127.0.0.1:99" for line in lines)
    assert not list(package.folder.glob("started_*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TRAINING, "give the number of processes"),
        (["two", *TRAINING], "two: give the number of processes"),
        (["2", "3", *TRAINING], "3: one number is enough"),
        (["2", "--devices=4", *TRAINING], "unknown flag --devices=4"),
        (["2", "--devices_per_process=no", *TRAINING], "--devices_per_process=no"),
        (["2"], "give the training command after --"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(package, words, message):
    ended = package.run("local_multiprocess.sh", *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
