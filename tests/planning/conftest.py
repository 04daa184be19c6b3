"""Small requests, and plans of them that were never compiled."""

import os
import subprocess
import sys

import pytest

from endistill_jax.core.model_io import Lengths
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import presets
from endistill_jax.planning.planned import PlannedStep, StepRequest
from endistill_jax.planning.topologies import parse_topology
from endistill_jax.train.optimizer import OptimizerConfig


def make_model(layers: int, width: int) -> T5Config:
    return T5Config(
        vocab_size=64,
        d_model=width,
        num_heads=4,
        head_dim=8,
        mlp_dim=2 * width,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
    )


@pytest.fixture
def make_request():
    """A small step on a topology; further fields as given."""

    def make(topology: str = "cpu:1", **fields) -> StepRequest:
        settings = {
            "topology": parse_topology(topology),
            "student": make_model(2, 16),
            "teacher": make_model(3, 32),
            "objective": presets.miniend_e(relation_heads=4),
            "optimizer": OptimizerConfig(name="adamw", learning_rate=1e-3),
            "steps": 100,
            "lengths": Lengths(batch=8, source=16, target=8),
        }
        return StepRequest(**settings | fields)

    return make


@pytest.fixture
def make_plan(make_request):
    """A step with made-up findings; `memory` in bytes, without a status it compiled."""

    def make(topology: str = "v5e:4x4", price: float | None = None, memory: int = 2**30, result=None, **fields):
        request = make_request(topology, **fields)
        compiled = {
            "status": "compiled",
            "reason": "",
            "mesh": {"data": 1, "fsdp": request.topology.chips, "tensor": 1},
            "student_params": 1000,
            "teacher_params": 5000,
            "held": {"student": 100, "optimizer": 200, "teacher": 300, "batch": 50},
            "memory": {"arguments": 700, "temporaries": memory - 700, "outputs": 0, "aliases": 0, "program": 0},
            "flops": 2e12,
            "collectives": [
                {"kind": "all-gather", "crosses_slices": False, "count": 3, "payload": 8e9, "sent": 7e9},
                {"kind": "all-reduce", "crosses_slices": True, "count": 1, "payload": 1e9, "sent": 1e9},
            ],
            "trace_seconds": 1.0,
            "compile_seconds": 60.0,
            "host_memory": 3 * 2**30,
        }
        return PlannedStep(request=request, result=result or compiled, run_tokens=request.tokens * 100, price=price)

    return make


@pytest.fixture
def run_python():
    """Runs a program in a process of its own."""

    def run(program: str, environment: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
