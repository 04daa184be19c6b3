"""Tasks by name, their texts, and where prepared data are read from."""

import pytest
import seqio

from endistill_jax import tasks
from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import check_prepared, read_prepared_from, read_texts, resolve_task
from endistill_jax.jobs import run

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
    assert set(resolve_task("added_source_v1").source.splits) == {"train", "validation"}


def test_texts_of_a_task_are_its_documents(document_task, documents):
    texts = list(read_texts(document_task.name))
    assert sorted(texts) == sorted(documents)
    assert texts == list(read_texts(document_task.source))
    assert list(read_texts(document_task, max_documents=3)) == texts[:3]


def test_mistakes_are_told(document_task, stream_task):
    with pytest.raises(UserError, match="the source has no split 'test'; it has train"):
        read_texts(document_task, split="test")
    with pytest.raises(UserError, match="no 'body'; they have text"):
        next(read_texts(document_task, text_field="body"))
    mixture = seqio.Mixture("test_texts_mixture", [(document_task.name, 1.0), (stream_task.name, 1.0)])
    with pytest.raises(UserError, match="is a mixture; name one of its tasks: test_documents_v1, test_stream_v1"):
        read_texts(mixture)


def test_unknown_task_names_similar_ones():
    with pytest.raises(
        UserError, match="no task or mixture named 'python_doc_stdlib_span_v1'; there is .*python_docs_stdlib"
    ):
        resolve_task("python_doc_stdlib_span_v1")


def test_tasks_given_as_objects_are_left_alone(document_task):
    assert resolve_task(document_task) is document_task


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    """Takes back what a test said of the folder."""
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", None)


@pytest.mark.parametrize("on_a_bucket", [True, False])
def test_a_job_reads_the_data_of_the_folder_that_it_is_given(tmp_path, on_a_bucket):
    folder = "gs://bucket/prepared" if on_a_bucket else str(tmp_path)
    source = seqio.TfdsDataSource("c4/en:3.1.0", splits=("train",))
    assert run(lambda dry_run: source.tfds_dataset.data_dir, data_dir=folder) == folder


def test_without_a_folder_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", "/of/a/caller")
    run(lambda dry_run: None)
    assert seqio.utils._TFDS_DATA_DIR_OVERRIDE == "/of/a/caller"


def test_a_local_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="data_dir is .*/nothing, which is no folder"):
        read_prepared_from(str(tmp_path / "nothing"))


def test_data_that_are_not_prepared_are_named_with_the_place(tmp_path):
    class Unprepared:
        """Of TensorFlow Datasets' builder what is asked of it."""

        data_path = tmp_path / "glue/rte/2.0.0"
        info = type("Info", (), {"full_name": "glue/rte/2.0.0"})

        def __init__(self, prepared: bool):
            self.is_prepared = lambda: prepared

    def task(prepared: bool) -> seqio.Task:
        source = seqio.TfdsDataSource("glue/rte:2.0.0", splits=("train",))
        source._tfds_dataset = type("Loader", (), {"builder": Unprepared(prepared)})
        features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
        return seqio.Task(f"prepared_{prepared}", source=source, output_features=features)

    check_prepared(task(True))
    with pytest.raises(UserError, match="which task prepared_False reads, is not prepared in .*DATA_DIR"):
        check_prepared(task(False))
