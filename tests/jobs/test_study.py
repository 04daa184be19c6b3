"""Studies: equal beginnings and batches, nothing run twice, and everything that was measured in one file."""

import dataclasses
import importlib
import json
import shutil

import pytest
from jax.sharding import Mesh

from endistill_jax.checkpoints.manager import finished_steps
from endistill_jax.core.errors import Stopped, UserError
from endistill_jax.jobs import Arm, Data, Experiment, Finetuning, Interpolation, Run, StageSettings, StudentInit, study
from endistill_jax.objectives import presets
from endistill_jax.sharding import HostPart, make_mesh
from endistill_jax.studies.arms import plan_study
from endistill_jax.studies.results import final, paired
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.training import open_teacher

study_job = importlib.import_module("endistill_jax.jobs.study")  # the package has functions of these names
study_runs = importlib.import_module("endistill_jax.studies.runs")
finetuning = importlib.import_module("endistill_jax.train.finetuning")

SCRATCH = presets.scratch()


@pytest.fixture(scope="session")
def task(color_task) -> Finetuning:
    return Finetuning(
        data=Data(
            task=color_task,
            inputs_length=16,
            targets_length=8,
            batch_size=4,
            pack=False,
            eval_batch_size=8,
            eval_batches=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        run=Run(steps=2, log_every=2, checkpoint_every=2, tensorboard=False),
        dropout_rate=0.0,
        scored_by="rank",
    )


@pytest.fixture(scope="session")
def union(experiment):
    return experiment.objective


@pytest.fixture(scope="session")
def common(experiment) -> Experiment:
    """Four steps, evaluated at steps 0, 2 and 4."""
    run = Run(steps=4, log_every=1, eval_every=2, eval_at_start=True, checkpoint_every=2, tensorboard=False)
    teacher = dataclasses.replace(experiment.teacher, dtype="float32")
    return dataclasses.replace(experiment, teacher=teacher, run=run)


@pytest.fixture(scope="session")
def arguments(common, union, task) -> dict:
    """Two arms, two seeds, one task, and the probe of all terms."""
    return {
        "experiment": common,
        "arms": {"scratch": Arm(objective=SCRATCH), "distilled": Arm(objective=presets.implicit(relation_heads=4))},
        "seeds": (0, 1),
        "tasks": {"color": task},
        "probe": union,
        "probe_batches": 1,
    }


def changed(arguments: dict, part: str | None = None, **settings) -> dict:
    """The arguments with other settings of their experiment, or of one of its parts."""
    experiment = arguments["experiment"]
    if part is not None:
        settings = {part: dataclasses.replace(getattr(experiment, part), **settings)}
    return arguments | {"experiment": dataclasses.replace(experiment, **settings)}


class StopsThird:
    """A stop signal that comes in the third run of a process: after an arm and its fine-tuning, in the next arm."""

    runs = 0

    def __init__(self):
        StopsThird.runs += 1
        self.number = 15 if StopsThird.runs == 3 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture(scope="session")
def studied(tmp_path_factory, arguments):
    """A study that was stopped and went on: its folder, what it returned, and what was trained after the stop."""
    folder = tmp_path_factory.mktemp("studied") / "study"
    trained = []

    def noting(train):
        def run(training, evaluation):
            trained.append(str(training.model_dir).removeprefix(f"{folder}/"))
            return train(training, evaluation)

        return run

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("endistill_jax.train.run.StopSignal", StopsThird)
        with pytest.raises(Stopped, match="^arm distilled, seed 0: stopped at step 1"):
            study(model_dir=str(folder), **arguments)
        assert finished_steps(str(folder / "distilled" / "seed_0" / "checkpoints")) == [1], "stopped in the second arm"
        for module in (study_runs, finetuning):
            patched.setattr(module, "train", noting(module.train))
        raw = study(model_dir=str(folder), **arguments)
    return folder, raw, trained


@pytest.mark.slow
def test_a_run_that_fails_names_arm_and_seed_and_leaves_a_report_of_what_has_ended(
    studied, arguments, tmp_path, monkeypatch
):
    def diverges(training, evaluation):
        raise UserError("the loss became nan by step 1")

    folder, raw, _ = studied
    shutil.copytree(folder, tmp_path / "study")
    monkeypatch.setattr(study_runs, "train", diverges)
    scratch, distilled = arguments["arms"].values()
    arms = {"scratch": scratch, "more": Arm(objective=SCRATCH), "distilled": distilled}
    with pytest.raises(UserError, match="^arm more, seed 0: the loss became nan by step"):
        study(model_dir=str(tmp_path / "study"), **arguments | {"arms": arms})
    assert json.loads((tmp_path / "study" / "study.json").read_text())["runs"] == raw["runs"]
    report = (tmp_path / "study" / "study.md").read_text()
    assert "4 of 6 runs have ended" in report and "| scratch |" in report and "| more |" not in report


def run_of(raw, arm, seed):
    (found,) = [run for run in raw["runs"] if (run["arm"], run["seed"]) == (arm, seed)]
    return found


def without_versions(raw):
    return {name: value for name, value in raw.items() if name != "versions"}


@pytest.mark.slow
def test_a_stopped_study_goes_on_inside_the_run_it_was_in(studied):
    folder, raw, trained = studied
    assert trained == [
        "distilled/seed_0",
        "distilled/seed_0/color",
        "scratch/seed_1",
        "scratch/seed_1/color",
        "distilled/seed_1",
        "distilled/seed_1/color",
    ]
    assert [
        line["step"] for line in read_metrics(folder / "distilled" / "seed_0" / "metrics.jsonl") if "loss" in line
    ] == [
        1,
        2,
        3,
        4,
    ]
    assert [each["step"] for each in run_of(raw, "distilled", 0)["evaluations"]] == [0, 2, 4]


@pytest.mark.slow
def test_a_finished_study_is_told_again_without_reading_examples(studied, arguments, monkeypatch):
    folder, raw, _ = studied
    for module, name in ((study_runs, "train"), (finetuning, "train"), (study_runs, "prepare_held_out")):
        monkeypatch.setattr(module, name, None)
    assert without_versions(study(model_dir=str(folder), **arguments)) == without_versions(raw)


@pytest.mark.slow
def test_a_study_keeps_its_shards_on_more_hosts(studied, arguments, tmp_path, monkeypatch, refused):
    folder, raw, _ = studied
    shutil.copytree(folder, tmp_path / "study")
    assert raw["eval_spec"]["shards"] == raw["data"]["shards"] == raw["tasks"]["color"]["data"]["shards"] == 1
    monkeypatch.setattr(study_job, "host_part", lambda mesh: HostPart(0, 2, True))
    assert without_versions(study(model_dir=str(tmp_path / "study"), **arguments)) == without_versions(raw)
    match = r"data\.shards is 1 there and 2 here"
    refused(study, match, model_dir=str(tmp_path / "study"), **changed(arguments, "data", shards=2))


def test_shards_are_those_of_the_first_start_for_training_and_tasks(data, task):
    def settled(data=data, task=task, **others):
        given, tasks = study_runs.settle_shards(data, {"color": task}, hosts=2, **others)
        return given.shards, tasks["color"].data.shards

    started = {"eval_spec": {"shards": 4}}
    assert settled(earlier=None) == (2, 2) and settled(earlier=started) == (4, 4)
    given = dataclasses.replace(data, shards=1)
    assert settled(given, earlier=started) == (1, 1), "what is given is compared, not replaced"
    own = dataclasses.replace(task, data=dataclasses.replace(task.data, shards=1))
    assert settled(task=own, earlier=started) == (4, 1)
    odd = dataclasses.replace(task, data=dataclasses.replace(task.data, batch_size=3))
    with pytest.raises(UserError, match=r"^task color: Data\.shards is 2; it must be a divisor of batch_size \(3\)"):
        settled(task=odd, earlier=None)


@pytest.mark.slow
def test_arms_of_a_seed_begin_with_the_same_parameters_and_read_the_same_batches(studied):
    folder, raw, _ = studied
    for seed in (0, 1):
        scratch, distilled = (run_of(raw, arm, seed) for arm in ("scratch", "distilled"))
        assert scratch["evaluations"][0] == distilled["evaluations"][0]
        assert scratch["tokens"] == distilled["tokens"]
        lines = [read_metrics(folder / arm / f"seed_{seed}" / "metrics.jsonl") for arm in ("scratch", "distilled")]
        first, second = ([line for line in each if "loss" in line] for each in lines)
        assert [line["tokens"] for line in first] == [line["tokens"] for line in second]
        # Before its first update every model tells the loss of the same parameters on the same batch.
        assert first[0]["cross_entropy"] == pytest.approx(second[0]["cross_entropy"], rel=1e-6)
        assert first[-1]["cross_entropy"] != pytest.approx(second[-1]["cross_entropy"], rel=1e-6)
    assert run_of(raw, "scratch", 0)["evaluations"][0] != run_of(raw, "scratch", 1)["evaluations"][0]


@pytest.mark.slow
def test_every_arm_has_every_term_of_the_probe_and_the_metrics_of_the_task(studied, union):
    _, raw, _ = studied
    for run in raw["runs"]:
        for evaluation in run["evaluations"]:
            probed = {name.removeprefix("probe/") for name in evaluation if name.startswith("probe/")}
            assert probed == set(union.term_names)
            assert {"token_loss", "shuffled_input_gap"} <= evaluation.keys()
        assert set(run["downstream"]) == {"color"} and set(run["downstream"]["color"]["metrics"]) == {"accuracy"}
    assert raw["arms"]["scratch"]["terms"] == ["lm"]
    assert raw["arms"]["distilled"]["terms"] == ["decoder_self/kk", "decoder_self/qq", "decoder_self/vv", "logits"]


@pytest.mark.slow
def test_the_file_holds_what_the_study_returned_and_the_table_what_the_file_holds(studied):
    folder, raw, _ = studied
    saved = json.loads((folder / "study.json").read_text())
    assert saved["runs"] == raw["runs"] and saved["seeds"] == [0, 1]
    distilled, scratch = (final(saved, arm, "token_loss") for arm in ("distilled", "scratch"))
    assert distilled == {seed: run_of(raw, "distilled", seed)["evaluations"][-1]["token_loss"] for seed in (0, 1)}
    (first, second), mean = distilled.values(), sum(distilled.values()) / 2
    row = next(line for line in (folder / "study.md").read_text().splitlines() if line.startswith("| distilled |"))
    assert row.split(" | ")[1] == f"{mean:.3f} ± {abs(first - second) / 2**0.5:.3f}"
    difference = sum(paired(distilled, scratch)) / 2
    assert difference == pytest.approx(mean - sum(scratch.values()) / 2)
    assert row.split(" | ")[2].startswith(f"{difference:+.3f} ± ")
    for name in ("held_out_loss.png", "downstream.png", "divergence.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_with_other_settings_is_refused(studied, arguments, refused):
    def refuses(match, arguments):
        refused(study, match, model_dir=str(studied[0]), **arguments)

    slower = changed(arguments, "optimizer", learning_rate=2e-3)
    refuses(r"optimizer\.learning_rate is 0\.001 there and 0\.002 here", slower)
    longer = changed(arguments, "run", steps=6)
    refuses("arm scratch: .* steps is 4 there and 6 here", longer)
    match = r"study\.json was .* probe\.objective\.terms\.logits is .* there and absent here"
    refuses(match, arguments | {"probe": presets.minilm(relation_heads=4)})
    data = arguments["experiment"].data
    size = 2 * data.eval_batch_size
    doubled = changed(arguments, "data", eval_batch_size=size, eval_batches=data.eval_examples // size)
    refuses(f"probe.examples is {data.eval_batch_size} there and {size} here", doubled)
    narrow = changed(arguments, "teacher", dtype="bfloat16")
    refuses('teacher_dtype is "float32" there and "bfloat16" here', narrow)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"arms": {}}, "study.arms is empty"),
        ({"seeds": ()}, "study.seeds is empty"),
        ({"seeds": (1, 1)}, "give each seed once"),
        ({"seeds": 3}, r"^study\.seeds is 3; give a tuple of whole numbers, such as '\(0, 1\)' or '\(3,\)'"),
        ({"baseline": "none"}, "study.baseline is 'none', which is no arm; choose one of scratch, distilled"),
        ({"arms": {"a/b": Arm(objective=SCRATCH)}}, "a name becomes a folder"),
        ({"probe": SCRATCH}, "study.probe compares nothing with the teacher"),
        ({"probe": presets.union(relation_heads=3)}, "study.probe with the student of scratch, seed 0"),
        ({"probe_batches": 0}, "study.probe_batches is 0"),
        ({"arms": {"scratch": SCRATCH}}, r"study\.arms has Objective\(.*; give a jobs\.Arm for each name"),
        ({"arms": (Arm(objective=SCRATCH),)}, r"study\.arms has \(Arm\(.*; give a jobs\.Arm for each name"),
        ({"arms": {"scratch": Arm(objective=SCRATCH, steps=0)}}, r"Run\.steps is 0"),
        (
            {"arms": {"scratch": Arm(objective=SCRATCH), "odd": Arm(objective=presets.union(relation_heads=3))}},
            "arm odd: .*relation_heads is 3",
        ),
        (
            {"arms": {"scratch": Arm(objective=SCRATCH, init=StudentInit(kind="layers"))}},
            "arm scratch: .*StudentInit",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(refused, tmp_path, arguments, given, match):
    refused(study, match, model_dir=str(tmp_path / "study"), **arguments | given)


def test_tasks_and_runs_that_would_not_compare_are_refused(refused, tmp_path, arguments, task):
    def refuses(match, arguments):
        refused(study, match, model_dir=str(tmp_path / "study"), **arguments)

    def on(**settings):
        return arguments | {"tasks": {"color": dataclasses.replace(task, **settings)}}

    refuses(r"Finetuning\.learning_rates = \(0\.1, 0\.2\)", on(learning_rates=(0.1, 0.2)))
    refuses(r"seeds = \(3,\)", on(seeds=(3,)))
    best = dataclasses.replace(task.run, keep_best="accuracy", best_mode="max")
    refuses(r"task color has Run\.keep_best = 'accuracy'", on(run=best))
    patient = changed(arguments, "run", keep_best="token_loss", patience=2)
    refuses("arm scratch: its run has a patience", patient)
    refuses("study.experiment has no teacher", changed(arguments, teacher=None))


@pytest.mark.parametrize("name", ["product", "checkpoints", "tokenizer", "tensorboard"])
def test_a_task_is_not_called_as_a_folder_of_its_run(refused, tmp_path, arguments, task, name):
    told = f"study.tasks has '{name}', which is a folder of every run"
    refused(study, told, model_dir=str(tmp_path / "study"), **arguments | {"tasks": {name: task}})


def test_steps_of_an_arm_and_of_its_stages_are_not_both_given():
    with pytest.raises(UserError, match="Arm has steps and an interpolation with steps"):
        Arm(objective=SCRATCH, steps=3, interpolation=Interpolation(number=1, steps=(1, 2)))


def test_a_stages_own_run_that_would_not_compare_is_refused(refused, tmp_path, arguments, union, make_model):
    common = arguments["experiment"]

    def chained(**settings):
        stages = {2: StageSettings(run=dataclasses.replace(common.run, **settings))}
        return Arm(objective=union, interpolation=Interpolation(assistants=(make_model(width=24),), stages=stages))

    arms = {"scratch": Arm(objective=SCRATCH), "chained": chained(keep_best="token_loss", patience=2)}
    match = "^arm chained: stage 2: its run has a patience"
    refused(study, match, model_dir=str(tmp_path / "study"), **arguments | {"arms": arms})
    teacher = open_teacher(common.teacher, common.student.scan_layers)
    (run,) = plan_study(str(tmp_path), common, teacher, {"chained": chained()}, seeds=(0,), tasks=arguments["tasks"])
    run.check(make_mesh())
    # One device has one mesh, but for the names of its axes.
    other = Mesh(make_mesh().devices, ("tensor", "fsdp", "data"))
    with pytest.raises(UserError, match=r"^arm chained: stage 1: its run has the mesh \(-1, 1, 1\), but students are"):
        run.check(other)


def test_a_dry_run_tells_all_arms_and_creates_nothing(tmp_path, arguments, capsys):
    assert study(model_dir=str(tmp_path / "study"), dry_run=True, **arguments) is None
    told = capsys.readouterr().out
    assert "4 runs (2 arms), 4 fine-tunings" in told and "distilled, seed 0\n" in told and "\ncolor\n" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_arm_over_an_assistant_is_a_chain_whose_student_begins_as_the_others(
    studied, tmp_path, arguments, make_model, monkeypatch
):
    """Beside an arm that has ended already."""
    folder = tmp_path / "study"
    shutil.copytree(studied[0], folder)
    direct = arguments["arms"]["distilled"]
    over = Interpolation(assistants=(make_model(width=24, layers=1),), steps=(2, 4))
    arms = {"distilled": direct, "chained": dataclasses.replace(direct, interpolation=over)}
    settings = arguments | {"arms": arms, "baseline": "distilled", "seeds": (0,), "tasks": {}}
    raw = study(model_dir=str(folder), **settings)
    direct, chained = (run_of(raw, arm, 0) for arm in arms)
    assert chained["evaluations"][0]["token_loss"] == direct["evaluations"][0]["token_loss"]
    assert [each["step"] for stage in chained["stages"] for each in stage["evaluations"]] == [0, 2, 0, 2, 4]
    assert chained["evaluations"] == chained["stages"][1]["evaluations"] and direct["stages"] == []
    assert chained["tokens"] == chained["stages"][0]["tokens"] + direct["tokens"]
    assert raw["arms"]["chained"]["steps"] == [2, 4] and raw["arms"]["distilled"]["steps"] == [4]
    monkeypatch.setattr(study_runs, "prepare_held_out", None)
    assert without_versions(study(model_dir=str(folder), **settings)) == without_versions(raw)
