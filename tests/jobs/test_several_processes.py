"""Two processes of two devices are one of four: same batches, losses and figures. What goes wrong, all are told."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from endistill_jax.checkpoints.manager import finished_steps
from endistill_jax.multihost import CONNECT_SECONDS
from endistill_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 16
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # float32, and one figure is a difference of losses
SECONDS = 300  # nothing here may take so long, hanging least of all


def environment(devices: int, **variables: str) -> dict[str, str]:
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        # On a busy machine a device may wait long for the others; after 40 s XLA would end the process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENDISTILL_NUM")}
    own = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return kept | own | variables


def start(commands: Sequence[list[str]], devices: int = 2) -> list[subprocess.Popen]:
    """Starts a command as one of so many processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index, command in enumerate(commands):
        variables = {
            "ENDISTILL_COORDINATOR": f"127.0.0.1:{port}",
            "ENDISTILL_NUM_PROCESSES": str(len(commands)),
            "ENDISTILL_PROCESS_ID": str(index),
        }
        own = environment(devices, **variables)
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        texts = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def words_of(file: pathlib.Path) -> Callable[..., list[str]]:
    """The words that start a gin file in a given model directory, with every array split over all four devices."""
    run = {"steps": STEPS, "mesh": "(1, 4, 1)", "micro_batches": 1, "log_every": 2, "eval_every": 4}
    run |= {"checkpoint_every": 4}
    data = {"batch_size": 8, "eval_batch_size": 8, "shards": 2}
    main = [sys.executable, "-m", "endistill_jax.main", f"--gin_file={file}"]
    main += [f"--gin.jobs.Run.{name}={value}" for name, value in run.items()]
    main += [f"--gin.jobs.Data.{name}={value}" for name, value in data.items()]
    return lambda model_dir, *more: [*main, f"--gin.MODEL_DIR={model_dir}", *more]


@pytest.fixture
def command(distill_gin) -> Callable[..., list[str]]:
    return words_of(distill_gin)


def lines(folder: pathlib.Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def assert_close(got: list[dict], wanted: list[dict]) -> None:
    """The same lines with the same numbers of tokens; losses differ by the order in which devices' sums are added."""
    assert [record.keys() for record in got] == [record.keys() for record in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        ours, theirs = ({name: x for name, x in record.items() if name != "timing"} for record in (ours, theirs))
        for name in ("step", "tokens", "held_out/tokens", "held_out/non_sentinel_tokens"):
            assert ours.get(name) == theirs.get(name), (ours["step"], name)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), **CLOSE, err_msg=str(ours["step"]))


def assert_same_table(folder: pathlib.Path, wanted: list[dict]) -> None:
    """The same models with the same figures, but for the time they took."""
    for ours, theirs in zip(json.loads((folder / "results.json").read_text()), wanted, strict=True):
        assert ours.keys() == theirs.keys() and ours["model"] == theirs["model"]
        numbers = [name for name, value in theirs.items() if isinstance(value, float) and name != "seconds"]
        np.testing.assert_allclose([ours[name] for name in numbers], [theirs[name] for name in numbers], **CLOSE)


def test_a_run_of_two_processes_goes_on_in_one_and_is_the_run_of_one(tmp_path, command):
    """The second process alone is asked to stop, and both save and end at the same step."""
    alone, folder = tmp_path / "alone", tmp_path / "several"
    subprocess.run(command(alone), env=environment(4), check=True, capture_output=True)
    wanted = read_metrics(alone / "metrics.jsonl")

    processes = start([command(folder)] * 2)
    while processes[0].poll() is None and lines(folder) < 4:  # three windows and held-out figures
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGTERM)
    (code, output, errors), (other_code, other_output, other_errors) = ended(processes)
    assert (code, other_code) == (143, 143), errors + other_errors
    (saved,) = finished_steps(str(folder / "checkpoints"))[-1:]
    assert f"stopped at step {saved} of {STEPS}" in errors
    assert f"step 2/{STEPS}" in errors and "step" not in other_output, "only the first process tells"
    seen = read_metrics(folder / "metrics.jsonl")
    assert seen[-1]["step"] == saved < STEPS
    assert_close(seen, wanted[: len(seen)])
    states = [path.name for path in (folder / "checkpoints" / str(saved) / "data").glob("shard_*")]
    assert sorted(states) == ["shard_0_of_2", "shard_1_of_2"]

    again = subprocess.run(command(folder), env=environment(4), check=True, capture_output=True, text=True)
    assert f"resumed from step {saved}" in again.stderr
    got = read_metrics(folder / "metrics.jsonl")
    assert got[: len(seen)] == seen
    assert_close(got, wanted)

    table = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    finished = ended(start([command(folder)] * 2))  # evaluates what one process has saved
    assert [code for code, _, _ in finished] == [0, 0], finished
    assert ["Held-out denoising" in output for _, output, _ in finished] == [True, False]
    assert_same_table(folder, table)


def test_a_chain_of_two_processes_is_that_of_one_and_keeps_its_product_alone(tmp_path, chain_gin):
    alone, folder = tmp_path / "alone", tmp_path / "several"
    command, own = words_of(chain_gin), ("--gin.jobs.Run.steps=4", "--gin.jobs.Run.mesh=(1, 2, 1)")
    subprocess.run(command(alone, *own), env=environment(2), check=True, capture_output=True)
    results = ended(start([command(folder, *own)] * 2, devices=1))
    assert [code for code, _, _ in results] == [0, 0], results
    assert ["Held-out denoising" in output for _, output, _ in results] == [True, False]
    assert not (folder / "stage_1" / "checkpoints").exists()
    assert finished_steps(str(folder / "stage_1" / "product" / "checkpoints")) == [4]
    for stage in ("stage_1", "stage_2"):
        assert_close(read_metrics(folder / stage / "metrics.jsonl"), read_metrics(alone / stage / "metrics.jsonl"))
    assert_same_table(folder, json.loads((alone / "results.json").read_text()))


def test_hosts_with_other_settings_stop_and_each_names_the_difference(tmp_path, command):
    results = ended(start([command(tmp_path / "run"), command(tmp_path / "run", "--gin.jobs.Run.seed=3")]))
    for code, _, errors in results:
        assert code == 2
        assert "the hosts disagree on their code and configuration: configuration.jobs.Run.seed is" in errors
        assert "absent on process 0 and " in errors and "3" in errors and "on process 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_one_host_ends_all_of_them_and_is_told(tmp_path, command):
    wrong = command(tmp_path / "run", "--gin.jobs.Run.stepps=3")
    (code, _, errors), (other_code, _, other_errors) = ended(start([command(tmp_path / "run"), wrong]))
    assert (code, other_code) == (2, 2), errors + other_errors
    assert "stepps" in other_errors
    assert "process 1 failed: error: " in errors and "stepps" in errors


DOWNSTREAM = """
    import runpy, sys
    from endistill_jax import multihost
    multihost.initialize()
    multihost.watch_peers()
    from endistill_jax.jobs import Data, Finetuning, Reading, Run, evaluate, finetune, infer
    from endistill_jax.models.generation.generation import Decoding
    from endistill_jax.train.optimizer import OptimizerConfig

    conftest, folder, model, texts, outputs = sys.argv[1:]
    given, mesh = runpy.run_path(conftest), (2, 2, 1)
    task = given["register_colors"]("several_processes_color_v1")
    data = Data(task=task, inputs_length=11, targets_length=8, batch_size=8, pack=False, shards=2, eval_batch_size=8)
    run = Run(steps=4, mesh=mesh, log_every=2, eval_every=2, checkpoint_every=2, tensorboard=False)
    finetuning = Finetuning(data=data, optimizer=OptimizerConfig(learning_rate=1e-3), run=run, scored_by="rank")
    finetune(model_dir=f"{folder}/tuned", model=given["small_model"](width=16), finetuning=finetuning)
    common = {"model": model, "mesh": mesh}
    evaluate(model_dir=f"{folder}/evaluated", data=data, scored_by="both", tensorboard=False, **common)
    infer(
        input_file=texts,
        output_file=outputs.format(multihost.process_index()),
        decoding=Decoding(max_length=8),
        reading=Reading(inputs_length=11),
        batch_size=8,
        vocabulary_file="bytes",
        **common,
    )
"""


def records_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_answers(got: pathlib.Path, wanted: pathlib.Path) -> None:
    """The same records but for the last bits of scores."""
    pairs = list(zip(records_of(got), records_of(wanted), strict=True))
    assert pairs
    for ours, theirs in pairs:
        scores = [{**record.pop("scores", {}), "": record.pop("score")} for record in (ours, theirs)]
        assert ours == theirs
        np.testing.assert_allclose(list(scores[0].values()), list(scores[1].values()), rtol=1e-5)


def test_downstream_jobs_of_two_processes_are_those_of_one(tmp_path):
    """Fine-tuning by rank, evaluation in both ways, and inference that goes on from what only the first one has."""
    alone, several, texts = tmp_path / "alone", tmp_path / "several", tmp_path / "texts.txt"
    texts.write_text("".join(f"text {number}\n" for number in range(100)))
    (tmp_path / "0").mkdir()

    def words(folder: pathlib.Path, outputs: pathlib.Path) -> list[str]:
        conftest = pathlib.Path(__file__).with_name("conftest.py")
        script = [sys.executable, "-c", textwrap.dedent(DOWNSTREAM), conftest, folder, alone / "tuned", texts, outputs]
        return list(map(str, script))

    output = alone / "out.jsonl"
    subprocess.run(words(alone, output), env=environment(4), check=True, capture_output=True)
    (tmp_path / "0" / "out.jsonl.run.json").write_bytes((alone / "out.jsonl.run.json").read_bytes())
    (tmp_path / "0" / "out.jsonl").write_text("".join(output.read_text().splitlines(keepends=True)[:70]))

    results = ended(start([words(several, tmp_path / "{}" / "out.jsonl")] * 2, devices=2))
    assert [code for code, _, _ in results] == [0, 0], results
    first, second = (errors for _, _, errors in results)
    assert "infer: resumes after line 70" in first and "infer:" not in second
    assert not (tmp_path / "1").exists()
    assert_same_answers(tmp_path / "0" / "out.jsonl", output)
    for name in ("tuned", "evaluated"):
        assert_close(read_metrics(several / name / "metrics.jsonl"), read_metrics(alone / name / "metrics.jsonl"))
    for file in sorted((alone / "evaluated" / "predictions").iterdir()):
        assert_same_answers(several / "evaluated" / "predictions" / file.name, file)


HOSTS = """
    import json, sys
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec
    from endistill_jax import multihost
    from endistill_jax.multihost import agree, agree_on_folder
    from endistill_jax.checkpoints.fingerprint import fingerprint_params
    from endistill_jax.core.errors import UserError
    from endistill_jax.sharding import host_part, host_rows, make_mesh, place_batch

    multihost.initialize()
    index = jax.process_index()
    told = {"gathered": multihost.gather([2**40 + index, index]).tolist()}
    kernel = np.arange(128, dtype=np.float32).reshape(16, 8)
    told["fingerprint"] = fingerprint_params({"a": {"kernel": kernel}})
    batch = {"tokens": np.arange(16 * 3).reshape(16, 3)}
    for axes in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
        mesh = make_mesh(*axes)
        name = str(axes)
        told[name] = {"part": host_part(mesh)}
        spec = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        split = jax.make_array_from_callback(kernel.shape, spec, lambda rows: kernel[rows])
        told[name]["fingerprint"] = fingerprint_params({"a": {"kernel": split}})
        whole = multihost_utils.process_allgather(place_batch(host_rows(batch, mesh), mesh), tiled=True)
        told[name]["same"] = bool((whole["tokens"] == batch["tokens"]).all())
    agree("agreement", {"a": 1})
    agree_on_folder(sys.argv[1])
    wrong = (agree, "shapes", {"model": {"width": 8 + index}}), (agree_on_folder, sys.argv[2 + index])
    for function, *arguments in wrong:
        try:
            function(*arguments)
        except UserError as error:
            told.setdefault("errors", []).append(str(error))
    print(json.dumps(told))
"""


def test_what_hosts_tell_each_other(tmp_path):
    folders = [str(tmp_path / name) for name in ("shared", "mine", "yours")]
    script = [sys.executable, "-c", textwrap.dedent(HOSTS), *folders]
    results = ended(start([script] * 2, devices=4))
    told = []
    for code, output, errors in results:
        assert code == 0, errors
        told.append(json.loads(output.splitlines()[-1]))
    assert [each.pop("gathered") for each in told] == [[[2**40, 0], [2**40 + 1, 1]]] * 2
    assert [each["(1, 8, 1)"]["part"] for each in told] == [[0, 2, True], [1, 2, True]]
    # One part that both have.
    assert [each["(1, 1, 8)"]["part"] for each in told] == [[0, 1, True], [0, 1, False]]
    for each in told:
        for axes in ("(1, 8, 1)", "(2, 2, 2)", "(1, 1, 8)"):
            assert each[axes]["fingerprint"] == each["fingerprint"]
            assert each[axes]["same"]
        shapes, folder = each["errors"]
        assert shapes == "the hosts disagree on their shapes: model.width is 8 on process 0 and 9 on process 1"
        assert "folder, which must be one that all of them share" in folder
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


FAILING = """
    import sys, time
    import numpy as np
    from jax.experimental import multihost_utils
    from endistill_jax import multihost
    from endistill_jax.core.errors import UserError

    multihost.initialize()
    multihost.watch_peers()
    multihost_utils.process_allgather(np.zeros(1))
    try:
        with multihost.reporting_failure():
            if multihost.process_index() == int(sys.argv[1]):
                raise UserError("the disk is full")
            multihost_utils.process_allgather(np.zeros(1))
    except UserError as error:
        time.sleep(3)  # closes what is open
        multihost.shutdown_all(f"error: {error}", 2)
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_the_middle_ends_hosts_that_wait_in_a_collective(failing):
    results = ended(start([[sys.executable, "-c", textwrap.dedent(FAILING), str(failing)]] * 2))
    assert [code for code, _, _ in results] == [2, 2], results
    assert f"process {failing} failed: UserError: the disk is full" in results[1 - failing][2]


def test_a_host_whose_others_do_not_come_ends_with_one_line(monkeypatch):
    monkeypatch.setenv(CONNECT_SECONDS, "3")
    alone = [
        sys.executable,
        "-c",
        "from endistill_jax.multihost import initialize; initialize()",
    ]
    processes = start([alone, [sys.executable, "-c", ""]])
    (code, _, errors), _ = ended(processes)
    assert code == 1, "not a mistake, with which launchers would not try again"
    assert "all 2 processes of ENDISTILL_COORDINATOR=127.0.0.1" in errors and "within 3 s" in errors
    assert "stack trace" not in errors
