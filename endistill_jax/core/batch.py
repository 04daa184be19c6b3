"""What a batch is: SeqIO's encoder-decoder features, and which of their positions see each other."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Integer arrays by SeqIO's names: `encoder_input_tokens` [batch, source]; `decoder_input_tokens`,
# `decoder_target_tokens`, `decoder_loss_weights` [batch, target]; when examples are packed also
# `encoder_segment_ids`, `decoder_segment_ids` and positions. Token 0 is padding.
Batch = Mapping[str, Array]


class Segments(NamedTuple):
    """Segment ids of encoder and decoder: 0 is padding; positions with equal ids may attend to each other."""

    encoder: Int[Array, "batch source"]
    decoder: Int[Array, "batch target"]


class Lengths(NamedTuple):
    """Number of examples and lengths of both sides, padding included."""

    batch: int
    source: int
    target: int


def segment_ids(batch: Batch, side: Literal["encoder", "decoder"]) -> Int[Array, "batch length"]:
    """The batch's own ids when it is packed, else 1 at real tokens and 0 at padding.

    Real decoder tokens are those with a target: the first decoder *input* is the start symbol, which has the id of
    padding.
    """
    ids = f"{side}_segment_ids"
    tokens = "encoder_input_tokens" if side == "encoder" else "decoder_target_tokens"
    return jnp.asarray(batch[ids] if ids in batch else batch[tokens] != 0, jnp.int32)


def batch_segments(batch: Batch) -> Segments:
    """The segment ids of both sides; see `segment_ids`."""
    return Segments(encoder=segment_ids(batch, "encoder"), decoder=segment_ids(batch, "decoder"))


def visible_keys(
    query_segments: Int[Array, "batch query"], key_segments: Int[Array, "batch key"], causal: bool
) -> Bool[Array, "batch query key"]:
    """Attention mask: each query sees the keys of its own non-zero segment, and if causal none after it.

    Causal compares positions in the arrays, so segments must be contiguous and both sides the same sequence.
    """
    queries, keys = query_segments[:, :, None], key_segments[:, None, :]
    visible = (queries == keys) & (queries != 0)
    if causal:
        visible &= jnp.tri(query_segments.shape[1], key_segments.shape[1], dtype=bool)
    return visible
