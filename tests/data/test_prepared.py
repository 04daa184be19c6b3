"""Where prepared data are read from, and that nobody prepares them by accident."""

import pytest
import seqio

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import check_prepared, read_prepared_from
from endistill_jax.jobs import run


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
