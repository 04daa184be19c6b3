"""The walk over a model's tensors that all foreign formats share."""

import functools

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.fingerprint import fingerprint_params
from endistill_jax.checkpoints.interchange import assemble, check_finite, parameters, tensors_of
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import unstack_layers
from endistill_jax.sharding import make_mesh, param_shardings


class _Memory:
    """A source whose tensors are those of a tree; counts how often each is asked for."""

    def __init__(self, params, config):
        self.where, self.config, self.vocabulary, self.step, self.notes = "memory", config, None, 0, ()
        self.fetch, self.asked = tensors_of(params, config), []

    def read(self, parameter):
        self.asked.append(parameter.name)
        return self.fetch(parameter)


def _leaf(tree, path):
    return functools.reduce(lambda branch, name: branch[name], path, tree)


def test_parameters_are_every_tensor_under_its_interchange_name(params, config):
    unstacked = jax.tree_util.tree_leaves_with_path(unstack_layers(params))
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in unstacked}
    assert {parameter.name: parameter.shape for parameter in parameters(config)} == shapes


def test_a_model_is_assembled_as_it_was_taken_apart_and_each_tensor_is_read_once(params, config):
    source = _Memory(params, config)
    assembled, fingerprint = assemble(source, np.float32)
    jax.tree.map(np.testing.assert_array_equal, assembled, params)
    assert fingerprint == fingerprint_params(params)
    assert sorted(source.asked) == sorted(parameter.name for parameter in parameters(config))


def test_a_model_assembled_on_a_mesh_is_the_same_and_lies_as_asked(params, config):
    shardings = param_shardings(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    placed, fingerprint = assemble(_Memory(params, config), np.float32, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings
    assert fingerprint == fingerprint_params(params)


def test_a_cast_changes_the_parameters_and_not_the_fingerprint(params, config):
    exact, fingerprint = assemble(_Memory(params, config), "float32")
    cast, fingerprint_of_cast = assemble(_Memory(params, config), "bfloat16")
    assert fingerprint == fingerprint_of_cast
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(cast))
    assert fingerprint_params(cast) != fingerprint_params(exact)


@pytest.mark.parametrize("path", [("token_embedder", "embedding"), ("encoder", "layers", "mlp", "wo", "kernel")])
def test_parameters_that_are_not_the_configurations_are_named(params, config, path):
    def changed(change):
        tree = jax.tree.map(lambda leaf: leaf, params)  # new dictionaries, the same arrays
        change(_leaf(tree, path[:-1]))
        return tree

    name = "/".join(path)
    with pytest.raises(UserError, match=f"the parameters lack {name}"):
        tensors_of(changed(lambda parent: parent.pop(path[-1])), config)
    with pytest.raises(UserError, match=f"{name} has shape .*; the configuration makes it"):
        tensors_of(changed(lambda parent: parent.update({path[-1]: np.zeros((2, 3, 4))})), config)
    with pytest.raises(UserError, match="no place for the parameter .*novel"):
        tensors_of(changed(lambda parent: parent.update(novel=np.zeros(3))), config)


def test_nan_and_infinity_are_found_in_any_block(monkeypatch):
    monkeypatch.setattr("endistill_jax.checkpoints.fingerprint._BLOCK", 16)
    for value in (np.nan, np.inf, -np.inf):
        for place in range(0, 60, 7):
            tensor = np.zeros((20, 3), np.float32)
            tensor.flat[place] = value
            with pytest.raises(UserError, match="the tensor holds NaN or infinity"):
                check_finite(tensor, "the tensor")
            check_finite(np.where(np.isfinite(tensor), tensor, 0), "the tensor")
