"""Contracts of result tables: exact JSON, readable Markdown, the right drawing for the stream."""

import io
import json

import pytest

from endistill_jax.reports.table import Column, format_cell, markdown_table, plain_table, print_table, write_table

COLUMNS = (
    Column(key="model", title="Model"),
    Column(key="parameters", title="Parameters", kind="count"),
    Column(key="loss", title="Loss (nats)", kind="loss"),
    Column(key="seconds", title="Time", kind="seconds"),
)
ROWS = [
    {"model": "teacher", "parameters": 5_700_000, "loss": 4.60149, "seconds": None, "seed": 0},
    {"model": "student [a|b]", "parameters": 1_234_567, "loss": [5.1, 5.2, 5.6], "seconds": 412.3, "seed": 0},
]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (5_700_000, "count", "5.7 M"),
        (1_234_567, "count", "1.2 M"),
        (999_949, "count", "999.9 k"),
        (999_951, "count", "1.0 M"),
        (2_849_757_184, "count", "2.8 B"),
        (5e15, "count", "5000.0 T"),
        (999, "count", "999"),
        (0, "count", "0"),
        (4.60149, "loss", "4.601"),
        (float("nan"), "loss", "nan"),
        ([5.1, 5.2, 5.6], "loss", "5.300 ± 0.265"),
        ([5.1], "loss", "5.100"),
        ([5.1, float("nan")], "loss", "nan ± nan"),
        ([5.1, float("inf")], "difference", "nan ± nan"),
        ([float("nan")], "loss", "nan"),
        ([], "loss", "-"),
        (None, "loss", "-"),
        (0.0123456, "number", "0.0123"),
        (1.5, "number", "1.50"),
        (-41.26, "number", "-41.3"),
        (412.6, "number", "413"),
        (98765.4, "number", "98765"),
        (0, "number", "0"),
        (0.12345, "share", "12.3 %"),
        (412.3, "seconds", "412 s"),
        (3.21, "seconds", "3.2 s"),
        ("minend", "count", "minend"),
        (3, "text", "3"),
    ],
)
def test_cells_read_as_people_write_them(value, kind, text):
    assert format_cell(value, kind) == text


def test_markdown_has_one_line_a_row_and_escapes_bars():
    assert markdown_table(ROWS, COLUMNS).splitlines() == [
        "| Model | Parameters | Loss (nats) | Time |",
        "| :--- | ---: | ---: | ---: |",
        "| teacher | 5.7 M | 4.601 | - |",
        "| student [a\\|b] | 1.2 M | 5.300 ± 0.265 | 412 s |",
    ]


def test_plain_table_lines_up_texts_left_and_numbers_right():
    lines = plain_table(ROWS, COLUMNS).splitlines()
    assert lines[0].startswith("Model ") and lines[2].startswith("teacher ")
    assert {len(line) for line in lines} == {len(lines[1])}


def test_json_holds_all_keys_exactly(tmp_path):
    write_table(tmp_path / "run", "results", ROWS, COLUMNS, title="Held-out")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == ROWS
    assert (tmp_path / "run" / "results.md").read_text(encoding="utf-8").startswith("## Held-out\n\n| Model |")


def test_terminal_gets_a_drawing_with_brackets_intact_and_a_pipe_gets_plain_text():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    drawn, piped = Terminal(), io.StringIO()
    print_table(ROWS, COLUMNS, title="Held-out", stream=drawn)
    print_table(ROWS, COLUMNS, title="Held-out", stream=piped)
    assert piped.getvalue() == "Held-out\n" + plain_table(ROWS, COLUMNS)
    assert "student [a|b]" in drawn.getvalue() and "┃" in drawn.getvalue()
