"""Floating-point operations of a T5's matrix products, from its shape alone.

A product of [m, k] and [k, n] counts 2 m k n. With B examples, S source and T target positions (padding included),
width D, inner width I = num_heads * head_dim, MLP width F with M branches (1 plain, 2 gated), V words:

    encoder layer   8 B S D I + 4 B S^2 I + 2 (M + 1) B S D F      projections, scores and weighted values, MLP
    decoder layer   8 B T D I + 4 B T^2 I + 2 (M + 1) B T D F
      its cross     4 B T D I + 4 B S D I + 4 B T S I               queries and output, keys and values, attention
    head            2 B T D V

A causal mask halves nothing: the scores above the diagonal are computed. The backward pass of a product is two of its
size, so a gradient costs twice the forward pass of what it goes through.

Left out: everything that is not a matrix product (normalisation, softmax, activations, embedding look-up, optimizer),
the position bias, whose product with one-hot vectors stands for a look-up, and whatever rematerialisation computes
again. So these are the model's operations, fewer than the hardware's.
"""

from collections.abc import Mapping
from typing import NamedTuple

from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import resolve_tap_layers


class Lengths(NamedTuple):
    """Size of a batch: examples, and positions of both sides, padding included."""

    batch: int
    source: int
    target: int


class Read(NamedTuple):
    """What is read of one attention site: the layer (negative counts from the top), and of q, k and v which."""

    layer: int
    vectors: str = "qkv"


class ForwardFlops(NamedTuple):
    """Operations of one forward pass.

    Attributes:
        encoder: the encoder's layers.
        decoder: the decoder's layers, without their attention to the encoder.
        cross: that attention.
        head: the projection to words.
    """

    encoder: int
    decoder: int
    cross: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def forward_flops(
    config: T5Config, lengths: Lengths, reads: Mapping[str, Read] | None = None, with_logits: bool = True
) -> ForwardFlops:
    """Operations of a forward pass that computes only what is read: with nothing above the highest tap.

    Args:
        config: the model's shape.
        lengths: the batch's.
        reads: site (`encoder_self`, `decoder_self`, `cross`) -> what is read of it.
        with_logits: whether logits are read.

    Raises:
        UserError: if a site is unknown or a layer does not exist.
    """
    reads = dict(reads or {})
    layers = resolve_tap_layers(config, {site: read.layer for site, read in reads.items()})
    vectors = {site: set(read.vectors) for site, read in reads.items()}

    # Layers that must run to their end: those below the highest residual stream that is read.
    decoder_layers = config.num_decoder_layers if with_logits else 0
    if vectors.get("decoder_self"):
        decoder_layers = max(decoder_layers, layers["decoder_self"])
    if "q" in vectors.get("cross", ()):
        decoder_layers = max(decoder_layers, layers["cross"])
    encoder_layers = layers.get("encoder_self", 0)
    if decoder_layers or vectors.get("cross", set()) & {"k", "v"}:
        encoder_layers = config.num_encoder_layers

    encoder = encoder_layers * _block(config, lengths.batch, lengths.source)
    decoder = decoder_layers * _block(config, lengths.batch, lengths.target)
    cross = decoder_layers * _attention(config, lengths.batch, lengths.target, lengths.source)
    # Of the layer above those, no more than what is read.
    if layers.get("encoder_self") == encoder_layers:
        encoder += len(vectors["encoder_self"]) * _projection(config, lengths.batch, lengths.source)
    if layers.get("cross", -1) >= decoder_layers:
        of_queries = len(vectors["cross"] & {"q"}) * lengths.target
        of_encoded = len(vectors["cross"] & {"k", "v"}) * lengths.source
        cross += _projection(config, lengths.batch, of_queries + of_encoded)
    if layers.get("cross") == decoder_layers and "q" in vectors["cross"]:
        decoder += _attention(config, lengths.batch, lengths.target, lengths.target)
    elif layers.get("decoder_self") == decoder_layers:
        decoder += len(vectors["decoder_self"]) * _projection(config, lengths.batch, lengths.target)
    head = 2 * lengths.batch * lengths.target * config.d_model * config.vocab_size if with_logits else 0
    return ForwardFlops(encoder=encoder, decoder=decoder, cross=cross, head=head)


def _projection(config: T5Config, batch: int, length: int) -> int:
    return 2 * batch * length * config.d_model * config.inner_dim


def _attention(config: T5Config, batch: int, queries: int, keys: int) -> int:
    projections = _projection(config, batch, 2 * queries + 2 * keys)
    return projections + 4 * batch * queries * keys * config.inner_dim


def _block(config: T5Config, batch: int, length: int) -> int:
    """Self-attention and MLP of one layer."""
    products = len(config.mlp_activations) + 1
    return _attention(config, batch, length, length) + 2 * products * batch * length * config.d_model * config.mlp_dim
