"""Contracts of the denoising report: what it sums, what it must not depend on, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import evaluate_denoising, make_denoising_step, model_logits, with_wrong_inputs
from endistill_jax.evaluation.ngrams import NgramCounter
from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config

VOCAB, SOURCE, TARGET = 32, 6, 5
SENTINELS = range(28, 32)
EOS = 1


def reader_logits(params, batch):
    """A model that adds up what it reads: the mean input embedding and that of the previous target token."""
    table = params["table"]
    real = (batch["encoder_input_tokens"] != 0).astype(jnp.float32)[..., None]
    read = (table[batch["encoder_input_tokens"]] * real).sum(1) / jnp.maximum(real.sum(1), 1)
    return (table[batch["decoder_input_tokens"]] + read[:, None]) @ params["head"]


STEP = make_denoising_step(reader_logits, sentinel_ids=SENTINELS, eos_id=EOS)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("table", (32, 8)), ("head", (8, 32)))}


@pytest.fixture(scope="module")
def examples():
    """Seven examples of uneven lengths, the targets holding pieces, sentinels and ends."""
    rng = np.random.default_rng(1)
    inputs = rng.integers(2, VOCAB, (7, SOURCE)).astype(np.int32)
    targets = rng.integers(2, VOCAB, (7, TARGET)).astype(np.int32)
    targets[:, 0] = SENTINELS[-1]
    for row, length in enumerate((5, 3, 4, 2, 5, 4, 3)):
        targets[row, length - 1] = EOS
        targets[row, length:] = 0
        inputs[row, length + 1 :] = 0
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


@pytest.fixture(scope="module")
def ngrams(examples):
    counter = NgramCounter(VOCAB)
    counter.update(examples)
    return counter.fit()


def batched(examples, size):
    """Batches of one size, the last filled up with rows of zeros."""
    count = len(examples["decoder_target_tokens"])
    padded = {name: np.pad(array, ((0, -count % size), (0, 0))) for name, array in examples.items()}
    starts = range(0, count + -count % size, size)
    return [{name: array[start : start + size] for name, array in padded.items()} for start in starts]


def log_probabilities(params, examples):
    """The stub's log-softmax in float64 NumPy, [examples, target, vocab]."""
    wide = jax.tree.map(lambda array: array.astype(np.float64), params)
    tokens = examples["encoder_input_tokens"]
    read = np.stack([wide["table"][row[row != 0]].mean(0) for row in tokens])
    logits = (wide["table"][examples["decoder_input_tokens"]] + read[:, None]) @ wide["head"]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_same(report, other):
    assert report.tokens == other.tokens and report.non_sentinel_tokens == other.non_sentinel_tokens
    np.testing.assert_allclose(list(report.scalars().values()), list(other.scalars().values()), rtol=2e-6, atol=1e-6)


def test_report_matches_a_float64_reference(params, examples, ngrams):
    report = evaluate_denoising(STEP, params, batched(examples, 4), ngrams=ngrams)
    targets, previous = examples["decoder_target_tokens"], examples["decoder_input_tokens"]
    tokens = targets != 0
    pieces = tokens & (targets != EOS) & ~np.isin(targets, SENTINELS)
    own = log_probabilities(params, examples)
    rolled = examples | {"encoder_input_tokens": np.roll(examples["encoder_input_tokens"], -1, axis=0)}
    picked = np.take_along_axis(own, targets[..., None], -1)[..., 0]
    wrong = np.take_along_axis(log_probabilities(params, rolled), targets[..., None], -1)[..., 0]
    expected = {
        "loss": -picked[tokens].mean(),
        "token_loss": -picked[pieces].mean(),
        "accuracy": (own.argmax(-1) == targets)[tokens].mean(),
        "token_accuracy": (own.argmax(-1) == targets)[pieces].mean(),
        "shuffled_input_loss": -wrong[pieces].mean(),
        "shuffled_input_gap": (picked - wrong)[pieces].mean(),
        "unigram_loss": ngrams.unigram_nats(targets)[pieces].mean(),
        "bigram_loss": ngrams.bigram_nats(previous, targets)[pieces].mean(),
        "tokens": tokens.sum(),
        "non_sentinel_tokens": pieces.sum(),
    }
    assert expected["non_sentinel_tokens"] < expected["tokens"] - len(targets)  # the examples have sentinels and ends
    assert dataclasses.asdict(report) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_report_does_not_depend_on_batch_size_or_padding_rows(params, examples, ngrams, size):
    reference = evaluate_denoising(STEP, params, batched(examples, 4), ngrams=ngrams)
    assert_same(evaluate_denoising(STEP, params, batched(examples, size), ngrams=ngrams), reference)


def test_rows_and_batches_without_weight_change_nothing_wherever_they_are(params, examples):
    reference = evaluate_denoising(STEP, params, batched(examples, 7))
    places = [0, 0, 0, 3, 3, 7]  # padding rows first, in the middle, last
    sparse = {name: np.insert(array, places, 0, axis=0) for name, array in examples.items()}
    empty = {name: np.zeros((1, array.shape[1]), array.dtype) for name, array in examples.items()}
    sparse["encoder_input_tokens"][0] = 9  # an input that nothing asks about
    for batches in ([empty, *batched(sparse, 1), empty], batched(sparse, 6), [sparse]):
        assert_same(evaluate_denoising(STEP, params, batches), reference)


def test_shuffled_input_gaps_nothing_to_a_model_that_does_not_read(params, examples):
    def deaf_logits(params, batch):
        return params["table"][batch["decoder_input_tokens"]] @ params["head"]

    step = make_denoising_step(deaf_logits, sentinel_ids=SENTINELS, eos_id=EOS)
    report = evaluate_denoising(step, params, batched(examples, 4))
    assert report.shuffled_input_gap == 0.0
    assert evaluate_denoising(STEP, params, batched(examples, 4)).shuffled_input_gap != 0.0


def test_wrong_input_moves_everything_of_the_encoder_side_and_nothing_else(examples):
    segments = {
        "encoder_segment_ids": (examples["encoder_input_tokens"] != 0).astype(np.int32),
        "decoder_segment_ids": examples["decoder_loss_weights"],
    }
    batches = with_wrong_inputs(batched(examples | segments, 3))
    wrong = {name: np.concatenate([batch[name] for batch in batches])[:7] for name in batches[0]}
    np.testing.assert_array_equal(wrong["encoder_input_tokens"], np.roll(examples["encoder_input_tokens"], -1, 0))
    np.testing.assert_array_equal(wrong["encoder_segment_ids"], wrong["encoder_input_tokens"] != 0)
    np.testing.assert_array_equal(wrong["decoder_target_tokens"], examples["decoder_target_tokens"])
    np.testing.assert_array_equal(wrong["decoder_segment_ids"], examples["decoder_loss_weights"])


def test_real_model_gives_finite_figures_with_padding_rows_of_nothing(examples):
    config = T5Config(
        vocab_size=VOCAB, d_model=8, num_heads=2, head_dim=4, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1
    )
    step = make_denoising_step(model_logits(config), sentinel_ids=SENTINELS, eos_id=EOS)
    weights = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    report = evaluate_denoising(step, weights, batched(examples, 8))
    padded_in_front = {name: np.insert(array, 0, 0, axis=0) for name, array in examples.items()}
    assert_same(report, evaluate_denoising(step, weights, [padded_in_front]))
    assert np.isfinite(list(report.scalars().values())).all()


def test_report_does_not_depend_on_the_mesh(params, examples, ngrams):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = {
        "table": jax.device_put(params["table"], NamedSharding(mesh, PartitionSpec("data", None))),
        "head": jax.device_put(params["head"], NamedSharding(mesh, PartitionSpec(None, "data"))),
    }
    batches = batched(examples, 8)
    report = evaluate_denoising(
        STEP, sharded, batches, ngrams=ngrams, place=lambda batch: jax.device_put(dict(batch), rows)
    )
    assert_same(report, evaluate_denoising(STEP, params, batches, ngrams=ngrams))


def test_step_compiles_once_for_own_and_wrong_inputs(params, examples, ngrams):
    step = make_denoising_step(reader_logits, sentinel_ids=SENTINELS, eos_id=EOS)
    evaluate_denoising(step, params, batched(examples, 2), ngrams=ngrams)
    assert step._cache_size() == 1


def test_scalars_leave_out_references_that_were_not_given(params, examples):
    scalars = evaluate_denoising(STEP, params, batched(examples, 7)).scalars("held_out/")
    assert "held_out/token_loss" in scalars and "held_out/bigram_loss" not in scalars
    assert all(type(value) is float for value in scalars.values())


def test_packed_rows_are_refused(params, examples):
    packed = examples | {"encoder_segment_ids": np.full((7, SOURCE), 2, np.int32)}
    with pytest.raises(UserError, match="encoder_segment_ids.*unpacked"):
        evaluate_denoising(STEP, params, batched(packed, 7))


def test_too_few_examples_for_a_wrong_input_are_refused(params, examples):
    with pytest.raises(UserError, match="1 held-out examples"):
        evaluate_denoising(STEP, params, [{name: array[:1] for name, array in examples.items()}])
    with pytest.raises(UserError, match="0 held-out examples"):
        evaluate_denoising(STEP, params, [])


def test_sentinels_outside_the_vocabulary_are_refused(params, examples):
    step = make_denoising_step(reader_logits, sentinel_ids=range(30, 33), eos_id=EOS)
    with pytest.raises(UserError, match="32 is outside"):
        evaluate_denoising(step, params, batched(examples, 7))
