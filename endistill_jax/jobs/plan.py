"""Planning a training: compiles its step for chips that are not here, and tells what it needs there."""

import dataclasses
from collections.abc import Iterator, Sequence

from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import UserError
from endistill_jax.interpolation.stages import Stage, stages_table
from endistill_jax.models.family import Lengths
from endistill_jax.models.t5.attention import ATTENTION_BYTES
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.objectives.relations_blocked import GROUP_BYTES
from endistill_jax.objectives.vocabulary import CHUNK_BYTES
from endistill_jax.planning.compiling import check_compilers, compile_bounded
from endistill_jax.planning.flags import PlanOptions, is_left_open
from endistill_jax.planning.planned import PlannedStep
from endistill_jax.planning.report import chain_text, describe_plan, plans_table, rank, write_plans
from endistill_jax.planning.request import StepRequest
from endistill_jax.planning.sweep import run_sweep
from endistill_jax.planning.topologies import Topology
from endistill_jax.reports.files import write_atomically
from endistill_jax.storage import check_folder
from endistill_jax.train.optimizer import OptimizerConfig, make_schedule
from endistill_jax.train.experiment import Data, Run


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
    check_folder(options.folder)
    settings = {"path": path, "data": data, "optimizer": optimizer, "run": run}
    plans = _plan(options, student=student, teacher=teacher, **settings)
    if not any(planned.fits for planned in plans):
        raise UserError(_nothing_fits(options))
    return plans


def _plan(
    options: PlanOptions,
    *,
    student: T5Config,
    teacher: T5Config | None,
    path: Path,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
) -> list[PlannedStep]:
    """As `plan_training`, of settings that were checked, and whether or not anything fits."""
    requests = [
        StepRequest(
            topology=topology,
            student=student,
            teacher=teacher if path.needs_teacher else None,
            path=path,
            optimizer=optimizer,
            steps=run.steps,
            lengths=Lengths(data.batch_size, data.inputs_length, data.targets_length),
            eval_rows=data.eval_batch_size,
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
    name = _name(options)
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
    return plans


def _name(options: PlanOptions) -> str:
    return "plan" if options.sweep is None else "sweep"


def _nothing_fits(options: PlanOptions) -> str:
    return f"nothing of what was planned fits; see {options.folder}/{_name(options)}.md"


def plan_stage_by_stage(options: PlanOptions, stages: Sequence[Stage], path: Path) -> list[list[PlannedStep]]:
    """Plans the training of every stage of a chain, each in a folder `stage_<n>` of the plan's, and tells the whole.

    Args:
        options: where, and what to vary.
        stages: in order, see `plan_stages`.
        path: what they were planned with.

    Returns:
        What was planned, by stage.

    Raises:
        UserError: settings that cannot be, before anything is compiled; and, once all were tried, stages that fit
            nowhere.
    """
    for stage in stages:
        stage.path.validate(stage.student, stage.teacher)
        make_schedule(stage.optimizer, stage.run.steps)
    check_compilers(options.topologies)
    check_folder(options.folder)
    table = stages_table(stages, path)
    print(table, flush=True)
    planned: list[list[PlannedStep]] = []
    failures = []
    for stage in stages:
        print(f"# Stage {stage.number} of {len(stages)}\n", flush=True)
        of_stage = dataclasses.replace(options, folder=f"{options.folder}/stage_{stage.number}")
        settings = {name: getattr(stage, name) for name in ("student", "teacher", "path", "data", "optimizer", "run")}
        planned.append(_plan(of_stage, **settings))
        if not any(plan.fits for plan in planned[-1]):
            failures.append(f"stage {stage.number}: {_nothing_fits(of_stage)}")
    text = chain_text(planned)
    write_atomically(f"{options.folder}/stages.md", f"```\n{table}```\n\n{text}")
    print(f"{text}written to {options.folder}/stages.md")
    if failures:
        raise UserError("; ".join(failures))
    return planned


def shape_of_teacher(teacher: str, teacher_config: T5Config | None) -> T5Config:
    """A teacher's shape for a plan: as it is said, or else as its checkpoint has it.

    Raises:
        UserError: if neither is given, or there is no such model.
    """
    if teacher_config is not None:
        return teacher_config
    if is_left_open(teacher):
        raise UserError("a plan needs the teacher's shape: give a --gin.TEACHER to read it from, or set teacher_config")
    return open_model(teacher).config


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
        attention_bytes=run.losses.attention_bytes or ATTENTION_BYTES.get(platform),
    )


def _text(options: PlanOptions, plans: list[PlannedStep]) -> str:
    if options.sweep is None:
        table = f"\n{plans_table(plans)}" if len(plans) > 1 else ""
        return "\n".join(describe_plan(planned) for planned in plans) + table
    fitting = [planned for planned in plans if planned.fits]
    best = f"\nThe first in full:\n\n{describe_plan(fitting[0])}" if fitting else ""
    return f"Ranked by estimated tokens a day; not measured.\n\n{plans_table(plans)}{best}"
