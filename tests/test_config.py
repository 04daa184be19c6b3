"""Gin files: every shipped one builds its job; every class of mistake is one line, exit code 2, and nothing is done."""

import pathlib
import re

import pytest
import toy
from toy import write

import gin
from endistill_jax import config, jobs
from endistill_jax.command_line import PACKAGE_FOLDER, find, purpose, shipped
from endistill_jax.core.errors import UserError
from endistill_jax.main import main
from endistill_jax.models.t5 import sizes
from endistill_jax.objectives import InterpolatedTargets, presets
from endistill_jax.train.experiment import Experiment

HEAD = """
from __gin__ import dynamic_registration
import toy
from endistill_jax import jobs
from endistill_jax.objectives import presets
jobs.run.job = @toy.job
"""
LINE = HEAD.count("\n") + 1  # the first that a test writes


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder to stand in."""
    monkeypatch.chdir(tmp_path)
    toy.CALLS.clear()
    yield tmp_path
    gin.clear_config()


MISTAKES = {
    "syntax": ("toy.job.steps = \n", "run.gin:{line}: "),
    "an open bracket": ("toy.job.part = (1,\n", "run.gin: EOF in multi-line statement"),
    "no value": ("toy.job.steps = three\n", "run.gin:{line}: 'three' is not a value .a string needs quotes"),
    "no parameter": ("toy.job.stepz = 3\n", "run.gin:{line}: toy.job has no parameter stepz; did you mean steps?"),
    "no parameter, in a block": ("toy.job:\n    stepz = 3\n",
                                 "run.gin:{next}: toy.job has no parameter stepz; did you mean steps?"),
    "no parameter, behind **": ("toy.job.part = @presets.build()\npresets.build.preset = 'minilm'\n"
                                "presets.build.relation_head = 4\n",
                                "run.gin:{last}: .*unexpected keyword argument 'relation_head'"),
    "no function": ("toy.job.part = @toy.prt()\n", "run.gin:{line}: toy has no prt; did you mean part?"),
    "no import": ("toi.job.steps = 3\n", "run.gin:{line}: 'toi' was not provided by an import"),
    "no module": ("import endistill_jax.nothing\n", "run.gin:{line}: No module named 'endistill_jax.nothing'"),
    "no file": ("include 'gin/studies/objective.gin'\n", "run.gin:{line}: .*did you mean gin/studies/objectives.gin?"),
    "a file in itself": ("include 'run.gin'\n", "run.gin: its files include one another without end"),
    "a macro not set": ("STEPZ = 3\ntoy.job.steps = %STEPS\ntoy.job.part = %STEPZ\n",
                        "run.gin:{next}: %STEPS is not set; give --gin.STEPS=..., .*; did you mean STEPZ?"),
    "a macro not used": ("toy.job.steps = %STEPS\nSTEPS = 3\nSTEPZ = 3\n",
                         "run.gin:{last}: nothing uses STEPZ; did you mean STEPS?"),
    "a scope not used": ("toy.job.part = @one/toy.part()\ntoy.part.size = 1\nonce/toy.part.size = 2\n",
                         "run.gin:{last}: nothing uses the scope once of once/toy.part.size; did you mean one?"),
    "a wrong type": ("toy.job.steps = 'many'\n", "run.gin:{line}: toy.job.steps is 'many'; it must be int"),
    "a wrong type, by a macro": ("toy.job.name = %NAME\nNAME = 3\n",
                                 r"run.gin:{next}: NAME \(toy.job.name\) is 3; it must be str or None"),
    "an argument missing": ("toy.job.part = @toy.part()\n", "run.gin:{line}: part.* missing .* 'size'"),
    "required": ("STEPS = %gin.REQUIRED  # how long\ntoy.job.steps = %STEPS\ntoy.job.name = %gin.REQUIRED\n",
                 r"STEPS, toy.job.name must be set: give --gin.STEPS=... \(how long\), --gin.toy.job.name=..."),
    "no preset": ("toy.job.part = @presets.build()\npresets.build.preset = 'unoin'\n",
                  "no objective 'unoin'; did you mean union?"),
}  # fmt: skip
FLAGS = {
    "no macro": ("--gin.STEPZ=3", "--gin.STEPZ: nothing uses STEPZ; did you mean STEPS?"),
    "no parameter": (
        "--gin.toy.job.stepz=3",
        "--gin.toy.job.stepz: toy.job has no parameter stepz; did you mean steps?",
    ),
    "no function": ("--gin.STEPS=@toy.jib()", "--gin.STEPS: toy has no jib; did you mean job?"),
    "a wrong type": ("--gin.STEPS=ten", r"--gin.STEPS: STEPS \(toy.job.steps\) is 'ten'; it must be int"),
    "an open bracket": ("--gin.STEPS=[3", "--gin.STEPS: EOF in multi-line statement"),
    "no name": ("--gin.a b=3", "--gin.a b: "),
    "no value": ("--gin.STEPS", "--gin.STEPS: write it as --gin.NAME=value"),
    "no flag": ("--gin_fil=run.gin", "unknown argument --gin_fil=run.gin; did you mean --gin_file?"),
    "no file": ("--gin_file=gin/miniend_dmo.gin", "no gin file gin/miniend_dmo.gin; did you mean gin/miniend_demo.gin"),
    "a folder": ("--gin_file=gin/runs", "gin/runs is a folder; give a gin file in it"),
    "a file that is none": ("--gin_file=binary.gin", "binary.gin: 'utf-8' codec"),
}
ALL = [
    *[pytest.param(text, [], said, id=name) for name, (text, said) in MISTAKES.items()],
    *[pytest.param("STEPS = 1\ntoy.job.steps = %STEPS\n", [flag], said, id=f"flag, {name}")
      for name, (flag, said) in FLAGS.items()],
]  # fmt: skip


@pytest.mark.parametrize(("text", "flags", "said"), ALL)
def test_a_mistake_is_one_line_with_its_place_and_nothing_is_done(capsys, text, flags, said):
    pathlib.Path("binary.gin").write_bytes(b"\xff\xfe\x00")
    words, before = [write(HEAD + text), *flags], sorted(pathlib.Path().rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("endistill: error: ") and err.count("\n") == 1
    said = said.replace("?", r"\?")
    places = {"line": LINE, "next": LINE + 1, "last": LINE + text.count("\n") - 1}
    for name, line in places.items():
        said = said.replace(f"{{{name}}}", str(line))
    assert re.match(said, err.removeprefix("endistill: error: ")), err
    assert sorted(pathlib.Path().rglob("*")) == before and toy.CALLS == []


def test_a_command_without_a_file_or_a_job_says_so(capsys):
    assert main([]) == 2
    assert "give a --gin_file, such as --gin_file=gin/miniend_demo.gin" in capsys.readouterr().err
    assert main([write("STEPS = 3\n", "none.gin")]) == 2
    assert "none.gin: no job to run; add a line like jobs.run.job" in capsys.readouterr().err


def build(*names, **macros):
    """The job of gin files, all its settings built."""
    config.read(names, [(name.replace("__", "/"), repr(value)) for name, value in macros.items()])
    return config.job().keywords["job"]


def required(name):
    """Macros that a file leaves to be set."""
    try:
        config.read([name])
    except UserError as error:
        return set(re.findall(r"[A-Z_]+", str(error).partition(" must be set")[0]))
    return set()


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_file_builds_its_job_and_its_header_says_what_must_be_set(name, folder):
    text = (PACKAGE_FOLDER / name).read_text()
    header = text.partition("\nfrom __gin__")[0].partition("\ninclude")[0]
    told = re.search(r"^# Must be set: ([^.]*)\.", header, re.MULTILINE)
    told = set(re.findall(r"\b[A-Z][A-Z_]+\b", told[1])) if told else set()
    assert required(name) == told
    assert f"--gin_file={name}" in header
    pathlib.Path("text.txt").write_text("Some words to read.\n" * 40)
    vocabulary = str(PACKAGE_FOLDER / "assets" / "python_docs" / "teacher" / "spiece.model")
    given = dict.fromkeys(told, "x") | {"TRAIN_FILES": "text.txt", "VOCABULARY": vocabulary}
    built = build(name, **{macro: value for macro, value in given.items() if macro in told})
    assert callable(built) and built.__name__ in jobs.__all__
    assert isinstance(built.keywords.get("experiment"), Experiment | None)


@pytest.mark.parametrize("file", sorted((PACKAGE_FOLDER / "gin").glob("**/*.gin")), ids=lambda file: file.stem)
def test_a_shipped_file_names_nothing_that_is_gone(file):
    text = file.read_text()
    for name in re.findall(r"gin/[\w/]+\.gin", text):
        assert name.startswith("gin/NAME") or find(name).is_relative_to(PACKAGE_FOLDER), name
    assert not re.search(r"%PATH|T5Config|[Pp]ath of distillation|by the MiniEnD", text)


def test_size_and_objective_are_chosen_by_macros_and_their_settings_stay():
    given = {"MODEL_DIR": "x", "TEACHER": "bundled", "TASK": "task"}
    experiment = build("gin/miniend_distill.gin", **given).keywords["experiment"]
    assert experiment.student == sizes.student_6x6_768(dtype="bfloat16", remat="dots")
    assert experiment.objective == presets.union(relation_heads=32)
    chosen = {"STUDENT": "student_12x12_384", "OBJECTIVE": "miniend_d", "RELATION_HEADS": 6, "VOCAB_SIZE": 33000}
    deeper = {"student__sizes.build.num_decoder_layers": 3, "presets.build.with_logits": False}
    experiment = build("gin/miniend_distill.gin", **given | chosen | deeper).keywords["experiment"]
    assert experiment.student == sizes.student_12x12_384(
        vocab_size=33000, num_decoder_layers=3, dtype="bfloat16", remat="dots"
    )
    assert experiment.objective == presets.miniend_d(relation_heads=6, with_logits=False)
    assert (
        build("gin/miniend_distill.gin", **given, OBJECTIVE="scratch").keywords["experiment"].objective
        == presets.scratch()
    )


def test_a_preset_may_be_a_function_and_may_not_be_an_objective():
    assert presets.build(presets.minilm, relation_heads=4) == presets.minilm(relation_heads=4)
    assert presets.build("scratch", relation_heads=4, z_loss=0.1) == presets.scratch(z_loss=0.1)
    with pytest.raises(UserError, match="a preset is a name or a function"):
        presets.build(presets.scratch())
    with pytest.raises(UserError, match=r"no objective 'union_'; did you mean union\?"):
        presets.build("union_")


def test_a_plan_of_3b_leaves_folders_teacher_and_data_open():
    config.read(["gin/miniend_3b/student_base.gin"], planning=True)
    experiment = config.job().keywords["job"].keywords["experiment"]
    assert experiment.student == sizes.t5_v1_1_base(dtype="bfloat16", remat="full")
    assert experiment.teacher.config == sizes.t5_v1_1_xl() and experiment.teacher.sharding == "replicated"
    assert experiment.teacher.source == "<TEACHER>" and experiment.data.task == "<TASK>"
    config.read(["gin/miniend_3b/teacher_t5_v1_0_3b.gin"], planning=True)
    assert config.job().keywords["job"].keywords["experiment"].teacher.config == sizes.t5_v1_0_3b()


ARMS = {
    "scratch": presets.scratch(),
    "logits": presets.logits(),
    "minilm": presets.minilm(relation_heads=8),
    "implicit": presets.implicit(relation_heads=8),
    "miniend_d": presets.miniend_d(relation_heads=8),
    "miniend_d_without_logits": presets.miniend_d(relation_heads=8, with_logits=False),
    "miniend_e": presets.miniend_e(relation_heads=8),
    "miniend_e_without_logits": presets.miniend_e(relation_heads=8, with_logits=False),
    "union": presets.union(relation_heads=8),
}


def test_arms_of_the_studies_differ_in_what_they_are_named_for():
    study = build("gin/studies/objectives.gin").keywords
    assert study["arms"] == {name: jobs.Arm(objective=objective) for name, objective in ARMS.items()}
    assert study["probe"] == ARMS["union"]

    arms = build("gin/studies/layers_and_heads.gin").keywords["arms"]
    assert arms["union"].objective == ARMS["union"]
    assert arms["layer_2"].objective == presets.union(relation_heads=8, teacher_layer=-3)
    assert arms["heads_4"].objective == presets.union(relation_heads=4)
    of_union, crossed = ARMS["union"].terms, presets.union(relation_heads=8, teacher_layer=-2).terms
    terms = tuple(
        other if getattr(term, "site", "") == "cross" else term for term, other in zip(of_union, crossed, strict=True)
    )
    assert [{**vars(term), "name": ""} for term in arms["cross_layer_3"].objective.terms] == [
        {**vars(term), "name": ""} for term in terms
    ]

    arms = build("gin/studies/interpolation.gin").keywords["arms"]
    assert arms["direct"] == jobs.Arm(objective=ARMS["union"])
    assert arms["direct_long"] == jobs.Arm(objective=ARMS["union"], steps=616)
    for name, chain in {
        "one_assistant": jobs.Interpolation(number=1, equal_compute=True),
        "two_assistants": jobs.Interpolation(number=2, equal_compute=True),
        "one_assistant_long": jobs.Interpolation(number=1),
    }.items():
        assert arms[name] == jobs.Arm(objective=ARMS["union"], interpolation=chain)
    moving = presets.union(relation_heads=8, interpolated_targets=InterpolatedTargets(steps=150))
    assert arms["interpolated_targets"].objective == moving


def test_the_text_of_a_configuration_builds_the_same_again():
    first = build("gin/studies/layers_and_heads.gin", SEEDS=(4,)).keywords
    write(config.config_text(), "again.gin")
    assert build("again.gin").keywords == first and first["seeds"] == (4,)
    settings = config.bound_settings()
    assert settings["SEEDS"] == "(4,)" and settings["heads_4/presets.build.relation_heads"] == "4"


def test_help_has_a_line_for_every_file():
    for name in shipped():
        assert len(purpose(name)) > 20, name
