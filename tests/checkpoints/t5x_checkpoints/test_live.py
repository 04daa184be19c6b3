"""The same model in T5X and here; runs where T5X is installed (docs/t5x.md)."""

import pathlib
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("t5x.checkpoints", reason="needs T5X, see docs/t5x.md")

import seqio  # noqa: E402
from t5x import adafactor, checkpoints, models, partitioning, utils  # noqa: E402

import gin  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import record_t5x as recorder  # noqa: E402
from comparison import differences, run_ours  # noqa: E402

from endistill_jax.checkpoints import t5x  # noqa: E402

FAMILY = {False: "v1_1", True: "scanned"}


def _assert_same_function(reference, params, config, theirs=None):
    """Padded and packed, `theirs` being T5X's parameters if they are not the reference's."""
    for make in (recorder.padded_batch, recorder.packed_batch):
        batch = make(config.vocab_size, seed=3)
        found = differences(run_ours(params, config, batch), recorder.run(reference, batch, theirs), batch)
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("kind", "write"),
    [(kind, recorder.save_native) for kind in recorder.KINDS]
    + [("v1_1", recorder.save_orbax), ("scanned", recorder.save_orbax)],
)
def test_import_of_what_t5x_saves_computes_the_same(tmp_path, read, kind, write):
    reference = recorder.build(kind, seed=1)
    write(reference, str(tmp_path))
    params, config = read(tmp_path)
    _assert_same_function(reference, params, config)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_both_of_t5xs_types_are_imported_bit_for_bit(tmp_path, read, dtype):
    reference = recorder.build("v1_1", seed=1)
    recorder.save_native(reference, str(tmp_path), save_dtype=dtype)
    params, _ = read(tmp_path, dtype)
    stored = checkpoints.load_t5x_checkpoint(str(tmp_path))["target"]
    kernel = np.asarray(stored["decoder"]["layers_2"]["mlp"]["wo"]["kernel"])
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(params["decoder"]["layers"]["mlp"]["wo"]["kernel"][2], kernel)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["v1_0", "v1_1", "mt5", "scanned"])
def test_load_t5x_checkpoint_reads_our_export_and_its_network_computes_the_same(tmp_path, read, golden, kind, dtype):
    scanned = kind == "scanned"
    t5x.save(str(tmp_path), golden(kind).params, golden(kind).config, step=7, dtype=dtype, scanned=scanned)
    loaded = checkpoints.load_t5x_checkpoint(str(tmp_path))
    assert int(loaded["state"]["step"]) == 7
    theirs = jax.tree.map(np.asarray, loaded["target"])
    reference = recorder.Reference(kind, golden(kind).flat)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), reference.params())
    jax.tree.map(np.testing.assert_array_equal, theirs, flax.core.unfreeze(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(theirs)} == {np.dtype(dtype)}
    if dtype == np.float32:
        _assert_same_function(reference, *read(tmp_path), theirs)


def _initializer(reference, optimizer):
    vocabulary = seqio.PassThroughVocabulary(reference.settings["vocab_size"])
    model = models.EncoderDecoderModel(reference.network(), vocabulary, vocabulary, optimizer_def=optimizer)
    return utils.TrainStateInitializer(
        optimizer_def=optimizer,
        init_fn=model.get_initial_variables,
        input_shapes=dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), (1, 4)),
        partitioner=partitioning.PjitPartitioner(num_partitions=1),
    )


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_t5x_restores_our_export_for_evaluation_and_for_fine_tuning(tmp_path, golden, training, scanned):
    kind = FAMILY[scanned]
    t5x.save(str(tmp_path), golden(kind).params, golden(kind).config, step=7, scanned=scanned)
    rules = adafactor.standard_logical_factor_rules()
    reference = recorder.Reference(kind, golden(kind).flat)
    initializer = _initializer(reference, adafactor.Adafactor(1e-3, logical_factor_rules=rules) if training else None)
    path = str(tmp_path / "checkpoint_7")
    # There is no optimizer's state to restore: fine-tuning begins with a new one.
    new_optimizer = {"fallback_to_scratch": True, "assignment_map": (("state/param_states.*", None),)}
    restored = initializer.from_checkpoint(
        [utils.RestoreCheckpointConfig(path=path, mode="specific", **(new_optimizer if training else {}))],
        init_rng=jax.random.PRNGKey(0),
    )
    assert int(restored.step) == 7
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(restored.params), reference.params())


def test_fine_tuning_without_the_fallback_fails_before_it_starts(tmp_path, golden):
    t5x.save(str(tmp_path), golden("v1_1").params, golden("v1_1").config, step=7)
    rules = adafactor.standard_logical_factor_rules()
    reference = recorder.Reference("v1_1", golden("v1_1").flat)
    initializer = _initializer(reference, adafactor.Adafactor(1e-3, logical_factor_rules=rules))
    with pytest.raises(ValueError, match="param_states"):
        initializer.from_checkpoint(
            [utils.RestoreCheckpointConfig(path=str(tmp_path / "checkpoint_7"), mode="specific")]
        )


@pytest.mark.parametrize("scanned", [False, True])
def test_gin_file_of_our_export_sets_up_t5xs_network(tmp_path, golden, scanned):
    kind = FAMILY[scanned]
    t5x.save(str(tmp_path), golden(kind).params, golden(kind).config, step=7, scanned=scanned)
    family = recorder.scalable_network if scanned else recorder.network
    with gin.unlock_config():
        gin.clear_config()
        gin.parse_config_file(str(tmp_path / "checkpoint_7" / "model.gin"))
        config = gin.get_configurable(family.T5Config)()
        gin.clear_config()
    expected = recorder.Reference(kind, golden(kind).flat).network().config
    assert config.replace(mlp_activations=list(config.mlp_activations)) == expected


def test_checkpoints_that_t5x_tests_itself_with_are_read(read):
    file = pathlib.Path(checkpoints.__file__).parent / "testdata" / "test_t5_tiny.checkpoint_0"
    if not file.is_file():
        pytest.skip("T5X is installed without its test data")
    params, config = read(file)
    assert (config.vocab_size, config.d_model, config.num_heads, config.head_dim) == (32128, 8, 4, 3)
    stored = flax.serialization.msgpack_restore(file.read_bytes())["optimizer"]["target"]
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], stored["decoder"]["logits_dense"]["kernel"]
    )
