"""Every search gives the same text on every mesh; the decoder's rows lie where the batch's do."""

import jax
import numpy as np
import pytest

from endistill_jax.models.family import abstract_params
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import batch_sharding, make_mesh, param_shardings

CONFIG = T5Config(
    vocab_size=40,
    d_model=16,
    num_heads=4,
    head_dim=3,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=12,
)
END = 35  # which these parameters make likely
SEARCHES = {
    "greedy": Decoding(max_length=6, eos_id=END),
    "sample": Decoding(max_length=6, eos_id=END, strategy="sample", top_k=20, top_p=0.9),
    "beam": Decoding(max_length=6, eos_id=END, strategy="beam", beams=3),
}
MESHES = {"8x1x1": "sharded", "2x2x2": "sharded", "1x2x4": "replicated"}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), abstract_params(CONFIG))


@pytest.fixture(scope="module")
def tokens():
    """Sixteen inputs, the last three empty, as in the last batch of a data set."""
    rng = np.random.default_rng(1)
    lengths = np.append(rng.integers(1, 7, 13), [0, 0, 0])
    return np.where(np.arange(6) < lengths[:, None], rng.integers(2, 40, (16, 6)), 0).astype(np.int32)


@pytest.mark.parametrize("search", SEARCHES)
def test_text_does_not_depend_on_the_mesh(params, tokens, search):
    key = jax.random.key(3)
    expected = make_decoder(CONFIG, SEARCHES[search])(params, tokens, key)
    assert len(set((np.asarray(expected.tokens[:13]) != 0).sum(axis=1))) > 1
    for axes, sharding in MESHES.items():
        mesh = make_mesh(*map(int, axes.split("x")))
        placed = jax.device_put(params, param_shardings(CONFIG, mesh, sharding))
        found = make_decoder(CONFIG, SEARCHES[search], mesh=mesh, sharding=sharding)(placed, tokens, key)
        assert found.tokens.sharding.is_equivalent_to(batch_sharding(mesh), 2)
        np.testing.assert_array_equal(found.tokens, expected.tokens, err_msg=axes)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5, err_msg=axes)
