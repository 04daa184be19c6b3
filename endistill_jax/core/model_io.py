"""What a model reads and what it returns: batches, requests, taps and outputs."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.attention import SITES, Segments, Stack
from endistill_jax.core.errors import UserError

# Integer arrays by SeqIO's names: `encoder_input_tokens` [batch, source]; `decoder_input_tokens`,
# `decoder_target_tokens`, `decoder_loss_weights` [batch, target]; when examples are packed also
# `encoder_segment_ids`, `decoder_segment_ids` and positions. Token 0 is padding.
Batch = Mapping[str, Array]


class Lengths(NamedTuple):
    """Number of examples and lengths of both sides, padding included."""

    batch: int
    source: int
    target: int


def segment_ids(batch: Batch, side: Stack) -> Int[Array, "batch length"]:
    """The batch's own ids when it is packed, else 1 at real tokens and 0 at padding."""
    ids = f"{side}_segment_ids"
    # Not the decoder's inputs: the first of them is the start symbol, which has the id of padding.
    tokens = "encoder_input_tokens" if side == "encoder" else "decoder_target_tokens"
    return jnp.asarray(batch[ids] if ids in batch else batch[tokens] != 0, jnp.int32)


def batch_segments(batch: Batch) -> Segments:
    """The segment ids of both sides; see `segment_ids`."""
    return Segments(encoder=segment_ids(batch, "encoder"), decoder=segment_ids(batch, "decoder"))


class Tap(NamedTuple):
    """Queries, keys and values of one attention module as projected, heads concatenated, on the model's own scale.

    `bias` is what the model adds to the scores; None where it adds nothing.
    """

    query: Float[Array, "batch query inner"]
    key: Float[Array, "batch key inner"]
    value: Float[Array, "batch key inner"]
    bias: Float[Array, "1 heads query key"] | None = None


class Head(NamedTuple):
    """An unapplied LM head, so that logits can be computed for a block of tokens at a time.

    The logits are `hidden @ kernel`, multiplied in the dtype of `hidden`: the decoder's output, scaled if the model
    scales it.
    """

    hidden: Float[Array, "batch target d_model"]
    kernel: Float[Array, "d_model vocab"]

    def logits(self) -> Float[Array, "batch target vocab"]:
        """All logits, float32."""
        dtype = self.hidden.dtype
        # Batch and length are one axis: XLA's CPU compiler otherwise transposes activations in the backward pass.
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        logits = jnp.dot(flat, self.kernel.astype(dtype), preferred_element_type=jnp.float32)
        logits = logits.reshape(*self.hidden.shape[:-1], -1)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))


class Output(NamedTuple):
    """What a forward pass was asked for; keys are as requested."""

    encoded: Float[Array, "batch source d_model"] | None = None  # after the encoder's final normalization
    head: Head | None = None
    taps: Mapping[tuple[str, int], Tap] = {}  # by (site, layer)
    hidden: Mapping[tuple[Stack, int], Float[Array, "batch length d_model"]] = {}  # after a layer, by (stack, layer)

    @property
    def logits(self) -> Float[Array, "batch target vocab"] | None:
        return None if self.head is None else self.head.logits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """The outputs to compute; nothing else is. Negative layers count from a stack's top."""

    # (site, layer) -> which vectors of that attention module, such as "qkv"
    taps: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    hidden: frozenset[tuple[Stack, int]] = frozenset()  # the residual streams after these layers
    encoded: bool = False  # the encoder's output
    head: bool = False  # the distribution over the vocabulary

    def __or__(self, other: "Reads") -> "Reads":
        vectors = {
            key: "".join(sorted(set(self.taps.get(key, "") + other.taps.get(key, ""))))
            for key in (*self.taps, *other.taps)
        }
        return Reads(
            taps=vectors,
            hidden=self.hidden | other.hidden,
            encoded=self.encoded or other.encoded,
            head=self.head or other.head,
        )

    @property
    def decoder(self) -> bool:
        """Whether any output of the decoder is requested."""
        stacks = {SITES[site].stack for site, _ in self.taps} | {stack for stack, _ in self.hidden}
        return self.head or "decoder" in stacks


LOGITS = Reads(head=True)


def union(reads: Iterable[Reads]) -> Reads:
    """The union of several requests."""
    return functools.reduce(Reads.__or__, reads, Reads())


def resolve_layer(layer: int, depth: int, what: str) -> int:
    """A layer's index from 0; negative ones count from the top. `what` names the stack in the message."""
    if not -depth <= layer < depth:
        raise UserError(f"layer {layer} of {what} does not exist; the stack has layers 0 to {depth - 1} (or -1)")
    return layer % depth
