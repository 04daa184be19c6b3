"""GLUE as T5 prints it, its submissions, and TFDS's loading code on mock data."""

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import resolve_task
from endistill_jax.data.vocabulary import BUNDLED
from endistill_jax.tasks import glue
from endistill_jax.tasks.glue_submission import submitted_config, write_submission
from endistill_jax.tasks.registration import proportional_mixture
from endistill_jax.tasks.text_to_text import ranked_task, task_labels

PAIR = {"sentence1": "Big news.", "sentence2": "No idea."}
INFERENCE = {"premise": "It rains.", "hypothesis": "It is wet."}

# T5's published format (Raffel et al. 2020, appendix D), one example of each task: features, label, inputs, targets.
EXAMPLES = {
    "cola": ({"sentence": "John made Bill master."}, 1, "cola sentence: John made Bill master.", "acceptable"),
    "sst2": ({"sentence": "a dull film "}, 0, "sst2 sentence: a dull film ", "negative"),
    "mrpc": (PAIR, 0, "mrpc sentence1: Big news. sentence2: No idea.", "not_equivalent"),
    "qqp": (
        {"question1": "How so?", "question2": "Why not?"},
        1,
        "qqp question1: How so? question2: Why not?",
        "duplicate",
    ),
    "stsb": (PAIR, 3.25, "stsb sentence1: Big news. sentence2: No idea.", "3.2"),
    "mnli": (INFERENCE, 2, "mnli hypothesis: It is wet. premise: It rains.", "contradiction"),
    "mnli_matched": (INFERENCE, 1, "mnli hypothesis: It is wet. premise: It rains.", "neutral"),
    "mnli_mismatched": (INFERENCE, 0, "mnli hypothesis: It is wet. premise: It rains.", "entailment"),
    "qnli": (
        {"question": "Who?", "sentence": "It was she."},
        0,
        "qnli question: Who? sentence: It was she.",
        "entailment",
    ),
    "rte": (PAIR, 1, "rte sentence1: Big news. sentence2: No idea.", "not_entailment"),
    "wnli": (PAIR, 1, "wnli sentence1: Big news. sentence2: No idea.", "entailment"),
    "ax": (INFERENCE, -1, "mnli hypothesis: It is wet. premise: It rains.", "<unk>"),
}


@pytest.fixture
def mock_glue(monkeypatch):
    """TFDS's mock data, and tasks over it with a vocabulary that needs no network."""
    monkeypatch.setattr(seqio.TfdsDataSource, "num_input_examples", lambda self, split: None)  # mock data have no size
    glue.glue_mixture(benchmark="test_glue", vocabulary=BUNDLED)
    with tfds.testing.mock_data(num_examples=6):
        yield


def as_text(config, features, label):
    label = tf.constant(label, tf.float32 if config == "stsb" else tf.int64)
    dataset = tf.data.Dataset.from_tensors({**features, "label": label, "idx": 7})
    [example] = glue.to_text(dataset, config=config).as_numpy_iterator()
    assert example["idx"] == 7
    return example["inputs"].decode(), example["targets"].decode()


@pytest.mark.parametrize("config", glue.TASKS)
def test_inputs_and_targets_are_in_t5s_format(config):
    features, label, inputs, targets = EXAMPLES[config]
    assert as_text(config, features, label) == (inputs, targets)


@pytest.mark.parametrize(
    ("score", "target"), [(0.0, "0.0"), (1.66, "1.6"), (2.8, "2.8"), (4.91, "5.0"), (-1.0, "<unk>")]
)
def test_stsb_scores_are_rounded_to_fifths(score, target):
    assert as_text("stsb", PAIR, score)[1] == target


def test_hidden_labels_are_unknown():
    assert as_text("cola", EXAMPLES["cola"][0], -1)[1] == "<unk>"


def test_labels_are_those_of_tfds():
    for config, task in glue.TASKS.items():
        built = tfds.text.glue.Glue.builder_configs[config]
        assert list(task.labels) == built.label_classes or config == "stsb"
        assert sorted(built.text_features) == list(task.texts)
    assert task_labels("glue_mnli_v1") == ("entailment", "neutral", "contradiction")
    assert len(task_labels("glue_stsb_v1")) == 26


def test_predictions_that_are_no_score_are_far_off():
    assert [glue.similarity(text) for text in ("3.8", " 4.0", "much", "nan", "inf")] == [3.8, 4.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("config", glue.TASKS)
def test_tfds_examples_become_tokens_with_an_end(mock_glue, config):
    task = resolve_task(f"test_glue_{config}_v1")
    for split in task.splits:
        dataset = task.get_dataset({"inputs": 16, "targets": 16}, split=split, shuffle=False)
        examples = list(dataset.as_numpy_iterator())
        assert len(examples) == 6
        vocabulary = task.output_features["targets"].vocabulary
        for example in examples:
            assert len(example["inputs"]) <= 16 and example["inputs"][-1] == example["targets"][-1] == 1
            assert example["targets_pretokenized"].decode() in task_labels(task)
            assert vocabulary.decode(example["targets"][:-1].tolist()) == example["targets_pretokenized"].decode()


@pytest.mark.parametrize("config", ["cola", "mrpc", "stsb", "mnli_matched"])
@pytest.mark.parametrize("ranked", [False, True])
def test_a_model_that_knows_the_answers_scores_a_hundred(mock_glue, evaluate_copying, config, ranked):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    task = resolve_task(f"test_glue_{config}_v1")
    scores = evaluate_copying(ranked_task(task) if ranked else task, "validation")
    names = [metric_fn.__name__ for metric_fn in glue.TASKS[config].metric_fns]
    assert scores == pytest.approx({name: 100.0 for name in names})


def test_a_ranked_task_has_every_example_once_for_each_label(mock_glue):
    task = ranked_task("test_glue_qnli_v1")
    assert task.name == "test_glue_qnli_ranked_v1" and ranked_task("test_glue_qnli_v1") is task
    assert len(task.score_metric_fns) == 1 and not task.predict_metric_fns
    examples = list(task.get_dataset({"inputs": 64, "targets": 8}, "validation", shuffle=False).as_numpy_iterator())
    assert [e["targets_pretokenized"].decode() for e in examples] == ["entailment", "not_entailment"] * 6
    assert all((a["inputs"] == b["inputs"]).all() for a, b in zip(examples[::2], examples[1::2], strict=True))
    with pytest.raises(UserError, match="'cnn_dailymail_v1' has no labels to rank"):
        ranked_task(resolve_task("cnn_dailymail_v1"))


def test_mixture_has_t5s_rates():
    rates = resolve_task("glue").rate_per_task_name
    assert rates["glue_cola_v1"] == 8551 and rates["glue_mnli_v1"] == 392702
    assert rates["glue_mnli_matched_v1"] == rates["glue_ax_v1"] == 0
    assert "glue_wnli_v1" not in rates and len(rates) == 11
    assert set(resolve_task("glue_mnli").rate_per_task_name) == {
        f"glue_{config}_v1" for config in ("mnli", "mnli_matched", "mnli_mismatched")
    }
    capped = glue.glue_mixture(benchmark="test_capped_glue", vocabulary=BUNDLED, largest_rate=5000)
    assert capped.rate_per_task_name["test_capped_glue_qqp_v1"] == 5000
    assert capped.rate_per_task_name["test_capped_glue_rte_v1"] == 2490


def drawn(mixture, count):
    """What the first examples of a mixture's training stream begin with: the names of their tasks."""
    dataset = mixture.get_dataset({"inputs": 4, "targets": 8}, split="train", shuffle=False, seed=0)
    vocabulary = mixture.output_features["inputs"].vocabulary
    texts = (vocabulary.decode(example["inputs"].tolist()) for example in dataset.take(count).as_numpy_iterator())
    return {text.split()[0] for text in texts}


def test_mixture_trains_on_all_tasks_with_a_training_split(mock_glue):
    even = glue.glue_mixture(benchmark="test_even_glue", vocabulary=BUNDLED, largest_rate=1)
    assert drawn(even, 100) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"}


def test_a_task_of_rate_0_is_never_drawn(mock_glue):
    sizes = {"test_glue_cola_v1": 2, "test_glue_sst2_v1": 1, "test_glue_rte_v1": 0}
    assert drawn(proportional_mixture("test_glue_some", sizes), 100) == {"cola", "sst2"}


def test_a_task_of_another_vocabulary_has_a_name_of_its_own():
    with pytest.raises(UserError, match="'glue_cola_v1' exists with other settings"):
        glue.glue_task("cola", vocabulary=BUNDLED)
    with pytest.raises(UserError, match="GLUE has no task 'boolq'; it has cola, sst2"):
        glue.glue_task("boolq")


@pytest.mark.parametrize(
    ("config", "predictions", "name", "rows"),
    [
        ("cola", [1, 0, -1], "CoLA.tsv", ["0\t0", "1\t1", "2\t0"]),
        ("mnli_mismatched", [2, 0, 1], "MNLI-mm.tsv", ["0\tentailment", "1\tcontradiction", "2\tneutral"]),
        ("ax", [0, 0, 2], "AX.tsv", ["0\tentailment", "1\tentailment", "2\tcontradiction"]),
        ("stsb", [3.8, 7.0, -1.0], "STS-B.tsv", ["0\t5.000", "1\t3.800", "2\t0.000"]),
    ],
)
def test_submissions_are_in_glues_format_in_order_of_the_rows(tmp_path, config, predictions, name, rows):
    path = write_submission(config, tmp_path / "submission", [1, 0, 2], predictions)
    assert path == str(tmp_path / "submission" / name)
    with open(path) as file:
        assert file.read() == "\n".join(["index\tprediction", *rows, ""])


def test_submissions_have_every_row_once(tmp_path):
    for indices in ([0, 2], [0, 0]):
        with pytest.raises(UserError, match="one prediction for every row"):
            write_submission("rte", tmp_path, indices, [0, 1])
    with pytest.raises(UserError, match="mnli_matched and mnli_mismatched"):
        write_submission("mnli", tmp_path, [0], [0])


def test_every_test_set_has_its_file():
    files = {task.file for task in glue.TASKS.values() if task.file}
    assert files == {"CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"}
    named = ("glue_cola_v1", "my_glue_mnli_matched_ranked_v1", "glue_mnli_v1", "xsum_v1")
    assert [submitted_config(name) for name in named] == ["cola", "mnli_matched", None, None]
