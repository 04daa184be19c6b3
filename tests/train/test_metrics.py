"""Contracts of metric writing: nothing told is lost, and a resumed run's file is an uninterrupted run's."""

import io
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.train.metrics import MetricWriter, ProgressDisplay, read_metrics


def values_at(step):
    return {"loss": np.float32(1) / np.float32(step + 3), "gradient_norm": jnp.float32(step) / 7}


def write_steps(directory, steps, resume_step=None):
    with MetricWriter(directory, resume_step=resume_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, values_at(step))
    return (directory / "metrics.jsonl").read_bytes()


def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
    whole = write_steps(tmp_path / "whole", range(10))
    write_steps(tmp_path / "killed", range(8))
    assert write_steps(tmp_path / "killed", range(5, 10), resume_step=4) == whole


@pytest.mark.parametrize("cut", [b'{"step": 8, "lo', b'{"step": 8}', b'{"n\xc3', b"\x00\x00"])
def test_last_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
    whole = write_steps(tmp_path / "whole", range(10))
    write_steps(tmp_path / "killed", range(8))
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    assert write_steps(tmp_path / "killed", range(8, 10), resume_step=8) == whole


def test_a_file_on_a_bucket_is_that_of_a_local_folder_and_resumes_like_it(tmp_path, bucket):
    whole = write_steps(tmp_path / "whole", range(10))
    file = bucket.folder / "run/metrics.jsonl"
    for steps, resume_step in ((range(8), None), (range(5, 10), 4)):
        with MetricWriter(f"{bucket.url}/run", resume_step=resume_step, tensorboard=False) as writer:
            for step in steps:
                writer.write(step, values_at(step))
                assert read_metrics(f"{bucket.url}/run/metrics.jsonl")[-1]["step"] == step
    assert file.read_bytes() == whole


def test_a_folder_may_be_in_ones_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with MetricWriter("~/run", tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
    assert read_metrics("~/run/metrics.jsonl") == read_metrics(tmp_path / "run/metrics.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_run_that_starts_over_starts_the_file_anew(tmp_path):
    write_steps(tmp_path, range(8))
    assert write_steps(tmp_path, range(2)) == write_steps(tmp_path / "fresh", range(2))


def test_resuming_in_a_folder_without_metrics_starts_a_file(tmp_path):
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5, 6]


def test_numbers_come_back_bit_for_bit_and_timing_stands_apart(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, values_at(3) | {"worst": np.inf}, timing={"seconds": 0.25})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record.pop("timing") == {"seconds": 0.25}
    assert np.float32(record["loss"]).tobytes() == values_at(3)["loss"].tobytes()
    assert float(record["worst"]) == np.inf
    assert set(record) == {"step", "loss", "gradient_norm", "worst"}


def test_killed_process_loses_no_line_it_wrote(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from endistill_jax.train.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], tensorboard=False)\n"
        "for step in range(3):\n"
        "    writer.write(step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_file_that_is_no_metrics_file_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nmy notes\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 of .*metrics.jsonl"):
        MetricWriter(tmp_path, resume_step=1, tensorboard=False)
    assert "my notes" in path.read_text()


def test_names_that_would_hide_the_step_are_refused(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2.0})


def test_missing_tensorboard_is_told_before_any_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="tensorboard=True.*needs tensorboard.*pip install endistill-jax"):
        MetricWriter(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def scalars_in(folder):
    """What TensorBoard shows of a folder: step -> value by tag."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_ndarray = pytest.importorskip("tensorboard.util.tensor_util").make_ndarray
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={event_accumulator.TENSORS: 0}).Reload()
    tags = events.Tags()["tensors"]
    return {tag: {each.step: make_ndarray(each.tensor_proto).item() for each in events.Tensors(tag)} for tag in tags}


def test_tensorboard_gets_the_same_scalars(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, values_at(step), timing={"seconds": step})
    seen = scalars_in(tmp_path / "tensorboard")
    assert set(seen) == {"loss", "gradient_norm", "timing/seconds"}
    assert seen["loss"] == {step: float(values_at(step)["loss"]) for step in range(3)}


def test_tensorboard_scalars_go_to_a_bucket(bucket):
    with MetricWriter(f"{bucket.url}/run") as writer:
        writer.write(7, {"loss": 2.5})
    assert scalars_in(bucket.folder / "run/tensorboard") == {"loss": {7: 2.5}}


def test_tensorboard_scalars_need_no_tensorflow(tmp_path, without_modules):
    program = (
        "import sys\n"
        "from endistill_jax.train.metrics import MetricWriter\n"
        "with MetricWriter(sys.argv[1]) as writer:\n"
        "    writer.write(7, {'loss': 2.5})\n"
    )
    ended = without_modules(program, str(tmp_path), absent=("tensorflow", "clu"))
    assert ended.returncode == 0, ended.stderr
    assert scalars_in(tmp_path / "tensorboard") == {"loss": {7: 2.5}}


def test_pipe_gets_a_line_only_when_there_is_something_to_tell():
    stream = io.StringIO()
    with ProgressDisplay(10, first_step=4, description="distill", stream=stream) as progress:
        progress.advance(5)
        progress.advance(6, {"loss": 5.90123})
        progress.say("checkpoint saved")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("distill: step 6/10  loss 5.901  ") and lines[0].endswith(" s left")
    assert lines[1:] == ["distill: checkpoint saved"]


def test_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with ProgressDisplay(10, first_step=4, description="distill", stream=stream) as progress:
        for step in range(5, 11):
            progress.advance(step, {"loss": step})
        progress.say("done")
    assert " 4/10 " in stream.getvalue() and " 10/10 " in stream.getvalue() and "loss 10" in stream.getvalue()
    assert "distill: done\n" in stream.getvalue()


def test_each_line_is_standard_json(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"loss": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"step": 0, "loss": "nan"}
