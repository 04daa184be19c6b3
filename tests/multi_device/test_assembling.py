"""A checkpoint's tensors go straight onto the shards of a mesh."""

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.fingerprint import fingerprint_params
from endistill_jax.checkpoints.interchange import assemble
from endistill_jax.checkpoints.models import open_model
from endistill_jax.jobs import import_checkpoint
from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import make_mesh, param_shardings

CONFIG = T5Config(
    vocab_size=48, d_model=16, num_heads=4, head_dim=4, mlp_dim=24, num_encoder_layers=2, num_decoder_layers=3
)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("huggingface") / "model")
    huggingface.save(path, params, CONFIG)
    return path


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_device_holds_its_shard_and_no_more(folder, params, shape):
    shardings = param_shardings(CONFIG, make_mesh(*shape))
    with huggingface.open_folder(folder) as source:
        placed, fingerprint = assemble(source, "float32", shardings)
    assert fingerprint == fingerprint_params(params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), params)
    for leaf, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(shardings), strict=True):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {sharding.shard_shape(leaf.shape)}


def test_an_import_is_restored_onto_another_mesh(folder, params, tmp_path):
    import_checkpoint(source=folder, model_dir=str(tmp_path / "run"), mesh=(1, 4, 2))
    model = open_model(str(tmp_path / "run"))
    mesh = make_mesh(2, 2, 2)
    placed = model.load_on(mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == param_shardings(CONFIG, mesh)
    assert model.fingerprint == fingerprint_params(params)
    whole = open_model(str(tmp_path / "run")).load_on(make_mesh(1, 8, 1), "replicated")
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), params)
