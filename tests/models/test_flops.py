"""The formula of a forward pass, term by term, against the products that the model's program holds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from counted_flops import count_matmul_flops

from endistill_jax.core.model_io import LOGITS, Lengths, Reads
from endistill_jax.models.family import abstract_params, forward_flops
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import T5

# Every size another number, so that the position biases' products are known by the length that they contract: the
# buckets, and in their gradient the examples and all pairs of positions.
MODEL = T5Config(
    vocab_size=23,
    d_model=10,
    num_heads=3,
    head_dim=4,
    mlp_dim=14,
    num_encoder_layers=4,
    num_decoder_layers=3,
    relative_buckets=64,
)
LENGTHS = Lengths(batch=2, source=7, target=5)
VECTORS = {"q": "query", "k": "key", "v": "value"}


def abstract_batch(lengths):
    def tokens(length):
        return jax.ShapeDtypeStruct((lengths.batch, length), jnp.int32)

    return {
        "encoder_input_tokens": tokens(lengths.source),
        "decoder_input_tokens": tokens(lengths.target),
        "decoder_target_tokens": tokens(lengths.target),
    }


def read_outputs(config, reads):
    """The forward pass as a function that returns what is read of it and nothing else."""

    def apply(params, batch):
        output = T5(config).apply({"params": params}, batch, reads)
        vectors = [getattr(output.taps[key], VECTORS[v]) for key, vectors in reads.taps.items() for v in vectors]
        return vectors, list(output.hidden.values()), output.encoded if reads.encoded else None, output.logits

    return apply


def counted(config, reads, gradient=False):
    forward = read_outputs(config, reads)

    def loss(params, batch):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(forward(params, batch)))

    function = jax.grad(loss) if gradient else forward
    counts = count_matmul_flops(function, abstract_params(config), abstract_batch(LENGTHS))
    for bias in (config.relative_buckets, LENGTHS.batch, LENGTHS.source**2, LENGTHS.target**2):
        counts.pop(bias, None)
    return counts


LAST = {("encoder_self", -1): "qkv", ("decoder_self", -1): "qkv", ("cross", -1): "qkv"}
READS = {
    "logits": LOGITS,
    "last layers and logits": Reads(taps=LAST, head=True),
    "last layers": Reads(taps=LAST),
    "encoder alone, third layer": Reads(taps={("encoder_self", 2): "qkv"}),
    "encoder's first keys": Reads(taps={("encoder_self", 0): "k"}),
    "encoder's output": Reads(encoded=True),
    "two layers of one site": Reads(taps={("encoder_self", 1): "q", ("encoder_self", -1): "kv"}),
    "residual streams": Reads(hidden=frozenset({("encoder", 1), ("decoder", 0)})),
    "encoder's residual stream": Reads(hidden=frozenset({("encoder", 1)})),
    "decoder's second layer": Reads(taps={("decoder_self", 1): "qv"}),
    "decoder's first layer, which reads no encoder": Reads(taps={("decoder_self", 0): "qkv"}),
    "both, decoder's first layer": Reads(taps={("encoder_self", 1): "qkv", ("decoder_self", 0): "qkv"}),
    "cross below self": Reads(taps={("decoder_self", 2): "qkv", ("cross", 1): "qkv"}),
    "cross above self": Reads(taps={("decoder_self", 0): "qkv", ("cross", 1): "qk"}),
    "cross queries": Reads(taps={("cross", -1): "q"}),
    "cross keys and values, which read no decoder": Reads(taps={("cross", -1): "kv"}),
    "cross values of a layer, self of another": Reads(taps={("cross", 2): "v", ("decoder_self", 1): "q"}),
    "self below the logits": Reads(taps={("decoder_self", 0): "qkv"}, head=True),
}


@pytest.mark.parametrize("reads", READS)
def test_formula_counts_every_product_that_what_is_read_needs(reads):
    assert sum(counted(MODEL, READS[reads]).values()) == forward_flops(MODEL, LENGTHS, READS[reads]).total > 0


@pytest.mark.parametrize(
    "changes", [{"mlp_activations": ("relu",)}, {"tied_head": True}, {"scan_layers": False}, {"bias_per_layer": True}]
)
def test_formula_holds_for_every_kind_of_model(changes):
    config = dataclasses.replace(MODEL, **changes)
    assert sum(counted(config, LOGITS).values()) == forward_flops(config, LENGTHS).total


def test_an_encoder_alone_has_the_operations_of_the_encoder():
    alone = dataclasses.replace(MODEL, num_decoder_layers=0)
    for reads in (Reads(encoded=True), READS["encoder alone, third layer"]):
        found = forward_flops(alone, LENGTHS, reads)
        assert sum(counted(alone, reads).values()) == found.total == forward_flops(MODEL, LENGTHS, reads).total > 0


def test_layers_in_a_loop_count_as_often_as_they_run():
    unrolled = dataclasses.replace(MODEL, scan_layers=False)
    assert counted(MODEL, LOGITS) == counted(unrolled, LOGITS)


@pytest.mark.parametrize("reads", ["logits", "last layers", "cross below self", "decoder's second layer"])
def test_gradient_costs_two_more_forward_passes(reads):
    counts = counted(MODEL, READS[reads], gradient=True)
    assert sum(counts.values()) == 3 * forward_flops(MODEL, LENGTHS, READS[reads]).total


def test_parts_are_those_that_the_count_tells_apart():
    flops = forward_flops(MODEL, LENGTHS)
    head = forward_flops(dataclasses.replace(MODEL, vocab_size=24), LENGTHS).head - flops.head
    assert head == 2 * 2 * 5 * 10  # one word more: 2 x batch x target x d_model
    encoder_only = forward_flops(MODEL, LENGTHS, Reads(taps={("encoder_self", 3): "qkv"}))
    assert encoder_only.decoder == encoder_only.cross == encoder_only.head == 0
    # The encoder's last layer ends with its projections.
    assert flops.encoder - encoder_only.encoder == flops.encoder // 4 - 3 * 2 * 2 * 7 * 10 * 12


def test_xla_counts_as_many_in_an_unrolled_model_of_large_products():
    config = dataclasses.replace(
        MODEL,
        d_model=192,
        num_heads=2,
        head_dim=128,
        mlp_dim=768,
        vocab_size=512,
        scan_layers=False,
        relative_buckets=8,
    )
    lengths = Lengths(batch=8, source=16, target=12)
    program = jax.jit(read_outputs(config, LOGITS)).lower(abstract_params(config), abstract_batch(lengths))
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # counted, never run
    found = program.compile(flags).cost_analysis()["flops"]
    expected = forward_flops(config, lengths).total
    # The rest is elementwise: about one operation where each number takes 2 x 192 or more in products.
    assert expected < found < 1.03 * expected
