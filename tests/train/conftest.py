"""A tiny teacher and student, a batch with uneven masks, and ways to make a state of them without random keys."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_models
from tiny_models import SOURCE, TARGET, random_params

from endistill_jax.objectives import CrossEntropy, ForwardKL, Objective, relations
from endistill_jax.sharding import make_mesh
from endistill_jax.train.state import TrainState, init_state

STUDENT = dataclasses.replace(tiny_models.STUDENT, num_encoder_layers=1, scan_layers=False)
TEACHER = dataclasses.replace(tiny_models.TEACHER, num_encoder_layers=1, scan_layers=False)

EVERYTHING = Objective(
    terms=(
        *relations("encoder_self", ("qq", "kk"), relation_heads=4),
        *relations("decoder_self", ("qk", "vv"), relation_heads=4),
        *relations("cross", ("qk", "vv"), coefficient=2.0, relation_heads=2),
        ForwardKL(coefficient=0.7, temperature=2.0),
        CrossEntropy(coefficient=0.3, z_loss=0.01),
    )
)

# (source, target) tokens of each row: no two parts of the batch have the same number, and one row is empty.
LENGTHS = ((6, 5), (2, 1), (5, 2), (0, 0), (6, 4), (1, 3), (4, 5), (3, 1))


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
def objective():
    """Every site, token distributions and language modeling."""
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
