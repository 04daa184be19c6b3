"""Paths read from gin files, beside the configuration of the command: those of the files, some settings changed."""

import dataclasses

import pytest

import gin
from endistill_jax import jobs
from endistill_jax.configuration.loading import load
from endistill_jax.configuration.paths import from_file
from endistill_jax.core.errors import UserError
from endistill_jax.objectives import InterpolatedTargets, Path, Site

SELF = Site(relations=("qq", "kk", "vv"), relation_heads=4)
CROSS = Site(relations=("qk", "vv"), relation_heads=4)
MINEND = Path(encoder_self=SELF, decoder_self=SELF, cross=CROSS, logits_weight=1.0)


def test_a_file_gives_its_path_with_the_heads_it_leaves_open():
    assert from_file("gin/paths/minend.gin", 4) == MINEND
    assert from_file("gin/paths/scratch.gin", 4) == from_file("gin/paths/scratch.gin") == Path(lm_weight=1.0)
    assert from_file("gin/paths/decoder.gin", 4) == Path(decoder_self=SELF, cross=CROSS)


def test_changes_go_into_sites_and_leave_the_rest():
    changed = from_file("gin/paths/minend.gin", 4, {"cross.teacher_layer": -2, "logits_weight": 0.5})
    assert changed == dataclasses.replace(MINEND, cross=dataclasses.replace(CROSS, teacher_layer=-2), logits_weight=0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("gin/paths/minned.gin",), "did you mean gin/paths/minend.gin"),
        (("gin/paths/minend.gin",), "relation_heads is %RELATION_HEADS, which the file does not set"),
        (("gin/models/t5_v1_1_xl.gin",), "does not set PATH; give a file that does"),
        (("gin/paths/minend.gin", 4, {"cros.weight": 1.0}), "there is no cros; did you mean cross"),
        (("gin/paths/minend.gin", 4, {"cross.layer": 1}), "there is no layer; "),
        (("gin/paths/minilm.gin", 4, {"cross.weight": 1.0}), "what holds weight is None in this path"),
        (("gin/paths/minend.gin", 4, {"cross.weight": "2"}), r"minend.gin: .*cross\.weight: .* '2'; it must be float"),
        (("gin/paths/minend.gin", 4, {"cross": 2.0}), "cross is 2.0; it must be Site or None"),
        (("gin/paths/minend.gin", 4, ["cross"]), r"minend.gin: changes is \['cross'\]; give names and values"),
    ],
)
def test_what_a_file_does_not_have_is_named_in_one_line(arguments, match):
    with pytest.raises(UserError, match=match) as error:
        from_file(*arguments)
    assert "\n" not in str(error.value)


OWN_PATH = """
from __gin__ import dynamic_registration
from endistill_jax.objectives import objective as path
PATH = @path.Path()
path.Path.cross = @cross/path.Site()
cross/path.Site.relations = ('qk',)
cross/path.Site.relation_heads = %RELATION_HEADS
"""


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("", "path.Path.logit_weight = 1.0", "own.gin:8: .* no parameter logit_weight; did you mean logits_weight"),
        ("", "path.Path.lm_weight = '1'", r"own.gin:8: path\.Path\.lm_weight is '1'; it must be float"),
        ("", "crss/path.Site.weight = 2.0", "own.gin:8: nothing uses the scope crss .*; did you mean cross"),
        ("", "RELATION_HAEDS = 2", "own.gin:8: nothing uses RELATION_HAEDS; did you mean RELATION_HEADS"),
        ("cross/path.Site.relations", "#", "own.gin: cross/path.Site needs relations; set cross/path.Site.relations"),
        ("", "path.Path.encoder_self = 3", r"own.gin:8: path\.Path\.encoder_self is 3; it must be Site or None"),
    ],
)
def test_mistakes_in_a_file_of_ones_own_are_named_with_file_and_parameter(tmp_path, old, new, match):
    file = tmp_path / "own.gin"
    file.write_text(OWN_PATH.replace(old, new, 1) if old else OWN_PATH + new)
    with pytest.raises(UserError, match=match) as error:
        from_file(str(file), 4)
    assert "\n" not in str(error.value)


@pytest.fixture
def arm_of():
    """Function (gin file, scope, search paths) -> the arm that a study's file makes in that scope."""

    def make(file, scope, search_paths=()):
        load([file], search_paths=search_paths)
        with gin.config_scope(scope):
            return gin.get_configurable(jobs.Arm)()

    yield make
    gin.clear_config()


def test_a_file_is_looked_up_in_the_search_paths_of_the_command(arm_of, tmp_path):
    (tmp_path / "own.gin").write_text(OWN_PATH)
    study = """
from __gin__ import dynamic_registration
from endistill_jax.configuration import paths
include 'gin/studies/paths.gin'
minend/paths.from_file.file = 'own.gin'
"""
    (tmp_path / "study.gin").write_text(study)
    own = Path(cross=Site(relations=("qk",), relation_heads=8))
    assert arm_of("study.gin", "minend", [str(tmp_path)]).path == own


@pytest.mark.parametrize("name", ["scratch", "logits", "minilm", "minilm_logits", "decoder", "minend"])
def test_every_arm_of_the_study_of_paths_has_the_path_of_its_file(arm_of, name):
    assert arm_of("gin/studies/paths.gin", name).path == from_file(f"gin/paths/{name}.gin", 8)


def test_arms_of_the_study_of_layers_and_heads_differ_in_what_they_are_named_for(arm_of):
    file, minend = "gin/studies/layers_and_heads.gin", from_file("gin/paths/minend.gin", 8)
    assert arm_of(file, "minend").path == minend
    assert arm_of(file, "heads_4").path == from_file("gin/paths/minend.gin", 4)
    crossed = dataclasses.replace(minend.cross, teacher_layer=-2)
    assert arm_of(file, "cross_layer_3").path == dataclasses.replace(minend, cross=crossed)
    assert arm_of(file, "layer_2").path.tap_layers("teacher") == dict.fromkeys(minend.sites, -3)
    assert arm_of(file, "layer_2").path.tap_layers("student") == dict.fromkeys(minend.sites, -1)


def test_arms_of_the_study_of_interpolation_differ_in_what_they_are_named_for(arm_of):
    file, minend = "gin/studies/interpolation.gin", from_file("gin/paths/minend.gin", 8)
    assert arm_of(file, "direct") == jobs.Arm(path=minend)
    assert arm_of(file, "direct_long") == jobs.Arm(path=minend, steps=616)
    chains = {
        "one_assistant": jobs.Interpolation(number=1, equal_compute=True),
        "two_assistants": jobs.Interpolation(number=2, equal_compute=True),
        "one_assistant_long": jobs.Interpolation(number=1),
    }
    for name, chain in chains.items():
        assert arm_of(file, name) == jobs.Arm(path=minend, interpolation=chain)
    moving = dataclasses.replace(minend, interpolated_targets=InterpolatedTargets(steps=150))
    assert arm_of(file, "interpolated_targets").path == moving


@pytest.mark.slow
def test_the_study_of_interpolation_tells_its_arms_at_the_cost_of_the_direct_run(tmp_path, capsys):
    load(["gin/studies/interpolation.gin"], [("MODEL_DIR", str(tmp_path / "study"))])(dry_run=True)
    told = capsys.readouterr().out
    assert told.count("as many as 300 steps from the teacher straight to the student") == 2
    assert told.count("as many as 616 steps from the teacher straight to the student") == 1
    assert "18 runs (6 arms), 36 fine-tunings" in told and not (tmp_path / "study").exists()
    gin.clear_config()
