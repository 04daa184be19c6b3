"""The command line: flags, help, and lookup of gin files. Imports nothing slow."""

import argparse
import ast
import difflib
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from endistill_jax import __version__
from endistill_jax.core.errors import UserError
from endistill_jax.planning.options import FLAGS as PLAN_FLAGS
from endistill_jax.planning.options import add_flags

COMMAND = ("python", "-m", "endistill_jax.main")
FLAGS = ("--gin_file", "--gin_search_paths", "--dry_run", "--help", "--version", *PLAN_FLAGS)
EXAMPLES = """examples:
  # distill a small student from the bundled teacher, here, and compare it with one trained from scratch
  {command} --gin_file=gin/miniend_demo.gin

  # the same with other settings; any macro of the file, or any parameter of what it imports
  {command} --gin_file=gin/miniend_demo.gin --gin.MODEL_DIR=/tmp/demo --gin.STEPS=200 \\
      --gin.jobs.Run.seed=1 --gin.optimizer.OptimizerConfig.learning_rate=2e-3

  # another objective (endistill_jax/objectives/presets.py), another size (endistill_jax/models/t5/sizes.py)
  {command} --gin_file=gin/miniend_demo.gin --gin.OBJECTIVE=miniend_d --gin.STUDENT=mini_4x4_256

  # print the settings, shapes and parameter counts of a run and create nothing
  {command} --gin_file=gin/runs/distill_c4.gin --gin.MODEL_DIR=/tmp/x \\
      --gin.TEACHER=/models/t5_v1_1_xl --dry_run

  # which slice, which mesh, which batch? Compiles for TPUs that need not be attached; reads no checkpoint and no data
  {command} --gin_file=gin/miniend_3b.gin --plan --topology=v5e-16,v5e-64
  {command} --gin_file=gin/miniend_3b.gin --plan --topology=v5e-16 --sweep

gin files that come with the package:
{files}

A run that was stopped resumes from its last checkpoint when the same command is given again.
"""
# Prefixes of gin values; any other value that is not a Python literal is a string.
GIN_VALUE_BEGINS = tuple("@%([{'\"")
# In a checkout a link to the folder next to the package, in an installation a folder of its own.
PACKAGE_FOLDER = pathlib.Path(__file__).resolve().parent
RUNNABLE = (".", "runs", "studies", "miniend_3b")  # folders of the files that run by themselves


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Splits the command line into its options and the name and value, as gin writes it, of each `--gin.NAME=value`."""
    options, rest = _parser().parse_known_args(list(words))
    flags = []
    for word in rest:
        name, equals, value = word.removeprefix("--gin.").partition("=")
        if not word.startswith("--gin."):
            near = difflib.get_close_matches(word.partition("=")[0], FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {word}; {hint}")
        if not (name and equals):
            raise UserError(f"{word}: write it as --gin.NAME=value, in one word")
        flags.append((name, _gin_value(value)))
    if not options.gin_file:
        raise UserError("give a --gin_file, such as --gin_file=gin/miniend_demo.gin; see --help")
    unused = [flag for flag in PLAN_FLAGS if getattr(options, flag.removeprefix("--")) not in (None, "", False)]
    if unused and not options.plan:
        raise UserError(f"{unused[0]} is for --plan alone; add --plan, or take it away")
    options.gin_search_paths = [path for paths in options.gin_search_paths for path in paths.split(",") if path]
    return options, flags


def _gin_value(text: str) -> str:
    if text.startswith(GIN_VALUE_BEGINS):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return repr(text)
    return repr(value) if isinstance(value, (bool, int, float, type(None))) else repr(text)


def find(name: str, search_paths: Sequence[str] = ()) -> pathlib.Path:
    """The gin file of that name: in the current folder, in `search_paths`, or of the package."""
    path = pathlib.Path(name).expanduser()
    folders = [pathlib.Path(), *(pathlib.Path(folder).expanduser() for folder in search_paths), PACKAGE_FOLDER]
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    if any((folder / path).is_dir() for folder in folders):
        raise UserError(f"{name} is a folder; give a gin file in it")
    known = [str(file) for file in sorted(path.parent.glob("*.gin"))]
    for folder in map(pathlib.Path, search_paths):
        known += [str(file.relative_to(folder)) for file in sorted(folder.glob("**/*.gin"))]
    known += [str(file.relative_to(PACKAGE_FOLDER)) for file in sorted((PACKAGE_FOLDER / "gin").glob("**/*.gin"))]
    near = [other for other in known if pathlib.Path(other).stem == path.stem]  # the same name in another folder
    near = list(dict.fromkeys(near + difflib.get_close_matches(name, known, n=3, cutoff=0.75)))[:3]
    raise UserError(f"no gin file {name}; " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))


def shipped() -> list[str]:
    """Names of the gin files of the package that run by themselves, as a user gives them."""
    found = [file for name in RUNNABLE for file in sorted((PACKAGE_FOLDER / "gin" / name).glob("*.gin"))]
    return [str(file.relative_to(PACKAGE_FOLDER)) for file in found]


def purpose(name: str) -> str:
    """The first line of a shipped file's header."""
    with open(PACKAGE_FOLDER / name, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    listed = [f"  {name}\n      {purpose(name)}" for name in shipped()]
    parser = _Parser(
        prog=" ".join(COMMAND),
        usage="%(prog)s --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=value ...] [--dry_run]",
        description="Distills large T5 models into small encoder-decoder students. Gin files say what to do.",
        epilog=EXAMPLES.format(command=" ".join(COMMAND), files="\n".join(listed)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; looked up here, in --gin_search_paths, then in the package. Repeatable: later ones win",
    )
    parser.add_argument(
        "--gin.NAME=value",  # for the help alone: flags of this kind are read from what the parser leaves over
        action="store_true",
        dest="_",
        help="sets a macro (--gin.STEPS=100) or a parameter (--gin.jobs.Run.seed=1) over all files. "
        "Python literals and gin's @reference and %%MACRO are read as such, anything else is a string without quotes",
    )
    parser.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="A,B",
        help="folders in which gin files and the files they include are looked up too",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration, shapes and parameter counts; create nothing",
    )
    add_flags(parser)
    parser.add_argument("--version", action="version", version=f"endistill-jax {__version__}")
    return parser
