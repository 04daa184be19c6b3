"""The registered pretraining tasks."""

import pytest
import seqio

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_files import TextFilesSource
from endistill_jax.data.text_pipeline import resolve_task
from endistill_jax.data.vocabulary import BUNDLED, bundled_vocabulary, load_vocabulary
from endistill_jax.tasks import pretraining
from endistill_jax.tasks.pretraining import span_corruption_task, text_files_task


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


def test_sentinels_within_the_sentencepiece_model_are_used_as_extra_ids_are(tmp_path):
    # As mT5's vocabulary: the model ends with the sentinels, and there are no extra ids.
    (tmp_path / "mt5.model").write_bytes(bundled_vocabulary().sp_model)
    (tmp_path / "a.txt").write_text("the first item of the sequence, or an error if it is empty\n" * 40)
    outside = text_files_task("test_outside_v1", f"{tmp_path}/*.txt", str(BUNDLED), held_out=0.0)
    within = text_files_task("test_within_v1", f"{tmp_path}/*.txt", f"{tmp_path}/mt5.model", extra_ids=0, held_out=0.0)
    examples = []
    for task in (outside, within):
        dataset = task.get_dataset({"inputs": 64, "targets": 20}, split="train", shuffle=False, seed=3)
        examples.append([(e["inputs"].tolist(), e["targets"].tolist()) for e in dataset.as_numpy_iterator()])
    assert examples[0] == examples[1]
    inputs, targets = examples[0][0]
    assert targets[0] == 8099 and 8099 in inputs and 8098 in inputs


def test_extra_ids_that_the_vocabulary_cannot_have_are_refused(tmp_path):
    (tmp_path / "mt5.model").write_bytes(bundled_vocabulary().sp_model)
    (tmp_path / "a.txt").write_text("text\n")
    settings = {"train": f"{tmp_path}/*.txt", "vocabulary": f"{tmp_path}/mt5.model"}
    with pytest.raises(UserError, match="mt5.model ends with 100 sentinels of its own, .*set extra_ids to 0"):
        text_files_task("test_two_hundred_v1", **settings)
    with pytest.raises(UserError, match="extra_ids is -1"):
        text_files_task("test_negative_v1", **settings, extra_ids=-1)
