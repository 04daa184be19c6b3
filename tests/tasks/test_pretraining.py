"""The registered pretraining tasks."""

import pytest
import seqio

from endistill_jax.data.registry import resolve_task
from endistill_jax.data.text_files import TextFilesSource
from endistill_jax.data.vocabulary import load_vocabulary
from endistill_jax.errors import UserError
from endistill_jax.tasks import pretraining
from endistill_jax.tasks.pretraining import span_corruption_task


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("one document\nanother document\n")
    return TextFilesSource(f"{folder}/*.txt")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("c4_v310_span_corruption_v1", {"train", "validation"}),
        ("wikipedia_20230601_en_span_corruption_v1", {"train", "validation"}),
        ("python_docs_stdlib_span_corruption_v1", {"train", "validation", "test"}),
        ("python_docs_packages_half_corruption_v1", {"train", "validation", "test"}),
    ],
)
def test_tasks_are_there_and_read_nothing_yet(name, splits):
    task = resolve_task(name)
    assert set(task.splits) == splits
    assert set(task.output_features) == {"inputs", "targets"}


def test_registering_twice_is_harmless(source):
    pretraining.register_all()
    first = span_corruption_task("test_twice_v1", source, load_vocabulary("bytes"), noise_density=0.3)
    assert span_corruption_task("test_twice_v1", source, load_vocabulary("bytes"), noise_density=0.3) is first


def test_a_name_has_one_meaning(source):
    span_corruption_task("test_meaning_v1", source, load_vocabulary("bytes"))
    with pytest.raises(UserError, match="'test_meaning_v1' exists with other settings"):
        span_corruption_task("test_meaning_v1", source, load_vocabulary("bytes"), mean_span_length=4.0)


def test_settings_are_checked_before_anything_is_registered(source):
    with pytest.raises(UserError, match="noise_density is 1.5"):
        span_corruption_task("test_unregistered_v1", source, load_vocabulary("bytes"), noise_density=1.5)
    assert "test_unregistered_v1" not in seqio.TaskRegistry.names()


def test_vocabulary_without_enough_sentinels(source):
    task = span_corruption_task("test_sentinels_v1", source, load_vocabulary("bytes", extra_ids=5))
    with pytest.raises(UserError, match="28 spans need as many sentinels; the vocabulary has 5"):
        task.get_dataset({"inputs": 512, "targets": 114}, split="train", shuffle=False)
