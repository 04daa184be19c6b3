"""A student cut from its teacher: layers land where they should, a slice fits together, misfits are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.checkpoints.student_init import StudentInit, cut_params, init_from_teacher
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, evenly_spaced, init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import T5
from endistill_jax.sharding import make_mesh

TEACHER = T5Config(
    vocab_size=23,
    d_model=10,
    num_heads=3,
    head_dim=4,
    mlp_dim=14,
    num_encoder_layers=4,
    num_decoder_layers=3,
    relative_buckets=8,
    relative_max_distance=12,
    # Zeros in the residual stream must change nothing but its mean square.
    layer_norm_epsilon=1e-12,
)
LAYERS, SLICE = StudentInit(kind="layers"), StudentInit(kind="slice")


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def logits(config, params):
    return np.asarray(forward(config)(params))


@functools.cache
def forward(config):
    """parameters -> logits of three examples, compiled once for a configuration."""
    tokens = np.random.default_rng(1).integers(1, 20, (3, 6)).astype(np.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: np.roll(tokens, index) for index, name in enumerate(names)}
    return jax.jit(lambda params: T5(config).apply({"params": params}, batch).logits)


def start(init, params, teacher, **changes):
    """The student's configuration and first parameters, as a run makes them on one device."""
    student = dataclasses.replace(teacher, **changes)
    init.check(teacher, student)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    return student, init_from_teacher(init, params, teacher=teacher, student=student, mesh=mesh)


def assert_equal(expected, actual):
    jax.tree.map(np.testing.assert_array_equal, expected, actual)


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (4, 3, [0, 2, 3]), (24, 2, [0, 23]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [0])],
)
def test_evenly_spaced_indices_round_halves_up_and_keep_both_ends(size, count, expected):
    assert evenly_spaced(size, count).tolist() == expected


def test_evenly_spaced_indices_are_distinct_with_gaps_that_differ_by_one_at_most():
    for size in range(2, 40):
        for count in range(2, size + 1):
            indices = evenly_spaced(size, count)
            gaps = np.diff(indices)
            assert (indices[0], indices[-1]) == (0, size - 1) and gaps.min() >= 1 and np.ptp(gaps) <= 1


@pytest.mark.parametrize("init", [LAYERS, SLICE])
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_the_teachers_shape_is_the_teacher(init, tied):
    teacher = dataclasses.replace(TEACHER, tied_head=tied)
    params = random_params(teacher)
    student, ours = start(init, params, teacher)
    assert_equal(params, ours)
    np.testing.assert_array_equal(logits(teacher, params), logits(student, ours))


def test_layers_land_where_they_are_listed_and_everything_else_stays():
    params = random_params(TEACHER)
    init = StudentInit(kind="layers", encoder_layers=(3, 1, 1, 0, 2), decoder_layers=(2,))
    student, ours = start(init, params, TEACHER, num_encoder_layers=5, num_decoder_layers=1)
    for stack, listed in (("encoder", [3, 1, 1, 0, 2]), ("decoder", [2])):
        chosen = jax.tree.map(lambda leaf, listed=listed: leaf[listed], params[stack].pop("layers"))
        assert_equal(chosen, ours[stack].pop("layers"))
    assert_equal(params, ours)


def test_layers_are_evenly_spaced_where_none_are_listed():
    teacher = dataclasses.replace(TEACHER, num_decoder_layers=6)
    student = dataclasses.replace(teacher, num_encoder_layers=3, num_decoder_layers=3)
    assert LAYERS.facts(teacher, student) == {
        "kind": "layers",
        "encoder_layers": [0, 2, 3],
        "decoder_layers": [0, 3, 5],
    }
    listed = StudentInit(kind="layers", encoder_layers=(0, 2, 3), decoder_layers=(0, 3, 5))
    params = random_params(teacher)
    cut = (cut_params(init, params, teacher=teacher, student=student) for init in (LAYERS, listed))
    assert_equal(*cut)
    assert listed.facts(teacher, student) == LAYERS.facts(teacher, student)


# Where each unit of the student is in a wider teacher: once where the rule chooses it, and as a copy where it does not;
# all else is zero. A quarter of the inputs is scaled by the root of four, so two copies of each make the same sum. In
# the residual stream zeros need no copies: the normalization enlarges the rest.
WIDE = dataclasses.replace(TEACHER, d_model=9, num_heads=8, head_dim=8, mlp_dim=12, num_encoder_layers=2)
NARROW = {"d_model": 4, "num_heads": 2, "head_dim": 2, "mlp_dim": 3}
ONCE = {"embed": [0, 3, 5, 8], "heads": [0, 7], "dimensions": [0, 7], "mlp": [0, 6, 11]}
COPIES = {"embed": [], "heads": [1, 6], "dimensions": [1, 6], "mlp": [1, 7, 10]}
AXES = {
    "embedding": (None, "embed"),
    "scale": ("embed",),
    "rel_embedding": ("heads", None),
    "logits_dense": ("embed", None),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "query": ("embed", "joined_kv"),
    "key": ("embed", "joined_kv"),
    "value": ("embed", "joined_kv"),
    "out": ("joined_kv", "embed"),
}


def spread_matrices():
    """By axis, [student size, teacher size]: 1 where the teacher's unit is the student's."""
    sizes = {"embed": (4, 9), "heads": (2, 8), "dimensions": (2, 8), "mlp": (3, 12)}
    matrices = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}
    for name, matrix in matrices.items():
        for places in (ONCE[name], COPIES[name]):
            matrix[range(len(places)), places] = 1
    return matrices | {"joined_kv": np.kron(matrices["heads"], matrices["dimensions"])}


def widened(params):
    """A teacher that computes what the student does, of whose units the rule chooses one copy each."""
    matrices = spread_matrices()
    # What the rule multiplies by, so that the slice gives the student's parameters back.
    factors = {"embed": 9 / 4, "joined_kv": 64 / 4, "mlp": 12 / 3}

    def widen(path, leaf):
        names = [entry.key for entry in path]
        name = names[-2] if names[-1] == "kernel" else names[-1]
        axes = AXES[name]
        for axis, named in zip(range(-len(axes), 0), axes, strict=True):
            if named:
                leaf = np.moveaxis(np.tensordot(leaf, matrices[named], (axis, 0)), -1, axis)
        if names[-1] == "kernel":
            leaf = leaf / np.sqrt(factors[axes[-2]] * (8 / 2 if name == "query" else 1))
        return leaf.astype(np.float32)

    return jax.tree_util.tree_map_with_path(widen, params)


@pytest.mark.parametrize("tied", [True, False])
def test_a_slice_of_a_teacher_made_of_copies_and_zeros_computes_the_same_function(tied):
    teacher = dataclasses.replace(WIDE, tied_head=tied)
    wanted = random_params(dataclasses.replace(teacher, **NARROW))
    params = widened(wanted)
    student, ours = start(SLICE, params, teacher, **NARROW)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wanted, ours)
    expected = logits(teacher, params)
    assert np.ptp(expected) > 1
    # Float32 sums of other lengths, through two and three layers.
    np.testing.assert_allclose(logits(student, ours), expected, rtol=1e-4, atol=1e-5)


def test_a_slice_of_fresh_parameters_is_as_large_as_fresh_parameters_of_its_width():
    sizes = {"vocab_size": 99, "d_model": 96, "num_heads": 8, "head_dim": 16, "mlp_dim": 160}
    teacher = dataclasses.replace(TEACHER, num_encoder_layers=1, num_decoder_layers=1, **sizes)
    student = dataclasses.replace(teacher, d_model=48, num_heads=4, head_dim=8, mlp_dim=64)

    def fresh_and_sliced(key):
        return init_params(student, key), cut_params(SLICE, init_params(teacher, key), teacher=teacher, student=student)

    fresh, ours = jax.jit(fresh_and_sliced)(jax.random.key(0))

    def compare(path, a, b):
        name = jax.tree_util.keystr(path)
        # Some 1500 numbers a kernel or more, so 2 % of deviation is usual; the smallest factor is 1.4.
        if path[-1].key != "rel_embedding":
            np.testing.assert_allclose(np.std(a), np.std(b), rtol=0.1, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, ours, fresh)


def test_a_bfloat16_teacher_gives_a_float32_student_of_its_values():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TEACHER))
    widened_values = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    changes = {"num_encoder_layers": 2, "d_model": 6, "mlp_dim": 5}
    _, expected = start(SLICE, widened_values, TEACHER, **changes)
    for given in (params, jax.tree.map(jnp.asarray, params)):
        _, ours = start(SLICE, given, TEACHER, **changes)
        assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}
        assert_equal(expected, ours)


def test_a_head_of_its_own_starts_as_the_tied_teachers():
    teacher = dataclasses.replace(TEACHER, tied_head=True)
    params = random_params(teacher)
    student, ours = start(LAYERS, params, teacher, tied_head=False)
    # The factor d_model^-0.5 is in the kernel, not on its input: the last bit may differ.
    np.testing.assert_allclose(logits(student, ours), logits(teacher, params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_after_the_vocabulary_may_be_left_out(tied):
    teacher = dataclasses.replace(TEACHER, tied_head=tied)
    params = random_params(teacher)
    student, ours = start(LAYERS, params, teacher, vocab_size=21)
    np.testing.assert_allclose(logits(student, ours), logits(teacher, params)[..., :21], rtol=1e-6)


@pytest.mark.parametrize(
    ("init", "changes", "told"),
    [
        (LAYERS, {"d_model": 8}, "'layers'.*d_model is 8 and the teacher's 10; make them equal, or choose 'slice'"),
        (LAYERS, {"num_heads": 2}, "num_heads is 2 and the teacher's 3; make them equal"),
        (LAYERS, {"head_dim": 2}, "head_dim is 2 and the teacher's 4; make them equal"),
        (LAYERS, {"mlp_dim": 15}, "mlp_dim is 15 and the teacher's 14; make it at most that"),
        (SLICE, {"d_model": 12}, "'slice'.*d_model is 12 and the teacher's 10; make it at most that"),
        (SLICE, {"num_heads": 4}, "num_heads is 4 and the teacher's 3; make it at most that"),
        (SLICE, {"head_dim": 5}, "head_dim is 5 and the teacher's 4; make it at most that"),
        (SLICE, {"vocab_size": 24}, "vocab_size is 24 and the teacher's 23; make it at most that"),
        (
            SLICE,
            {"mlp_activations": ("relu",)},
            r"mlp_activations is \('relu',\) and the teacher's \('gelu', 'linear'\)",
        ),
        (SLICE, {"relative_buckets": 4}, "relative_buckets is 4 and the teacher's 8; make them equal"),
        (LAYERS, {"relative_max_distance": 20}, "relative_max_distance is 20 and the teacher's 12; make them equal"),
        (LAYERS, {"tied_head": True}, "head is not its embedding; set the student's tied_head to False"),
        (LAYERS, {"d_model": 10, "tied_head": True, "num_decoder_layers": 1}, "set the student's tied_head to False"),
        (LAYERS, {"num_decoder_layers": 4}, "has 4 decoder layers and the teacher 3; list StudentInit.decoder_layers"),
    ],
)
def test_a_student_that_the_teacher_cannot_start_is_refused_in_one_line(init, changes, told):
    with pytest.raises(UserError, match=told) as error:
        init.check(TEACHER, dataclasses.replace(TEACHER, **changes))
    assert "\n" not in str(error.value)
    StudentInit().check(TEACHER, dataclasses.replace(TEACHER, **changes))  # fresh parameters ask nothing of a teacher


UMT5 = dataclasses.replace(TEACHER, bias_per_layer=True)


def test_umt5_s_layers_bring_their_position_biases():
    params = random_params(UMT5)
    init = StudentInit(kind="layers", encoder_layers=(3, 1), decoder_layers=(2,))
    student, ours = start(init, params, UMT5, num_encoder_layers=2, num_decoder_layers=1)
    for stack, listed in (("encoder", [3, 1]), ("decoder", [2])):
        assert_equal(
            params[stack]["layers"]["relpos_bias"]["rel_embedding"][listed],
            ours[stack]["layers"]["relpos_bias"]["rel_embedding"],
        )
    narrow, ours = start(SLICE, params, UMT5, num_heads=2, num_encoder_layers=2)
    table = params["encoder"]["layers"]["relpos_bias"]["rel_embedding"]
    assert_equal(table[[0, 3]][:, [0, 2]], ours["encoder"]["layers"]["relpos_bias"]["rel_embedding"])
    assert np.isfinite(logits(narrow, ours)).all()


def test_a_bias_in_every_layer_starts_as_the_teacher_s_of_the_whole_stack():
    params = random_params(TEACHER)
    student, ours = start(LAYERS, params, TEACHER, bias_per_layer=True)
    np.testing.assert_allclose(logits(student, ours), logits(TEACHER, params), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="has a position bias in every layer; set the student's bias_per_layer to True"):
        LAYERS.check(UMT5, TEACHER)


def test_an_encoder_alone_starts_from_a_whole_teacher_s_and_not_the_other_way_round():
    params = random_params(TEACHER)
    student, ours = start(LAYERS, params, TEACHER, num_decoder_layers=0, num_encoder_layers=2)
    assert set(ours) == {"token_embedder", "encoder"}
    assert_equal(params["token_embedder"], ours["token_embedder"])
    assert_equal(
        params["encoder"]["layers"]["mlp"]["wo"]["kernel"][[0, 3]], ours["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    )
    assert LAYERS.facts(TEACHER, student)["decoder_layers"] == []
    with pytest.raises(UserError, match="has 3 decoder layers and the teacher 0"):
        LAYERS.check(dataclasses.replace(TEACHER, num_decoder_layers=0), TEACHER)


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"encoder_layers": (0, 1, 4, 3)}, "encoder_layers has 4, but the teacher's encoder has layers 0 to 3"),
        ({"decoder_layers": (0, -1, 2)}, "decoder_layers is .*-1.*; give a tuple of layers"),
        ({"encoder_layers": (0, 1, 2.0, 3)}, r"encoder_layers is .*2\.0.*; give a tuple of layers"),
        ({"encoder_layers": (0, 3)}, "encoder_layers lists 2 layers, but the student has 4; list one for each"),
        ({"decoder_layers": ()}, "decoder_layers lists 0 layers, but the student has 3"),
    ],
)
def test_a_list_of_layers_that_does_not_fit_is_refused(lists, told):
    with pytest.raises(UserError, match=told):
        StudentInit(kind="layers", **lists).check(TEACHER, TEACHER)


def test_settings_that_contradict_themselves_are_refused():
    with pytest.raises(UserError, match="kind is 'middle'; choose one of random, layers, slice"):
        StudentInit(kind="middle")
    with pytest.raises(UserError, match=r"encoder_layers is \(0,\); kind must be 'layers' or 'slice' then"):
        StudentInit(encoder_layers=(0,))
    with pytest.raises(UserError, match=r"decoder_layers is 3; give a tuple of layers, such as \(0, 3\) or \(3,\)"):
        StudentInit(kind="layers", decoder_layers=3)
    with pytest.raises(UserError, match="there is no teacher; choose 'random'"):
        LAYERS.check(None, TEACHER)
