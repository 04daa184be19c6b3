"""Planning a training: compiles its step for chips that are not here, and tells what it needs there."""

import dataclasses
from collections.abc import Iterator

from endistill_jax.errors import UserError
from endistill_jax.jobs.settings import Data, Run
from endistill_jax.losses import Path
from endistill_jax.losses.relations_grouped import GROUP_BYTES
from endistill_jax.losses.vocabulary import CHUNK_BYTES
from endistill_jax.model.config import T5Config
from endistill_jax.model.flops import Lengths
from endistill_jax.planning.compiling import check_compilers, compile_bounded
from endistill_jax.planning.flags import PlanOptions
from endistill_jax.planning.planned import PlannedStep
from endistill_jax.planning.report import describe_plan, plans_table, rank, write_plans
from endistill_jax.planning.request import StepRequest
from endistill_jax.planning.sweep import run_sweep
from endistill_jax.planning.topologies import Topology
from endistill_jax.train.optimizer import OptimizerConfig, make_schedule


def plan_training(
    options: PlanOptions,
    *,
    student: T5Config,
    teacher: T5Config | None,
    path: Path,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
) -> list[PlannedStep]:
    """Compiles the step of a training for each topology, prints what is found, and writes it after each compilation.

    Args:
        options: where, and what to vary.
        student: the model that is trained.
        teacher: the frozen model as it will be run; None without one.
        path: what is compared.
        data: its lengths and its batch; nothing is read.
        optimizer: how the student is updated.
        run: how long, and on which mesh.

    Returns:
        What was planned, in a sweep the best first.

    Raises:
        UserError: settings that fit nowhere, before anything is compiled; and if nothing of what was compiled fits.
    """
    path.validate(student, teacher)
    make_schedule(optimizer, run.steps)
    check_compilers(options.topologies)
    requests = [
        StepRequest(
            topology=topology,
            student=student,
            teacher=teacher if path.needs_teacher else None,
            path=path,
            optimizer=optimizer,
            steps=run.steps,
            lengths=Lengths(data.batch_size, data.inputs_length, data.targets_length),
            packed=data.pack,
            mesh=run.mesh,
            micro_batches=run.micro_batches,
            computation=_computation(run, topology),
            teacher_placement=run.teacher_placement,
            compiler_options=run.compiler_options,
            slices=run.slices,
        )
        for topology in options.topologies
    ]
    name = "plan" if options.sweep is None else "sweep"
    plans: list[PlannedStep] = []
    for planned in _plan_all(options, requests):
        plans.append(planned)
        if options.sweep is not None:
            print(plans_table([planned]).splitlines()[2], flush=True)
            plans = rank(plans)
        else:
            print(describe_plan(planned), flush=True)
        write_plans(options.folder, name, plans, _text(options, plans))
    if len(plans) > 1:
        print(plans_table(plans))
    print(f"written to {options.folder}/{name}.md and {name}.json")
    if not any(planned.fits for planned in plans):
        raise UserError(f"nothing of what was planned fits; see {options.folder}/{name}.md")
    return plans


def _plan_all(options: PlanOptions, requests: list[StepRequest]) -> Iterator[PlannedStep]:
    run_tokens = requests[0].steps * requests[0].tokens

    def plan(request: StepRequest) -> PlannedStep:
        result = compile_bounded(request, options.bounds)
        return PlannedStep(request=request, result=result, run_tokens=run_tokens, price=options.price)

    for request in requests:
        if options.sweep is None:
            yield plan(request)
        else:
            yield from run_sweep(options.sweep, request, plan)


def _computation(run: Run, topology: Topology) -> object:
    """The losses' form on the topology's own platform, also where the CPU's compiler stands for it."""
    platform = topology.chip.platform
    return dataclasses.replace(
        run.losses,
        group_bytes=run.losses.group_bytes or GROUP_BYTES.get(platform),
        chunk_bytes=run.losses.chunk_bytes or CHUNK_BYTES.get(platform),
    )


def _text(options: PlanOptions, plans: list[PlannedStep]) -> str:
    if options.sweep is None:
        table = f"\n{plans_table(plans)}" if len(plans) > 1 else ""
        return "\n".join(describe_plan(planned) for planned in plans) + table
    fitting = [planned for planned in plans if planned.fits]
    best = f"\nThe first in full:\n\n{describe_plan(fitting[0])}" if fitting else ""
    return f"Ranked by estimated tokens a day; not measured.\n\n{plans_table(plans)}{best}"
