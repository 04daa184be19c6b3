"""Planning: AOT-compiles a training step for a topology and reports memory, time and cost."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.attention import ATTENTION_BYTES
from endistill_jax.core.errors import UserError
from endistill_jax.interpolation.stages import stages_table
from endistill_jax.objectives.relations_blocked import RELATION_BYTES
from endistill_jax.objectives.tokens_blocked import VOCABULARY_BYTES
from endistill_jax.planning.compiling import check_compilers, compile_bounded
from endistill_jax.planning.options import BATCHES, REMATS, PlanOptions, Sweep, is_left_open
from endistill_jax.planning.planned import PlannedStep, StepRequest
from endistill_jax.planning.report import chain_text, describe_plan, plans_table, rank, write_plans
from endistill_jax.planning.topologies import Topology
from endistill_jax.reports.files import write_atomically
from endistill_jax.sharding import PARAM_SHARDINGS
from endistill_jax.storage import check_folder
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.optimizer import make_schedule
from endistill_jax.train.training import as_teacher


def plan_experiment(options: PlanOptions, experiment: Experiment) -> list[PlannedStep]:
    """Compiles an experiment's step for each topology, and prints and writes a report after each compilation.

    Returns:
        The plans; for a sweep the best first.

    Raises:
        UserError: invalid settings, before anything is compiled; later if no plan fits.
    """
    experiment = with_teacher_config(experiment)
    _check(options, [experiment])
    plans = _plan(options, experiment)
    if not any(planned.fits for planned in plans):
        raise UserError(_nothing_fits(options))
    return plans


def plan_stage_by_stage(
    options: PlanOptions, stages: Sequence[Experiment], direct: Experiment
) -> list[list[PlannedStep]]:
    """Plans every stage of a chain, each in a folder `stage_<n>` of the plan's, and reports the whole.

    Args:
        options: topologies, and what to vary.
        stages: in order, see `plan_stages`.
        direct: what they were planned from.

    Raises:
        UserError: invalid settings, before anything is compiled; once all were tried, stages that fit nowhere.
    """
    _check(options, stages)
    table = stages_table(stages, direct.objective)
    print(table, flush=True)
    planned: list[list[PlannedStep]] = []
    failures = []
    for number, stage in enumerate(stages, 1):
        print(f"# Stage {number} of {len(stages)}\n", flush=True)
        of_stage = dataclasses.replace(options, folder=f"{options.folder}/stage_{number}")
        planned.append(_plan(of_stage, stage))
        if not any(plan.fits for plan in planned[-1]):
            failures.append(f"stage {number}: {_nothing_fits(of_stage)}")
    text = chain_text(planned)
    write_atomically(f"{options.folder}/stages.md", f"```\n{table}```\n\n{text}")
    print(f"{text}written to {options.folder}/stages.md")
    if failures:
        raise UserError("; ".join(failures))
    return planned


def with_teacher_config(experiment: Experiment) -> Experiment:
    """The experiment with its teacher's configuration as it will be run: the given one, or its checkpoint's."""
    teacher = experiment.teacher
    if teacher is None:
        return experiment
    if teacher.config is None and is_left_open(teacher.source):
        raise UserError("a plan needs the teacher's shape: give a --gin.TEACHER to read it from, or set Teacher.config")
    config = as_teacher(
        teacher.config or open_model(teacher.source).config, teacher.dtype, experiment.student.scan_layers
    )
    return dataclasses.replace(experiment, teacher=dataclasses.replace(teacher, config=config))


def _check(options: PlanOptions, experiments: Sequence[Experiment]) -> None:
    for experiment in experiments:
        teacher = experiment.teacher and experiment.teacher.config
        experiment.objective.validate(experiment.student, teacher)
        experiment.init.check(teacher, experiment.student)
        make_schedule(experiment.optimizer, experiment.run.steps)
    check_compilers(options.topologies)
    check_folder(options.folder)


def _plan(options: PlanOptions, experiment: Experiment) -> list[PlannedStep]:
    """The plans of a checked experiment, printed and written; does not raise if nothing fits."""

    requests = [_request(experiment, topology) for topology in options.topologies]
    run_tokens = experiment.run.steps * requests[0].tokens  # as configured, whatever batches a sweep tries

    def plan(request: StepRequest) -> PlannedStep:
        result = compile_bounded(request, options.bounds)
        return PlannedStep(request=request, result=result, run_tokens=run_tokens, price=options.price)

    name = _name(options)
    plans: list[PlannedStep] = []
    for request in requests:
        for planned in [plan(request)] if options.sweep is None else run_sweep(options.sweep, request, plan):
            plans.append(planned)
            if options.sweep is None:
                print(describe_plan(planned), flush=True)
            else:
                print(plans_table([planned]).splitlines()[2], flush=True)
                plans = rank(plans)
            write_plans(options.folder, name, plans, _text(options, plans))
    if len(plans) > 1:
        print(plans_table(plans))
    print(f"written to {options.folder}/{name}.md and {name}.json")
    return plans


def _name(options: PlanOptions) -> str:
    return "plan" if options.sweep is None else "sweep"


def _nothing_fits(options: PlanOptions) -> str:
    return f"nothing of what was planned fits; see {options.folder}/{_name(options)}.md"


def _request(experiment: Experiment, topology: Topology) -> StepRequest:
    data, run, platform = experiment.data, experiment.run, topology.chip.platform
    return StepRequest(
        topology=topology,
        student=experiment.student,
        teacher=experiment.teacher.config if experiment.objective.needs_teacher else None,
        objective=experiment.objective,
        optimizer=experiment.optimizer,
        steps=run.steps,
        lengths=data.lengths,
        eval_rows=data.eval_batch_size,
        packed=data.pack,
        mesh=run.mesh,
        micro_batches=run.micro_batches,
        # The blocks of the topology's platform, even if the CPU compiler is used as a proxy.
        implementation=dataclasses.replace(
            run.losses,
            relation_bytes=run.losses.relation_bytes or RELATION_BYTES.get(platform),
            vocabulary_bytes=run.losses.vocabulary_bytes or VOCABULARY_BYTES.get(platform),
            attention_bytes=run.losses.attention_bytes or ATTENTION_BYTES.get(platform),
        ),
        teacher_sharding=experiment.teacher_sharding,
        compiler_options=run.compiler_options,
        slices=run.slices,
    )


def _text(options: PlanOptions, plans: list[PlannedStep]) -> str:
    if options.sweep is None:
        table = f"\n{plans_table(plans)}" if len(plans) > 1 else ""
        return "\n".join(describe_plan(planned) for planned in plans) + table
    fitting = [planned for planned in plans if planned.fits]
    best = f"\nThe first in full:\n\n{describe_plan(fitting[0])}" if fitting else ""
    return f"Ranked by estimated tokens a day; not measured.\n\n{plans_table(plans)}{best}"


def run_sweep(sweep: Sweep, request: StepRequest, plan: Callable[[StepRequest], PlannedStep]) -> Iterator[PlannedStep]:
    """Plans the variants of a step, one after another, except those that cannot fit any more.

    Args:
        sweep: what varies.
        request: the step as configured, on one topology.
        plan: compiles one.
    """
    chips = request.topology.chips
    meshes = usual_meshes(request.topology) if sweep.mesh == () else sweep.mesh or (request.mesh,)
    teacher_shardings = _choices(sweep.teacher, request.teacher_sharding, PARAM_SHARDINGS)
    remats = sorted(_choices(sweep.remat, request.student.remat, REMATS), key=REMATS.index)
    batches = [request.lengths.batch]
    if sweep.batch is not None:
        batches = sorted({chips * each for each in sweep.batch or BATCHES}, reverse=True)
    for mesh, teacher_sharding in itertools.product(meshes, teacher_shardings):
        if teacher_sharding != teacher_shardings[0] and (request.teacher is None or mesh[1] == 1):
            continue  # nothing is sharded over one device: both are the same
        # From the largest batch down, and the remat policy that keeps least first: a batch that does not fit with it
        # fits with no other, so most variants that cannot fit are never compiled.
        possible = batches
        for remat in remats:
            for batch in possible:
                planned = plan(
                    dataclasses.replace(
                        request,
                        mesh=mesh,
                        teacher_sharding=teacher_sharding,
                        student=dataclasses.replace(request.student, remat=remat),
                        lengths=request.lengths._replace(batch=batch),
                    )
                )
                yield planned
                if planned.fits:
                    break
                if planned.status == "too big":
                    possible = [other for other in possible if other < batch]


def _choices(given: tuple[str, ...] | None, configured: str, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (configured,) if given is None else given or usual


def usual_meshes(topology: Topology) -> tuple[tuple[int, int, int], ...]:
    """Parameters split over all chips of a slice, over a quarter of them, over four, over none; and heads over two."""
    chips = topology.chips // topology.slices
    parts = dict.fromkeys(part for part in (chips, chips // 4, 4, 1) if 1 <= part <= chips and chips % part == 0)
    meshes = [(topology.chips // part, part, 1) for part in parts]
    if chips >= 4:
        meshes.append((topology.slices, chips // 2, 2))
    return tuple(dict.fromkeys(meshes))
