"""Summaries as T5 has them, from TFDS's mock data and from the user's own files."""

import gzip
import json

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import resolve_task
from endistill_jax.data.vocabulary import BUNDLED
from endistill_jax.tasks.mixtures import downstream_mixture
from endistill_jax.tasks.summarization import (
    XSUM_ARCHIVE,
    cnn_dailymail_task,
    summarization_files_task,
    summarize,
    xsum_task,
)

LENGTHS = {"inputs": 32, "targets": 32}


@pytest.fixture
def mock_tfds(monkeypatch, tmp_path):
    monkeypatch.setattr(seqio.TfdsDataSource, "num_input_examples", lambda self, split: None)  # mock data have no size
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(tmp_path))
    with tfds.testing.mock_data(num_examples=4, data_dir=str(tmp_path)):
        yield tmp_path


def summarized(summary, **settings):
    dataset = tf.data.Dataset.from_tensors({"article": "An article.", "highlights": summary, "id": "a"})
    return next(summarize(dataset, article_field="article", summary_field="highlights", **settings).as_numpy_iterator())


def test_inputs_and_targets_are_in_t5s_format():
    assert summarized("A summary.") == {"inputs": b"summarize: An article.", "targets": b"A summary."}


def test_periods_at_the_end_of_highlights_stand_alone():
    summary = "He scored 2.5 times .\nIt was late.\nWas it? Yes...\nEnd."
    expected = b"He scored 2.5 times .\nIt was late .\nWas it? Yes...\nEnd ."
    assert summarized(summary, periods_alone=True)["targets"] == expected


def test_highlights_are_told_apart_once_line_ends_are_lost():
    # The vocabulary makes a space of a line end; ROUGE-Lsum then splits at ` . `.
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    task = cnn_dailymail_task(name="test_lsum_v1", vocabulary=BUNDLED)
    vocabulary = task.output_features["targets"].vocabulary
    target = summarized("the cat sat.\nthe dog ran.", periods_alone=True)["targets"].decode()
    prediction = vocabulary.decode(vocabulary.encode("the dog ran .\nthe cat sat ."))
    assert "\n" not in prediction
    assert task.metric_fns[0]([target], [prediction])["rougeLsum"] == 100.0


def test_tfds_examples_become_tokens(mock_tfds, evaluate_copying):
    task = cnn_dailymail_task(name="test_cnn_dailymail_v1", vocabulary=BUNDLED)
    for split in ("train", "validation", "test"):
        examples = list(task.get_dataset(LENGTHS, split, shuffle=False).as_numpy_iterator())
        assert len(examples) == 4
        assert examples[0]["inputs_pretokenized"].startswith(b"summarize: ")
        assert all(example["inputs"][-1] == example["targets"][-1] == 1 for example in examples)
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    assert evaluate_copying(task, "validation")["rouge1"] == pytest.approx(100.0)


def test_xsum_tells_what_must_be_fetched_by_hand(mock_tfds):
    task = xsum_task(name="test_xsum_v1", vocabulary=BUNDLED)
    with pytest.raises(UserError, match=f"TFDS cannot download it: put {XSUM_ARCHIVE} at .*manual"):
        task.get_dataset(LENGTHS, "train", shuffle=False)
    manual = mock_tfds / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / XSUM_ARCHIVE).touch()
    [example] = task.get_dataset(LENGTHS, "train", shuffle=False).take(1).as_numpy_iterator()
    assert example["inputs_pretokenized"].startswith(b"summarize: ")


def test_files_of_the_users_own(tmp_path, evaluate_copying):
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    lines = [json.dumps({"document": f"Article {n}.", "summary": f"summary {n}"}) for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]))
    with gzip.open(tmp_path / "held_out.jsonl.gz", "wt") as file:
        file.write(lines[0] + "\n")
    files = {"train": f"{tmp_path}/a*.jsonl", "validation": f"{tmp_path}/*.gz"}
    task = summarization_files_task("test_files_v1", files, str(BUNDLED))
    assert summarization_files_task("test_files_v1", files, str(BUNDLED)) is task
    examples = list(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
    assert [e["inputs_pretokenized"].decode() for e in examples] == [f"summarize: Article {n}." for n in range(3)]
    assert [e["targets_pretokenized"].decode() for e in examples] == [f"summary {n}" for n in range(3)]
    assert evaluate_copying(task, "validation")["rougeLsum"] == pytest.approx(100.0)


def test_wrong_files_are_refused_by_name_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"document": "An article.", "summary": "one"}\n{"document": "Another."}\n')
    task = summarization_files_task("test_wrong_line_v1", {"train": f"{tmp_path}/*.jsonl"}, str(BUNDLED))
    with pytest.raises(tf.errors.OpError, match=r"a\.jsonl line 2 has no string in field 'summary'"):
        list(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
    (tmp_path / "b.txt").write_text("text\n")
    with pytest.raises(UserError, match=r"b\.txt is not JSONL"):
        summarization_files_task("test_text_v1", {"train": f"{tmp_path}/*.txt"}, str(BUNDLED))


def test_downstream_mixture_has_both_fields_at_proportional_rates():
    rates = resolve_task("downstream").rate_per_task_name
    assert {"glue_rte_v1": 2490, "cnn_dailymail_v1": 287113, "xsum_v1": 204045}.items() <= rates.items()
    mixture = downstream_mixture(prefix="test_fields_", vocabulary=BUNDLED, largest_rate=100_000)
    assert mixture.name == "test_fields_downstream"
    assert mixture.rate_per_task_name["test_fields_cnn_dailymail_v1"] == 100_000
    with pytest.raises(UserError, match="largest_rate of mixture 'test_none_glue_mnli' is 0"):
        downstream_mixture(prefix="test_none_", vocabulary=BUNDLED, largest_rate=0)
