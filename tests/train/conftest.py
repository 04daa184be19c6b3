"""A tiny teacher and student, a batch with uneven masks, and ways to make a state of them without random keys."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path, Site
from endistill_jax.sharding import make_mesh
from endistill_jax.train.state import TrainState, init_state

STUDENT = T5Config(
    vocab_size=19,
    d_model=8,
    num_heads=2,
    head_dim=6,
    mlp_dim=10,
    num_encoder_layers=1,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=12,
    scan_layers=False,
)
TEACHER = dataclasses.replace(STUDENT, d_model=14, head_dim=8, mlp_dim=22)

EVERYTHING = Path(
    encoder_self=Site(relations=("qq", "kk"), relation_heads=4),
    decoder_self=Site(relations=("qk", "vv"), relation_heads=4),
    cross=Site(relations=("qk", "vv"), weight=2.0, relation_heads=2),
    logits_weight=0.7,
    temperature=2.0,
    lm_weight=0.3,
    z_loss=0.01,
)

# (source, target) tokens of each row: no two parts of the batch have the same number, and one row is empty.
LENGTHS = ((6, 5), (2, 1), (5, 2), (0, 0), (6, 4), (1, 3), (4, 5), (3, 1))
SOURCE, TARGET = 6, 5


def random_params(config, seed):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def uneven_batch(vocab_size=STUDENT.vocab_size):
    rng = np.random.default_rng(5)
    real = [np.arange(length) < np.array(LENGTHS)[:, side, None] for side, length in enumerate((SOURCE, TARGET))]
    source, target = (np.where(mask, rng.integers(1, vocab_size, mask.shape), 0).astype(np.int32) for mask in real)
    return {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": real[1].astype(np.float32),
    }


@pytest.fixture(scope="session")
def student():
    return STUDENT


@pytest.fixture(scope="session")
def teacher():
    return TEACHER


@pytest.fixture(scope="session")
def path():
    """Every site, logits and language modelling."""
    return EVERYTHING


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(scope="session")
def teacher_params():
    return jax.tree.map(jax.numpy.asarray, random_params(TEACHER, seed=1))


@pytest.fixture
def batch():
    return uneven_batch()


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def gradient_descent():
    """Its update is the gradient, so that a step tells the gradient: the parameters before minus those after."""
    return optax.sgd(1.0)


@pytest.fixture(scope="session")
def new_state(mesh):
    def new(optimizer, config=STUDENT, seed=0) -> TrainState:
        return init_state(config, optimizer, mesh, jax.random.key(0), random_params(config, seed))

    return new
