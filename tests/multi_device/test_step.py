"""One step gives the same on every mesh: terms, gradients, moments and parameters; and everything lies where it should.

The first moment after one step of Adam from zero is (1 - b1) times the gradient, so the state tells it. The examples
are uneven: whole devices hold padding alone, so averaging per device, or per micro-batch, would show.
"""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.losses import Path, Site
from endistill_jax.model.config import T5Config
from endistill_jax.sharding import abstract_params, make_mesh, param_shardings, place_batch
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step

# Every width is a multiple of eight, the largest mesh axis. Two lower layers of the encoder run as a loop.
STUDENT = T5Config(
    vocab_size=40,
    d_model=16,
    num_heads=8,
    head_dim=3,
    mlp_dim=32,
    num_encoder_layers=3,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=12,
)
TEACHER = dataclasses.replace(STUDENT, d_model=24, head_dim=6, mlp_dim=56, num_encoder_layers=1, tied_head=True)

_SELF = Site(relations=("qq", "kk", "vv"), relation_heads=4)
PATH = Path(
    encoder_self=_SELF,
    decoder_self=_SELF,
    cross=Site(relations=("qk", "vv"), relation_heads=12),
    logits_weight=0.7,
    lm_weight=0.3,
    z_loss=0.01,
)
ROWS, SOURCE, TARGET = 16, 6, 5

# A large eps keeps Adam's first update from being the mere sign of a gradient, of noise where that is zero.
ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", eps=1e-3), 10)

# name -> (axes, micro-batches, devices)
RUNS = {
    "1x1x1": ((1, 1, 1), 1, 1),
    "8x1x1": ((8, 1, 1), 2, 8),
    "1x8x1": ((1, 8, 1), 1, 8),
    "2x2x2": ((2, 2, 2), 1, 8),
    "1x1x8": ((1, 1, 8), 1, 8),
}
MESHES = [name for name in RUNS if name != "1x1x1"]


def random_params(config, seed):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def uneven_batch():
    """Rows of zero to six tokens; the first four, on some meshes whole devices, are empty."""
    rng = np.random.default_rng(5)
    lengths = [np.where(np.arange(ROWS) < 4, 0, rng.integers(1, most + 1, ROWS)) for most in (SOURCE, TARGET)]
    source, target = (
        np.where(np.arange(most) < length[:, None], rng.integers(1, 40, (ROWS, most)), 0).astype(np.int32)
        for most, length in zip((SOURCE, TARGET), lengths, strict=True)
    )
    return {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target != 0).astype(np.float32),
    }


@dataclasses.dataclass
class Ran:
    """A step on one mesh: the state it left (on the mesh), its metrics, its program for one device."""

    mesh: jax.sharding.Mesh
    state: object
    metrics: dict
    program: str


@pytest.fixture(scope="module")
def runs():
    def run(axes, micro_batches, devices):
        mesh = make_mesh(*axes, devices=jax.devices()[:devices])
        state = init_state(STUDENT, ADAM, mesh, jax.random.key(0), random_params(STUDENT, 0))
        teacher_params = jax.device_put(random_params(TEACHER, 1), param_shardings(TEACHER, mesh))
        step = make_train_step(
            student=STUDENT, teacher=TEACHER, path=PATH, optimizer=ADAM, mesh=mesh, micro_batches=micro_batches
        )
        batch = place_batch(uneven_batch(), mesh)
        compiled = step.lower(state, teacher_params, batch).compile()
        state, metrics = compiled(state, teacher_params, batch)
        return Ran(mesh, state, jax.device_get(metrics), compiled.as_text())

    return {name: run(*settings) for name, settings in RUNS.items()}


@pytest.mark.parametrize("name", MESHES)
def test_terms_and_loss_do_not_depend_on_the_mesh(runs, name):
    expected, actual = runs["1x1x1"].metrics, runs[name].metrics
    assert actual.keys() == expected.keys() and len(actual) == 16
    for term, (total, weight) in expected.items():
        assert actual[term][1] == weight, term
        # Float32 sums of some hundred terms of either sign, in another order: a few of 2^-23 times their size.
        np.testing.assert_allclose(actual[term][0], total, rtol=2e-5, err_msg=term)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_moments_and_updated_parameters_do_not_depend_on_the_mesh(runs, name):
    expected, actual = (jax.device_get(runs[key].state) for key in ("1x1x1", name))
    assert jax.tree.structure(actual) == jax.tree.structure(expected) and int(actual.step) == 1
    gradient = optax.tree_utils.tree_get(expected.opt_state, "mu")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))

    def compare(moment, atol):
        pair = (optax.tree_utils.tree_get(state.opt_state, moment) for state in (actual, expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), *pair)

    # What cancels in a sum is only as exact as the largest things in it.
    compare("mu", 1e-6 * largest)
    compare("nu", 1e-6 * largest**2)
    # An update is at most the learning rate, 0.1; in its slope, 1 / eps at worst, the gradient's rounding is amplified.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), actual.params, expected.params)


def test_parameters_move_far_more_than_the_tolerance_of_their_comparison(runs):
    before, after = random_params(STUDENT, 0), runs["1x1x1"].state.params
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), before, after)
    assert min(jax.tree.leaves(moved)) > 0.01


def shard_shapes(tree, names):
    found = {}
    for name in names:
        leaf = tree
        for part in name.split("/"):
            leaf = leaf[part]
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8 and len(shapes) == 1
        found[name] = shapes.pop()
    return found


# Whole shape: (40, 16), (3, 16, 24), (3, 32, 16), (3, 16), (8, 8), (16, 40).
SHARDS = {
    "8x1x1": [(40, 16), (3, 16, 24), (3, 32, 16), (3, 16), (8, 8), (16, 40)],
    "1x8x1": [(40, 2), (3, 2, 24), (3, 32, 2), (3, 2), (8, 8), (2, 40)],
    "2x2x2": [(20, 8), (3, 8, 12), (3, 16, 8), (3, 8), (4, 8), (8, 20)],
    "1x1x8": [(5, 16), (3, 16, 3), (3, 4, 16), (3, 16), (1, 8), (16, 5)],
}


@pytest.mark.parametrize("name", MESHES)
def test_parameters_and_adam_moments_are_sharded_by_the_logical_rules(runs, name):
    parameters = (
        "token_embedder/embedding",
        "encoder/layers/attention/query/kernel",
        "encoder/layers/mlp/wo/kernel",
        "encoder/layers/pre_mlp_layer_norm/scale",
        "encoder/relpos_bias/rel_embedding",
        "decoder/logits_dense/kernel",
    )
    expected = dict(zip(parameters, SHARDS[name], strict=True))
    state = runs[name].state
    for tree in (state.params, *(optax.tree_utils.tree_get(state.opt_state, moment) for moment in ("mu", "nu"))):
        assert shard_shapes(tree, parameters) == expected
    assert state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2"])
def test_no_device_computes_with_the_rows_of_the_whole_batch(runs, name):
    """Also where a kernel is split along the axis it is multiplied along, which tempts the compiler to do just that."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", runs[name].program)
    sizes = {int(size) for shape in shapes for size in shape.split(",")}
    whole = {ROWS * SOURCE, ROWS * TARGET}  # no other axis has these sizes
    assert len(shapes) > 50 and not whole & sizes


@pytest.mark.parametrize(("name", "rows", "vocab"), [("1x8x1", 2, 40), ("2x2x2", 4, 20), ("1x1x8", 16, 5)])
def test_each_device_has_its_examples_logits_of_its_part_of_the_vocabulary(runs, name, rows, vocab):
    program = runs[name].program
    assert f"f32[{rows * TARGET},{vocab}]" in program
    assert f"f32[{ROWS * TARGET},40]" not in program and f"f32[{ROWS},{TARGET},40]" not in program


@pytest.mark.parametrize("name", ["1x8x1", "1x1x8", "1x1x1"])
def test_checkpoint_of_one_mesh_restores_on_another_bit_for_bit(runs, tmp_path, name):
    saved = runs["2x2x2"].state
    shardings = state_shardings(STUDENT, ADAM, runs[name].mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(STUDENT, ADAM),
        shardings,
    )
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, saved, b"", {})
    with Checkpointer(str(tmp_path)) as checkpoints:
        restored, _, _ = checkpoints.restore(1, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for ours, theirs, sharding in zip(*map(jax.tree.leaves, (restored, saved, shardings)), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding.is_equivalent_to(sharding, ours.ndim)
        np.testing.assert_array_equal(ours, theirs)
