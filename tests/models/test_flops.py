"""The formula of a forward pass, term by term, against the products that the model's program holds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from endistill_jax.models.family import Lengths, abstract_params, forward_flops
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.counted_flops import count_matmul_flops
from endistill_jax.models.t5.flops import Read
from endistill_jax.models.t5.t5 import SITES, T5

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


def read_outputs(config, reads, with_logits):
    """The forward pass as a function that returns what is read of it and nothing else."""

    def apply(params, batch):
        taps = {site: read.layer for site, read in reads.items()}
        output = T5(config).apply({"params": params}, batch, tap_layers=taps, with_logits=with_logits)
        vectors = [getattr(output.taps[site], VECTORS[v]) for site, read in reads.items() for v in read.vectors]
        return vectors, output.logits

    return apply


def counted(config, reads, with_logits, gradient=False):
    forward = read_outputs(config, reads, with_logits)

    def loss(params, batch):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(forward(params, batch)))

    function = jax.grad(loss) if gradient else forward
    counts = count_matmul_flops(function, abstract_params(config), abstract_batch(LENGTHS))
    for bias in (config.relative_buckets, LENGTHS.batch, LENGTHS.source**2, LENGTHS.target**2):
        counts.pop(bias, None)
    return counts


READS = {
    "logits": ({}, True),
    "last layers and logits": (dict.fromkeys(SITES, Read(-1)), True),
    "last layers": (dict.fromkeys(SITES, Read(-1)), False),
    "encoder alone, third layer": ({"encoder_self": Read(2)}, False),
    "encoder's first keys": ({"encoder_self": Read(0, "kk")}, False),
    "decoder's second layer": ({"decoder_self": Read(1, "qv")}, False),
    "decoder's first layer, which reads no encoder": ({"decoder_self": Read(0)}, False),
    "both, decoder's first layer": ({"encoder_self": Read(1), "decoder_self": Read(0)}, False),
    "cross below self": ({"decoder_self": Read(2), "cross": Read(1)}, False),
    "cross above self": ({"decoder_self": Read(0), "cross": Read(1, "qk")}, False),
    "cross queries": ({"cross": Read(-1, "q")}, False),
    "cross keys and values, which read no decoder": ({"cross": Read(-1, "kv")}, False),
    "cross values of a layer, self of another": ({"cross": Read(2, "v"), "decoder_self": Read(1, "q")}, False),
    "self below the logits": ({"decoder_self": Read(0)}, True),
}


@pytest.mark.parametrize("reads", READS)
def test_formula_counts_every_product_that_what_is_read_needs(reads):
    assert sum(counted(MODEL, *READS[reads]).values()) == forward_flops(MODEL, LENGTHS, *READS[reads]).total > 0


@pytest.mark.parametrize("changes", [{"mlp_activations": ("relu",)}, {"tied_head": True}, {"scan_layers": False}])
def test_formula_holds_for_every_kind_of_model(changes):
    config = dataclasses.replace(MODEL, **changes)
    assert sum(counted(config, {}, True).values()) == forward_flops(config, LENGTHS).total


def test_layers_in_a_loop_count_as_often_as_they_run():
    unrolled = dataclasses.replace(MODEL, scan_layers=False)
    assert counted(MODEL, {}, True) == counted(unrolled, {}, True)


@pytest.mark.parametrize("reads", ["logits", "last layers", "cross below self", "decoder's second layer"])
def test_gradient_costs_two_more_forward_passes(reads):
    counts = counted(MODEL, *READS[reads], gradient=True)
    assert sum(counts.values()) == 3 * forward_flops(MODEL, LENGTHS, *READS[reads]).total


def test_parts_are_those_that_the_count_tells_apart():
    flops = forward_flops(MODEL, LENGTHS)
    head = forward_flops(dataclasses.replace(MODEL, vocab_size=24), LENGTHS).head - flops.head
    assert head == 2 * 2 * 5 * 10  # one word more: 2 x batch x target x d_model
    encoder_only = forward_flops(MODEL, LENGTHS, {"encoder_self": Read(3)}, with_logits=False)
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
    program = jax.jit(read_outputs(config, {}, True)).lower(abstract_params(config), abstract_batch(lengths))
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # counted, never run
    found = program.compile(flags).cost_analysis()["flops"]
    expected = forward_flops(config, lengths).total
    # The rest is elementwise: about one operation where each number takes 2 x 192 or more in products.
    assert expected < found < 1.03 * expected
