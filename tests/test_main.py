"""The command line: flags, search paths, help, dry run, how it ends. For mistakes in gin files see test_config.py."""

import os
import re
import signal
import subprocess
import sys

import pytest
import toy
from toy import write

import gin
from endistill_jax.command_line import PACKAGE_FOLDER, find, shipped
from endistill_jax.main import main
from endistill_jax.reports.files import Launch, started_by, write_run_files

HEAD = """
from __gin__ import dynamic_registration
import toy
from endistill_jax import jobs
jobs.run.job = @toy.job
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder to stand in."""
    monkeypatch.chdir(tmp_path)
    toy.CALLS.clear()
    yield tmp_path
    gin.clear_config()


def test_flags_win_over_files_and_later_files_over_earlier():
    first = write(f"{HEAD}STEPS = 1\nNAME = 'first'\ntoy.job.steps = %STEPS\ntoy.job.name = %NAME\n")
    second = write("STEPS = 2\nNAME = 'second'\n", "second.gin")
    assert main([first, second, "--gin.STEPS=3", "--gin.toy.job.rate=2"]) == 0
    assert toy.CALLS == [{"steps": 3, "rate": 2, "name": "second", "part": None, "dry_run": False}]


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
        ("@toy.part", toy.part),
        ("@toy.part()", (7, {})),
        ("%OTHER", "other"),
    ],
)
def test_values_of_flags_need_no_quotes(given, read):
    file = write(f"{HEAD}OTHER = 'other'\ntoy.job.name = %OTHER\ntoy.part.size = 7\ntoy.job.part = %VALUE\n")
    assert main([file, f"--gin.VALUE={given}"]) == 0
    assert getattr(toy.CALLS[0]["part"], "__wrapped__", toy.CALLS[0]["part"]) == read
    assert type(toy.CALLS[0]["part"]) is type(read)


def test_flags_reach_scopes_and_scoped_parameters():
    file = write(f"{HEAD}toy.job.part = @one/toy.part()\none/toy.part.size = 1\n")
    assert main([file, "--gin.one/toy.part.size=2", "--gin.toy.part.label=all"]) == 0
    assert toy.CALLS[0]["part"] == (2, {"label": "all"})


def test_files_are_found_here_then_in_search_paths_then_in_the_package(monkeypatch):
    write("here", "gin/a.gin")
    write("one", "one/gin/a.gin")
    write("two", "two/gin/b.gin")
    assert find("gin/a.gin", ["one", "two"]).read_text() == "here"
    assert find("gin/b.gin", ["one", "two"]).read_text() == "two"
    assert find("a.gin", ["two", "one/gin"]).read_text() == "one"
    assert find("gin/miniend_demo.gin", ["one"]).is_relative_to(PACKAGE_FOLDER)


def test_included_files_are_found_in_the_same_places():
    write(f"{HEAD}include 'deep/settings.gin'\ntoy.job.steps = %STEPS\n", "place/run.gin")
    write(
        "include 'gin/data/text_files.gin'\nTRAIN_FILES = 'x'\nVOCABULARY = 'x'\nSTEPS = 5\n", "other/deep/settings.gin"
    )
    # Twice the flag, and folders with commas between: both are taken.
    assert main(["--gin_file=run.gin", "--gin_search_paths=nowhere,place", "--gin_search_paths=other"]) == 0
    assert toy.CALLS[0]["steps"] == 5


def test_includes_take_effect_where_they_stand():
    write("STEPS = 2\n", "included.gin")
    file = write(f"{HEAD}STEPS = 1\ninclude 'included.gin'\nRATE = 3\ntoy.job:\n    steps = %STEPS\n    rate = %RATE\n")
    assert main([file]) == 0
    assert (toy.CALLS[0]["steps"], toy.CALLS[0]["rate"]) == (2, 3)


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
    assert toy.CALLS[0]["dry_run"] is True


TINY = """
from __gin__ import dynamic_registration
from endistill_jax.models.t5 import sizes
include 'gin/runs/python_docs_teacher.gin'
sizes.build.d_model = 8
sizes.build.num_heads = 2
sizes.build.head_dim = 4
sizes.build.mlp_dim = 8
MODEL_DIR = 'model_dir'
"""


def test_dry_run_prints_shapes_and_counts_and_creates_nothing(capsys):
    file = write(TINY)
    assert main([file, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "token_embedder/embedding [8192, 8]" in printed and "parameters" in printed and "model_dir" in printed
    assert os.listdir() == ["run.gin"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--gin.VOCAB_SIZE=4096", "vocab_size is 4096"),
        ("--gin.STEPS=100", "warmup_steps"),
        ("--gin.jobs.Data.task=python_dogs", "no task"),
    ],
)
def test_a_job_refuses_settings_that_do_not_fit_before_it_creates_anything(capsys, flag, said):
    assert main([write(TINY), flag]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir() == ["run.gin"]


def test_the_model_directory_tells_how_its_run_was_started(tmp_path):
    write_run_files(tmp_path / "plain_python")
    assert not (tmp_path / "plain_python").exists()
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "--gin.X='y'"]
    with started_by(Launch(command=words, config=lambda: "X = 1\n")):
        write_run_files(tmp_path / "run")
    assert (tmp_path / "run" / "config.gin").read_text() == "X = 1\n"
    ran = subprocess.run(["sh", tmp_path / "run" / "command.sh"], capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout == "['a b', \"--gin.X='y'\"]\n"


def test_help_names_every_shipped_file_and_needs_no_heavy_import():
    script = (
        "import sys\nfrom endistill_jax.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'tensorflow', 'gin'} & set(sys.modules), 'slow'"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in shipped())
    for flag in ("--gin_file", "--gin.NAME=value", "--gin_search_paths", "--dry_run"):
        assert flag in shown


@pytest.mark.slow
def test_the_program_prints_one_line_and_exits_with_two(folder):
    command = [sys.executable, "-m", "endistill_jax.main", "--gin_file=gin/runs/python_docs_teacher.gin"]
    quiet = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=quiet)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"endistill: error: MODEL_DIR must be set: give --gin.MODEL_DIR=... \(.*\)\n", ended.stderr)
    assert list(folder.iterdir()) == []
