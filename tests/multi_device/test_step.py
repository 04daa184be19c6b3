"""One step gives the same on every mesh: terms, gradients, moments, parameters; and all is where it should be.

The first moment after one step of Adam from zero is (1 - b1) times the gradient, so the state tells it. The examples
are packed and uneven: whole devices hold padding alone, so averaging per device, or per micro-batch, would show. All is
compared with one device that computes the dense losses.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import ROWS, SOURCE, STUDENT, TARGET, TEACHER, packed_batch, random_params

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.objectives import (
    AttentionKL,
    CrossEntropy,
    ForwardKL,
    HiddenDistance,
    InterpolatedTargets,
    LossImplementation,
    Objective,
    ReverseKL,
    relations,
)
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.planning.hlo import parse_program
from endistill_jax.sharding import make_mesh, param_shardings, place_batch
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step

OBJECTIVE = Objective(
    terms=(
        *relations("encoder_self", ("qq", "vv"), relation_heads=4),
        *relations("decoder_self", ("qk",), relation_heads=4),
        *relations("cross", ("qk", "vv"), relation_heads=12),
        AttentionKL(site="encoder_self", num_heads=8),
        HiddenDistance(of="encoded"),
        ForwardKL(coefficient=0.7),
        ReverseKL(coefficient=0.2),
        CrossEntropy(coefficient=0.3, z_loss=0.01),
    )
)

# A large eps keeps Adam's first update from being the mere sign of a gradient, of noise where that is zero.
ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", eps=1e-3), 10)

# One head of one example has up to 4 x 6 x 6 = 144 bytes of scores: attention takes four heads at a time.
AUTO = LossImplementation(attention_bytes=600)
# name -> (axes, micro-batches, sharding of the teacher, form of the losses)
RUNS = {
    "1x1x1": ((1, 1, 1), 1, "sharded", DENSE),
    "8x1x1": ((8, 1, 1), 2, "sharded", AUTO),
    "1x8x1": ((1, 8, 1), 1, "sharded", AUTO),
    "2x2x2": ((2, 2, 2), 1, "replicated", AUTO),
    "2x4x1": ((2, 4, 1), 2, "sharded", AUTO),
    "1x2x4": ((1, 2, 4), 1, "sharded", DENSE),
    "1x8x1, replicated": ((1, 8, 1), 2, "replicated", DENSE),
}
MESHES = [name for name in RUNS if name != "1x1x1"]


@dataclasses.dataclass
class Ran:
    """A step on one mesh: what it left there, its metrics, its program for one device, what the compiler said."""

    mesh: jax.sharding.Mesh
    state: object
    teacher_params: object
    metrics: dict
    program: str
    log: list[str]


@pytest.fixture(scope="module")
def run(compiler_log):
    """One step by the settings of a name of RUNS."""

    def run(name, objective=OBJECTIVE):
        axes, micro_batches, teacher_sharding, implementation = RUNS[name]
        mesh = make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
        student = dataclasses.replace(STUDENT, attention_bytes=implementation.attention_bytes)
        models = {"objective": objective, "teacher": TEACHER}
        state = init_state(STUDENT, ADAM, mesh, jax.random.key(0), random_params(STUDENT, 0), **models)
        teacher_params = jax.device_put(random_params(TEACHER, 1), param_shardings(TEACHER, mesh, teacher_sharding))
        step = make_train_step(
            student=student,
            teacher=TEACHER,
            objective=objective,
            optimizer=ADAM,
            mesh=mesh,
            micro_batches=micro_batches,
            implementation=implementation,
            teacher_sharding=teacher_sharding,
        )
        batch = place_batch(packed_batch(), mesh)
        with compiler_log() as log:
            compiled = step.lower(state, teacher_params, batch).compile()
        state, metrics = compiled(state, teacher_params, batch)
        return Ran(mesh, state, teacher_params, jax.device_get(metrics), compiled.as_text(), log)

    return run


@pytest.fixture(scope="module")
def runs(run):
    return {name: run(name) for name in RUNS}


def check_metrics(actual, expected):
    assert actual.keys() == expected.keys() and len(actual) == 19 + ("teacher_share" in expected)
    for term, (total, weight) in expected.items():
        assert actual[term][1] == weight, term
        # Float32 sums of some hundred terms of either sign, in another order: a few of 2^-23 times their size.
        np.testing.assert_allclose(actual[term][0], total, rtol=2e-5, err_msg=term)


def check_state(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected) and int(actual.step) == 1

    def compare(moment, tolerance):
        for ours, theirs in zip(
            *(jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, moment)) for state in (actual, expected)),
            strict=True,
        ):
            assert np.linalg.norm(theirs) > 0 and np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)

    # Of each parameter's gradient as a vector: float32 sums in another order and, of the losses, in another form.
    compare("mu", 2e-5)
    compare("nu", 4e-5)
    # An update is at most the learning rate, 0.1; in its slope, 1 / eps at worst, the gradient's rounding is amplified.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), actual.params, expected.params)
    own = actual.objective["params"], expected.objective["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), *own)


@pytest.mark.parametrize("name", MESHES)
def test_terms_and_loss_do_not_depend_on_the_mesh(runs, name):
    check_metrics(runs[name].metrics, runs["1x1x1"].metrics)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_moments_and_updated_parameters_do_not_depend_on_the_mesh(runs, name):
    check_state(*(jax.device_get(runs[key].state) for key in (name, "1x1x1")))


def test_a_step_with_interpolated_targets_does_not_depend_on_the_mesh(run, runs):
    targets = InterpolatedTargets(start=0.4, steps=10, adaptive_rate=0.1)
    objective = dataclasses.replace(OBJECTIVE, interpolated_targets=targets)
    one, several = run("1x1x1", objective), run("1x2x4", objective)
    check_metrics(several.metrics, one.metrics)
    check_state(*(jax.device_get(ran.state) for ran in (several, one)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5),
        *(ran.state.objective["share"] for ran in (several, one)),
    )
    assert float(one.state.objective["share"]["share"]) > 0.4
    # Targets that are partly the student's own are nearer to it.
    assert one.metrics["loss"][0] < 0.95 * runs["1x1x1"].metrics["loss"][0]


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
        found[name] = _shard(leaf)
    return found


def _shard(leaf):
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert len(leaf.addressable_shards) == 8 and len(shapes) == 1
    return shapes.pop()


# Whole shape: (40, 16), (3, 16, 24), (3, 32, 16), (3, 16), (8, 8), (16, 40).
SHARDS = {
    "8x1x1": [(40, 16), (3, 16, 24), (3, 32, 16), (3, 16), (8, 8), (16, 40)],
    "1x8x1": [(40, 2), (3, 2, 24), (3, 32, 2), (3, 16), (8, 8), (2, 40)],
    "2x2x2": [(20, 8), (3, 8, 12), (3, 16, 8), (3, 16), (4, 8), (8, 20)],
    "2x4x1": [(40, 4), (3, 4, 24), (3, 32, 4), (3, 16), (8, 8), (4, 40)],
    "1x2x4": [(10, 8), (3, 8, 6), (3, 8, 8), (3, 16), (2, 8), (8, 10)],
}


@pytest.mark.parametrize("name", SHARDS)
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
    projection = 16 // RUNS[name][0][1], 24  # of the hidden states: the student's width is split over `fsdp`
    assert _shard(state.objective["params"]["hidden/encoded"]["kernel"]) == projection
    for moment in ("mu", "nu"):
        tree = optax.tree_utils.tree_get(state.opt_state, moment)
        assert shard_shapes(tree["student"], parameters) == expected
        assert _shard(tree["objective"]["hidden/encoded"]["kernel"]) == projection
    assert shard_shapes(state.params, parameters) == expected
    assert state.step.sharding.is_fully_replicated


# Whole shape: (40, 24), (3, 24, 48), (3, 56, 24).
TEACHER_SHARDS = {
    "8x1x1": [(40, 24), (3, 24, 48), (3, 56, 24)],
    "1x8x1": [(40, 3), (3, 3, 48), (3, 56, 3)],
    "2x2x2": [(20, 24), (3, 24, 24), (3, 28, 24)],  # replicated: whole but for the axis tensor
    "1x2x4": [(10, 12), (3, 12, 12), (3, 14, 12)],
    "1x8x1, replicated": [(40, 24), (3, 24, 48), (3, 56, 24)],
}


@pytest.mark.parametrize("name", TEACHER_SHARDS)
def test_teacher_is_sharded_as_it_is_said(runs, name):
    parameters = (
        "token_embedder/embedding",
        "encoder/layers/attention/query/kernel",
        "encoder/layers/mlp/wo/kernel",
    )
    expected = dict(zip(parameters, TEACHER_SHARDS[name], strict=True))
    assert shard_shapes(runs[name].teacher_params, parameters) == expected


def kernels(config):
    """Whole shapes of the kernels of a looped layer, none of which is also an activation's on eight `fsdp` devices."""
    inner = config.inner_dim
    return {
        (config.d_model, inner),
        (inner, config.d_model),
        (config.d_model, config.mlp_dim),
        (config.mlp_dim, config.d_model),
    }


def gathers(program):
    """(shape, how often) of every gathering of an array from several devices."""
    found = [(each, times) for each, _, times in parse_program(program).counted() if "all-gather" in each.opcode]
    return [(array.shape, times) for each, times in found for array in each.arrays]


@pytest.mark.parametrize("name", ["1x8x1", "1x8x1, replicated"])
def test_parameters_are_gathered_a_layer_at_a_time_inside_the_loop(runs, name):
    """Forward and backward, a loop gathers the kernels of its layer; no device ever has those of two layers."""
    micro_batches, teacher_sharding = RUNS[name][1:3]
    program = runs[name].program
    found = gathers(program)
    models = [STUDENT, TEACHER] if teacher_sharding == "sharded" else [STUDENT]
    for config in models:
        for kernel in kernels(config):
            # The loop has two turns. A compiler may gather once more for the backward pass, not instead of the loop.
            assert (kernel, 2 * micro_batches) in found, kernel
    arrays = {array.shape for each, _, _ in parse_program(program).counted() for array in each.arrays}
    whole = {(layers, *kernel) for config in models for kernel in kernels(config) for layers in (2, 3)}
    assert not whole & arrays
    assert {(3, *kernel[:1], kernel[1] // 8) for kernel in kernels(STUDENT)} & arrays  # the parts are there


def test_nothing_of_a_replicated_teacher_is_gathered(runs):
    shapes = {shape for shape, _ in gathers(runs["1x8x1, replicated"].program)}
    assert shapes and not {(TEACHER.vocab_size, TEACHER.d_model), *kernels(TEACHER)} & shapes


INVOLUNTARY = "Involuntary full rematerialization"


@pytest.mark.parametrize("name", MESHES)
def test_the_compiler_never_gives_everything_to_everyone(runs, name):
    """It does, with a warning, where it finds no way between two layouts: then every device has the whole batch."""
    assert not [line for line in runs[name].log if INVOLUNTARY in line]
    rows = ROWS // RUNS[name][1]  # of a micro-batch
    whole = {(rows, length, config.d_model) for length in (SOURCE, TARGET) for config in (STUDENT, TEACHER)}
    program = parse_program(runs[name].program)
    assert not whole & {array.shape for each, _, _ in program.counted() for array in each.arrays}


def test_the_warning_that_must_not_come_is_heard_when_it_comes(compiler_log):
    mesh = make_mesh(2, 4, 1)
    width, examples = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), (("data", "fsdp"),)))
    turn = jax.jit(lambda x: jnp.sin(jax.lax.with_sharding_constraint(2 * x, width)), out_shardings=examples)
    with compiler_log() as log:
        turn.lower(jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=examples)).compile()
    assert any(INVOLUNTARY in line for line in log)


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2", "2x4x1"])
def test_no_device_computes_with_the_rows_of_the_whole_batch(runs, name):
    """Also where a kernel is split along the axis it is multiplied along, which tempts the compiler to do just that."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", runs[name].program)
    sizes = {int(size) for shape in shapes for size in shape.split(",")}
    whole = {ROWS * SOURCE, ROWS * TARGET}  # no other axis has these sizes
    assert len(shapes) > 50 and not whole & sizes


@pytest.mark.parametrize(("name", "rows", "vocab"), [("1x8x1", 2, 40), ("2x2x2", 4, 20), ("1x2x4", 8, 10)])
def test_each_device_has_its_examples_logits_of_its_part_of_the_vocabulary(runs, name, rows, vocab):
    program = runs[name].program
    assert f"f32[{rows * TARGET},{vocab}]" in program
    assert f"f32[{ROWS * TARGET},40]" not in program and f"f32[{ROWS},{TARGET},40]" not in program


@pytest.mark.parametrize("name", ["1x8x1", "1x2x4", "1x1x1"])
def test_checkpoint_of_one_mesh_restores_on_another_bit_for_bit(runs, tmp_path, name):
    saved, whole = runs["2x2x2"].state, {"objective": OBJECTIVE, "teacher": TEACHER}
    shardings = state_shardings(STUDENT, ADAM, runs[name].mesh, **whole)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(STUDENT, ADAM, **whole).saved(),
        shardings.saved(),
    )
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, saved.saved(), {}, {})
    with Checkpointer(str(tmp_path)) as checkpoints:
        restored = TrainState(**checkpoints.restore(1, abstract)[0])
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for ours, theirs, sharding in zip(*map(jax.tree.leaves, (restored, saved, shardings)), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding.is_equivalent_to(sharding, ours.ndim)
        np.testing.assert_array_equal(ours, theirs)
