"""The files of a study: `study.json` with all measurements, and the tables and plots made from it.

    python -m endistill_jax.studies.report FOLDER

recreates `study.md` and the plots from FOLDER/study.json.
"""

import json
import os
import sys
from collections.abc import Sequence

from etils import epath

from endistill_jax.checkpoints.manifest import objective_of_path, plain, renamed_metrics
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import print_table
from endistill_jax.storage import reading_failure, stored_path
from endistill_jax.studies.figures import Raw
from endistill_jax.studies.plots import study_plots
from endistill_jax.studies.tables import study_markdown, study_tables

RAW_FILE = "study.json"
TABLE_FILE = "study.md"


def raw_file(folder: str | os.PathLike) -> epath.Path:
    """The path of a folder's `study.json`."""
    return stored_path(folder) / RAW_FILE


def read_raw(folder: str | os.PathLike) -> Raw:
    """Reads `study.json`.

    Raises:
        UserError: there is none, or it is not of a study.
        StorageFailure: the storage could not be read.
    """
    file = raw_file(folder)
    try:
        raw = json.loads(file.read_text())
        raw["judged_by"]["shards"], raw["runs"]
        _rename(raw)
    except OSError as error:
        raise reading_failure(f"{file}, the record of a study, cannot be read", error) from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no record of a study; move it away") from None
    return raw


def _rename(raw: Raw) -> None:
    """Metrics and the probe of a study of manifest schema 1, under their present names."""
    raw["teacher_figures"] = renamed_metrics(raw["teacher_figures"])
    for run in raw["runs"]:
        for each in (run, *run.get("stages", ())):
            each["evaluations"] = [renamed_metrics(evaluation) for evaluation in each["evaluations"]]
    probe = raw["judged_by"].get("probe")
    if probe and "path" in probe:
        probe["objective"] = plain(objective_of_path(probe.pop("path")).described())


def write_raw(folder: str | os.PathLike, raw: Raw) -> None:
    """Writes `study.json`."""
    write_atomically(raw_file(folder), json_text(raw, indent=1) + "\n")


def write_report(folder: str | os.PathLike, raw: Raw) -> None:
    """Writes `study.md` and the plots."""
    plots = study_plots(raw)
    for name, image in plots.items():
        write_atomically(epath.Path(folder) / name, image)
    pictures = "".join(f"\n![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in plots)
    write_atomically(epath.Path(folder) / TABLE_FILE, study_markdown(raw) + pictures)


def print_study(raw: Raw) -> None:
    """Prints the tables."""
    for table in study_tables(raw):
        print_table(table.rows, table.columns, title=table.title)


def main(words: Sequence[str]) -> int:
    """Recreates the tables and plots of each folder."""
    if not words:
        print("usage: python -m endistill_jax.studies.report FOLDER ...", file=sys.stderr)
        return 2
    for folder in words:
        try:
            write_report(folder, read_raw(folder))
        except (UserError, StorageFailure) as error:
            print(f"endistill: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
