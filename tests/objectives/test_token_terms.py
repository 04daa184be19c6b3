"""Losses of the distributions over the vocabulary: against plain NumPy, derivatives against each other, blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from endistill_jax.core.model_io import Head
from endistill_jax.objectives import CrossEntropy, ForwardKL, GeneralizedJSD, LossImplementation, ReverseKL, SkewedKL
from endistill_jax.objectives.token_terms import TokenDistribution, TokenTerm, dense_token_sums
from endistill_jax.objectives.tokens_blocked import token_loss

BATCH, TARGET, VOCABULARY = 3, 7, 37  # 21 tokens: blocks of 8 leave some over
TEACHER_DIM, STUDENT_DIM = 12, 6
TERMS = (
    ForwardKL(),
    ForwardKL(temperature=2.0, label="softened"),
    ReverseKL(temperature=1.5),
    GeneralizedJSD(beta=0.3),
    SkewedKL(),
    CrossEntropy(z_loss=0.01),
)
FACTORS = {term.name: 0.3 + 0.1 * number for number, term in enumerate(TERMS)}
BLOCK_BYTES = {"three blocks": 8 * 4 * VOCABULARY, "one block": 1 << 20}


def _logits(seed=0, tokens=9):
    rng = np.random.default_rng(seed)
    student, teacher = 3 * rng.standard_normal((2, tokens, VOCABULARY)).astype(np.float32)
    return student, teacher, rng.integers(0, VOCABULARY, tokens)


def _softmax(logits, temperature):
    exp = np.exp(np.asarray(logits, np.float64) / temperature)
    return exp / exp.sum(-1, keepdims=True)


def _kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def _by_definition(term, student, teacher, targets):
    """Nats of each token, float64."""
    if isinstance(term, CrossEntropy):
        normalizer = np.log(np.exp(np.asarray(student, np.float64)).sum(-1))
        return normalizer - student[np.arange(len(targets)), targets] + term.z_loss * normalizer**2
    p, q = _softmax(teacher, term.temperature), _softmax(student, term.temperature)
    match term:
        case ForwardKL():
            found = _kl(p, q)
        case ReverseKL():
            found = _kl(q, p)
        case GeneralizedJSD(beta=beta):
            mixed = beta * p + (1 - beta) * q
            found = beta * _kl(p, mixed) + (1 - beta) * _kl(q, mixed)
        case SkewedKL(alpha=alpha):
            found = _kl(p, alpha * p + (1 - alpha) * q)
    return term.temperature**2 * found


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(term, student, teacher, targets):
    """The losses, the gradient that the term forms, and the derived one."""
    ours, theirs = TokenDistribution(student, targets), TokenDistribution(teacher, targets)
    return *term.loss_and_gradient(ours, theirs, targets), TokenTerm.loss_and_gradient(term, ours, theirs, targets)[1]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_loss_is_its_definition_and_its_gradient_the_derivative(term):
    inputs = _logits()
    losses, gradient, derived = _loss_and_gradients(term, *inputs)
    np.testing.assert_allclose(losses, _by_definition(term, *inputs), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, derived, rtol=1e-4, atol=2e-6)
    numeric, step = np.zeros(inputs[0].shape), 1e-5
    for column in range(VOCABULARY):
        moved = [inputs[0].astype(np.float64) for _ in range(2)]
        moved[0][:, column] += step
        moved[1][:, column] -= step
        up, down = (_by_definition(term, each, *inputs[1:]) for each in moved)
        numeric[:, column] = (up - down) / (2 * step)
    assert np.abs(numeric).max() > 1e-2
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("term", [term for term in TERMS if term.needs_teacher], ids=lambda term: term.name)
def test_equal_models_have_no_divergence_and_no_gradient(term):
    _, logits, targets = _logits()
    for value in _loss_and_gradients(term, logits, logits, targets):
        np.testing.assert_allclose(value, 0, atol=3e-6)


def test_jsd_is_the_forward_and_the_reverse_divergence_in_its_limits():
    student, teacher, targets = _logits()
    inputs = student / 6, teacher / 6, targets  # far from distributions of disjoint supports
    for beta, limit in ((1e-3, ForwardKL()), (1 - 1e-3, ReverseKL())):
        scaled = _loss_and_gradients(GeneralizedJSD(beta=beta), *inputs)[0] / (beta * (1 - beta))
        np.testing.assert_allclose(scaled, _by_definition(limit, *inputs), rtol=0.02)
    half = _loss_and_gradients(GeneralizedJSD(), *inputs)[0]
    swapped = _loss_and_gradients(GeneralizedJSD(), inputs[1], inputs[0], inputs[2])[0]
    np.testing.assert_allclose(half, swapped, rtol=1e-5)
    assert (half < np.log(2)).all()


def test_cross_entropy_is_optax_and_the_logarithm_of_the_vocabulary_where_nothing_is_known():
    student, _, targets = _logits()
    losses = _loss_and_gradients(CrossEntropy(), student, student, targets)[0]
    np.testing.assert_allclose(losses, optax.softmax_cross_entropy_with_integer_labels(student, targets), rtol=1e-5)
    losses = _loss_and_gradients(CrossEntropy(), np.zeros_like(student), student, targets)[0]
    np.testing.assert_allclose(losses, np.log(VOCABULARY), rtol=1e-6)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_logits_too_large_for_a_plain_exponential_stay_finite(term):
    student, teacher, targets = _logits()
    for value in _loss_and_gradients(term, 1e4 * np.sign(student), -1e4 * np.sign(teacher), targets):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_a_target_outside_the_vocabulary_is_not_given_a_plausible_loss(target):
    student, teacher, targets = _logits()
    targets[0] = target
    losses, gradient, derived = _loss_and_gradients(CrossEntropy(), student, teacher, targets)
    assert np.isnan(losses[0]) and np.isfinite(losses[1:]).all()
    assert np.isfinite(gradient).all() and np.isfinite(derived).all()


# --- the heads' projection inside ---


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


@functools.partial(jax.jit, static_argnames=("terms", "block_bytes"))
def _run(student, teacher, targets, weights, terms=TERMS, block_bytes=None):
    """(three times the loss, sums), gradient by the student; dense without `block_bytes`."""

    def loss(student):
        if block_bytes is None:
            sums = dense_token_sums(terms, student, teacher, targets, weights)
            return 3 * sum(FACTORS[term.name] * sums[term.name] for term in terms), sums
        implementation = LossImplementation(vocabulary_bytes=block_bytes)
        value, sums = token_loss(terms, student, teacher, targets, weights, FACTORS, implementation)
        return 3 * value, sums

    return jax.value_and_grad(loss, has_aux=True)(student)


def _relative_error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES.values(), ids=BLOCK_BYTES)
def test_loss_sums_and_gradient_equal_the_dense_form(block_bytes):
    inputs = _inputs()
    (expected, expected_sums), expected_gradient = _run(*inputs)
    (loss, sums), gradient = _run(*inputs, block_bytes=block_bytes)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sums.keys() == expected_sums.keys() == {*FACTORS, "cross_entropy", "teacher_cross_entropy"}
    for name, total in expected_sums.items():
        np.testing.assert_allclose(sums[name], total, rtol=2e-6, err_msg=name)
    assert _relative_error(gradient.hidden, expected_gradient.hidden) < 1e-6
    assert _relative_error(gradient.kernel, expected_gradient.kernel) < 1e-6
    assert not np.any(gradient.hidden[inputs[3] == 0])


def test_student_alone_needs_no_teacher():
    student, _, targets, weights = _inputs()
    terms = (CrossEntropy(z_loss=0.01),)
    (expected, sums), _ = _run(student, None, targets, weights, terms)
    (loss, found), _ = _run(student, None, targets, weights, terms, 1 << 20)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sums.keys() == found.keys() == {"lm", "cross_entropy"}


@pytest.mark.parametrize("block_bytes", [None, BLOCK_BYTES["three blocks"]], ids=["dense", "blocked"])
@pytest.mark.parametrize("padding", [np.inf, np.nan])
def test_what_is_at_weight_zero_changes_nothing(padding, block_bytes):
    student, teacher, targets, weights = _inputs()
    expected = _run(student, teacher, targets, weights, block_bytes=block_bytes)
    spoilt = [
        head._replace(hidden=jnp.where(weights[..., None] == 0, padding, head.hidden)) for head in (student, teacher)
    ]
    impossible = np.where(weights == 0, -1, targets)
    actual = _run(*spoilt, impossible, weights, block_bytes=block_bytes)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_half_precision_is_the_float32_oracle_but_for_the_rounding_of_the_gradient():
    """Hidden states and heads are rounded to bfloat16 for both; the gradient by the logits is rounded to its eight bits
    before the products with them, that by the hidden states once more after, and after the factor of the chain rule."""
    student, teacher, targets, weights = _inputs(jnp.bfloat16)
    rounded = [
        Head(head.hidden.astype(jnp.float32), head.kernel.astype(jnp.bfloat16).astype(jnp.float32))
        for head in (student, teacher)
    ]
    (expected, _), expected_gradient = _run(*rounded, targets, weights)
    (loss, _), gradient = _run(student, teacher, targets, weights, block_bytes=BLOCK_BYTES["three blocks"])
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert gradient.hidden.dtype == jnp.bfloat16 and gradient.kernel.dtype == jnp.float32
    assert _relative_error(gradient.hidden, expected_gradient.hidden) < 3 * 2**-9
    # Summed in float32 and kept so: only the rounding before the product.
    assert _relative_error(gradient.kernel, expected_gradient.kernel) < 2**-9


def _temporaries(target, vocabulary, block_bytes):
    """Bytes beside arguments and results; the widths are small, so that logits are what counts."""

    def abstract(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    student, teacher = (Head(abstract(4, target, width), abstract(width, vocabulary)) for width in (8, 16))
    tokens = abstract(4, target, dtype=jnp.int32), abstract(4, target)
    lowered = _run.lower(student, teacher, *tokens, terms=(ForwardKL(),), block_bytes=block_bytes)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_temporaries_do_not_grow_with_tokens_times_vocabulary():
    logits = 4 * 4 * 256 * 4096  # bytes of one model's
    base, longer, wider = (_temporaries(*size, 1 << 20) for size in ((256, 4096), (1024, 4096), (256, 16384)))
    assert base < logits / 2 < logits < _temporaries(256, 4096, None)
    # Four times the tokens: only hidden states and their gradient, of 8 and 16 numbers a token, are more.
    assert longer - base < 4 * 4 * (1024 - 256) * 4 * (8 + 16)
    # Four times the vocabulary: only the kernels and the gradient of one are more.
    assert wider - base < 4 * (16384 - 4096) * 2 * (8 + 16)
