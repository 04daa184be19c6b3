"""Chains of distillations: each stage once, resumed where it was, kept small, and told apart when damaged."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.manager import Checkpointer, finished_steps, restore_params
from endistill_jax.checkpoints.models import open_model
from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.core.errors import UserError
from endistill_jax.interpolation import chain
from endistill_jax.jobs import Experiment, Interpolation, Run, StageSettings, export, interpolate
from endistill_jax.jobs import plan as plan_job
from endistill_jax.main import main
from endistill_jax.objectives import presets
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig

STEPS = 4
INTERPOLATION = Interpolation(
    number=1,
    stages={1: StageSettings(optimizer=OptimizerConfig(learning_rate=2e-3), init=StudentInit(kind="slice"))},
)


@pytest.fixture(scope="module")
def direct(experiment) -> Experiment:
    """The distillation that the stages are made from."""
    return dataclasses.replace(experiment, teacher=dataclasses.replace(experiment.teacher, dtype="float32"))


@pytest.fixture(scope="module")
def arguments(direct) -> dict:
    return {"experiment": direct, "interpolation": INTERPOLATION}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments) -> pathlib.Path:
    """A chain of two stages of four steps, all of whose checkpoints were kept."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    interpolate(model_dir=str(folder), **arguments | {"interpolation": keeping_all()})
    return folder


@pytest.fixture(scope="module")
def trained(monkeypatch_module) -> list[str]:
    """The folders of the runs that were trained since the list was last cleared."""
    folders: list[str] = []
    train = chain.train

    def spy(training, evaluation):
        folders.append(pathlib.Path(training.model_dir).name)
        return train(training, evaluation)

    monkeypatch_module.setattr(chain, "train", spy)
    return folders


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def copy(tmp_path, whole, trained) -> pathlib.Path:
    """A copy of the finished chain, which tests may damage."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    trained.clear()
    return folder


@pytest.fixture
def pruned(copy, arguments, trained) -> pathlib.Path:
    """The same with what the default keeps."""
    interpolate(model_dir=str(copy), **arguments)
    assert trained == []
    return copy


def keeping_all() -> Interpolation:
    return dataclasses.replace(INTERPOLATION, keep="all")


def params_of(folder: pathlib.Path):
    return restore_params(str(folder / "checkpoints"))[0]


def remove_last_step(stage: pathlib.Path) -> None:
    shutil.rmtree(stage / "checkpoints" / str(STEPS))


def damage(product: pathlib.Path) -> None:
    """Leaves every file of arrays as long as it was."""
    for file in (product / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)


def test_a_chain_leaves_a_run_a_stage_and_one_table(whole, teacher):
    rows = json.loads((whole / "results.json").read_text())
    assert [row["model"] for row in rows] == [f"teacher ({teacher})", "assistant 1", "student", "unigram", "bigram"]
    parameters = [row["parameters"] for row in rows[:3]]
    assert parameters == sorted(parameters, reverse=True)
    for number in (1, 2):
        stage = whole / f"stage_{number}"
        assert finished_steps(str(stage / "checkpoints")) == [2, 4]
        assert read_metrics(stage / "metrics.jsonl")[-1]["step"] == STEPS


def test_each_stage_learns_from_the_product_of_the_one_before_by_its_own_settings(whole, teacher):
    first, second = (open_model(str(whole / f"stage_{number}")) for number in (1, 2))
    runs = [model.manifest["run"] for model in (first, second)]
    assert runs[0]["teacher"] == open_model(teacher).fingerprint
    assert runs[1]["teacher"] == first.fingerprint
    assert [run["optimizer"]["learning_rate"] for run in runs] == [2e-3, 1e-3]
    assert [run["student_init"]["kind"] for run in runs] == ["slice", "random"]


def test_a_finished_chain_is_told_again_and_nothing_is_read(monkeypatch, copy, arguments, trained):
    before = (copy / "results.md").read_text()

    def must_not(*_, **__):
        raise AssertionError("nothing is left to be run")

    # The function of the same name hides the module.
    monkeypatch.setattr(sys.modules["endistill_jax.jobs.interpolate"], "prepare_held_out", must_not)
    monkeypatch.setattr("endistill_jax.data.pipeline.make_iterator", must_not)
    results = interpolate(model_dir=str(copy), **arguments | {"interpolation": keeping_all()})
    assert trained == [] and (copy / "results.md").read_text() == before
    assert [pathlib.Path(result.model_dir).name for result in results] == ["stage_1", "stage_2"]


def test_of_a_finished_stage_only_its_parameters_are_kept(pruned, whole):
    stage = pruned / "stage_1"
    assert not (stage / "checkpoints").exists()
    assert finished_steps(str(stage / "product" / "checkpoints")) == [STEPS]
    jax.tree.map(np.testing.assert_array_equal, params_of(stage / "product"), params_of(whole / "stage_1"))
    stored = (stage / "product" / "checkpoints" / str(STEPS) / "state" / "_METADATA").read_text()
    assert "params" in stored and "opt_state" not in stored
    assert finished_steps(str(pruned / "stage_2" / "checkpoints")) == [2, 4], "the last stage is nobody's teacher"
    opened = open_model(str(stage))
    assert opened.step == STEPS and opened.manifest["progress"]["finished"]


def test_the_student_and_its_assistants_are_exported_from_their_stages(pruned, tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"exported_{number}"
        export(model=str(pruned / f"stage_{number}"), folder=str(folder))
        exported = huggingface.load(str(folder))[1]
        assert exported.architecture() == open_model(str(pruned / f"stage_{number}")).config.architecture()


def test_a_chain_that_was_stopped_in_a_stage_goes_on_inside_it(pruned, whole, arguments, trained):
    remove_last_step(pruned / "stage_2")
    interpolate(model_dir=str(pruned), **arguments)
    assert trained == ["stage_2"]
    jax.tree.map(np.testing.assert_array_equal, params_of(pruned / "stage_2"), params_of(whole / "stage_2"))
    assert (pruned / "results.json").exists()


@pytest.mark.slow
def test_a_chain_that_was_stopped_between_stages_goes_on_with_the_next(pruned, whole, arguments, trained):
    shutil.rmtree(pruned / "stage_2")
    interpolate(model_dir=str(pruned), **arguments)
    assert trained == ["stage_2"]
    jax.tree.map(np.testing.assert_array_equal, params_of(pruned / "stage_2"), params_of(whole / "stage_2"))


def test_a_product_that_was_not_written_to_the_end_is_written_again(copy, whole, arguments, trained):
    (copy / "stage_1" / "product" / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    interpolate(model_dir=str(copy), **arguments)
    assert trained == [] and not (copy / "stage_1" / "checkpoints").exists()
    jax.tree.map(np.testing.assert_array_equal, params_of(copy / "stage_1" / "product"), params_of(whole / "stage_1"))


def test_checkpoints_that_were_not_all_removed_are_removed_and_not_taken_for_the_stage(
    pruned, whole, arguments, trained
):
    shutil.copytree(whole / "stage_1" / "checkpoints", pruned / "stage_1" / "checkpoints")
    remove_last_step(pruned / "stage_1")
    assert open_model(str(pruned / "stage_1")).step == STEPS
    interpolate(model_dir=str(pruned), **arguments)
    assert trained == [] and not (pruned / "stage_1" / "checkpoints").exists()


def write_other_params(product: pathlib.Path) -> None:
    """Leaves a product that can be read, with other parameters than its manifest says."""
    directory = product / "checkpoints"
    params, manifest = restore_params(str(directory))
    shutil.rmtree(directory)
    with Checkpointer(str(directory)) as checkpointer:
        checkpointer.save(STEPS, {"params": jax.tree.map(lambda leaf: 2 * leaf, params)}, {}, manifest, force=True)


def cut_manifest(product: pathlib.Path) -> None:
    file = product / "checkpoints" / str(STEPS) / "facts" / "metadata"
    file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize("spoil", [damage, write_other_params, cut_manifest])
def test_checkpoints_stay_while_the_product_beside_them_is_wrong(refused, pruned, whole, arguments, trained, spoil):
    stage = pruned / "stage_1"
    shutil.copytree(whole / "stage_1" / "checkpoints", stage / "checkpoints")
    spoil(stage / "product")
    for _ in range(2):
        told = "stage 1: .* remove .*stage_1/product; the same command then resumes from the checkpoints"
        refused(interpolate, told, model_dir=str(pruned), **arguments)
    shutil.rmtree(stage / "product")
    interpolate(model_dir=str(pruned), **arguments)
    assert trained == [] and not (stage / "checkpoints").exists()
    jax.tree.map(np.testing.assert_array_equal, params_of(stage / "product"), params_of(whole / "stage_1"))


def test_a_product_that_was_written_and_not_compared_is_compared_at_the_next_start(
    monkeypatch, copy, whole, arguments, trained
):
    stage = copy / "stage_1"

    def killed(source: str, *more):
        if source == str(stage / "product"):
            raise KeyboardInterrupt
        return open_model(source, *more)

    with monkeypatch.context() as patch:
        patch.setattr(chain, "open_model", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interpolate(model_dir=str(copy), **arguments)
            assert finished_steps(str(stage / "product" / "checkpoints")) == [STEPS]
            assert finished_steps(str(stage / "checkpoints")) == [2, STEPS]
    interpolate(model_dir=str(copy), **arguments)
    assert trained == [] and not (stage / "checkpoints").exists()


def test_changed_settings_of_a_stage_are_named(refused, pruned, arguments):
    common = {"model_dir": str(pruned), **arguments}
    two = dataclasses.replace(INTERPOLATION, number=2)
    refused(interpolate, r"stage 1: .*model\.head_dim is 16 there and 8 here", **common | {"interpolation": two})
    longer = dataclasses.replace(INTERPOLATION, steps=(4, 6))
    refused(interpolate, "stage 2: .*steps is 4 there and 6 here", **common | {"interpolation": longer})


def taught_by(arguments: dict, source: pathlib.Path | str) -> dict:
    teacher = dataclasses.replace(arguments["experiment"].teacher, source=str(source))
    return arguments | {"experiment": dataclasses.replace(arguments["experiment"], teacher=teacher)}


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory, make_model, make_teacher) -> str:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "other", make_model(width=32), seed=2)


def test_another_teacher_of_a_finished_stage_is_refused_and_the_same_elsewhere_is_not(
    refused, pruned, arguments, teacher, other_teacher, tmp_path, trained
):
    match = "stage 1 was trained by another teacher than .*other"
    refused(interpolate, match, model_dir=str(pruned), **taught_by(arguments, other_teacher))
    shutil.copytree(teacher, tmp_path / "same")
    interpolate(model_dir=str(pruned), **taught_by(arguments, tmp_path / "same"))
    assert trained == []


def test_another_teacher_of_a_stage_that_was_begun_is_refused_before_its_metrics_are_written(
    refused, copy, arguments, other_teacher, monkeypatch
):
    shutil.rmtree(copy / "stage_2")
    remove_last_step(copy / "stage_1")
    metrics = (copy / "teacher.json").read_text()
    common = {"model_dir": str(copy), **taught_by(arguments, other_teacher)}
    match = "stage 1 was trained by another teacher than .*other; give that one"
    refused(interpolate, match, **common)
    refused(interpolate, match, **common, dry_run=True)
    # As if the other one had taken the first one's place, and its name.
    monkeypatch.setattr(chain.Chain, "_check_teacher", lambda *_: None)
    refused(interpolate, match, **common)
    assert (copy / "teacher.json").read_text() == metrics


def test_a_product_that_cannot_be_read_is_named_with_what_to_do(refused, pruned, arguments):
    shutil.rmtree(pruned / "stage_2")
    damage(pruned / "stage_1" / "product")
    told = (
        "the student of stage 1, which teaches stage 2, cannot be used: .*stage_1.* remove it and the stages after it"
    )
    refused(interpolate, told, model_dir=str(pruned), **arguments)


def test_a_product_with_other_parameters_than_were_written_is_named(refused, pruned, arguments):
    shutil.rmtree(pruned / "stage_2")
    write_other_params(pruned / "stage_1" / "product")
    told = "student of stage 1.*are not those that were written"
    refused(interpolate, told, model_dir=str(pruned), **arguments)


def test_a_product_that_is_not_whole_does_not_begin_the_stage_anew(refused, pruned, arguments):
    common = {"model_dir": str(pruned), **arguments}
    manifest = pruned / "stage_1" / "product" / "checkpoints" / str(STEPS) / "facts" / "metadata"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    refused(interpolate, "stage 1: .*cannot be restored.* bring .*stage_1 back as it was, or remove it", **common)
    manifest.unlink()
    refused(interpolate, "stage 1: .*product is incomplete; bring .*stage_1 back as it was, or remove it", **common)
    shutil.rmtree(pruned / "stage_1")
    refused(interpolate, "stage 2 was started .*but stage 1, its teacher, is not complete", **common)


@pytest.mark.parametrize(
    ("stage", "own", "match"),
    [
        (
            -1,
            {"objective": presets.union(relation_heads=4, student_layer=1)},
            "stage 2: layer 1 of encoder_self",
        ),
        (1, {"optimizer": OptimizerConfig(warmup_steps=9)}, "stage 1: .*warmup_steps is 9, but the run has 4"),
        (2, {"init": StudentInit(kind="layers")}, "stage 2: StudentInit.kind is 'layers'"),
    ],
)
def test_settings_that_do_not_fit_a_stage_are_refused_before_anything_is_created(
    refused, tmp_path, direct, stage, own, match
):
    interpolation = dataclasses.replace(INTERPOLATION, stages={stage: StageSettings(**own)})
    settings = {"experiment": direct, "interpolation": interpolation}
    refused(interpolate, match, model_dir=str(tmp_path / "run"), **settings)


@pytest.mark.parametrize("stages", [{1: Run(steps=3)}, (StageSettings(),), StageSettings()])
def test_settings_of_stages_are_by_their_number(stages):
    with pytest.raises(UserError, match=r"Interpolation\.stages is .*; give settings by number of the stage, such as"):
        Interpolation(stages=stages)


def test_a_dry_run_tells_every_stage_and_creates_nothing(tmp_path, arguments, capsys):
    assert interpolate(model_dir=str(tmp_path / "run"), **arguments, dry_run=True) is None
    told = capsys.readouterr().out
    assert "teacher  2+2 x 32" in told and "stage 2  1+1 x 16" in told and "as many as" in told
    assert told.count("token_embedder/embedding") == 2 and not (tmp_path / "run").exists()


def test_a_plan_plans_every_stage_and_then_says_which_does_not_fit(monkeypatch, tmp_path, arguments):
    from endistill_jax.planning.options import Bounds, PlanOptions
    from endistill_jax.planning.topologies import parse_topology

    requests = []

    def refuse_the_first(request, bounds):
        requests.append(request)
        return {"status": "refused" if len(requests) == 1 else "crashed", "reason": f"attempt {len(requests)}"}

    monkeypatch.setattr(plan_job, "compile_bounded", refuse_the_first)
    options = PlanOptions(topologies=(parse_topology("cpu:1"),), folder=str(tmp_path), bounds=Bounds())
    with pytest.raises(UserError, match="^stage 1: nothing .*; stage 2: nothing of what was planned fits; see"):
        interpolate(model_dir="<MODEL_DIR>", **arguments, plan=options)
    first, second = requests
    assert first.student.architecture() == second.teacher.architecture()
    assert second.student == arguments["experiment"].student and first.optimizer.learning_rate == 2e-3
    told = (tmp_path / "stages.md").read_text()
    assert "stage 2  1+1 x 16" in told and "attempt 1" in told and "attempt 2" in told
    assert "attempt 2" in (tmp_path / "stage_2" / "plan.md").read_text()


@pytest.fixture(scope="module")
def words(chain_gin):
    """Function (folder) -> the words after `python -m endistill_jax.main` that run the chain in it."""
    return lambda folder: [f"--gin_file={chain_gin}", f"--gin.MODEL_DIR={folder}"]


def kill_at(words: list[str], metrics: pathlib.Path, lines: int) -> None:
    """Starts the chain, and kills it once a stage has so many lines of metrics."""
    command = [sys.executable, "-m", "endistill_jax.main", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=120) == -signal.SIGKILL, "it was killed before its end"


@pytest.mark.slow
def test_a_chain_that_is_killed_in_both_stages_ends_bit_identical_to_one_that_was_not(tmp_path, words, capsys):
    folder, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    assert main(words(uninterrupted)) == 0
    kill_at(words(folder), folder / "stage_1" / "metrics.jsonl", 5)
    assert not (folder / "stage_2").exists()
    kill_at(words(folder), folder / "stage_2" / "metrics.jsonl", 5)
    first = (folder / "stage_1" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(words(folder)) == 0
    (status,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("stage 1 "))
    assert status.endswith("finished")
    assert (folder / "stage_1" / "metrics.jsonl").read_bytes() == first
    for product in ("stage_1/product", "stage_2"):
        jax.tree.map(np.testing.assert_array_equal, params_of(folder / product), params_of(uninterrupted / product))
    rows = [json.loads((each / "results.json").read_text()) for each in (folder, uninterrupted)]
    for resumed, straight in zip(*rows, strict=True):
        resumed.pop("seconds", None), straight.pop("seconds", None)
        assert resumed == straight
