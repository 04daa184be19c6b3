"""launch/tpu.sh against a gcloud that records its calls and fails on demand."""

import shlex
import subprocess
import tarfile

import pytest

TRAINING = ["--", "--gin_file=gin/miniend_3b.gin", "--gin.MODEL_DIR=gs://bucket/run", "--gin.NAMES=('a', \"b $c\")"]
PLACE = ["--project=project", "--zone=zone", "--quiet"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--node=all", "--worker=all"]
SSH = ["--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=30"]
SCP = [flag.replace("ssh", "scp") for flag in SSH]
DONE = " && echo endistill-done"
NOT_FOUND = (1, "ERROR: (gcloud) NOT_FOUND: Resource 'run' was not found")
QUOTA = (1, "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 0 in zone.")
UNAVAILABLE = (1, "ERROR: (gcloud) HTTPError 503: The service is currently unavailable.")
PER_MINUTE = (
    1,
    "ERROR: RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'",
)
EXISTS = (1, "ERROR: (gcloud) ALREADY_EXISTS: Resource 'run' already exists")
DENIED = (1, "ERROR: PERMISSION_DENIED: The caller does not have permission")
STOCKOUT = (1, 'ERROR: There is no more capacity in the zone "zone"; you can try in another zone')


def run(fakes, command, *words):
    return fakes.run("tpu.sh", command, "run", "--poll_seconds=0.001", *words)


def resume(fakes, *words):
    return run(fakes, "resume", "--type=v5litepod-16", *words, *TRAINING)


def job(fakes):
    """The word that names the training command, as submit sends it."""
    ended = fakes.run("tpu.sh", "submit", "run", "--dry_run", *TRAINING)
    return shlex.split(shlex.split(ended.stdout)[-1])[3]


def kinds(fakes):
    """What was done, a word a call; looking is left out."""
    words = []
    for call in fakes.calls:
        remote = call[-1].removeprefix("--command=").split()
        words.append(remote[2] if remote[0] == "bash" else call[4])
    return [word for word in words if word not in ("describe", "list", "state")]


def workers(fakes, *states):
    """What the workers of a slice say of themselves."""
    name = job(fakes)
    return "\\n".join(f"endistill-worker host-{index} {name} {state}" for index, state in enumerate(states))


ABSENT = "endistill-worker host-0 none absent\\nendistill-worker host-1 none absent"


@pytest.fixture(autouse=True)
def packed_at_once(fakes):
    """Packing the checkout takes a second or two."""
    fakes.write("tar", '#!/usr/bin/env bash\ntouch "${3#--file=}"\n')


@pytest.fixture
def cloud(fakes):
    """A cloud with one slice of two workers that is there."""
    fakes.answer("describe", "ACTIVE")
    fakes.answer("names", "run")
    fakes.answer("list", "run\\tREADY\\t2")
    return fakes


def test_create_asks_for_one_slice_on_demand(cloud):
    ended = run(cloud, "create", "--type=v5e-16")
    assert ended.returncode == 0, ended.stderr
    assert cloud.calls[0] == [
        *QUEUE,
        *["create", "run", *PLACE, "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"],
        *["--node-id=run", "--async"],
    ]


def test_create_asks_for_several_spot_slices_in_one_request(cloud):
    words = ["--type=v6e-16", "--slices=3", "--spot", "--create_flag=--network=net", "--zone=there", "--project=mine"]
    assert run(cloud, "create", *words).returncode == 0
    assert cloud.calls[0] == [
        *QUEUE,
        *["create", "run", "--project=mine", "--zone=there", "--quiet", "--accelerator-type=v6e-16"],
        *["--runtime-version=v2-alpha-tpuv6e", "--node-count=3", "--node-prefix=run", "--spot", "--async"],
        "--network=net",
    ]


def test_create_waits_in_the_queue_and_tells_each_state_once(fakes):
    fakes.answer("describe", "CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    ended = run(fakes, "create", "--type=v4-8")
    assert ended.returncode == 0
    told = [line.rpartition(" ")[2] for line in ended.stderr.splitlines() if " is " in line]
    assert told == ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (QUOTA, 1, "the quota of project project for v4-8 in zone is too small"),
        (STOCKOUT, 1, "no v4-8 is free in zone now"),
        ((1, "ERROR: ALREADY_EXISTS: Resource exists"), 2, "run exists already"),
        ((1, "ERROR: PERMISSION_DENIED: no"), 1, "does not let you"),
        ((1, "ERROR: INVALID_ARGUMENT:\\nthe network"), 1, "refused: ERROR: INVALID_ARGUMENT: the network"),
    ],
)
def test_a_refused_request_is_one_line_that_says_what_to_do(fakes, answer, code, words):
    fakes.answer("create", answer)
    ended = run(fakes, "create", "--type=v4-8")
    assert ended.returncode == code
    assert words in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert kinds(fakes) == ["create"]


def test_create_tells_why_a_request_failed_in_the_queue(fakes):
    fakes.answer("describe", "PROVISIONING", "FAILED")
    fakes.answer("reason", STOCKOUT[1])
    ended = run(fakes, "create", "--type=v4-8")
    assert ended.returncode == 1
    assert "no v4-8 is free in zone now" in ended.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("create", ["--type=v5p-32", "--slices=2", "--spot"]),
        ("setup", []),
        ("setup", ["--source=endistill-jax[tpu] @ git+https://example.org/x", "--ssh_flag=--tunnel-through-iap"]),
        ("submit", TRAINING),
        ("status", []),
        ("logs", ["--slice=1", "--worker=2", "--lines=7", "--follow"]),
        ("stop", []),
        ("delete", []),
    ],
)
def test_dry_run_prints_the_very_commands_and_calls_nothing(cloud, command, words):
    printed = run(cloud, command, "--dry_run", *words)
    assert printed.returncode == 0 and cloud.calls == []
    assert run(cloud, command, *words).returncode == 0
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert [line for line in lines if line[0] == "gcloud"] == cloud.calls


def test_dry_run_of_resume_prints_every_step_and_calls_nothing(fakes):
    ended = resume(fakes, "--dry_run", "--delete_when_done")
    assert ended.returncode == 0 and fakes.calls == []
    steps = [shlex.split(line) for line in ended.stdout.splitlines()]
    assert [step[4] for step in steps if step[0] == "gcloud"] == [
        *["create", "describe", "describe", "list", "ssh"],
        *["describe", "list", "ssh", "scp", "describe", "list", "ssh"],
        *["describe", "list", "ssh", "delete"],
    ]


def test_setup_tries_again_until_ssh_is_ready(cloud):
    cloud.answer("connect", (255, "not yet"), (255, "not yet"), "")
    ended = run(cloud, "setup")
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == ["ssh", "ssh", "ssh", "scp", "install"]
    packed = cloud.folder / "endistill_run"
    files = [packed / "on_worker.sh", packed / "checkout.tgz"]
    assert all(file.exists() for file in files)
    [scp] = [call for call in cloud.calls if call[4] == "scp"]
    assert scp[5:] == [*map(str, files), "run:endistill/", *PLACE, *EVERYWHERE, *SCP]
    install = "--command=bash endistill/on_worker.sh install checkout.tgz tpu,gcs" + DONE
    assert cloud.calls[-1] == [*QUEUE, "ssh", "run", *PLACE, *EVERYWHERE, *SSH, install]


def test_setup_installs_further_extras_on_request(cloud):
    assert run(cloud, "setup", "--extras=hf").returncode == 0
    assert cloud.calls[-1][-1] == "--command=bash endistill/on_worker.sh install checkout.tgz tpu,gcs,hf" + DONE
    assert run(cloud, "setup", "--source=endistill-jax[tpu,gcs]==1").returncode == 0
    [*_, command] = cloud.calls[-1]
    assert shlex.split(command.removeprefix("--command="))[2:4] == ["install", "endistill-jax[tpu,gcs]==1"]


def test_setup_sends_what_the_package_is_built_from(cloud):
    (cloud.commands / "tar").unlink()
    assert run(cloud, "setup").returncode == 0
    with tarfile.open(cloud.folder / "endistill_run/checkout.tgz") as archive:
        names = set(archive.getnames())
    assert {"pyproject.toml", "README.md", "LICENSE", "endistill_jax/main.py", "gin/miniend_demo.gin"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git", "tests", "runs"))]


def test_setup_gives_up_on_ssh_after_the_attempts_it_was_given(cloud):
    cloud.answer("connect", (255, "refused"))
    ended = run(cloud, "setup", "--ssh_attempts=4")
    assert ended.returncode == 1
    assert "no connection to all workers of run after 4 attempts" in ended.stderr.splitlines()[-1]
    assert kinds(cloud) == ["ssh"] * 4


def test_submit_hands_the_training_command_over_unchanged(cloud):
    assert run(cloud, "submit", "--", "python", "-m", "endistill_jax.main", *TRAINING[1:]).returncode == 0
    [*_, call] = cloud.calls
    assert call[:-1] == [*QUEUE, "ssh", "run", *PLACE, *EVERYWHERE, *SSH]
    remote = shlex.split(call[-1].removeprefix("--command=").removesuffix(DONE))
    assert remote[:3] == ["bash", "endistill/on_worker.sh", "start"]
    assert remote[4:] == TRAINING[1:]


def test_submit_gives_the_training_command_its_variables(cloud):
    assert run(cloud, "submit", "--env=A=b c", "--env=EMPTY=", *TRAINING).returncode == 0
    remote = shlex.split(cloud.calls[-1][-1].removeprefix("--command="))
    assert remote[:6] == ["env", "A=b c", "EMPTY=", "bash", "endistill/on_worker.sh", "start"]


@pytest.mark.parametrize("command", ["setup", "submit", "stop"])
@pytest.mark.parametrize("reached", [0, 1])
def test_success_is_that_of_every_worker(cloud, command, reached):
    """gcloud ends with 0 where it could not reach one of several slices at all."""
    for kind in ("connect", "start", "stop"):
        cloud.reach(kind, reached)
    ended = run(cloud, command, *(TRAINING if command == "submit" else ["--ssh_attempts=1"][: command == "setup"]))
    assert ended.returncode == 1
    assert "all workers of run" in ended.stderr


def test_nothing_is_done_on_a_part_of_the_slices(cloud):
    cloud.answer("names", "run-0;run-1")
    cloud.answer("list", "run-0\\tREADY\\t2")
    assert run(cloud, "submit", *TRAINING).returncode == 1
    assert kinds(cloud) == []


def test_a_worker_that_was_not_sent_the_archive_cannot_install_an_earlier_one(cloud):
    assert run(cloud, "setup").returncode == 0
    [command, *_] = [call[-1].removeprefix("--command=") for call in cloud.calls if call[4] == "ssh"]
    (cloud.folder / "endistill").mkdir()
    (cloud.folder / "endistill/checkout.tgz").touch()
    said = subprocess.run(["bash", "-c", command], cwd=cloud.folder, capture_output=True, text=True, check=True).stdout
    assert said == "endistill-done\n"
    assert not (cloud.folder / "endistill/checkout.tgz").exists()


def test_resume_installs_the_checkout_as_it_was_when_it_began(cloud):
    cloud.write("tar", '#!/usr/bin/env bash\necho packed >>"$FAKES/packings"\ntouch "${3#--file=}"\n')
    cloud.answer("describe", "ACTIVE", "SUSPENDED", "ACTIVE")
    cloud.answer("state", ABSENT, ABSENT, workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud).count("scp") == 2
    sent = {word for call in cloud.calls if call[4] == "scp" for word in call if word.endswith((".tgz", ".sh"))}
    assert len(sent) == 2 and not any("launch/tpu" in word for word in sent)
    assert (cloud.folder / "packings").read_text() == "packed\n"
    assert list((cloud.folder / ".cache/endistill").iterdir()) == []


def test_status_tells_of_request_slices_and_workers(cloud):
    cloud.answer("state", workers(cloud, "running", "exit 0"))
    name = job(cloud)
    assert run(cloud, "status").stdout.splitlines() == [
        "request run: ACTIVE",
        "slice run READY 2",
        f"worker host-0 {name} running",
        f"worker host-1 {name} exit 0",
    ]


def test_resume_goes_from_nothing_to_the_end_of_the_run(cloud):
    cloud.answer("describe", NOT_FOUND, "WAITING_FOR_RESOURCES", "ACTIVE")
    cloud.answer("state", ABSENT, workers(cloud, "running", "running"), workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud)
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == ["create", "ssh", "scp", "install", "start"]
    assert "run costs money as long as it is there: launch/tpu.sh delete run" in ended.stderr


def test_resume_gives_the_slices_back_where_asked_to(cloud):
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud, "--delete_when_done").returncode == 0
    assert kinds(cloud) == ["delete"]


def test_resume_gives_slices_back_patiently(cloud):
    cloud.answer("describe", "ACTIVE", "DELETING")
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    cloud.answer("delete", UNAVAILABLE, UNAVAILABLE, "")
    assert resume(cloud, "--delete_when_done").returncode == 0
    assert kinds(cloud) == ["delete"] * 3


def test_slices_that_are_gone_already_are_given_back(cloud):
    cloud.answer("describe", "ACTIVE", NOT_FOUND)
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    cloud.answer("delete", NOT_FOUND)
    assert resume(cloud, "--delete_when_done").returncode == 0


@pytest.mark.parametrize(("state", "code"), [("exit 0", 1), ("exit 2", 2)])
def test_slices_that_could_not_be_given_back_are_a_failure(cloud, state, code):
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, state, state))
    cloud.answer("delete", UNAVAILABLE)
    ended = resume(cloud, "--delete_when_done")
    assert ended.returncode == code
    assert "its chips are still billed" in ended.stderr.splitlines()[-1]


def test_resume_takes_a_running_command_over_without_touching_it(cloud):
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == []


def test_resume_recreates_preempted_slices_and_goes_on(cloud):
    cloud.answer("describe", "ACTIVE", "SUSPENDING", "SUSPENDED", NOT_FOUND, "PROVISIONING", "ACTIVE")
    cloud.answer("state", workers(cloud, "running", "running"), ABSENT, workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud, "--spot")
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == ["delete", "create", "ssh", "scp", "install", "start"]
    [create] = [call for call in cloud.calls if call[4] == "create"]
    assert "--spot" in create


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED", None])
def test_resume_recreates_all_slices_when_one_is_gone(cloud, state):
    cloud.answer("describe", "ACTIVE", "ACTIVE", NOT_FOUND, "ACTIVE")
    good = "run-0\\tREADY\\t1\\nrun-1\\tREADY\\t1"
    bad = f"run-0\\tREADY\\t1\\nrun-1\\t{state}\\t1" if state else "run-0\\tREADY\\t1"
    cloud.answer("names", "run-0;run-1")
    cloud.answer("list", bad, bad, good)
    cloud.answer("state", ABSENT, workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud, "--slices=2")
    assert ended.returncode == 0, ended.stderr
    assert f"taken away: run-1 {state or 'MISSING'}" in ended.stderr
    assert kinds(cloud) == ["delete", "create", "ssh", "scp", "install", "start"]


def test_resume_waits_where_there_is_no_capacity(cloud):
    cloud.answer("describe", NOT_FOUND, NOT_FOUND, "FAILED", NOT_FOUND, "ACTIVE")
    cloud.answer("create", STOCKOUT, "")
    cloud.answer("reason", STOCKOUT[1])
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud)
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == ["create", "create", "delete", "create"]


@pytest.mark.parametrize("refusal", [QUOTA, DENIED])
def test_resume_ends_where_quota_or_permission_is_missing(cloud, refusal):
    cloud.answer("describe", NOT_FOUND)
    cloud.answer("create", refusal)
    ended = resume(cloud)
    assert ended.returncode == 1
    assert kinds(cloud) == ["create"]


def test_the_quota_may_lag_behind_slices_that_were_deleted(cloud):
    cloud.answer("describe", "ACTIVE", "SUSPENDED", NOT_FOUND, NOT_FOUND, "ACTIVE")
    cloud.answer("create", QUOTA, "")
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == ["delete", "create", "create"]


@pytest.mark.parametrize("refusal", [UNAVAILABLE, PER_MINUTE, EXISTS])
def test_resume_asks_again_after_a_refusal_that_may_pass(cloud, refusal):
    cloud.answer("describe", NOT_FOUND, NOT_FOUND, "ACTIVE")
    cloud.answer("create", refusal, "")
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud)
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == ["create", "create"]


def test_resume_finds_the_request_whose_answer_was_lost(cloud):
    cloud.answer("describe", NOT_FOUND, NOT_FOUND, "ACTIVE")
    cloud.answer("create", (1, "ERROR: The read operation timed out"), EXISTS)
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == ["create", "create"]


def test_resume_asks_no_more_often_than_allowed(cloud):
    cloud.answer("describe", NOT_FOUND)
    cloud.answer("create", UNAVAILABLE)
    assert resume(cloud, "--max_crashes=2").returncode == 1
    assert kinds(cloud) == ["create"] * 3


@pytest.mark.parametrize("command", ["create", "resume"])
@pytest.mark.parametrize("message", [DENIED[1], "ERROR: There was a problem refreshing your current auth tokens"])
def test_a_login_that_expired_is_told_and_the_end(cloud, command, message):
    cloud.answer("describe", (1, message))
    ended = resume(cloud) if command == "resume" else run(cloud, "create", "--type=v4-8")
    assert ended.returncode == 1
    assert "gcloud auth login" in ended.stderr.splitlines()[-1]
    assert kinds(cloud) == ["create"] * (command == "create")


def test_resume_tells_again_that_workers_do_not_answer(cloud):
    cloud.clock(250)
    silent = (255, "timed out")
    cloud.answer("state", *[silent] * 9, workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud)
    assert ended.returncode == 0
    assert [line for line in ended.stderr.splitlines() if "not answered" in line] == [
        f"tpu.sh: workers of run have not answered for {minutes} minutes" for minutes in (16, 33)
    ]


def test_resume_ends_at_a_mistake_in_the_training_command(cloud):
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, "running", "exit 2"))
    cloud.answer("log", "endistill: error: no such task")
    ended = resume(cloud)
    assert ended.returncode == 2
    assert kinds(cloud) == ["stop", "log"]
    assert "no such task" in ended.stdout


@pytest.mark.parametrize("state", ["exit 2", "exit 1", "exit 143"])
def test_resume_sends_what_it_packed_where_an_earlier_start_has_ended(cloud, state):
    """What was wrong may be mended in this checkout, or by other variables."""
    cloud.answer("state", workers(cloud, state, state), workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud, "--env=A=b").returncode == 0
    assert kinds(cloud) == ["stop", "ssh", "scp", "install", "ssh"]
    [start] = [call[-1] for call in cloud.calls if " start " in call[-1]]
    assert start.startswith("--command=env A=b bash endistill/on_worker.sh start ")


def test_a_mistake_that_is_made_again_is_the_end(cloud):
    cloud.answer("state", workers(cloud, "exit 2", "exit 2"))
    assert resume(cloud).returncode == 2
    assert kinds(cloud) == ["stop", "ssh", "scp", "install", "start", "stop", "log"]


@pytest.mark.parametrize("states", [("lost", "running"), ("exit 143", "exit 143"), ("exit 0", "exit 143")])
def test_resume_starts_all_workers_again_after_an_interruption(cloud, states):
    cloud.answer(
        "state",
        workers(cloud, "running", "running"),
        workers(cloud, *states),
        workers(cloud, "exit 0", "exit 0"),
    )
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == ["stop", "start"]


@pytest.mark.parametrize("state", ["lost", "exit 143", "exit 1", "running"])
def test_resume_sets_a_machine_that_came_back_empty_up_again(cloud, state):
    empty = ABSENT.partition("\\n")[0]
    other = f"endistill-worker host-1 {job(cloud)} {state}"
    cloud.answer("state", f"{empty}\\n{other}", workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == ["stop", "ssh", "scp", "install", "start"]


def test_stopping_finds_nothing_to_stop_on_a_machine_without_the_script(cloud):
    assert run(cloud, "stop").returncode == 0
    [command] = [call[-1].removeprefix("--command=") for call in cloud.calls if call[4] == "ssh"]
    assert subprocess.run(["bash", "-c", command], cwd=cloud.folder, capture_output=True, check=False).returncode == 0
    (cloud.folder / "endistill").mkdir()
    (cloud.folder / "endistill/on_worker.sh").write_text("exit 3")
    assert subprocess.run(["bash", "-c", command], cwd=cloud.folder, capture_output=True, check=False).returncode != 0


def test_resume_gives_up_after_too_many_crashes_with_their_exit_code(cloud):
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, "exit 134", "running"))
    ended = resume(cloud, "--max_crashes=2")
    assert ended.returncode == 134
    assert kinds(cloud) == ["stop", "start", "stop", "start", "log"]


def test_a_crash_counts_once_however_often_the_next_start_fails(cloud):
    crashed = workers(cloud, "exit 134", "running")
    running = workers(cloud, "running", "running")
    cloud.answer("state", running, crashed, crashed, crashed, workers(cloud, "exit 0", "exit 0"))
    cloud.answer("start", (255, "no connection"), (255, "no connection"), "")
    assert resume(cloud, "--max_crashes=2").returncode == 0
    assert kinds(cloud) == ["stop", "start"] * 3


def test_crashes_before_half_an_hour_of_running_no_longer_count(cloud):
    crashed, running = workers(cloud, "exit 134", "running"), workers(cloud, "running", "running")
    cloud.answer("state", *[crashed, running, running] * 4, workers(cloud, "exit 0", "exit 0"))
    cloud.clock(1000)
    assert resume(cloud, "--max_crashes=1").returncode == 0


def test_resume_gives_up_where_the_package_cannot_be_installed(cloud):
    cloud.answer("state", ABSENT)
    cloud.answer("install", (1, "no such package"))
    ended = resume(cloud, "--max_crashes=1")
    assert ended.returncode == 1
    assert "start" not in kinds(cloud)


def test_resume_never_gives_granted_slices_up_for_a_bad_connection(cloud):
    cloud.answer("describe", "ACTIVE", (1, "ERROR: network unreachable"), "ACTIVE")
    cloud.answer("state", (255, "timed out"), workers(cloud, "exit 0", "exit 0"))
    ended = resume(cloud)
    assert ended.returncode == 0, ended.stderr
    assert kinds(cloud) == []
    assert "the run is unreachable" in ended.stderr


def test_resume_concludes_nothing_from_a_part_of_the_workers(cloud):
    """gcloud ends with 0 where it could not reach one of several slices at all."""
    cloud.answer(
        "state", workers(cloud, "exit 0"), workers(cloud, "exit 0", "running"), workers(cloud, "exit 0", "exit 0")
    )
    assert resume(cloud).returncode == 0
    assert len([call for call in cloud.calls if call[4] == "ssh"]) == 3


def test_interruptions_are_no_crashes(cloud):
    stopped = workers(cloud, "exit 143", "exit 143")
    cloud.answer("state", stopped, stopped, stopped, workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud, "--max_crashes=1").returncode == 0


def test_resume_leaves_another_running_command_alone(cloud):
    cloud.answer("state", workers(cloud, "running", "running").replace(job(cloud), "another"))
    ended = resume(cloud)
    assert ended.returncode == 2
    assert "another command runs on run" in ended.stderr
    assert kinds(cloud) == []


def test_resume_takes_the_end_of_another_command_for_none(cloud):
    before = workers(cloud, "exit 0", "exit 0").replace(job(cloud), "another")
    cloud.answer("state", before, workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == ["ssh", "scp", "install", "start"]


def test_one_listing_without_a_slice_is_no_loss(cloud):
    cloud.answer("list", "", "run\\tREADY\\t2", "", "run\\tREADY\\t2")
    cloud.answer("state", workers(cloud, "running", "running"), workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud).returncode == 0
    assert kinds(cloud) == []


def test_slices_of_another_run_do_not_count(cloud):
    """Those of run are run-a and run-b; run-1 is the only slice of somebody's run-1."""
    cloud.answer("names", "run-a;run-b")
    cloud.answer("list", "run-1\\tPREEMPTED\\t4\\nrun-a\\tREADY\\t1\\nrun-b\\tREADY\\t1\\nrun-ab\\tPREEMPTED\\t4")
    cloud.answer("state", workers(cloud, "exit 0", "exit 0"))
    assert resume(cloud, "--slices=2").returncode == 0
    assert kinds(cloud) == []


@pytest.mark.parametrize(("slices", "names"), [("2", "run"), ("1", "run-0;run-1"), ("2", "run-0;run-1;run-2")])
def test_resume_with_the_wrong_number_of_slices_deletes_nothing(cloud, slices, names):
    cloud.answer("names", names)
    cloud.answer("list", "")
    ended = resume(cloud, f"--slices={slices}")
    assert ended.returncode == 2
    assert kinds(cloud) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command"),
        (["launch", "run"], "launch is no command"),
        (["create", "--type=v4-8"], "give the slices a name"),
        (["create", "Run", "--type=v4-8"], "Run: a name has lower-case letters"),
        (["create", "run"], "--type is missing"),
        (["create", "run", "--type=v9-8"], "--type=v9-8 is no accelerator type"),
        (["create", "run", "--type=v4-8", "--slices=0"], "--slices=0: give a whole number"),
        (["create", "run", "--type=v4-8", "--lines=3"], "create does not take --lines=3"),
        (["create", "run", "--type="], "--type=: a value is missing"),
        (["create", "run", "more", "--type=v4-8"], "more: one name is enough"),
        (["delete", "run", "--", "--gin_file=x"], "delete takes no training command"),
        (["submit", "run"], "give the training command after --"),
        (["submit", "run", "--", "--gin.STEPS=3"], "give the training command after --"),
        (["submit", "run", "--", "--gin_file=x", "--gin.MODEL_DIR=/tmp/x"], "--gin.MODEL_DIR=gs://"),
        (["delete", "run", "--zone="], "--zone=: a value is missing"),
        (["create", "run", "--type=v4-8", "--poll_seconds=soon"], "--poll_seconds=soon: give a number of seconds"),
        (["create", "run", "--type=v4-8", "--poll_seconds=0.0"], "--poll_seconds=0.0: give a number of seconds"),
        (["logs", "run", "--slice=0x"], "--slice=0x: give a number, the first is 0"),
        (["logs", "run", "--worker="], "--worker=: give a number, the first is 0"),
        (["setup", "run", "--env=A=b"], "setup does not take --env=A=b"),
        (["submit", "run", "--env=2A=b", *TRAINING], "--env=2A=b: give NAME=VALUE"),
        (["setup", "run", "--source=x", "--extras=hf"], "--extras=hf: name them in --source"),
        (["submit", "run", *TRAINING, "--gin_file=my.gin"], "--gin_file=my.gin: the package has the files in gin/"),
        (["submit", "run", *TRAINING, "--gin_file", "/tmp/my.gin"], "--gin_file=/tmp/my.gin: the package has"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_called(fakes, words, message):
    ended = fakes.run("tpu.sh", *words)
    assert (ended.returncode, ended.stdout, fakes.calls) == (2, "", [])
    assert ended.stderr.startswith("tpu.sh: error: ") and len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr


@pytest.mark.parametrize("variable", ["CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"])
def test_project_and_zone_come_from_nowhere_but_the_user(fakes, variable):
    ended = fakes.run("tpu.sh", "delete", "run", **{variable: ""})
    assert ended.returncode == 2 and variable in ended.stderr
    assert fakes.calls == []
