import json
import pathlib
import shutil

import flax
import jax
import numpy as np
import pytest
from flax import serialization

from endistill_jax.checkpoints import t5x
from endistill_jax.checkpoints.interchange import assemble
from endistill_jax.models.family import stack_layers
from endistill_jax.models.t5.config import T5Config

GOLDENS = pathlib.Path(__file__).parent / "goldens"


class Golden:
    """A model that T5X's network was recorded with.

    Attributes:
        flat: its tensors by the names of `t5x.examples.t5`.
        config: its configuration, in our terms.
    """

    def __init__(self, kind):
        self.data = np.load(GOLDENS / f"{kind}.npz")
        self.flat = {key[7:]: self.data[key].astype(np.float32) for key in self.data if key.startswith("tensor/")}
        self.config = config_of(json.loads(str(self.data["settings"])))

    @property
    def params(self):
        """In our layout."""
        return stack_layers(flax.traverse_util.unflatten_dict(dict(self.flat), sep="/"))

    def part(self, name):
        """The arrays under a name."""
        return {key[len(name) + 1 :]: self.data[key] for key in self.data if key.startswith(f"{name}/")}


def config_of(settings):
    """Our configuration of T5X's settings."""
    settings = dict(settings)
    return T5Config(
        d_model=settings.pop("emb_dim"),
        tied_head=settings.pop("logits_via_embedding"),
        mlp_activations=tuple(settings.pop("mlp_activations")),
        **settings,
    )


def write_inline(folder, tensors, version=3):
    """A checkpoint whose arrays all lie in the msgpack file, and a gin file beside it that says the dropout."""
    folder.mkdir(parents=True)
    (folder.parent / "config.gin").write_text("network.T5Config.dropout_rate = %DROPOUT_RATE\nDROPOUT_RATE = 0.1\n")
    target = flax.traverse_util.unflatten_dict(dict(tensors), sep="/")
    state = {"step": np.int32(7), "param_states": {"poison": np.float32("nan")}}
    content = {"version": version, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


def read_model(path, dtype=np.float32):
    with t5x.open_checkpoint(str(path)) as source:
        return assemble(source, dtype)[0], source.config


def assert_same_tree(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def write():
    return write_inline


@pytest.fixture(scope="session")
def read():
    return read_model


@pytest.fixture(scope="session")
def assert_same():
    return assert_same_tree


@pytest.fixture
def stored(tmp_path):
    """Unpacks a checkpoint that T5X wrote; gives its model directory."""

    def unpack(name):
        shutil.unpack_archive(GOLDENS / f"{name}.zip", tmp_path / name)
        return tmp_path / name

    return unpack
