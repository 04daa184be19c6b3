"""Which positions count as real tokens."""

import jax
import numpy as np

from endistill_jax.core.model_io import batch_segments

UNPACKED = {
    "encoder_input_tokens": np.array([[5, 6, 1, 0]], np.int32),
    "decoder_input_tokens": np.array([[0, 7, 8]], np.int32),
    "decoder_target_tokens": np.array([[7, 8, 1]], np.int32),
}


def test_unpacked_batches_have_one_segment_of_the_real_tokens():
    segments = batch_segments(UNPACKED)
    np.testing.assert_array_equal(segments.encoder, [[1, 1, 1, 0]])
    # Not from the decoder's inputs, which begin with the id of padding.
    np.testing.assert_array_equal(segments.decoder, [[1, 1, 1]])


def test_packed_batches_keep_their_segment_ids():
    ids = {
        "encoder_segment_ids": np.array([[1, 2, 2, 0]], np.int32),
        "decoder_segment_ids": np.array([[1, 1, 2]], np.int32),
    }
    jax.tree.map(np.testing.assert_array_equal, tuple(batch_segments(UNPACKED | ids)), tuple(ids.values()))
