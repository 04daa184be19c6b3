"""Logging of a run: `metrics.jsonl`, TensorBoard scalars, and a progress bar or log lines.

`metrics.jsonl` has one JSON object per line: `step`, the scalars of that step by name, and under `timing` whatever
depends on the clock or the machine. A run that is killed and resumed ends with the same lines, except for `timing`, as
an uninterrupted one, bit for bit. This requires the training loop to write all lines of step S before it saves the
checkpoint of step S.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax

from endistill_jax.checkpoints.manifest import renamed_metrics
from endistill_jax.core.errors import UserError
from endistill_jax.extras import require
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.storage import stored_path

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # a folder


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, ignoring a truncated last line; metrics by their present names."""
    lines = stored_path(path).read_bytes().split(b"\n")  # bytes: a cut may go through a character
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut off
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"line {number} of {path} is not a record with a step; move the file away") from None
        records.append(renamed_metrics(record))
    return records


class MetricWriter(contextlib.AbstractContextManager):
    """Writes the scalars of steps to `metrics.jsonl` and TensorBoard; a context manager. One process of a run has one.

    Args:
        directory: the run's folder; created if missing.
        resume_step: the step that the run resumes from: later lines of an earlier attempt are removed. None starts an
            empty file.
        tensorboard: write to `directory/tensorboard` too; a bucket needs TensorFlow for it, a local folder does not.
            Steps repeated after a resume overlay the earlier ones there.
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int | None = None, tensorboard: bool = True):
        folder = stored_path(directory)
        path = folder / FILE_NAME
        if tensorboard:  # before any file is made
            require("tensorboard", "writing TensorBoard scalars (tensorboard=True)")
        kept = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        write_atomically(path, "".join(json_text(record) + "\n" for record in kept))
        self._path = path
        self._tensorboard = _TensorBoardScalars(str(folder / TENSORBOARD)) if tensorboard else None

    def write(self, step: int, scalars: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Appends one line: scalars that are the same in every run of the same settings, timing that is not."""
        if reserved := {"step", "timing"} & set(scalars):
            raise ValueError(f"{', '.join(sorted(reserved))}: not a name for a scalar of {FILE_NAME}")
        scalars = {name: float(value) for name, value in scalars.items()}
        timing = {name: float(value) for name, value in (timing or {}).items()}
        record = {"step": int(step)} | scalars | ({"timing": timing} if timing else {})
        # Closed each time, so that a killed process loses no line, and in a bucket, where it is rewritten, it is seen.
        with self._path.open("a") as file:
            file.write(json_text(record) + "\n")
        if self._tensorboard is not None:
            timed = {f"timing/{name}": value for name, value in timing.items()}
            self._tensorboard.write(int(step), scalars | timed)

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


class _TensorBoardScalars:
    """Scalars as `tf.summary.scalar` writes them, one event a step; they reach the disk within two minutes."""

    def __init__(self, folder: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(folder)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.value.extend(scalar_pb(name, value).value)
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class ProgressDisplay(contextlib.AbstractContextManager):
    """A progress bar on a terminal, plain log lines elsewhere; a context manager.

    Args:
        total_steps: where the run ends.
        first_step: where it starts, the checkpoint's step on resume.
        description: prefix of the bar and of each line.
        stream: standard error by default.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, description: str = "", stream: TextIO | None = None):
        from tqdm import tqdm

        self._stream = stream or sys.stderr
        self._total = total_steps
        self._first = self._step = first_step
        self._description = description
        self._started = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                desc=description or None,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
            )

    def advance(self, step: int, scalars: Mapping[str, Any] | None = None) -> None:
        """Moves to `step`; with scalars, shows them next to the bar or prints a line with the time left."""
        moved, self._step = step - self._step, step
        shown = "  ".join(f"{name} {float(value):.4g}" for name, value in (scalars or {}).items())
        if self._bar is not None:
            if scalars:
                self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(moved)
        elif scalars:
            self.say(f"step {step}/{self._total}  {shown}  {self._pace()}")

    def _pace(self) -> str:
        done = self._step - self._first
        if not done:
            return ""
        seconds = (time.monotonic() - self._started) / done
        return f"{seconds:.3g} s/step, {seconds * (self._total - self._step):.0f} s left"

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        line = f"{self._description}: {text}" if self._description else text
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line.rstrip(), file=self._stream, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class NullWriter(contextlib.AbstractContextManager):
    """Stands in for `MetricWriter` and `ProgressDisplay` on non-primary hosts."""

    def write(self, *_: object, **__: object) -> None:
        pass

    advance = say = write

    def __exit__(self, *_: object) -> None:
        pass


def open_metrics(directory: str, *, resume_step: int | None, tensorboard: bool) -> MetricWriter | NullWriter:
    """A `MetricWriter` on the primary host, else one that writes nothing."""
    if jax.process_index():
        return NullWriter()
    return MetricWriter(directory, resume_step=resume_step, tensorboard=tensorboard)


def open_progress(total_steps: int, *, first_step: int, description: str) -> ProgressDisplay | NullWriter:
    """A `ProgressDisplay` on the primary host, else one that writes nothing."""
    if jax.process_index():
        return NullWriter()
    return ProgressDisplay(total_steps, first_step=first_step, description=description)
