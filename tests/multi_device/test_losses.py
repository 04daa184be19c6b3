"""The fast losses on a mesh: sums and gradients of one device, and nothing of the loops inside leaves its device.

A loop over examples or tokens that the compiler had to split itself would gather what it slices.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from endistill_jax.core.attention import RowMasks
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Head
from endistill_jax.objectives import (
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    LossImplementation,
    MeshAxes,
    ReverseKL,
    SkewedKL,
)
from endistill_jax.objectives.relations import relation_kl
from endistill_jax.objectives.relations_blocked import relation_kl_blocked
from endistill_jax.objectives.token_terms import TokenTerm
from endistill_jax.objectives.tokens_blocked import token_loss
from endistill_jax.sharding import make_mesh

MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "2x4x1": (2, 4, 1), "1x2x4": (1, 2, 4)}
BATCH, QUERIES, KEYS = 8, 11, 13
TEACHER_DIM, STUDENT_DIM = 48, 24
VOCABULARY = 40
BATCH_AXES = ("data", "fsdp")
RNG_SEED = 0


def _place(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def _compiled(function, *args):
    return jax.jit(jax.value_and_grad(function, has_aux=True)).lower(*args).compile()


def _exchanges(program):
    """(computation, kind, shape) of every exchange between devices."""
    found, computation = [], None
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = start[1]
        elif exchange := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            found.append((computation, exchange[2], exchange[1]))
    return found


def _vectors():
    """(student, teacher, segments); the first example, on some meshes a whole device's, is padding alone."""
    rng = np.random.default_rng(RNG_SEED)

    def pair(dim):
        return tuple(rng.standard_normal((BATCH, length, dim)).astype(np.float32) for length in (QUERIES, KEYS))

    segments = tuple(
        (np.arange(length) < np.minimum(np.arange(BATCH), length)[:, None]).astype(np.int32)
        for length in (QUERIES, KEYS)
    )
    return pair(STUDENT_DIM), pair(TEACHER_DIM), segments


def _relation(heads, implementation=None):
    """Of no mesh and dense, without an implementation."""

    def function(student, teacher, segments):
        masks = RowMasks(*segments, causal=False)
        if implementation is None:
            return relation_kl(teacher, student, heads, masks), None
        return relation_kl_blocked(teacher, student, heads, masks, implementation), None

    return function


# Two heads are split over no `tensor` axis of four; each block holds one head of one example.
@pytest.mark.parametrize("heads", [2, 12])
@pytest.mark.parametrize("name", MESHES)
def test_blocked_relations_do_not_depend_on_the_mesh(name, heads):
    arrays = _vectors()
    (expected, _), expected_gradients = _compiled(_relation(heads), *arrays)(*arrays)
    mesh = make_mesh(*MESHES[name])
    vectors, examples = PartitionSpec(BATCH_AXES, None, "tensor"), PartitionSpec(BATCH_AXES)
    placed = _place(mesh, arrays, ((vectors,) * 2, (vectors,) * 2, (examples,) * 2))

    implementation = LossImplementation(relation_bytes=4 * QUERIES * KEYS, axes=MeshAxes(mesh=mesh))
    compiled = _compiled(_relation(heads, implementation), *placed)
    (total, _), gradients = compiled(*placed)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(gradient - expected_gradient) < 1e-6 * np.linalg.norm(expected_gradient)
    tensor = mesh.shape["tensor"]
    if heads % tensor == 0:
        assert gradients[0].sharding.is_equivalent_to(NamedSharding(mesh, vectors), 3)
        # Nothing is exchanged but sums.
        exchanged = [shape for _, _, shape in _exchanges(compiled.as_text())]
        assert exchanged and all(set(re.findall(r"\w+\[(.*?)\]", shape)) == {""} for shape in exchanged)


def _heads(dtype=np.float32):
    """(student, teacher) heads and (targets, weights); the first example has weight 0."""
    rng = np.random.default_rng(RNG_SEED)

    def head(d_model):
        hidden = rng.standard_normal((BATCH, QUERIES, d_model)).astype(np.float32)
        return Head(jnp.asarray(hidden, dtype), rng.standard_normal((d_model, VOCABULARY)).astype(np.float32))

    weights = rng.choice([0.0, 0.5, 1.0], (BATCH, QUERIES)).astype(np.float32) * (np.arange(BATCH) > 0)[:, None]
    return head(16), head(24), (rng.integers(0, VOCABULARY, (BATCH, QUERIES)).astype(np.int32), weights)


class _Derived(ForwardKL):
    """`ForwardKL` with its derived gradient."""

    loss_and_gradient = TokenTerm.loss_and_gradient


TERMS = (
    ForwardKL(temperature=2.0),
    _Derived(temperature=2.0, label="derived"),
    ReverseKL(),
    GeneralizedJSD(beta=0.3),
    SkewedKL(),
    CrossEntropy(z_loss=0.01),
)


def _tokens(axes=None, terms=TERMS):
    implementation = LossImplementation(vocabulary_bytes=4 * 8 * VOCABULARY // 8, axes=axes)
    factors = {term.name: 0.3 + 0.1 * number for number, term in enumerate(terms)}

    def function(student, teacher, tokens):
        return token_loss(terms, student, teacher, *tokens, factors, implementation)

    return function


def _placed_heads(mesh, dtype=np.float32):
    examples = PartitionSpec(BATCH_AXES)
    head = Head(examples, PartitionSpec("fsdp", "tensor"))
    return _place(mesh, _heads(dtype), (head, head, (examples,) * 2))


@pytest.mark.parametrize("name", MESHES)
def test_blocked_token_losses_do_not_depend_on_the_mesh(name):
    arrays = _heads()
    (expected, expected_sums), expected_gradient = _compiled(_tokens(), *arrays)(*arrays)
    mesh = make_mesh(*MESHES[name])
    placed = _placed_heads(mesh)
    (loss, sums), gradient = _compiled(_tokens(MeshAxes(mesh=mesh)), *placed)(*placed)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for term, total in expected_sums.items():
        np.testing.assert_allclose(sums[term], total, rtol=2e-6, err_msg=term)
    for actual, whole in zip(gradient, expected_gradient, strict=True):
        assert np.linalg.norm(actual - whole) < 1e-6 * np.linalg.norm(whole)
    assert gradient.kernel.sharding.is_equivalent_to(placed[0].kernel.sharding, 2)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_the_gradient_of_every_token_term_is_that_of_one_device_where_the_vocabulary_is_split(term):
    arrays, mesh = _heads(), make_mesh(1, 2, 4)
    placed = _placed_heads(mesh)
    _, expected = _compiled(_tokens(terms=(term,)), *arrays)(*arrays)
    _, gradient = _compiled(_tokens(MeshAxes(mesh=mesh), terms=(term,)), *placed)(*placed)
    for actual, whole in zip(gradient, expected, strict=True):
        assert np.linalg.norm(actual - whole) < 1e-6 * np.linalg.norm(whole)


def test_heads_are_gathered_once_and_their_gradient_is_summed_once():
    mesh = make_mesh(1, 8, 1)
    placed = _placed_heads(mesh)
    program = _compiled(_tokens(MeshAxes(mesh=mesh), (ForwardKL(), CrossEntropy())), *placed).as_text()
    assert re.search(r" while\(.*body=", program)
    inside = set(re.findall(r"body=%?([\w.-]+)", program))
    exchanges = _exchanges(program)
    assert not inside & {computation for computation, _, _ in exchanges}
    kinds = [kind for _, kind, _ in exchanges]
    assert kinds.count("all-gather") == 2 and kinds.count("reduce-scatter") == 1 and "all-to-all" not in kinds


def test_examples_that_the_mesh_does_not_divide_take_the_dense_forms_or_are_an_error():
    axes = MeshAxes(mesh=make_mesh(4, 2, 1))
    assert LossImplementation(axes=axes).blocks("relations", 16)
    assert not LossImplementation(axes=axes).blocks("vocabulary", 12)
    with pytest.raises(UserError, match="relations is 'blocked', but 8 devices do not divide 12 examples"):
        LossImplementation(relations="blocked", axes=axes).blocks("relations", 12)
