"""Where eight devices hold what, and what cannot be spread over them."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import HeldOut
from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.attention import attend, attend_in_groups
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import presets
from endistill_jax.sharding import activation_sharding, make_mesh, param_shardings, place_batch
from endistill_jax.train.experiment import Data, Experiment, Run, Teacher
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import abstract_state, init_state, state_shardings
from endistill_jax.train.training import Training

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
        ({"num_heads": 4}, (1, 1, 8), "tensor=8 does not divide the model's num_heads of 4; .* tensor may be 1, 2, 4 "),
        ({"mlp_dim": 20}, (1, 1, 8), "tensor=8 does not divide the model's mlp_dim of 20; .* tensor may be 1, 2, 4 "),
        ({"vocab_size": 42}, (2, 1, 4), "tensor=4 does not divide the model's vocab_size of 42; .* may be 1, 2 "),
        ({"d_model": 12}, (1, 8, 1), "fsdp=8 does not divide the model's d_model of 12; .* fsdp may be 1, 2, 4 "),
    ],
)
def test_width_that_a_mesh_axis_does_not_divide_is_refused_and_the_fix_named(changes, axes, told):
    config, mesh = dataclasses.replace(CONFIG, **changes), make_mesh(*axes)
    with pytest.raises(UserError, match=told) as error:
        param_shardings(config, mesh)
    assert "\n" not in str(error.value)
    if "d_model" in changes:  # a replicated model is not split there
        param_shardings(config, mesh, "replicated")


@pytest.mark.parametrize(
    ("student", "teacher", "data", "run", "told"),
    [
        ({}, {}, {}, {"mesh": (3, 1, 1)}, "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ({}, {}, {}, {"slices": 2}, r"slices is 2, but the 8 devices form 1 slice\(s\) in 1 process\(es\); choose 1"),
        ({"num_heads": 4}, {}, {}, {"mesh": (1, 1, 8)}, "the student's num_heads of 4; .* tensor may be 1, 2, 4 "),
        ({}, {"vocab_size": 42}, {}, {"mesh": (2, 1, 4)}, "the teacher's vocab_size of 42; .* tensor may be 1, 2 "),
        ({}, {"d_model": 12}, {}, {"mesh": (1, 8, 1)}, "the teacher's d_model of 12; .* fsdp may be 1, 2, 4 "),
        ({}, {}, {"batch_size": 20}, {}, r"Data.batch_size is 20; .* of 8 \(.* data x fsdp = 8\): choose 16 or 24"),
        ({}, {}, {"batch_size": 24}, {"micro_batches": 2}, "of 16 .* times Run.micro_batches = 2.: choose 16 or 32"),
        ({}, {}, {"eval_batch_size": 4}, {}, "Data.eval_batch_size is 4; .* of 8 .*: choose 8"),
        ({}, {}, {}, {"compiler_options": {"cpu": {"xla_nope": 1}}}, r"compiler_options\['cpu'\]\['xla_nope'\] = 1"),
    ],
)
def test_training_that_does_not_fit_its_mesh_is_refused_in_one_line_with_what_would_fit(
    student, teacher, data, run, told
):
    def training(teacher, sharding="sharded"):
        config = dataclasses.replace(CONFIG, **teacher)
        experiment = Experiment(
            student=dataclasses.replace(CONFIG, **student),
            teacher=Teacher(source="t", sharding=sharding),
            objective=presets.logits(),
            data=Data(task="none", **{"batch_size": 32, "eval_batch_size": 16} | data),
            optimizer=OptimizerConfig(),
            run=Run(steps=1, log_every=1, checkpoint_every=1, **run),
        )
        model = TrainedModel(source="t", config=config, vocabulary_file=None, step=0, manifest={}, _read=None)
        return Training(model_dir="nowhere", experiment=experiment, teacher=model)

    with pytest.raises(UserError, match=told) as error:
        training(teacher).check_mesh()
    assert "\n" not in str(error.value)
    if "d_model" in teacher:  # a replicated teacher is not split there
        training(teacher, sharding="replicated").check_mesh()


def test_batch_that_does_not_split_over_the_examples_axes_is_refused():
    batch = {"tokens": np.zeros((12, 3), np.int32)}
    for axes in ((8, 1, 1), (2, 4, 1), (1, 8, 1)):
        with pytest.raises(UserError, match="examples of a batch is 12; it must be a multiple of 8 "):
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
    assert scale.shape == (1, 128) and scale.sharding.is_fully_replicated  # as the scale is


@pytest.mark.parametrize(("name", "most"), [("adamw", 0.0), ("adafactor", 0.01)])
def test_what_each_device_holds_of_the_optimizer_is_its_share_but_for_the_small(name, most):
    """Of a student of 6 + 6 layers and width 768; `most` is the part of the parameters' size that may be replicated."""
    config = dataclasses.replace(
        CONFIG, vocab_size=32128, d_model=768, num_heads=12, head_dim=64, mlp_dim=2048, num_encoder_layers=6,
        num_decoder_layers=6,
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    state, shardings = abstract_state(config, optimizer), state_shardings(config, optimizer, make_mesh(1, 8, 1))
    held = jax.tree.map(lambda leaf, sharding: np.prod(sharding.shard_shape(leaf.shape)), state, shardings)
    whole = {"params": state.params, "opt_state": state.opt_state}
    total = sum(leaf.size for leaf in jax.tree.leaves(whole))
    on_device = sum(jax.tree.leaves({"params": held.params, "opt_state": held.opt_state}))
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert total / 8 <= on_device < total / 8 + most * params + 0.001 * params
    assert params > 1e8


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_evaluation_gives_the_same_report_on_every_mesh(placement):
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
        held_out = HeldOut(mesh=mesh, batches=[batch], ngrams=None, sentinel_ids=range(36, 40))
        return held_out.evaluate(CONFIG, random_params(CONFIG), placement)

    expected, actual = report((1, 1, 1), 1), report((2, 2, 2), 8)
    assert actual.tokens == expected.tokens == lengths.sum()
    assert actual.non_sentinel_tokens == expected.non_sentinel_tokens
    assert (actual.accuracy, actual.token_accuracy) == (expected.accuracy, expected.token_accuracy)
    for name in ("loss", "token_loss", "shuffled_input_loss"):
        # Float32 sums over some fifty tokens, in another order.
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    assert expected.shuffled_input_gap != 0


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_attention_of_rows_that_the_devices_do_not_divide_is_computed_all_at_once(rows, group_bytes):
    queries, keys, values = (jax.random.normal(jax.random.key(seed), (rows, 2, 3, 8)) for seed in range(3))
    arrays = queries, keys, values, jax.numpy.ones((rows, 1, 3, 3), bool), None
    with activation_sharding(make_mesh(8, 1, 1)):
        found = jax.jit(functools.partial(attend_in_groups, group_bytes=group_bytes))(*arrays)
    np.testing.assert_allclose(found, attend(*arrays), rtol=1e-6)
