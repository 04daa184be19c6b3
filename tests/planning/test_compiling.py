"""A compilation that ends badly is an answer: crashes, endless ones, greedy ones."""

import importlib.util
import sys

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.planning.compiling import check_compilers, compile_bounded
from endistill_jax.planning.options import Bounds
from endistill_jax.planning.topologies import parse_topology

BOUNDS = Bounds(seconds=60)


def ending(program: str) -> tuple[str, ...]:
    """A worker that does something else than compile; sys.argv[1:] are its two files."""
    return (sys.executable, "-c", program)


def test_the_worker_gets_the_request_and_its_answer_comes_back(make_request):
    program = """
import json, pathlib, pickle, sys
request = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
pathlib.Path(sys.argv[2]).write_text(json.dumps({"status": "compiled", "steps": request.steps}))
"""
    assert compile_bounded(make_request(steps=7), BOUNDS, ending(program)) == {"status": "compiled", "steps": 7}


def test_the_worker_has_the_devices_of_the_topology(make_request):
    program = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[2]).write_text(json.dumps({"status": "compiled", "environment": dict(os.environ)}))
"""
    seen = compile_bounded(make_request("cpu:5"), BOUNDS, ending(program))["environment"]
    assert "device_count=5" in seen["XLA_FLAGS"] and seen["JAX_PLATFORMS"] == "cpu"


def test_a_crash_is_told_with_how_and_its_last_words(make_request):
    killed = compile_bounded(
        make_request(),
        BOUNDS,
        ending("import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
    )
    assert killed["status"] == "crashed"
    assert "signal 11" in killed["reason"] and "last words" in killed["reason"]
    failed = compile_bounded(make_request(), BOUNDS, ending("raise SystemExit(3)"))
    assert failed["status"] == "crashed" and "exit code 3" in failed["reason"]


def test_one_that_does_not_end_is_ended(make_request):
    answer = compile_bounded(make_request(), Bounds(seconds=0.5), ending("import time; time.sleep(600)"))
    assert answer["status"] == "out of time" and "--plan_seconds" in answer["reason"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc to see how much memory a process has")
def test_one_that_takes_too_much_memory_is_ended(make_request):
    program = "x = bytearray(300 << 20)\nimport time; time.sleep(600)"
    answer = compile_bounded(make_request(), Bounds(seconds=60, memory=200 << 20), ending(program))
    assert answer["status"] == "out of host memory" and "--plan_memory" in answer["reason"]


def test_without_libtpu_a_tpu_is_refused_and_a_host_is_not(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_compilers([parse_topology("cpu:8")])
    with pytest.raises(UserError, match="the extra `plan`"):
        check_compilers([parse_topology("cpu:8"), parse_topology("v5e:4x4")])
