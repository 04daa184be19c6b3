"""The blocked relation loss is the dense one, in memory that does not grow with heads or examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.attention import RowMasks, choose_groups
from endistill_jax.objectives import LossImplementation
from endistill_jax.objectives.relations import relation_kl
from endistill_jax.objectives.relations_blocked import relation_kl_blocked

BATCH, HEADS = 4, 6
TEACHER_DIM, STUDENT_DIM = 48, 24
LENGTHS = {"self": (13, 13), "cross": (13, 21)}  # multiples of nothing

MASKS = ("full", "causal", "padded", "packed", "packed causal", "cross", "packed cross", "queries that see nothing")

# Bytes of a block -> what it splits: 4 * 13 * 13 = 676 bytes of scores a head (4 * 13 * 21 = 1092 of `cross`).
BLOCK_BYTES = {"rows": 300, "heads": 2600, "examples": 10_000, "nothing": 1 << 20}


def _segments(mask, length, side):
    """Ragged rows; every packed row has its segments at other places, and one example is all padding."""
    positions = np.arange(length)
    if mask in ("full", "causal"):
        return np.ones((BATCH, length), np.int32)
    if mask == "queries that see nothing" and side == "key":
        return np.zeros((BATCH, length), np.int32) + (np.arange(BATCH)[:, None] == 1)
    ends = np.array([length, length - 3, 5, 0])[:, None]
    ids = 1 + (positions >= 3 + np.arange(BATCH)[:, None]) if "packed" in mask else np.ones((BATCH, length), int)
    return np.where(positions < ends, ids, 0).astype(np.int32)


def _inputs(mask, dtype=np.float32):
    """(teacher, student) pairs and the mask's keyword arguments."""
    rng = np.random.default_rng(MASKS.index(mask))
    lengths = LENGTHS["cross" if "cross" in mask or "nothing" in mask else "self"]

    def pair(dim):
        return tuple(jnp.asarray(rng.standard_normal((BATCH, length, dim)), dtype) for length in lengths)

    query, key = (_segments(mask, length, side) for length, side in zip(lengths, ("query", "key"), strict=True))
    return (
        pair(TEACHER_DIM),
        pair(STUDENT_DIM),
        {"query_segments": query, "key_segments": key, "causal": "causal" in mask},
    )


@functools.partial(jax.jit, static_argnames=("causal", "block_bytes"))
def _value_and_gradients(teacher, student, query_segments, key_segments, causal, block_bytes=None):
    """Three times the sum, and its gradients by (teacher, student); dense without `block_bytes`."""
    masks = RowMasks(query_segments, key_segments, causal)

    def loss(teacher, student):
        if block_bytes is None:
            return 3 * relation_kl(teacher, student, HEADS, masks)
        return 3 * relation_kl_blocked(teacher, student, HEADS, masks, LossImplementation(relation_bytes=block_bytes))

    return jax.value_and_grad(loss, argnums=(0, 1))(teacher, student)


def _relative_error(actual, expected):
    """Of the whole array, by its length: single numbers of a gradient may cancel to anything."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES.values(), ids=BLOCK_BYTES)
@pytest.mark.parametrize("mask", MASKS)
def test_value_and_gradient_equal_the_dense_form(mask, block_bytes):
    teacher, student, masks = _inputs(mask)
    expected, (_, expected_gradients) = _value_and_gradients(teacher, student, **masks)
    total, (by_teacher, gradients) = _value_and_gradients(teacher, student, **masks, block_bytes=block_bytes)
    assert float(expected) > 1
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert _relative_error(gradient, expected_gradient) < 1e-6
        # To no single number is more added than rounding: what is zero there is zero here.
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6 * np.abs(expected_gradient).max())
        assert not np.any(np.asarray(gradient)[np.asarray(expected_gradient) == 0])
    assert not any(np.any(gradient) for gradient in by_teacher)


def test_group_sizes_of_the_tests_split_what_they_say():
    def groups(name, lengths):
        found = choose_groups(BATCH, HEADS, *lengths, BLOCK_BYTES[name])
        return found.examples, found.heads, found.queries

    assert groups("rows", (13, 13)) == (1, 2, 8) and groups("rows", (13, 21)) == (1, 2, 8)
    assert groups("heads", (13, 13)) == (1, 3, 13) and groups("heads", (13, 21)) == (1, 2, 13)
    assert groups("examples", (13, 13)) == (2, HEADS, 13) and groups("examples", (13, 21)) == (1, HEADS, 13)
    assert groups("nothing", (13, 13)) == (BATCH, HEADS, 13)


@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize("heads", [1, 12, 17])
@pytest.mark.parametrize("lengths", [(1, 1), (48, 256), (512, 512), (100, 4096)])
def test_groups_are_within_their_size_and_divide_what_they_split(batch, heads, lengths):
    groups = choose_groups(batch, heads, *lengths, 1 << 20)
    assert 4 * groups.examples * groups.heads * groups.queries * lengths[1] <= 1 << 20
    assert batch % groups.examples == 0 and heads % groups.heads == 0


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES.values(), ids=BLOCK_BYTES)
def test_value_alone_equals_the_value_beside_the_gradient(block_bytes):
    teacher, student, masks = _inputs("packed causal")
    expected, _ = _value_and_gradients(teacher, student, **masks, block_bytes=block_bytes)
    implementation = LossImplementation(relation_bytes=block_bytes)
    alone = relation_kl_blocked(teacher, student, HEADS, RowMasks(**masks), implementation)
    np.testing.assert_allclose(3 * alone, expected, rtol=1e-6)


@pytest.mark.parametrize("padding", [np.inf, np.nan])
@pytest.mark.parametrize("block_bytes", BLOCK_BYTES.values(), ids=BLOCK_BYTES)
def test_padding_values_change_neither_value_nor_gradient(block_bytes, padding):
    teacher, student, masks = _inputs("packed cross")
    expected = _value_and_gradients(teacher, student, **masks, block_bytes=block_bytes)
    sides = (masks["query_segments"], masks["key_segments"])
    spoilt = [
        tuple(jnp.where(ids[..., None] == 0, padding, x) for x, ids in zip(pair, sides, strict=True))
        for pair in (teacher, student)
    ]
    actual = _value_and_gradients(*spoilt, **masks, block_bytes=block_bytes)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES["rows"], BLOCK_BYTES["heads"]])
def test_loss_and_gradient_are_zero_for_identical_models(block_bytes):
    teacher, _, masks = _inputs("packed")
    total, (_, gradients) = _value_and_gradients(teacher, teacher, **masks, block_bytes=block_bytes)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_scores_too_large_for_a_plain_exponential_equal_the_dense_form():
    teacher, student, masks = _inputs("causal")
    teacher, student = ([30 * x for x in pair] for pair in (teacher, student))
    expected, (_, expected_gradients) = _value_and_gradients(teacher, student, **masks)
    total, (_, gradients) = _value_and_gradients(teacher, student, **masks, block_bytes=BLOCK_BYTES["heads"])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert _relative_error(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("mask", ["causal", "packed cross"])
def test_half_precision_is_the_float32_oracle_but_for_the_rounding_of_the_gradient(mask):
    """Products of bfloat16 are exact in float32; the gradient is rounded to bfloat16's eight bits before its products,
    after them, and after the factor of the chain rule, each time by at most 2^-9 of each number."""
    teacher, student, masks = _inputs(mask, jnp.bfloat16)
    oracle_inputs = [tuple(x.astype(jnp.float32) for x in pair) for pair in (teacher, student)]
    expected, (_, expected_gradients) = _value_and_gradients(*oracle_inputs, **masks)
    total, (_, gradients) = _value_and_gradients(teacher, student, **masks, block_bytes=BLOCK_BYTES["heads"])
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert _relative_error(gradient, expected_gradient) < 3 * 2**-9


def test_types_of_teacher_and_student_may_differ():
    teacher, student, masks = _inputs("cross")
    teacher = tuple(x.astype(jnp.bfloat16) for x in teacher)
    expected, (_, expected_gradients) = _value_and_gradients(teacher, student, **masks)
    total, (_, gradients) = _value_and_gradients(teacher, student, **masks, block_bytes=BLOCK_BYTES["heads"])
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert _relative_error(gradients[0], expected_gradients[0]) < 1e-6 and gradients[0].dtype == jnp.float32


def _compiled(length, *, batch=2, heads=12, gradient=True, loss=relation_kl_blocked):
    """The loss of one relation compiled for this platform, at the default block size."""
    vectors = tuple(jax.ShapeDtypeStruct((batch, length, 96), jnp.float32) for _ in range(2))
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def value(student, teacher, query_segments, key_segments):
        masks = RowMasks(query_segments, key_segments, causal=True)
        form = () if loss is relation_kl else (LossImplementation(),)
        return loss(teacher, student, heads, masks, *form)

    function = jax.value_and_grad(value) if gradient else value
    return jax.jit(function).lower(vectors, vectors, segments, segments).compile()


def _temporaries(*args, **kwargs):
    return _compiled(*args, **kwargs).memory_analysis().temp_size_in_bytes


def test_temporaries_grow_at_most_in_step_with_length():
    assert 0 < _temporaries(1024) <= 2.1 * _temporaries(512)
    assert _temporaries(1024, loss=relation_kl) > 3.5 * _temporaries(512, loss=relation_kl)


def test_temporaries_hold_scores_of_neither_all_heads_nor_all_examples():
    few, many = _temporaries(512), _temporaries(512, batch=8)
    vectors = 8 * 512 * 96 * 4
    assert many - few <= 4 * vectors  # no more than copies of what was given
    assert _temporaries(512, heads=48) <= 1.1 * few


def test_value_alone_costs_no_gradient():
    # One group, so no loop, of which FLOPs are counted once.
    one = {"batch": 1, "heads": 1}
    value, both = (_compiled(128, **one, gradient=gradient).cost_analysis()["flops"] for gradient in (False, True))
    product = 2 * 128 * 128 * 96
    assert 2 * product < value < 3 * product
    assert 4 * product < both < 5 * product
