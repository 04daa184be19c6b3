"""The command line: what it finds, what it refuses, and that a refusal is one line and leaves nothing behind."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest

import gin
from endistill_jax import jobs
from endistill_jax.configuration import files
from endistill_jax.configuration.loading import config_text, load
from endistill_jax.core.errors import Stopped, StorageFailure, UserError
from endistill_jax.main import main
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path, Site
from endistill_jax.reports.run_files import Launch, started_by, write_run_files

HEAD = """
from __gin__ import dynamic_registration
import toy
from endistill_jax import jobs
jobs.run.job = @toy.job
"""
calls = []


def job(*, steps: int = 1, rate: float = 0.5, name: str | None = None, part=None, error=None, dry_run: bool = False):
    """What the tests run: notes its call and raises what it is told to."""
    calls.append({"steps": steps, "rate": rate, "name": name, "part": part, "dry_run": dry_run})
    if isinstance(error, int):
        os.kill(os.getpid(), error)
    if error is not None:
        raise error()


def part(*, size: int, label: str = ""):
    return (size, label)


def stopped():
    return Stopped("stopped at step 7", signal.SIGTERM)


def stopped_by_hand():
    return Stopped("stopped at step 7", signal.SIGINT)


def user_error():
    return UserError("that is wrong; this would be right")


def storage_failure():
    return StorageFailure("checkpoint gs://bucket/run/3 cannot be restored (UnavailableError: 503)")


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """A folder to stand in, and a module `toy` that gin files can import."""
    module = types.ModuleType("toy")
    module.job, module.part, module.user_error = job, part, user_error
    module.zero_division, module.interrupted = ZeroDivisionError, KeyboardInterrupt
    module.storage_failure = storage_failure
    module.stopped, module.stopped_by_hand = stopped, stopped_by_hand
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.chdir(tmp_path)
    calls.clear()
    yield tmp_path
    gin.clear_config()


def write(text, name="run.gin"):
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(text)
    return f"--gin_file={name}"


def refused(capsys, *words):
    """The one line that a refused command prints; checks that it did nothing else."""
    before = sorted(pathlib.Path().rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("endistill: error: ") and err.count("\n") == 1
    assert sorted(pathlib.Path().rglob("*")) == before
    return err.removeprefix("endistill: error: ").strip()


def test_flags_win_over_files_and_later_files_over_earlier():
    first = write(f"{HEAD}STEPS = 1\nNAME = 'first'\ntoy.job.steps = %STEPS\ntoy.job.name = %NAME\n")
    second = write("STEPS = 2\nNAME = 'second'\n", "second.gin")
    assert main([first, second, "--gin.STEPS=3", "--gin.toy.job.rate=2"]) == 0
    assert calls == [{"steps": 3, "rate": 2, "name": "second", "part": None, "dry_run": False}]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("/tmp/x y", "/tmp/x y"),
        ("gs://bucket/c4/en:3.1.0", "gs://bucket/c4/en:3.1.0"),
        ("bundled", "bundled"),
        ("3b", "3b"),
        ("it's", "it's"),
        ("", ""),
        ("-1", -1),
        ("+1", 1),
        ("1e-3", 0.001),
        ("1_000", 1000),
        ("True", True),
        ("None", None),
        ("'1'", "1"),
        ("(1, -1)", (1, -1)),
        ("['a', None]", ["a", None]),
        ("{'a': 1}", {"a": 1}),
        ("@toy.part", part),
        ("@toy.part()", (7, "")),
        ("%OTHER", "other"),
    ],
)
def test_values_of_flags_need_no_quotes(given, read):
    file = write(f"{HEAD}OTHER = 'other'\ntoy.job.name = %OTHER\ntoy.part.size = 7\ntoy.job.part = %VALUE\n")
    assert main([file, f"--gin.VALUE={given}"]) == 0
    assert getattr(calls[0]["part"], "__wrapped__", calls[0]["part"]) == read
    assert type(calls[0]["part"]) is type(read)


def test_flags_reach_scopes_and_scoped_parameters():
    file = write(f"{HEAD}toy.job.part = @one/toy.part()\none/toy.part.size = 1\n")
    assert main([file, "--gin.one/toy.part.size=2", "--gin.toy.part.label=all"]) == 0
    assert calls[0]["part"] == (2, "all")


def test_files_are_found_here_then_in_search_paths_then_in_the_package(monkeypatch):
    write("here", "gin/a.gin")
    write("one", "one/gin/a.gin")
    write("two", "two/gin/b.gin")
    assert files.find("gin/a.gin", ["one", "two"]).read_text() == "here"
    assert files.find("gin/b.gin", ["one", "two"]).read_text() == "two"
    assert files.find("a.gin", ["two", "one/gin"]).read_text() == "one"
    assert files.find("gin/miniend_demo.gin", ["one"]).is_relative_to(files.PACKAGE_FOLDER)


def test_included_files_are_found_in_the_same_places():
    write(f"{HEAD}include 'deep/settings.gin'\ntoy.job.steps = %STEPS\n", "place/run.gin")
    write("include 'gin/paths/scratch.gin'\nSTEPS = 5\n", "other/deep/settings.gin")
    # Twice the flag, and folders with commas between: both are taken.
    assert main(["--gin_file=run.gin", "--gin_search_paths=nowhere,place", "--gin_search_paths=other"]) == 0
    assert calls[0]["steps"] == 5


def test_includes_take_effect_where_they_stand():
    write("STEPS = 2\n", "included.gin")
    file = write(f"{HEAD}STEPS = 1\ninclude 'included.gin'\nRATE = 3\ntoy.job:\n    steps = %STEPS\n    rate = %RATE\n")
    assert main([file]) == 0
    assert (calls[0]["steps"], calls[0]["rate"]) == (2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy.job.steps = \n", "run.gin:6: "),
        ("toy.job.steps = three\n", "run.gin:6: 'three' is not a value (a string needs quotes"),
        ("toy.job.part = (1,\n", "run.gin:"),
        ("toy.job.stepz = 3\n", "run.gin:6: toy.job has no parameter stepz; did you mean steps?"),
        ("toy.job:\n    steps = 3\n    stepz = 3\n", "run.gin:8: toy.job has no parameter stepz; did you mean steps?"),
        ("toy.jib.steps = 3\n", "run.gin:6: toy.jib: there is no jib; did you mean job?"),
        ("toi.job.steps = 3\n", "run.gin:6: toi.job: toi is not imported; did you mean toy?"),
        ("toy.job.part = @toy.prt()\n", "run.gin:6: toy.prt: there is no prt; did you mean part?"),
        ("toy.job.part = [@toy.part(), {1: @toy.prt()}]\n", "run.gin:6: toy.prt: there is no prt"),
        ("jobs.settings.steps = 3\n", "run.gin:6: jobs.settings is not a function or a class"),
        ("import endistill_jax.nothing\n", "run.gin:6: there is no module endistill_jax.nothing"),
        (
            "from __gin__ import dynamic_registration\n",
            "run.gin:6: `from __gin__ import dynamic_registration` must come",
        ),
        ("include 'gin/paths/minned.gin'\n", "run.gin:6: no gin file gin/paths/minned.gin; did you mean "),
        ("include 'run.gin'\n", "run.gin:6: run.gin includes itself, through run.gin -> run.gin"),
        ("toy.job.steps = %STEPS\n", "run.gin:6: %STEPS is not set; give --gin.STEPS=..., or set it in a gin file"),
        ("toy.job.steps = %STEPS\nSTEPZ = 3\n", "run.gin:7: nothing uses STEPZ; did you mean STEPS?"),
        ("toy.job.steps = 'many'\n", "run.gin:6: toy.job.steps is 'many'; it must be int"),
        ("toy.job.name = 3\n", "run.gin:6: toy.job.name is 3; it must be str or None"),
        ("toy.job.steps = %STEPS\nSTEPS = 1.5\n", "run.gin:7: STEPS (toy.job.steps) is 1.5; it must be int"),
        ("toy.job.part = @toy.part()\n", "run.gin:6: toy.part needs size; give --gin.toy.part.size=..."),
        (
            "toy.job.part = @one/toy.part()\ntoy.part.size = 1\nonce/toy.part.size = 2\n",
            "run.gin:8: nothing uses the scope once of once/toy.part; did you mean one?",
        ),
        (
            "STEPS = %gin.REQUIRED  # how long\ntoy.job.steps = %STEPS\ntoy.job.rate = %gin.REQUIRED\n",
            "STEPS, toy.job.rate must be set: give --gin.STEPS=... (how long), --gin.toy.job.rate=...",
        ),
        ("toy.job.error = @toy.user_error\n", "that is wrong; this would be right"),
        ("toy.job.part = @toy.fail()\n", "run.gin:6: toy.fail: there is no fail"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place(capsys, text, message):
    assert refused(capsys, write(HEAD + text)).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a --gin_file, such as --gin_file=gin/miniend_demo.gin; see --help"),
        (["--gin_file=gin/miniend_dmo.gin"], "no gin file gin/miniend_dmo.gin; did you mean gin/miniend_demo.gin"),
        (["--gin_file=gin/paths"], "gin/paths is a folder; give a gin file in it"),
        (["--gin_fil=run.gin"], "unknown argument --gin_fil=run.gin; did you mean --gin_file?"),
        (["--gin_file=run.gin", "--gin.STEPS"], "--gin.STEPS: write it as --gin.NAME=value, in one word"),
        (["--gin_file=run.gin", "--gin.STEPZ=3"], "--gin.STEPZ: nothing uses STEPZ; did you mean STEPS?"),
        (["--gin_file=run.gin", "--gin.STEPS=[3"], "--gin.STEPS: "),
        (["--gin_file=run.gin", "--gin.STEPS=ten"], "--gin.STEPS: STEPS (toy.job.steps) is 'ten'; it must be int"),
        (["--gin_file=run.gin", "--gin.toy.job.stepz=3"], "--gin.toy.job.stepz: toy.job has no parameter stepz"),
        (["--gin_file=run.gin", "--gin.toy.jib.steps=3"], "--gin.toy.jib.steps: toy.jib: there is no jib"),
        (["--gin_file=run.gin", "--gin.a b=3"], "--gin.a b: "),
        (["--gin_file=nojob.gin"], "nojob.gin: no job to run; a gin file must end with a line such as `jobs.run.job"),
        (["--gin_file=binary.gin"], "cannot read binary.gin: not a text file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, words, message):
    write(f"{HEAD}STEPS = 1\ntoy.job.steps = %STEPS\n")
    write("STEPS = 3\n", "nojob.gin")
    pathlib.Path("binary.gin").write_bytes(b"\xff\xfe\x00")
    assert refused(capsys, *words).startswith(message)


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main([write(f"{HEAD}toy.job.error = @toy.zero_division\n")])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("@toy.storage_failure", 1),
        ("@toy.interrupted", 128 + signal.SIGINT),
        ("@toy.stopped", 128 + signal.SIGTERM),
        ("@toy.stopped_by_hand", 128 + signal.SIGINT),
        (int(signal.SIGTERM), 128 + signal.SIGTERM),
        (int(signal.SIGINT), 128 + signal.SIGINT),
    ],
)
def test_an_ended_run_is_one_line_and_a_code_that_says_whether_to_start_it_again(capsys, error, code):
    # A shell starts its background programs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main([write(f"{HEAD}toy.job.error = {error}\n")]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_dry_run_reaches_the_job():
    assert main([write(HEAD), "--dry_run"]) == 0
    assert calls[0]["dry_run"] is True


TINY = """
from __gin__ import dynamic_registration
from endistill_jax.models.t5 import config
include 'gin/runs/python_docs_teacher.gin'
config.T5Config.d_model = 8
config.T5Config.num_heads = 2
config.T5Config.head_dim = 4
config.T5Config.mlp_dim = 8
MODEL_DIR = 'model_dir'
"""


def test_dry_run_prints_shapes_and_counts_and_creates_nothing(capsys):
    file = write(TINY)
    before = sorted(pathlib.Path().rglob("*"))
    assert main([file, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "token_embedder/embedding [8192, 8]" in printed and "parameters" in printed and "model_dir" in printed
    assert sorted(pathlib.Path().rglob("*")) == before


def test_a_job_refuses_settings_that_do_not_fit_before_it_creates_anything(capsys):
    file = write(TINY)
    assert "vocab_size is 4096" in refused(capsys, file, "--gin.VOCAB_SIZE=4096")
    assert "warmup_steps" in refused(capsys, file, "--gin.STEPS=100")
    assert "no task" in refused(capsys, file, "--gin.jobs.Data.task=python_dogs")


def test_the_operative_configuration_runs_the_same_again():
    parts = "toy.job.part = %PART\nPART = @one/toy.part()\none/toy.part.size = %SIZE\nSIZE = 3\ntoy.job.name = 'a b'\n"
    load([write(HEAD + parts).partition("=")[2]], [("SIZE", "4")])(dry_run=True)
    write(config_text(), "again.gin")
    load(["again.gin"])(dry_run=False)
    assert calls[1] == calls[0] | {"dry_run": False}
    assert calls[0]["part"] == (4, "")


def test_the_model_directory_tells_how_its_run_was_started(tmp_path):
    write_run_files(tmp_path / "plain_python")
    assert not (tmp_path / "plain_python").exists()
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "--gin.X='y'"]
    with started_by(Launch(command=words, config=lambda: "X = 1\n")):
        write_run_files(tmp_path / "run")
    assert (tmp_path / "run" / "config.gin").read_text() == "X = 1\n"
    ran = subprocess.run(["sh", tmp_path / "run" / "command.sh"], capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout == "['a b', \"--gin.X='y'\"]\n"


SELF = ("qq", "kk", "vv")
CROSS = ("qk", "vv")
TABLE = {
    "scratch": (None, None, None, 0.0, 1.0),
    "logits": (None, None, None, 1.0, 0.0),
    "minilm": (SELF, SELF, None, 0.0, 0.0),
    "minilm_logits": (SELF, SELF, None, 1.0, 0.0),
    "decoder": (None, SELF, CROSS, 0.0, 0.0),
    "minend": (SELF, SELF, CROSS, 1.0, 0.0),
}


def resolved(macro, *file_names, **flags):
    """The value of a macro of shipped gin files."""
    text = HEAD + "".join(f"include '{name}'\n" for name in file_names) + f"toy.job.part = %{macro}\n"
    load([write(text).partition("=")[2]], [(name, str(value)) for name, value in flags.items()])(dry_run=True)
    return calls[-1]["part"]


@pytest.mark.parametrize("name", TABLE)
def test_paths_are_those_of_the_table(name):
    *sites, logits, lm = TABLE[name]
    flags = {"RELATION_HEADS": 6} if any(sites) else {}
    expected = [None if relations is None else Site(relations=relations, relation_heads=6) for relations in sites]
    assert resolved("PATH", f"gin/paths/{name}.gin", **flags) == Path(
        encoder_self=expected[0], decoder_self=expected[1], cross=expected[2], logits_weight=logits, lm_weight=lm
    )


def test_there_is_a_file_for_every_path_and_no_other():
    assert {file.stem for file in (files.PACKAGE_FOLDER / "gin" / "paths").iterdir()} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_path_given_later_leaves_nothing_of_an_earlier_one(name):
    alone = resolved("PATH", f"gin/paths/{name}.gin", **({"RELATION_HEADS": 6} if any(TABLE[name][:3]) else {}))
    assert resolved("PATH", "gin/paths/minend.gin", f"gin/paths/{name}.gin", RELATION_HEADS=6) == alone


# Parameters of the public checkpoints, shared embeddings counted once.
PUBLISHED = {
    "t5_v1_0_small": 60_506_624,
    "t5_v1_0_base": 222_903_552,
    "t5_v1_0_3b": 2_851_598_336,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_number_of_parameters(name):
    assert count_params(abstract_params(resolved("MODEL", f"gin/models/{name}.gin"))) == PUBLISHED[name]


@pytest.mark.parametrize("file", sorted((files.PACKAGE_FOLDER / "gin" / "models").glob("*.gin")), ids=lambda f: f.stem)
def test_a_model_given_later_leaves_nothing_of_an_earlier_one(file):
    name = f"gin/models/{file.name}"
    alone = resolved("MODEL", name, VOCAB_SIZE=999)
    assert isinstance(alone, T5Config)
    for other in ("t5_v1_0_3b", "t5_v1_1_small"):
        assert resolved("MODEL", f"gin/models/{other}.gin", name, VOCAB_SIZE=999) == alone


@pytest.mark.parametrize("name", files.shipped())
def test_headers_name_what_must_be_set_and_nothing_else_is_missing(name, toy):
    text = (files.PACKAGE_FOLDER / name).read_text()
    told = re.search(r"^# Must be set: ([^.]*)\.", text, re.MULTILINE)
    told = set(re.findall(r"\b[A-Z][A-Z_]+\b", told[1])) if told else set()
    try:
        load([name])
        missing = set()
    except UserError as error:
        missing = set(re.findall(r"[A-Z_]+", str(error).partition(" must be set")[0]))
    assert missing == told
    # With those set nothing else is wrong with the file.
    value = str(toy / "run.gin")
    write(HEAD)
    assert load([name], [(macro, value) for macro in sorted(told)]) is gin.get_configurable(jobs.run)


def test_help_names_every_shipped_file_and_needs_no_heavy_import():
    script = (
        "import sys\nfrom endistill_jax.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'tensorflow', 'gin'} & set(sys.modules), 'slow'"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in files.shipped())
    for flag in ("--gin_file", "--gin.NAME=value", "--gin_search_paths", "--dry_run"):
        assert flag in shown


@pytest.mark.slow
def test_the_program_prints_one_line_and_exits_with_two(toy):
    command = [sys.executable, "-m", "endistill_jax.main", "--gin_file=gin/runs/python_docs_teacher.gin"]
    quiet = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=toy, env=quiet)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"endistill: error: MODEL_DIR must be set: give --gin.MODEL_DIR=... \(.*\)\n", ended.stderr)
    assert list(toy.iterdir()) == []
