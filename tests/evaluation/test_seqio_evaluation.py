"""SeqIO's evaluator over a model: perfect for one that copies, blind to padding, exact in its log-likelihoods."""

import functools

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.data.vocabulary import load_vocabulary
from endistill_jax.evaluation.metrics import accuracy, rouge
from endistill_jax.evaluation.predictor import Predictor, batches_by_length, choices_of_each_input, make_score_step
from endistill_jax.evaluation.task_metrics import TaskEvaluator, check_task_metrics
from endistill_jax.models.family import init_params
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import T5
from endistill_jax.sharding import make_mesh
from endistill_jax.tasks.text_to_text import TextToText, label_index, text_to_text_task
from endistill_jax.train.experiment import Data

LENGTHS = {"inputs": 16, "targets": 8}
LABELS = ("yes", "no", "maybe")
CONFIG = T5Config(
    vocab_size=384,
    d_model=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=False,
)
WORDS = ("one", "two two", "three 3 three", "four", "five five 5", "six", "seven")


def dataset(split, shuffle_files=False, seed=None):
    targets = [LABELS[number % 3] for number in range(len(WORDS))]
    return tf.data.Dataset.from_tensor_slices({"inputs": list(WORDS), "targets": targets})


def make_task(name, labels=(), metric_fns=(rouge,), **settings):
    definition = TextToText(
        source=seqio.FunctionDataSource(dataset, splits=("validation",)),
        to_text=lambda examples: examples,
        labels=labels,
        metric_fns=metric_fns,
        **settings,
    )
    return text_to_text_task(name, definition, load_vocabulary("bytes"))


@pytest.fixture(scope="module")
def text_task():
    return make_task("evaluation_tests_text_v1")


@pytest.fixture(scope="module")
def label_task():
    value_of = functools.partial(label_index, labels=LABELS)
    return make_task("evaluation_tests_label_v1", LABELS, (accuracy,), value_of=value_of)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def predictors():
    """Function batch size -> predictor, each compiled once."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    @functools.cache
    def make(batch_size):
        return Predictor(CONFIG, Decoding(max_length=8), mesh, batch_size=batch_size, inputs_length=16)

    return make


def copying(dataset):
    examples = list(dataset.as_numpy_iterator())
    return [(int(index), example["decoder_target_tokens"]) for index, example in examples], [0.0] * len(examples)


def no_scores(dataset):
    raise AssertionError("nothing is to be scored")


def test_a_model_that_copies_its_targets_is_perfect(text_task, label_task):
    found = TaskEvaluator(text_task, split="validation", lengths=LENGTHS).evaluate(copying, no_scores)
    assert found.metrics == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 100.0) | {"rouge2": 0.0}
    found = TaskEvaluator(label_task, split="validation", lengths=LENGTHS).evaluate(copying, no_scores)
    assert found.metrics == {"accuracy": 100.0} and found.values == [0, 1, 2, 0, 1, 2, 0]
    assert found.records[1] == {"index": 1, "inputs": "two two", "target": "no", "prediction": "no", "score": 0.0}


def test_the_right_label_on_top_is_perfect_by_rank(label_task):
    evaluator = TaskEvaluator(label_task, split="validation", lengths=LENGTHS, by_rank=True)

    def score(dataset):
        indices = [int(index) for index, _ in dataset.as_numpy_iterator()]
        return [(index, -abs(float(index % 3 - index // 3 % 3)) - 1) for index in reversed(indices)]

    found = evaluator.evaluate(copying, score)
    assert found.metrics == {"accuracy": 100.0} and found.task == "evaluation_tests_label_ranked_v1"
    assert found.counted_as == "evaluation_tests_label_v1"
    assert len(found.records) == len(WORDS)
    assert found.records[1] == {
        "index": 1,
        "inputs": "two two",
        "target": "no",
        "prediction": "no",
        "score": -1.0,
        "scores": {"yes": -2.0, "no": -1.0, "maybe": -2.0},
    }


def test_neither_padding_nor_batches_change_a_metric_or_a_prediction(text_task, label_task, params, predictors):
    def run(batch_size):
        predictor, found = predictors(batch_size), []
        for task, by_rank in ((text_task, False), (label_task, False), (label_task, True)):
            evaluator = TaskEvaluator(task, split="validation", lengths=LENGTHS, by_rank=by_rank)
            found.append(
                evaluator.evaluate(
                    lambda dataset: predictor.predict(params, dataset), lambda dataset: predictor.score(params, dataset)
                )
            )
        return found

    for one, other in zip(run(7), run(4), strict=True):
        assert one.metrics == other.metrics and one.values == other.values
        for mine, theirs in zip(one.records, other.records, strict=True):
            assert mine["prediction"] == theirs["prediction"]
            assert mine["score"] == pytest.approx(theirs["score"], rel=1e-5)


def test_scores_by_rank_are_the_log_likelihoods_of_teacher_forcing(label_task, params, predictors):
    evaluator = TaskEvaluator(label_task, split="validation", lengths=LENGTHS, by_rank=True)
    found = evaluator.evaluate(copying, lambda dataset: predictors(4).score(params, dataset))
    vocabulary = label_task.output_features["targets"].vocabulary
    for record in found.records[:3]:
        for label, score in record["scores"].items():
            inputs = np.asarray([[*vocabulary.encode(record["inputs"]), 1]])
            target = np.asarray([[*vocabulary.encode(label), 1]])
            batch = {
                "encoder_input_tokens": inputs,
                "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
                "decoder_target_tokens": target,
            }
            logits = np.asarray(T5(CONFIG).apply({"params": params}, batch).logits[0], np.float64)  # [target, vocab]
            normalizer = np.log(np.exp(logits).sum(axis=-1))
            expected = (logits[np.arange(target.size), target[0]] - normalizer).sum()
            assert score == pytest.approx(expected, rel=1e-5)


def test_the_score_of_a_generated_text_is_its_log_likelihood(text_task, params, predictors):
    inputs = [(40, 41, 1), (50, 1)]
    tokens, scores = predictors(4).generate(params, inputs)
    step = make_score_step(CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    padded = np.asarray([(*ids, *([0] * (16 - len(ids)))) for ids in inputs], np.int32)
    np.testing.assert_allclose(scores, step(params, padded, tokens[:, None])[:, 0], rtol=1e-5)


def test_labels_of_one_input_are_recognized_also_where_inputs_repeat():
    assert choices_of_each_input(["a", "a", "a", "b", "b", "b"]) == 3
    assert choices_of_each_input(["a", "a", "a", "a", "b", "b"]) == 2
    assert choices_of_each_input(["a", "a", "b"]) == 1


def test_batches_have_few_shapes_and_every_text_once():
    texts = [tuple(range(1, 1 + length)) for length in (3, 16, 1, 8, 4, 5, 2, 4)]
    batches = list(batches_by_length(texts, 2, 16))
    assert {tokens.shape for _, tokens in batches} == {(2, 4), (2, 8), (2, 16)}
    assert sorted(index for indices, _ in batches for index in indices) == list(range(8))
    for indices, tokens in batches:
        for index, row in zip(indices, tokens, strict=False):
            assert tuple(row[row != 0]) == texts[index]
        assert not tokens[len(indices) :].any()


def test_metric_names_are_known_before_any_model_is_run(text_task, label_task):
    assert TaskEvaluator(label_task, split="validation", lengths=LENGTHS, by_rank=True).metric_names() == ["accuracy"]
    names = TaskEvaluator(text_task, split="validation", lengths=LENGTHS).metric_names()
    assert names == ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_open_targets_cannot_be_ranked(text_task):
    with pytest.raises(UserError, match="no task of evaluation_tests_text_v1 has labels to rank"):
        check_task_metrics(Data(task=text_task, inputs_length=16, targets_length=8), "rank")
