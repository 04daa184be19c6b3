"""Contracts of small files: whole or not there, JSON that every reader accepts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.reports.files import json_text, write_atomically


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "table.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    assert path.read_text() == "old"


def test_write_replaces_what_was_there(tmp_path):
    write_atomically(tmp_path / "a.txt", "a long first text")
    write_atomically(tmp_path / "a.txt", "naïve ±")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve ±"


def test_json_keeps_every_bit_of_float32_and_has_no_bare_nan():
    value = np.float32(1) / np.float32(3)
    text = json_text({"loss": value, "jax": jnp.float32(value), "steps": np.int64(3), "bad": [np.nan, -np.inf]})
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert np.float32(record["loss"]).tobytes() == value.tobytes() == np.float32(record["jax"]).tobytes()
    assert record["steps"] == 3 and isinstance(record["steps"], int)
    assert np.isnan(float(record["bad"][0])) and float(record["bad"][1]) == -np.inf
