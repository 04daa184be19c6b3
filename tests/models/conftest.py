"""A tiny model for tests: every dimension another number, so that no two can be confused."""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config

CONFIG = T5Config(
    vocab_size=23,
    d_model=10,
    num_heads=3,
    head_dim=4,
    mlp_dim=14,
    num_encoder_layers=4,
    num_decoder_layers=3,
    relative_buckets=8,
    relative_max_distance=12,
)

# (source, target) tokens of each example; none of them has another's lengths.
LENGTHS = ((5, 3), (2, 4), (4, 1), (3, 2))


def random_params(config):
    """Random parameters, the normalization scales around one, so that the function is far from degenerate."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def random_examples():
    rng = np.random.default_rng(1)
    return [[rng.integers(1, CONFIG.vocab_size, length).astype(np.int32) for length in pair] for pair in LENGTHS]


def lay_out(rows, source, target, packed, fill=0):
    """A batch with the given examples in each row, one after the other; `fill` is the token at padding positions."""
    examples = random_examples()
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: np.full((len(rows), source if "encoder" in name else target), fill, np.int32) for name in names}
    segments = {
        f"{stack}_segment_ids": np.zeros_like(batch[f"{stack}_input_tokens"]) for stack in ("encoder", "decoder")
    }
    for row, members in enumerate(rows):
        start = np.zeros(2, int)
        for number, member in enumerate(members, start=1):
            inputs, targets = examples[member]
            end = start + [len(inputs), len(targets)]
            places = [slice(*pair) for pair in zip(start, end, strict=True)]
            batch["encoder_input_tokens"][row, places[0]] = inputs
            batch["decoder_input_tokens"][row, places[1]] = np.append(0, targets[:-1])
            batch["decoder_target_tokens"][row, places[1]] = targets
            segments["encoder_segment_ids"][row, places[0]] = number
            segments["decoder_segment_ids"][row, places[1]] = number
            start = end
    return batch | (segments if packed else {})


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def small():
    """The same with one layer a stack, for what has nothing to do with depth."""
    return dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(scope="session")
def make_batch():
    return lay_out


@pytest.fixture(scope="session")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="session")
def batch():
    """Four examples, one a row, padded to unequal lengths on both sides."""
    return lay_out([[0], [1], [2], [3]], 6, 5, packed=False)
