"""The command line: flags and gin files in, one job run.

python -m endistill_jax.main --gin_file=gin/miniend_demo.gin
"""

import contextlib
import functools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import absl.logging

from endistill_jax import command_line
from endistill_jax.core.errors import HostMissing, Stopped, StorageFailure, UserError

RESUMES = "the same command resumes from the last checkpoint, if there is one"


class _Terminated(BaseException):
    """SIGTERM arrived while nothing was running that could save its state."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for a mistake of the user, 128 + n when signal n ended it,
    1 where another host did not come, or storage failed.

    Anything else that goes wrong is raised; where there are several hosts, all of them end with 1.
    """
    try:
        with _raising_on_sigterm(), _prepared(list(sys.argv[1:] if argv is None else argv)) as job:
            job()
    except UserError as error:
        return _end(f"error: {_line(error)}", 2)
    except (HostMissing, StorageFailure) as error:
        return _end(f"error: {_line(error)}", 1)
    except Stopped as error:  # on all hosts alike
        return _report(_line(error), 128 + error.signal_number)
    except KeyboardInterrupt:
        return _end(f"interrupted; {RESUMES}", 128 + signal.SIGINT)
    except _Terminated:
        return _end(f"terminated; {RESUMES}", 128 + signal.SIGTERM)
    except Exception as error:
        if not _joined():
            raise
        traceback.print_exc()
        return _end(f"{type(error).__name__}: {_line(error)}", 1)
    return 0


@contextlib.contextmanager
def _prepared(words: list[str]) -> Iterator[Callable[[], Any]]:
    """The job of a command line, ready to be called. Slow imports come after cheap checks."""
    options, flags = command_line.parse(words)
    for name in options.gin_file:
        command_line.find(name, options.gin_search_paths)
    silence_library_logs()
    if options.plan:  # joins no other host and uses no device of this one
        from endistill_jax.planning.options import plan_options

        os.environ["JAX_PLATFORMS"] = "cpu"
        plan = plan_options(options)
        _import_text_pipeline()
        from endistill_jax import config

        config.read(options.gin_file, flags, options.gin_search_paths, planning=True)
        yield functools.partial(config.job(), plan=plan)
        return
    from endistill_jax import multihost

    multihost.initialize()
    _import_text_pipeline()
    multihost.watch_peers()
    from endistill_jax import config
    from endistill_jax.reports.files import Launch, started_by

    config.read(options.gin_file, flags, options.gin_search_paths)
    settings = multihost.code_versions() | {"configuration": config.bound_settings()}
    multihost.agree("code and configuration", settings, multihost.connect_seconds())
    with (
        started_by(Launch(command=(*command_line.COMMAND, *words), config=config.config_text)),
        multihost.first_process_prints(),
    ):
        yield functools.partial(config.job(), dry_run=options.dry_run)


def _import_text_pipeline() -> None:
    """Imports SeqIO early: TensorFlow comes with it, and writes notices to stderr that no setting silences.

    Where either is missing, the job that needs it says so.
    """
    with _held_back_stderr(), contextlib.suppress(ModuleNotFoundError):
        import seqio  # noqa: F401


def silence_library_logs() -> None:
    """Silences library notices; errors are still logged. Existing environment variables are kept."""
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "GLOG_minloglevel": "2"}.items():
        os.environ.setdefault(name, value)
    # Orbax warns of a missing file that is optional, and of every checkpoint without held-out metrics.
    absl.logging.set_verbosity(absl.logging.ERROR)


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Suppresses what libraries write to file descriptor 2 inside the context, unless they fail."""
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
    return " ".join(str(error).split())


def _report(message: str, code: int) -> int:
    print(f"endistill: {message}", file=sys.stderr)
    return code


def _end(message: str, code: int) -> int:
    """Prints the error; in a multi-host run, ends all hosts."""
    _report(message, code)
    if _joined():
        from endistill_jax.multihost import shutdown_all

        shutdown_all(message, code)
    return code


def _joined() -> bool:
    """Whether this process has joined others; avoids slow imports."""
    joined = sys.modules.get("endistill_jax.multihost")
    return joined is not None and joined.process_count() > 1


if __name__ == "__main__":
    sys.exit(main())
