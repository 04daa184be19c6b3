"""The programs that the benchmarks of the step time: a teacher's forward pass, training steps, the relation losses."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from shapes import OPTIMIZER, Shape, random_batch, random_teacher

from endistill_jax.core.model_io import Lengths, Output, Reads
from endistill_jax.models.family import apply, forward_flops, init_params
from endistill_jax.objectives import LossImplementation, Objective, RelationKL, loss_and_sums, presets
from endistill_jax.sharding import make_mesh, param_shardings, place_batch
from endistill_jax.train.flops import step_flops
from endistill_jax.train.optimizer import make_optimizer
from endistill_jax.train.state import init_state
from endistill_jax.train.step import make_train_step

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

from counted_flops import count_matmul_flops  # noqa: E402

SCRATCH = presets.scratch()


@dataclasses.dataclass(kw_only=True)
class Program:
    """Something to time.

    Attributes:
        run: does it once and waits for it.
        flops: of its matrix products by our formula.
        counted_flops: of the matrix products in its trace, position biases and rematerialization included.
        compile_seconds: of XLA, after tracing.
        trace_seconds: of JAX, before.
        temporary_bytes: the compiler's count of what the program needs in addition to arguments and results.
    """

    run: Callable[[], Any]
    flops: int
    counted_flops: int
    compile_seconds: float
    trace_seconds: float
    temporary_bytes: int


def compile_program(jitted: Callable, arguments: tuple, flops: int, run: Callable[[], Any]) -> Program:
    """Compiles ahead of time to learn what that takes; `run` calls the jitted function as training does."""
    began = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    memory = compiled.memory_analysis()
    return Program(
        run=run,
        flops=flops,
        counted_flops=count_matmul_flops(jitted, *arguments).total(),
        compile_seconds=ended - traced,
        trace_seconds=traced - began,
        temporary_bytes=0 if memory is None else memory.temp_size_in_bytes,
    )


class Training:
    """A training step with its state, teacher and batch: each call is one update.

    Attributes:
        losses: the losses of all calls so far, on the device.
    """

    def __init__(
        self,
        shape: Shape,
        objective: Objective,
        mesh: Mesh,
        teacher_params: Any,
        params: Any = None,
        implementation: LossImplementation | None = None,
    ):
        optimizer = make_optimizer(OPTIMIZER, steps=1_000_000)
        teacher = shape.teacher if objective.needs_teacher else None
        self.step = make_train_step(
            student=shape.student,
            teacher=teacher,
            objective=objective,
            optimizer=optimizer,
            mesh=mesh,
            implementation=implementation,
        )
        self.state = init_state(shape.student, optimizer, mesh, jax.random.key(0), params)
        self.teacher_params = teacher_params if objective.needs_teacher else None
        self.batch = place_batch(random_batch(shape), mesh)
        self.losses: list[jax.Array] = []

    def __call__(self) -> None:
        self.state, metrics = self.step(*self.arguments())
        jax.block_until_ready((self.state, metrics))
        self.losses.append(metrics["loss"][0])

    def arguments(self) -> tuple:
        """What the step is called with; the state of now."""
        return self.state, self.teacher_params, self.batch


def whole_step(shape: Shape, mesh: Mesh | None = None, implementation: LossImplementation | None = None) -> Program:
    """Distillation: the teacher's forward pass, the student's step, the losses in the form asked for."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    teacher_params = random_teacher(shape, param_shardings(shape.teacher, mesh))
    training = Training(shape, shape.objective, mesh, teacher_params, implementation=implementation)
    flops = step_flops(shape.student, shape.teacher, shape.objective, shape.lengths).total
    return compile_program(training.step, training.arguments(), flops, training)


def student_step(shape: Shape) -> Program:
    """Pretraining of the student on the same batch: forward pass, cross-entropy, backward pass, update."""
    training = Training(shape, SCRATCH, make_mesh(devices=jax.devices()[:1]), None)
    flops = step_flops(shape.student, None, SCRATCH, shape.lengths).total
    return compile_program(training.step, training.arguments(), flops, training)


def teacher_forward(shape: Shape) -> Program:
    """The teacher's taps and logits that the objective reads."""
    reads = shape.objective.reads("teacher")

    @jax.jit
    def forward(params: Any, batch: dict) -> tuple:
        output = apply(shape.teacher, params, batch, reads)
        return output.taps, output.logits

    arguments = (random_teacher(shape), jax.device_put(random_batch(shape)))
    flops = forward_flops(shape.teacher, shape.lengths, reads).total
    return compile_program(forward, arguments, flops, lambda: jax.block_until_ready(forward(*arguments)))


def relation_losses(shape: Shape) -> Program:
    """All relations of the objective on given taps: their sum, and its gradient by the student's taps."""
    objective = Objective(terms=tuple(term for term in shape.objective.terms if isinstance(term, RelationKL)))

    @jax.jit
    def value_and_gradient(student: Output, teacher: Output, batch: dict) -> tuple:
        weights = objective.weights(batch)
        return jax.value_and_grad(lambda taken: loss_and_sums(objective, taken, teacher, batch, weights)[0])(student)

    batch = jax.device_put(random_batch(shape))
    outputs = [_taps(getattr(shape, role), objective.reads(role), batch) for role in ("student", "teacher")]
    arguments = (*outputs, batch)
    flops = step_flops(shape.student, shape.teacher, objective, shape.lengths).terms
    return compile_program(
        value_and_gradient, arguments, flops, lambda: jax.block_until_ready(value_and_gradient(*arguments))
    )


def _taps(config: Any, reads: Reads, batch: dict) -> Output:
    return jax.jit(lambda key: apply(config, init_params(config, key), batch, reads))(jax.random.key(2))


def positions(lengths: Lengths) -> int:
    """Tokens of a batch, inputs and targets, padding included."""
    return lengths.batch * (lengths.source + lengths.target)
