"""Lines for a model: the good ones by number, and what is wrong with the others."""

import json

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.data.input_lines import InputFile


def test_bad_lines_say_what_is_wrong_and_do_not_end_the_reading(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [
        json.dumps({"inputs": "smile \U0001f600"}),  # a whole surrogate pair, in JSON's ASCII form
        json.dumps({"inputs": "half \ud83d"}),
        json.dumps({"inputs": "  "}),
        json.dumps({"text": "elsewhere"}),
        json.dumps({"inputs": " last "}),
    ]
    file.write_text("\n".join(lines))
    first, half, empty, elsewhere, last = InputFile(file)
    assert (first.number, first.text, first.problem) == (1, "smile \U0001f600", None)
    assert half.problem == f"{file} line 2 has \\ud83d, half of a surrogate pair, which is no character"
    assert empty.problem == f"{file} line 3 is empty"
    assert "line 4 has no string in field 'inputs'; its fields are 'text'" in elsewhere.problem
    assert (last.number, last.text) == (5, "last")
    assert all(line.text.encode() or line.problem for line in (first, half, empty, elsewhere, last))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no file .*nowhere.txt"):
        InputFile(tmp_path / "nowhere.txt")
