"""The mesh, and which part of each array lies where, as far as one device can tell; see multi_device/ for the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    opt_state_shardings,
    param_shardings,
    place_batch,
)
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import abstract_state, state_shardings

CONFIG = T5Config(
    vocab_size=130, d_model=128, num_heads=2, head_dim=80, mlp_dim=144, num_encoder_layers=2, num_decoder_layers=1
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def specs(shardings):
    """name -> the mesh axis of each axis, without trailing None."""
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {"/".join(entry.key for entry in path): tuple(leaf.spec) for path, leaf in leaves}


def test_mesh_has_its_three_axes_and_one_may_be_what_is_left():
    for axes in ({}, {"data": 1, "fsdp": -1}, {"data": 1, "tensor": -1}, {"data": 1, "fsdp": 1, "tensor": 1}):
        mesh = make_mesh(**axes, devices=jax.devices()[:1])
        assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "tensor")
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as arranging a mesh asks for it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self):
        """In a slice of two by two."""
        return self.id % 2, self.id // 2 % 2, 0


def chips(slices, processes=1, **kinds):
    return [Chip(id=i, slice_index=i * slices // 8, process_index=i * processes // 8, **kinds) for i in range(8)]


@pytest.mark.parametrize("axes", [(2, 4, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1), (-1, 2, 1)])
def test_every_slice_holds_whole_rows_of_the_mesh_along_data(axes):
    shuffled = np.random.default_rng(0).permutation(8)
    for devices in (chips(2, platform="tpu"), chips(2), chips(1, processes=2)):
        devices = [devices[i] for i in shuffled] if devices[0].slice_index != devices[-1].slice_index else devices
        told_by_devices = devices[0].platform == "tpu"
        found = make_mesh(*axes, devices=devices, slices=None if told_by_devices else 2).devices
        assert sorted(chip.id for chip in found.flat) == list(range(8))
        group = np.vectorize(lambda chip: chip.id // 4)(found)
        first, second = np.split(group, 2)  # along data
        assert (first == 0).all() and (second == 1).all()


def test_only_data_goes_over_slices_and_their_number_must_be_that_of_the_devices():
    with pytest.raises(UserError, match="mesh axis data=1 does not split over 2 slices; make it a multiple of 2"):
        make_mesh(1, 8, 1, devices=chips(2, platform="tpu"))
    for slices, devices, right in ((4, chips(2), 2), (2, chips(1), 1), (3, chips(1, processes=4), 4), (0, chips(1), 1)):
        with pytest.raises(UserError, match=f"slices is {slices}, but the 8 devices form .*; choose {right}, or leave"):
            make_mesh(8, 1, 1, devices=devices, slices=slices)
    # What is no TPU is taken for one slice unless it is asked for: hosts with GPUs are often joined well enough.
    assert make_mesh(1, 8, 1, devices=chips(2)).shape["fsdp"] == 8


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({"data": 2}, "data=2 x fsdp=1 x tensor=1 does not fit 1 devices"),
        ({"fsdp": 3}, "does not fit 1 devices"),
        ({"data": 0}, "sizes must be positive"),
        ({"tensor": -2}, "sizes must be positive"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(axes, told):
    with pytest.raises(UserError, match=told):
        make_mesh(**axes, devices=jax.devices()[:1])


def test_parameters_are_split_as_the_rules_say(mesh):
    """By hand: the residual width over fsdp; heads, joined heads, MLP and vocabulary over tensor; layers whole."""
    found = specs(param_shardings(CONFIG, mesh))
    inward, outward = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    expected = {
        "token_embedder/embedding": ("tensor", "fsdp"),
        "encoder/relpos_bias/rel_embedding": ("tensor", None),
        "encoder/encoder_norm/scale": (),
        "encoder/layers/pre_attention_layer_norm/scale": (),
        "encoder/layers/attention/query/kernel": inward,
        "encoder/layers/attention/key/kernel": inward,
        "encoder/layers/attention/value/kernel": inward,
        "encoder/layers/attention/out/kernel": outward,
        "encoder/layers/mlp/wi_0/kernel": inward,
        "encoder/layers/mlp/wi_1/kernel": inward,
        "encoder/layers/mlp/wo/kernel": outward,
        "decoder/layers/encoder_decoder_attention/query/kernel": inward,
        "decoder/layers/self_attention/out/kernel": outward,
        "decoder/logits_dense/kernel": ("fsdp", "tensor"),
    }
    assert {name: found[name] for name in expected} == expected
    # No kernel and no table is left whole.
    for name, spec in found.items():
        assert {"fsdp", "tensor"} <= set(spec) or name.endswith(("scale", "rel_embedding")), name


def test_a_replicated_model_is_split_over_tensor_alone(mesh):
    sharded, replicated = (specs(param_shardings(CONFIG, mesh, kind)) for kind in ("sharded", "replicated"))
    without = {name: tuple(None if axis == "fsdp" else axis for axis in spec) for name, spec in sharded.items()}
    assert replicated == without and {axis for spec in replicated.values() for axis in spec} == {None, "tensor"}
    with pytest.raises(UserError, match="the sharding of parameters is 'whole'; choose one of sharded, replicated"):
        param_shardings(CONFIG, mesh, "whole")


def test_shardings_fit_the_parameters_they_are_for(mesh):
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tied_head=tied)
        shapes, shardings = abstract_params(config), param_shardings(config, mesh)
        assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
        jax.tree.map(lambda shape, sharding: sharding.shard_shape(shape.shape), shapes, shardings)


def test_abstract_parameters_are_those_that_initialisation_gives():
    initial = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, abstract_params(CONFIG), initial))


def test_adam_moments_lie_like_their_parameters(mesh):
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), 10)
    params = param_shardings(CONFIG, mesh)
    shardings = state_shardings(CONFIG, optimizer, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract_state(CONFIG, optimizer))
    assert shardings.params == params
    for moment in ("mu", "nu"):
        assert optax.tree_utils.tree_get(shardings.opt_state, moment) == params
    assert shardings.step.spec == PartitionSpec()


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "clip_norm": None}])
def test_adafactor_statistics_are_replicated_where_factored_and_lie_like_their_parameter_elsewhere(mesh, settings):
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", **settings), 10)
    params, shardings = abstract_params(CONFIG), param_shardings(CONFIG, mesh)
    placed = opt_state_shardings(optimizer, params, shardings, mesh)
    state = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    whole, rows, columns = (optax.tree_utils.tree_get(placed, name) for name in ("v", "v_row", "v_col"))
    assert rows["encoder"]["layers"]["mlp"]["wi_0"]["kernel"].spec == PartitionSpec()
    assert columns["encoder"]["layers"]["mlp"]["wi_0"]["kernel"].spec == PartitionSpec()
    # Not factored, for one of its axes is small.
    assert whole["encoder"]["relpos_bias"]["rel_embedding"].spec == PartitionSpec("tensor", None)
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), state, placed)


def test_batch_is_spread_over_data_and_fsdp_and_keeps_its_types(mesh):
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.ones((2, 3), np.float32)}
    placed = place_batch(batch, mesh)
    assert {name: x.dtype for name, x in placed.items()} == {"tokens": jnp.int32, "weights": jnp.float32}
    for name, x in placed.items():
        np.testing.assert_array_equal(x, batch[name])
        assert x.sharding.is_equivalent_to(batch_sharding(mesh), 2)
