import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from endistill_jax.checkpoints import huggingface


def assert_same_tree(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="session")
def assert_same():
    return assert_same_tree


@pytest.fixture
def folder(tmp_path, params, config):
    """A v1.1 model's folder, with every name of the embedding."""
    huggingface.save(tmp_path / "model", params, config)
    return tmp_path / "model"


def edit_folder(folder, change_tensors=None, **change_config):
    """Rewrites a folder with other tensors or config entries."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change_config}))
    if change_tensors:
        tensors = dict(load_file(folder / "model.safetensors"))
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="session")
def edit():
    return edit_folder
