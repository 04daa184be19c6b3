"""Stacked and numbered layers are two layouts of the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.models.family import stack_layers, unstack_layers


def _assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_unstacking_numbers_each_layer_and_leaves_the_rest(config, params):
    flat = unstack_layers(params)
    assert set(flat["encoder"]) == {"relpos_bias", "encoder_norm"} | {f"layers_{i}" for i in range(4)}
    assert set(flat["decoder"]) == {"relpos_bias", "decoder_norm", "logits_dense"} | {f"layers_{i}" for i in range(3)}
    for index in range(4):
        stacked = jax.tree.map(lambda leaf, i=index: leaf[i], params["encoder"]["layers"])
        _assert_identical(flat["encoder"][f"layers_{index}"], stacked)
    assert flat["encoder"]["layers_0"]["attention"]["query"]["kernel"].shape == (config.d_model, config.inner_dim)
    _assert_identical(flat["token_embedder"], params["token_embedder"])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_round_trip_gives_the_same_arrays_of_the_same_kind(params, array):
    params = jax.tree.map(array, params)
    again = stack_layers(unstack_layers(params))
    _assert_identical(again, params)
    assert {type(leaf) for leaf in jax.tree.leaves(again)} == {type(leaf) for leaf in jax.tree.leaves(params)}


def test_neither_direction_changes_its_argument(params):
    stacked = {name: dict(tree) for name, tree in params.items()}
    flat = unstack_layers(stacked)
    assert set(stacked["encoder"]) == set(params["encoder"])
    names = set(flat["encoder"])
    stack_layers(flat)
    assert set(flat["encoder"]) == names


def test_ten_layers_and_more_are_put_in_the_order_of_their_numbers():
    encoder = {f"layers_{index}": {"scale": np.full(2, index)} for index in range(12)}
    stacked = stack_layers({"encoder": encoder, "decoder": {"layers_0": {"scale": np.zeros(2)}}})
    np.testing.assert_array_equal(stacked["encoder"]["layers"]["scale"][:, 0], np.arange(12))


@pytest.mark.parametrize("missing", [{"layers_1"}, {"layers_0"}, {"layers_0", "layers_1", "layers_2", "layers_3"}])
def test_gap_in_the_numbers_is_refused(params, missing):
    flat = unstack_layers(params)
    flat["encoder"] = {name: tree for name, tree in flat["encoder"].items() if name not in missing}
    with pytest.raises(ValueError, match="encoder has layers .*without a gap"):
        stack_layers(flat)
