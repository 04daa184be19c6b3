"""Which positions of a batch are real tokens, and which of them belong together."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """Segment ids of both sides of a batch.

    Attributes:
      encoder: int32 `[batch, source]`; 0 is padding, equal ids may see each other.
      decoder: int32 `[batch, target]`; decoder segment i belongs to encoder segment i.
    """

    encoder: jax.Array
    decoder: jax.Array


def batch_segments(batch: Mapping[str, jax.Array]) -> Segments:
    """Returns the segment ids of a batch: its own when it is packed, else 1 at real tokens and 0 at padding.

    Real decoder tokens are those with a target: the first decoder *input* is the start symbol, which has the id of
    padding.

    Args:
      batch: SeqIO encoder-decoder features: `encoder_segment_ids` and `decoder_segment_ids`, or else
        `encoder_input_tokens` `[batch, source]` and `decoder_target_tokens` `[batch, target]`, where 0 is padding.
    """

    def one_side(ids: str, tokens: str) -> jax.Array:
        return jnp.asarray(batch[ids] if ids in batch else batch[tokens] != 0, jnp.int32)

    return Segments(
        encoder=one_side("encoder_segment_ids", "encoder_input_tokens"),
        decoder=one_side("decoder_segment_ids", "decoder_target_tokens"),
    )
