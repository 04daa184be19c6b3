"""The command line: flags and gin files in, one job run.

python -m endistill_jax.main --gin_file=gin/miniend_demo.gin
"""

import argparse
import contextlib
import difflib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

import absl.logging

from endistill_jax import __version__
from endistill_jax.configuration import files
from endistill_jax.core.errors import HostMissing, Stopped, StorageFailure, UserError
from endistill_jax.planning.flags import FLAGS as PLAN_FLAGS
from endistill_jax.planning.flags import add_flags

COMMAND = ("python", "-m", "endistill_jax.main")
FLAGS = ("--gin_file", "--gin_search_paths", "--dry_run", "--help", "--version", *PLAN_FLAGS)
EXAMPLES = """examples:
  # distil a small student from the bundled teacher, here, and compare it with one trained from scratch
  {command} --gin_file=gin/miniend_demo.gin

  # the same with other settings; any macro of the file, or any parameter of what it imports
  {command} --gin_file=gin/miniend_demo.gin --gin.MODEL_DIR=/tmp/demo --gin.STEPS=200 \\
      --gin.jobs.Run.seed=1 --gin.optimizer.OptimizerConfig.learning_rate=2e-3

  # print the settings, shapes and parameter counts of a run and create nothing
  {command} --gin_file=gin/runs/distill_c4.gin --gin.MODEL_DIR=/tmp/x \\
      --gin.TEACHER=/models/t5_v1_1_xl --dry_run

  # which slice, which mesh, which batch? Compiles for chips that are not here; needs no TPU, checkpoint or data
  {command} --gin_file=gin/miniend_3b.gin --plan --topology=v5e-16,v5e-64
  {command} --gin_file=gin/miniend_3b.gin --plan --topology=v5e-16 --sweep

  # another path: files given later win over earlier ones
  {command} --gin_file=gin/miniend_demo.gin --gin_file=gin/paths/minilm.gin

gin files that come with the package (sizes are in gin/models/, paths in gin/paths/):
{files}

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""


class _Terminated(BaseException):
    """SIGTERM came while nothing was running that could save itself."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for a mistake of the user, 128 + n when signal n ended it,
    1 where another host did not come, or storage failed.

    Anything else that goes wrong is raised; where there are several hosts, all of them end with 1.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _raising_on_sigterm():
            _run(words)
    except UserError as error:
        return _end(f"error: {_line(error)}", 2)
    except (HostMissing, StorageFailure) as error:
        return _end(f"error: {_line(error)}", 1)
    except Stopped as error:  # on all hosts alike
        return _tell(_line(error), 128 + error.signal_number)
    except KeyboardInterrupt:
        return _end(
            "interrupted; the same command goes on from the last checkpoint, if there is one", 128 + signal.SIGINT
        )
    except _Terminated:
        return _end(
            "terminated; the same command goes on from the last checkpoint, if there is one", 128 + signal.SIGTERM
        )
    except Exception as error:
        if not _joined():
            raise
        traceback.print_exc()
        return _end(f"{type(error).__name__}: {_line(error)}", 1)
    return 0


def _run(words: list[str]) -> None:
    options, flags = parse(words)
    for name in options.gin_file:
        files.find(name, options.gin_search_paths)  # before the slow imports
    be_quiet()
    if options.plan:
        _plan(options, flags)
        return
    from endistill_jax.multihost import initialize as distributed
    from endistill_jax.multihost import shutdown as ending

    distributed.initialize()
    _import_text_pipeline()
    ending.watch()
    from endistill_jax.configuration.loading import bound_settings, config_text, load
    from endistill_jax.multihost.agreement import agree, code_facts
    from endistill_jax.reports.run_files import Launch, started_by

    job = load(options.gin_file, flags, options.gin_search_paths)
    agree("code and configuration", code_facts() | {"configuration": bound_settings()}, distributed.connect_seconds())
    with started_by(Launch(command=(*COMMAND, *words), config=config_text)), distributed.first_process_prints():
        job(dry_run=options.dry_run)


def _plan(options: argparse.Namespace, flags: list[tuple[str, str]]) -> None:
    """Compiles for chips that are not here; joins no other host and uses no device of this one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from endistill_jax.planning.flags import plan_options

    planned = plan_options(options)  # before the slow imports
    _import_text_pipeline()
    from endistill_jax.configuration.loading import load

    load(options.gin_file, flags, options.gin_search_paths, planning=True)(plan=planned)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Splits the command line into its options and the (name, value) of each `--gin.NAME=value`.

    Raises:
        UserError: an unknown flag, a flag without its value, no gin file.
    """
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
        flags.append((name, value))
    if not options.gin_file:
        raise UserError("give a --gin_file, such as --gin_file=gin/miniend_demo.gin; see --help")
    unused = [flag for flag in PLAN_FLAGS if getattr(options, flag.removeprefix("--")) not in (None, "", False)]
    if unused and not options.plan:
        raise UserError(f"{unused[0]} is for --plan alone; add --plan, or take it away")
    options.gin_search_paths = [path for paths in options.gin_search_paths for path in paths.split(",") if path]
    return options, flags


def be_quiet() -> None:
    """Keeps libraries from writing notices; what the environment already sets stays. Errors are still told."""
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "GLOG_minloglevel": "2"}.items():
        os.environ.setdefault(name, value)
    # Orbax warns of a missing file that is optional, and of every checkpoint without held-out figures.
    absl.logging.set_verbosity(absl.logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    listed = [f"  {name}\n      {files.purpose(name)}" for name in files.shipped()]
    parser = _Parser(
        prog=" ".join(COMMAND),
        usage="%(prog)s --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=value ...] [--dry_run]",
        description="Distils large T5 models into small encoder-decoder students. Gin files say what to do.",
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
        help="sets a macro (--gin.STEPS=100) or a parameter (--gin.jobs.distill.teacher=/models/xl) over all files. "
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


def _import_text_pipeline() -> None:
    """Imports SeqIO early: TensorFlow comes with it, and writes notices to stderr that no setting silences.

    Where either is missing, the job that needs it says so.
    """
    with _held_back_stderr(), contextlib.suppress(ModuleNotFoundError):
        import seqio  # noqa: F401


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Drops what libraries write to file descriptor 2 meanwhile; if they fail, it is written after all."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(error: Exception) -> str:
    """An error's message, without the lines that gin adds on the way up."""
    return " ".join(str(error).partition("\n  In ")[0].split())


def _tell(message: str, code: int) -> int:
    print(f"endistill: {message}", file=sys.stderr)
    return code


def _end(message: str, code: int) -> int:
    """Tells what went wrong; where there are several hosts, all of them end here."""
    _tell(message, code)
    if _joined():
        from endistill_jax.multihost.shutdown import leave

        leave(message, code)
    return code


def _joined() -> bool:
    """Whether this process has joined others; asked without importing what takes seconds."""
    joined = sys.modules.get("endistill_jax.multihost.initialize")
    return joined is not None and joined.process_count() > 1


if __name__ == "__main__":
    sys.exit(main())
