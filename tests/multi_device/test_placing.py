"""Where eight devices hold what, and what cannot be spread over them."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from endistill_jax.errors import UserError
from endistill_jax.evaluation.denoising import evaluate_denoising, make_denoising_step, t5_logits
from endistill_jax.model.config import T5Config
from endistill_jax.sharding import abstract_params, make_mesh, param_shardings, place_batch
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import init_state

CONFIG = T5Config(
    vocab_size=40, d_model=16, num_heads=8, head_dim=4, mlp_dim=24, num_encoder_layers=1, num_decoder_layers=1
)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), abstract_params(config))


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (-1, 2, 1), (2, -1, 2)])
def test_mesh_uses_every_device_once(axes):
    mesh = make_mesh(*axes)
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert all(size in (asked, 8 // np.prod([a for a in axes if a != -1])) for size, asked in
               zip(mesh.devices.shape, axes, strict=True))  # fmt: skip


@pytest.mark.parametrize("axes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (16, 1, 1)])
def test_mesh_of_another_number_of_devices_is_refused(axes):
    with pytest.raises(UserError, match="does not fit 8 devices; the product of its axes must equal that"):
        make_mesh(*axes)


@pytest.mark.parametrize(
    ("changes", "axes", "told"),
    [
        ({"num_heads": 4}, (1, 1, 8), r"rel_embedding has an axis of 4, which mesh axis tensor=8"),
        ({"mlp_dim": 20}, (1, 1, 8), r"mlp/.* has an axis of 20, which mesh axis tensor=8"),
        ({"vocab_size": 42}, (2, 1, 4), r"has an axis of 42, which mesh axis tensor=4"),
        ({"d_model": 12}, (1, 8, 1), r"has an axis of 12, which mesh axis fsdp=8"),
    ],
)
def test_width_that_a_mesh_axis_does_not_divide_is_refused_and_the_fix_named(changes, axes, told):
    with pytest.raises(UserError, match=told) as error:
        param_shardings(dataclasses.replace(CONFIG, **changes), make_mesh(*axes))
    assert "among the divisors of" in str(error.value) and "\n" not in str(error.value)


def test_batch_that_does_not_split_over_the_examples_axes_is_refused():
    batch = {"tokens": np.zeros((12, 3), np.int32)}
    for axes in ((8, 1, 1), (2, 4, 1), (1, 8, 1)):
        with pytest.raises(UserError, match="12 examples does not split over data x fsdp = 8"):
            place_batch(batch, make_mesh(*axes))
    assert place_batch(batch, make_mesh(2, 2, 2))["tokens"].addressable_shards[0].data.shape == (3, 3)


def test_rows_of_a_batch_lie_on_data_and_fsdp_in_order_and_are_repeated_over_tensor():
    tokens = np.arange(16, dtype=np.int32).reshape(8, 2)
    mesh = make_mesh(2, 2, 2)
    placed = place_batch({"tokens": tokens}, mesh)["tokens"]
    by_device = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        start = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(by_device[device], tokens[start : start + 2])


def test_initial_parameters_do_not_depend_on_the_mesh():
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def initial(axes, devices):
        mesh = make_mesh(*axes, devices=jax.devices()[:devices])
        return jax.device_get(init_state(CONFIG, optimizer, mesh, jax.random.key(7)).params)

    jax.tree.map(np.testing.assert_array_equal, initial((2, 2, 2), 8), initial((1, 1, 1), 1))


def test_adafactor_statistics_are_replicated_where_factored():
    wide = dataclasses.replace(CONFIG, d_model=128, mlp_dim=256)
    optimizer = make_optimizer(OptimizerConfig(name="adafactor"), 10)
    state = init_state(wide, optimizer, make_mesh(2, 2, 2), jax.random.key(0), random_params(wide))
    whole, rows, columns = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("v", "v_row", "v_col"))
    kernel = state.params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 128, 64)
    for statistic, size in ((rows, 256), (columns, 128)):
        leaf = statistic["encoder"]["layers"]["mlp"]["wo"]["kernel"]
        assert leaf.sharding.is_fully_replicated and leaf.shape in ((1, size), (1, 384 - size))
    scale = whole["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"]  # one large axis alone: not factored
    assert scale.shape == (1, 128) and scale.addressable_shards[0].data.shape == (1, 64)


def test_evaluation_gives_the_same_report_on_every_mesh():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 6, (16, 1))  # some rows have no target
    targets = np.where(np.arange(5) < lengths, rng.integers(1, 40, (16, 5)), 0).astype(np.int32)
    batch = {
        "encoder_input_tokens": rng.integers(2, 40, (16, 7)).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }

    def report(axes, devices):
        mesh = make_mesh(*axes, devices=jax.devices()[:devices])
        params = jax.device_put(random_params(CONFIG), param_shardings(CONFIG, mesh))
        step = make_denoising_step(t5_logits(CONFIG), sentinel_ids=range(36, 40))
        return evaluate_denoising(step, params, [batch], place=lambda batch: place_batch(batch, mesh))

    expected, actual = report((1, 1, 1), 1), report((2, 2, 2), 8)
    assert (actual.tokens, actual.pieces) == (expected.tokens, expected.pieces) == (lengths.sum(), expected.pieces)
    assert (actual.accuracy, actual.piece_accuracy) == (expected.accuracy, expected.piece_accuracy)
    for name in ("loss", "piece_loss", "wrong_input_piece_loss"):
        # Float32 sums over some fifty tokens, in another order.
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    assert expected.wrong_input_cost != 0
