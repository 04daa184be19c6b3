"""Tasks by name."""

import pytest

from endistill_jax import tasks
from endistill_jax.data import text_pipeline

ADDED = """
import seqio

from endistill_jax.data.vocabulary import bundled_vocabulary
from endistill_jax.tasks.pretraining import span_corruption_task
from endistill_jax.data.text_files import TextFilesSource

span_corruption_task("added_source_v1", TextFilesSource(__file__), bundled_vocabulary())
"""


def test_a_task_in_a_new_file_of_the_folder_is_found_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("seqio")
    (tmp_path / "added_source.py").write_text(ADDED)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert set(text_pipeline.resolve_task("added_source_v1").source.splits) == {"train", "validation"}
