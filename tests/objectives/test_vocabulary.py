"""The chunked losses over the vocabulary are the dense ones, in memory that does not grow with tokens x vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.cross_entropy import cross_entropy
from endistill_jax.objectives.implementation import Computation
from endistill_jax.objectives.logits_kl import logits_kl
from endistill_jax.objectives.vocabulary import vocabulary_loss
from endistill_jax.objectives.vocabulary_tokens import Head

BATCH, TARGET, VOCABULARY = 3, 7, 37  # 21 tokens: chunks of 8 leave some over
TEACHER_DIM, STUDENT_DIM = 12, 6

# What is in the loss: (factor of the divergence, of the cross-entropy, temperature, z-loss).
TERMS = {
    "divergence": (0.7, None, 1.0, 0.0),
    "softened divergence": (0.7, None, 2.0, 0.0),
    "cross-entropy": (None, 0.3, 1.0, 0.0),
    "cross-entropy and z-loss": (None, 0.3, 1.0, 0.01),
    "everything": (0.7, 0.3, 1.0, 0.01),
    "everything softened": (0.7, 0.3, 2.0, 0.01),
}
CHUNK_BYTES = {"three chunks": 8 * 4 * VOCABULARY, "one chunk": 1 << 20}


def _inputs(dtype=jnp.float32, seed=0):
    """(student, teacher) heads, targets and weights; kernels are float32 whatever the type of the hidden states."""
    rng = np.random.default_rng(seed)

    def head(d_model):
        hidden = jnp.asarray(rng.standard_normal((BATCH, TARGET, d_model)), dtype)
        return Head(hidden, jnp.asarray(rng.standard_normal((d_model, VOCABULARY)), jnp.float32))

    weights = rng.choice([0.0, 0.5, 1.0], (BATCH, TARGET)).astype(np.float32)
    weights[1] = 0
    targets = np.where(weights, rng.integers(0, VOCABULARY, (BATCH, TARGET)), 0).astype(np.int32)
    return head(STUDENT_DIM), head(TEACHER_DIM), targets, weights


def _logits(head):
    kernel = head.kernel.astype(head.hidden.dtype)
    return jnp.einsum("btd,dv->btv", head.hidden, kernel, preferred_element_type=jnp.float32)


def _dense(student, teacher, targets, weights, terms):
    """As `vocabulary_loss`, from all logits; sums by name."""
    logits_factor, lm_factor, temperature, z_loss = terms
    student_logits, teacher_logits = _logits(student), jax.lax.stop_gradient(_logits(teacher))
    divergence, _ = logits_kl(teacher_logits, student_logits, weights, temperature)
    lm, _ = cross_entropy(student_logits, targets, weights, z_loss)
    sums = {
        "logits": 0.0 if logits_factor is None else divergence,
        "lm": 0.0 if lm_factor is None else lm,
        "cross_entropy": cross_entropy(student_logits, targets, weights)[0],
        "teacher_cross_entropy": cross_entropy(teacher_logits, targets, weights)[0],
    }
    return (logits_factor or 0.0) * divergence + (lm_factor or 0.0) * lm, sums


@functools.partial(jax.jit, static_argnames=("terms", "chunk_bytes"))
def _value_and_gradients(student, teacher, targets, weights, terms, chunk_bytes=None):
    """(three times the loss, sums), gradients by (student, teacher); dense without `chunk_bytes`."""

    def loss(student, teacher):
        if chunk_bytes is None:
            value, sums = _dense(student, teacher, targets, weights, terms)
        else:
            logits_factor, lm_factor, temperature, z_loss = terms
            value, sums = vocabulary_loss(
                student,
                teacher,
                targets,
                weights,
                logits_factor=logits_factor,
                lm_factor=lm_factor,
                temperature=temperature,
                z_loss=z_loss,
                computation=Computation(chunk_bytes=chunk_bytes),
            )
            sums = sums._asdict()
        return 3 * value, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, teacher)


def _relative_error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES.values(), ids=CHUNK_BYTES)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_loss_sums_and_gradients_equal_the_dense_forms(terms, chunk_bytes):
    inputs = _inputs()
    (expected, expected_sums), (expected_gradient, _) = _value_and_gradients(*inputs, terms)
    (loss, sums), (gradient, by_teacher) = _value_and_gradients(*inputs, terms, chunk_bytes)
    assert float(expected) > 1
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sums.keys() == expected_sums.keys()
    for name, total in expected_sums.items():
        np.testing.assert_allclose(sums[name], total, rtol=1e-6, err_msg=name)
    for ours, dense in zip(gradient, expected_gradient, strict=True):
        assert _relative_error(ours, dense) < 1e-6
    assert not any(np.any(leaf) for leaf in by_teacher)
    assert not np.any(gradient.hidden[inputs[3] == 0])


def test_value_alone_equals_the_value_beside_the_gradient():
    student, teacher, targets, weights = _inputs()
    (expected, expected_sums), _ = _value_and_gradients(
        student, teacher, targets, weights, (0.7, None, 1.0, 0.0), CHUNK_BYTES["three chunks"]
    )
    computation = Computation(chunk_bytes=CHUNK_BYTES["three chunks"])
    loss, sums = vocabulary_loss(student, teacher, targets, weights, logits_factor=0.7, computation=computation)
    np.testing.assert_allclose(3 * loss, expected, rtol=1e-6)
    for name, total in sums._asdict().items():
        np.testing.assert_allclose(total, expected_sums[name], rtol=1e-6, err_msg=name)


def test_student_alone_needs_no_teacher():
    student, _, targets, weights = _inputs()
    loss, sums = vocabulary_loss(student, None, targets, weights, lm_factor=1.0, z_loss=0.1)
    expected, _ = cross_entropy(_logits(student), targets, weights, 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(sums.logits) == float(sums.teacher_cross_entropy) == 0.0


@pytest.mark.parametrize("padding", [np.inf, np.nan])
def test_padding_values_change_neither_value_nor_gradient(padding):
    student, teacher, targets, weights = _inputs()
    terms, chunk_bytes = TERMS["everything"], CHUNK_BYTES["three chunks"]
    expected = _value_and_gradients(student, teacher, targets, weights, terms, chunk_bytes)
    spoilt = [
        head._replace(hidden=jnp.where(weights[..., None] == 0, padding, head.hidden)) for head in (student, teacher)
    ]
    impossible = np.where(weights == 0, -1, targets)
    actual = _value_and_gradients(*spoilt, impossible, weights, terms, chunk_bytes)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_a_real_target_outside_the_vocabulary_is_not_given_a_plausible_loss(target):
    student, teacher, targets, weights = _inputs()
    targets[weights > 0] = np.where(np.arange(np.sum(weights > 0)) == 3, target, targets[weights > 0])
    loss, sums = vocabulary_loss(student, teacher, targets, weights, lm_factor=1.0)
    assert np.isnan(loss) and np.isnan(sums.cross_entropy) and np.isnan(sums.teacher_cross_entropy)
    loss, sums = vocabulary_loss(student, teacher, targets, weights, logits_factor=1.0)
    assert np.isfinite(loss) and np.isnan(sums.cross_entropy)


def test_half_precision_is_the_float32_oracle_but_for_the_rounding_of_the_gradient():
    """Hidden states and heads are rounded to bfloat16 for both; the gradient by the logits is rounded to its eight bits
    before the products with them, that by the hidden states once more after, and after the factor of the chain rule."""
    student, teacher, targets, weights = _inputs(jnp.bfloat16)
    rounded = [
        Head(head.hidden.astype(jnp.float32), head.kernel.astype(jnp.bfloat16).astype(jnp.float32))
        for head in (student, teacher)
    ]
    terms = TERMS["everything"]
    (expected, _), (expected_gradient, _) = _value_and_gradients(*rounded, targets, weights, terms)
    (loss, _), (gradient, _) = _value_and_gradients(student, teacher, targets, weights, terms, 8 * 4 * VOCABULARY)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert gradient.hidden.dtype == jnp.bfloat16 and gradient.kernel.dtype == jnp.float32
    assert _relative_error(gradient.hidden, expected_gradient.hidden) < 3 * 2**-9
    # Summed in float32 and kept so: only the rounding before the product.
    assert _relative_error(gradient.kernel, expected_gradient.kernel) < 2**-9


def test_vocabularies_of_different_sizes_are_an_error():
    student, teacher, targets, weights = _inputs()
    teacher = teacher._replace(kernel=teacher.kernel[:, :-1])
    with pytest.raises(UserError, match="36 entries.* 37;.*one vocabulary"):
        vocabulary_loss(student, teacher, targets, weights, logits_factor=1.0)


def _temporaries(target, vocabulary, loss):
    """Bytes beside arguments and results; the widths are small, so that logits are what counts."""

    def abstract(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    student, teacher = (Head(abstract(4, target, width), abstract(width, vocabulary)) for width in (8, 16))
    tokens = abstract(4, target, dtype=jnp.int32), abstract(4, target)
    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return function.lower(student, teacher, *tokens).compile().memory_analysis().temp_size_in_bytes


def test_temporaries_do_not_grow_with_tokens_times_vocabulary():
    chunk_bytes = 1 << 20

    def chunked(student, teacher, targets, weights):
        computation = Computation(chunk_bytes=chunk_bytes)
        return vocabulary_loss(student, teacher, targets, weights, logits_factor=1.0, computation=computation)

    def dense(*inputs):
        return _dense(*inputs, TERMS["divergence"])

    target, vocabulary = 256, 4096
    logits = 4 * 4 * target * vocabulary  # bytes of one model's
    base, longer, wider = (_temporaries(*size, chunked) for size in ((256, 4096), (1024, 4096), (256, 16384)))
    assert base < logits / 2 < logits < _temporaries(target, vocabulary, dense)
    # Four times the tokens: only hidden states and their gradient, of 8 and 16 numbers a token, are more.
    assert longer - base < 4 * 4 * (1024 - 256) * 4 * (8 + 16)
    # Four times the vocabulary: only the kernels and the gradient of one are more.
    assert wider - base < 4 * (16384 - 4096) * 2 * (8 + 16)
