"""Manifests: absent means default, order means nothing, and every difference is named in one line."""

import dataclasses
import json

import pytest

from endistill_jax.checkpoints.manifest import SCHEMA, check_same, plain, upgraded
from endistill_jax.core.errors import UserError
from endistill_jax.jobs import Data, Experiment, Run
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import CrossEntropy, ForwardKL, InterpolatedTargets, Objective, Ramp, presets
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.training import Training

STUDENT = T5Config(
    vocab_size=384, d_model=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1
)


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float
    later: tuple[int, ...] = (1, 2)
    made: list = dataclasses.field(default_factory=list)


def as_saved(value):
    """What a manifest gives back: through `plain` and a file."""
    return json.loads(json.dumps(plain(value)))


def differences(saved, current) -> str:
    with pytest.raises(UserError) as caught:
        check_same(saved, current, "run/checkpoints/10")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_went_through_a_file_is_the_same():
    current = {"a": Settings(0.1), "dict": {"none": None, "tuple": ("x", 1), "nested": {}}, "function": len}
    check_same(as_saved(current), current)


def test_every_difference_is_named_with_both_values():
    saved = {"model": {"d_model": 64, "depth": 2}, "mixture": "c4", "teacher": "aa"}
    current = {"model": {"d_model": 32, "depth": 2}, "mixture": "wikipedia", "objective": "union"}
    told = differences(saved, current)
    assert told.startswith("run/checkpoints/10 was made with other settings: ")
    for part in (
        "model.d_model is 64 there and 32 here",
        'mixture is "c4" there and "wikipedia" here',
        'teacher is "aa" there and absent here',
        'objective is absent there and "union" here',
    ):
        assert part in told
    assert "depth" not in told


def test_an_option_that_a_manifest_lacks_counts_as_its_default():
    saved = as_saved({"a": Settings(0.1)})
    del saved["a"]["later"], saved["a"]["made"]
    check_same(saved, {"a": Settings(0.1)})
    assert "a.later is absent there and [3] here" in differences(saved, {"a": Settings(0.1, later=(3,))})
    assert "a.made is absent there and [0] here" in differences(saved, {"a": Settings(0.1, made=[0])})
    assert "a.rate is 0.1 there and 0.2 here" in differences(saved, {"a": Settings(0.2)})
    del saved["a"]["rate"]
    assert "a.rate is absent there and 0.1 here" in differences(saved, {"a": Settings(0.1)})


def test_an_option_that_is_gone_must_have_been_off():
    saved = as_saved({"a": Settings(0.1)})
    check_same(saved | {"a": saved["a"] | {"gone": None}}, {"a": Settings(0.1)})
    assert "a.gone is 3 there and absent here" in differences(saved | {"a": saved["a"] | {"gone": 3}}, saved)


def test_settings_of_another_class_differ_though_their_fields_agree():
    @dataclasses.dataclass(frozen=True)
    class Other(Settings):
        pass

    told = differences(as_saved({"a": Settings(0.1)}), {"a": Other(0.1)})
    assert 'a.type is "Settings" there and "Other" here' in told


def test_the_order_of_terms_is_no_part_of_an_objective():
    terms = presets.union(relation_heads=2).terms
    saved = as_saved(Objective(terms=terms).described())
    check_same(saved, Objective(terms=terms[::-1]).described())
    told = differences(saved, Objective(terms=terms[1:]).described())
    assert "terms.encoder_self/qq is " in told and "there and absent here" in told
    told = differences(saved, Objective(terms=(*terms, CrossEntropy())).described())
    assert "terms.lm is absent there" in told


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (ForwardKL(temperature=2.0), "terms.logits.temperature is 1.0 there and 2.0 here"),
        (ForwardKL(coefficient=Ramp(steps=5)), "terms.logits.coefficient is 1.0 there and "),
        (ForwardKL(coefficient=0.5), "terms.logits.coefficient is 1.0 there and 0.5 here"),
    ],
)
def test_what_changes_a_term_is_named(changed, told):
    assert told in differences(as_saved(presets.logits().described()), Objective(terms=(changed,)).described())


def test_interpolated_targets_are_compared_and_absent_without():
    moving = presets.logits(interpolated_targets=InterpolatedTargets(steps=5))
    saved = as_saved(moving.described())
    check_same(saved, moving.described())
    slower = presets.logits(interpolated_targets=InterpolatedTargets(steps=6))
    assert "interpolated_targets.steps is 5 there and 6 here" in differences(saved, slower.described())
    assert "interpolated_targets is " in differences(saved, presets.logits().described())


def test_a_newer_schema_is_refused_and_the_present_one_is_as_it_is():
    manifest = {"schema": SCHEMA, "run": {"steps": 3}}
    assert upgraded(manifest) == manifest
    with pytest.raises(UserError, match=f"schema {SCHEMA + 1}, and this version reads up to {SCHEMA}"):
        upgraded(manifest | {"schema": SCHEMA + 1})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("".join(f"{number}: the cat sat on the mat.\n" for number in range(40)))
    task = text_files_task("manifest_tests_v1", str(corpus), "bytes", held_out=0.1)
    data = Data(task=task, inputs_length=8, targets_length=4, batch_size=4)
    return Experiment(
        student=STUDENT, objective=presets.scratch(), data=data, optimizer=OptimizerConfig(), run=Run(steps=8)
    )


def changed(experiment, part, **settings) -> Experiment:
    return dataclasses.replace(experiment, **{part: dataclasses.replace(getattr(experiment, part), **settings)})


def manifest_of(experiment, *, finished=False) -> dict:
    run = as_saved(Training(model_dir="run", experiment=experiment).with_shards(None).identity())
    return {"schema": SCHEMA, "run": run, "progress": {"finished": finished}}


def resumes(experiment, manifest) -> None:
    Training(model_dir="run", experiment=experiment).check_resumes(4, manifest)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("run", {"log_every": 10, "checkpoint_every": 10, "keep_last": 9, "tensorboard": False}),
        ("run", {"mesh": (1, -1, 1), "compiler_options": {"tpu": {"x": 1}}, "eval_at_start": True}),
        ("student", {"scan_layers": False, "remat": "dots", "attention_bytes": 1000}),
        ("data", {"eval_batch_size": 16}),
    ],
)
def test_what_changes_neither_mathematics_nor_data_may_change(experiment, part, settings):
    resumes(changed(experiment, part, **settings), manifest_of(experiment))


@pytest.mark.parametrize(
    ("part", "settings", "named"),
    [
        ("run", {"steps": 9}, "steps"),
        ("run", {"seed": 1}, "seed"),
        ("run", {"micro_batches": 2}, "micro_batches"),
        ("run", {"keep_best": "token_loss"}, "evaluation.keep_best"),
        ("student", {"d_model": 16}, "model.d_model"),
        ("student", {"dropout_rate": 0.1}, "model.dropout_rate"),
        ("student", {"dtype": "bfloat16"}, "model.dtype"),
        ("student", {"bias_per_layer": True}, "model.bias_per_layer"),
        ("optimizer", {"learning_rate": 0.5}, "optimizer.learning_rate"),
        ("data", {"batch_size": 8}, "data.batch_size"),
        ("data", {"pack": False}, "data.pack"),
        ("data", {"shards": 2}, "data.shards"),
    ],
)
def test_what_changes_mathematics_or_data_is_refused_by_name(experiment, part, settings, named):
    with pytest.raises(UserError, match=f"step 4 in run was made with other settings: .*{named} is "):
        resumes(changed(experiment, part, **settings), manifest_of(experiment))


def test_an_option_of_any_part_of_an_experiment_may_be_newer_than_the_checkpoint(experiment):
    """As if each of these had been added after the checkpoint was saved."""
    manifest = manifest_of(experiment)
    for part, name in (("optimizer", "clip_norm"), ("optimizer", "end_fraction")):
        del manifest["run"][part][name]
    del manifest["run"]["objective"]["terms"]["lm"]["z_loss"]
    resumes(experiment, manifest)
    with pytest.raises(UserError, match=r"optimizer\.clip_norm is absent there and 2\.0 here"):
        resumes(changed(experiment, "optimizer", clip_norm=2.0), manifest)
    with pytest.raises(UserError, match=r"objective\.terms\.lm\.z_loss is absent there and 0\.5 here"):
        resumes(dataclasses.replace(experiment, objective=presets.scratch(z_loss=0.5)), manifest)


def test_only_what_the_run_was_is_compared(experiment):
    manifest = manifest_of(experiment) | {"held_out": {"loss": 1.0}, "teacher": {"source": "x"}, "versions": "other"}
    resumes(experiment, manifest)


def test_a_finished_run_may_be_longer_but_not_shorter(experiment):
    resumes(changed(experiment, "run", steps=9), manifest_of(experiment, finished=True))
    with pytest.raises(UserError, match="steps is 8 there and 7 here"):
        resumes(changed(experiment, "run", steps=7), manifest_of(experiment, finished=True))
