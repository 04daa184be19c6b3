"""The notebook: its cells run in order, teach a student something, and are few lines."""

import json
import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"
CODE = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_tour_is_at_most_15_lines_of_code_without_outputs():
    lines = [line for source in CODE for line in source.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 120
    assert '"output_type"' not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_tour_runs_and_teaches_a_student(tmp_path, monkeypatch, capsys):
    pytest.importorskip("seqio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {}
    for source in CODE:
        exec(compile(source, str(NOTEBOOK), "exec"), namespace)
    assert namespace["relation"].sum(axis=-1) == pytest.approx(1.0, rel=1e-5)
    written = capsys.readouterr().out.strip().splitlines()[-1]  # by the student, after the table of the run
    assert written.strip("[]'\"")
    logs = [json.loads(line) for line in (tmp_path / "runs/tour/metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out/loss"] for line in logs if "held_out/loss" in line]
    assert losses[-1] < 6.0  # the slice of the teacher that it starts as has about 7
