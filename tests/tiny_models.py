"""The tiny student and teacher of the tests: every width a multiple of eight, so that any mesh of eight splits them."""

import dataclasses

import jax
import numpy as np

from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config

STUDENT = T5Config(
    vocab_size=40,
    d_model=16,
    num_heads=8,
    head_dim=3,
    mlp_dim=32,
    num_encoder_layers=3,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=12,
)
TEACHER = dataclasses.replace(STUDENT, d_model=24, head_dim=6, mlp_dim=56, tied_head=True)
ROWS, SOURCE, TARGET = 16, 6, 5


def random_params(config, seed):
    """The normalization scales around one, so that the function is far from degenerate."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def packed_batch():
    """Rows of two examples, one or none; the first four, on some meshes whole devices, are empty."""
    rng = np.random.default_rng(5)
    examples = np.repeat([0, 1, 2], [4, 5, 7])  # of each row

    def side(most):
        lengths = np.where(np.arange(2) < examples[:, None], rng.integers(1, most // 2 + 1, (ROWS, 2)), 0)
        first, both = np.cumsum(lengths, axis=1)[..., None].swapaxes(0, 1)  # [rows, 1] each
        position = np.arange(most)
        segments = np.where(position < first, 1, np.where(position < both, 2, 0)).astype(np.int32)
        return segments, np.where(segments > 0, rng.integers(1, STUDENT.vocab_size, (ROWS, most)), 0).astype(np.int32)

    (source_segments, source), (target_segments, target) = side(SOURCE), side(TARGET)
    shifted, before = (np.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in (target, target_segments))
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": source_segments,
        "decoder_input_tokens": np.where(before == target_segments, shifted, 0),
        "decoder_target_tokens": target,
        "decoder_segment_ids": target_segments,
        "decoder_loss_weights": np.where(target > 0, rng.choice([0.5, 1.0], target.shape), 0).astype(np.float32),
    }
