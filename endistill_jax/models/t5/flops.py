"""Floating-point operations of a T5's matrix products, from its shape alone.

A product of [m, k] and [k, n] counts 2 m k n. With B examples, S source and T target positions (padding included),
width D, inner width I = num_heads * head_dim, MLP width F with M branches (1 plain, 2 gated), V words:

    encoder layer   8 B S D I + 4 B S^2 I + 2 (M + 1) B S D F      projections, scores and weighted values, MLP
    decoder layer   8 B T D I + 4 B T^2 I + 2 (M + 1) B T D F
      its cross     4 B T D I + 4 B S D I + 4 B T S I               queries and output, keys and values, attention
    head            2 B T D V

A causal mask halves nothing: the scores above the diagonal are computed. The backward pass of a product is two of its
size, so a gradient costs twice the forward pass of what it goes through.

Left out: everything that is not a matrix product (normalization, softmax, activations, embedding look-up, optimizer),
the position bias, whose one-hot product implements a look-up, and what rematerialization computes again. So these are
the model's operations, fewer than the hardware's.
"""

from endistill_jax.core.attention import Stack
from endistill_jax.core.model_io import LOGITS, Lengths, Reads
from endistill_jax.models.family import ForwardFlops
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import check_reads, stack_reads


def forward_flops(config: T5Config, lengths: Lengths, reads: Reads = LOGITS) -> ForwardFlops:
    """Operations of a forward pass that computes only what is read: nothing above the highest of it."""
    check_reads(config, reads)
    decoder_taps = _indexed(reads, "decoder", config.num_decoder_layers)
    encoder_taps = _indexed(reads, "encoder", config.num_encoder_layers)

    # Layers that must run to their end: those below the highest residual stream that is read.
    decoder_layers = config.num_decoder_layers if reads.head else 0
    ends = stack_reads(reads, "decoder", config.num_decoder_layers, to_top=reads.head).hidden.values()
    below = (layer for site, layer, vectors in decoder_taps if site == "decoder_self" or "q" in vectors)
    decoder_layers = max((decoder_layers, *(layer + 1 for layer in ends), *below))
    encoder_layers = config.num_encoder_layers
    read_by_cross = any(site == "cross" and set(vectors) & {"k", "v"} for site, _, vectors in decoder_taps)
    if not (reads.encoded or decoder_layers or read_by_cross):  # a decoder layer's self-attention reads no encoder
        ends = stack_reads(reads, "encoder", config.num_encoder_layers, to_top=False).hidden.values()
        encoder_layers = max((0, *(layer + 1 for layer in ends), *(layer for _, layer, _ in encoder_taps)))

    encoder = encoder_layers * _block(config, lengths.batch, lengths.source)
    decoder = decoder_layers * _block(config, lengths.batch, lengths.target)
    cross = decoder_layers * _attention(config, lengths.batch, lengths.target, lengths.source)
    # Of a layer above those, no more than what is read.
    for _, layer, vectors in encoder_taps:
        if layer == encoder_layers:
            encoder += len(vectors) * _projection(config, lengths.batch, lengths.source)
    above = {(site, layer): vectors for site, layer, vectors in decoder_taps if layer >= decoder_layers}
    for (site, layer), vectors in above.items():
        if site == "cross":
            encoded = len(set(vectors) & {"k", "v"}) * lengths.source
            cross += _projection(config, lengths.batch, encoded + ("q" in vectors) * lengths.target)
            if "q" in vectors:
                decoder += _attention(config, lengths.batch, lengths.target, lengths.target)
        elif "q" not in above.get(("cross", layer), ""):
            decoder += len(vectors) * _projection(config, lengths.batch, lengths.target)
    head = 2 * lengths.batch * lengths.target * config.d_model * config.vocab_size if reads.head else 0
    return ForwardFlops(encoder=encoder, decoder=decoder, cross=cross, head=head)


def _indexed(reads: Reads, stack: Stack, depth: int) -> list[tuple[str, int, str]]:
    """(site, layer from 0, vectors) of a stack's taps."""
    layers = stack_reads(reads, stack, depth, to_top=True).taps
    merged: dict[tuple[str, int], str] = {}
    for key, layer in layers.items():  # one layer may be named from both ends
        merged[key[0], layer] = "".join(sorted({*merged.get((key[0], layer), ""), *reads.taps[key]}))
    return [(site, layer, vectors) for (site, layer), vectors in merged.items()]


def _projection(config: T5Config, batch: int, length: int) -> int:
    return 2 * batch * length * config.d_model * config.inner_dim


def _attention(config: T5Config, batch: int, queries: int, keys: int) -> int:
    projections = _projection(config, batch, 2 * queries + 2 * keys)
    return projections + 4 * batch * queries * keys * config.inner_dim


def _block(config: T5Config, batch: int, length: int) -> int:
    """Self-attention and MLP of one layer."""
    products = len(config.mlp_activations) + 1
    return _attention(config, batch, length, length) + 2 * products * batch * length * config.d_model * config.mlp_dim
