"""Programs do not grow with depth and hold nothing that nobody reads: counted in instructions and FLOPs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from endistill_jax.core.attention import SITES
from endistill_jax.core.model_io import Reads
from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import T5

LAST = dict.fromkeys(SITES, -1)  # site -> layer
MODEL = T5Config(
    vocab_size=96,
    d_model=64,
    num_heads=2,
    head_dim=40,
    mlp_dim=96,
    num_encoder_layers=4,
    num_decoder_layers=4,
    scan_layers=False,
)
BATCH, SOURCE, TARGET = 2, 8, 6

# The programs are counted, never run: no time is spent on their machine code.
COUNTED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def abstract_batch():
    def tokens(length):
        return jax.ShapeDtypeStruct((BATCH, length), jnp.int32)

    return {
        "encoder_input_tokens": tokens(SOURCE),
        "decoder_input_tokens": tokens(TARGET),
        "decoder_target_tokens": tokens(TARGET),
    }


def lower(config, taps, head, gradient=False, frozen=False):
    reads = Reads(taps=dict.fromkeys(taps.items(), "qkv"), head=head)

    def apply(params, batch):
        output = T5(config).apply({"params": params}, batch, reads, frozen=frozen)
        return [tap[:3] for tap in output.taps.values()], output.logits  # the position bias is no product of a layer

    def loss(params, batch):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(apply(params, batch)))

    function = jax.grad(loss) if gradient else apply
    return jax.jit(function).lower(abstract_params(config), abstract_batch())


def instructions(text):
    return sum(" = " in line for line in text.splitlines())


def of_depth(depth, **changes):
    return dataclasses.replace(MODEL, num_encoder_layers=depth, num_decoder_layers=depth, **changes)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_lowered_program_does_not_grow_with_depth_under_scan(remat, gradient):
    sizes = [
        instructions(lower(of_depth(depth, scan_layers=True, remat=remat), LAST, True, gradient).as_text())
        for depth in (4, 12)
    ]
    assert sizes[0] == sizes[1] > 100


def test_compiled_program_does_not_grow_with_depth_under_scan():
    sizes = [
        instructions(lower(of_depth(depth, scan_layers=True), LAST, True).compile(COUNTED).as_text())
        for depth in (4, 12)
    ]
    assert sizes[0] == sizes[1] > 100


def test_program_grows_with_depth_without_scan():
    small, large = (instructions(lower(of_depth(depth), LAST, True).as_text()) for depth in (4, 12))
    assert large > 2 * small


def test_rematerialisation_computes_again_what_the_policy_does_not_keep_in_a_loop_or_not():
    def products(**changes):
        program = lower(of_depth(2, **changes), {"encoder_self": -1}, False, gradient=True).compile(COUNTED).as_text()
        return program.count(" dot(")

    # Merged back by the compiler, they would be as many as without.
    kept, some, none = (products(remat=remat) for remat in ("none", "dots", "full"))
    assert kept < some < none
    # Both layers are outside a loop here: the tapped one always is, and one alone below it needs none.
    assert (some, none) == tuple(products(remat=remat, scan_layers=True) for remat in ("dots", "full"))


@functools.cache
def flops(config, taps, head=False):
    return lower(config, dict(taps), head).compile(COUNTED).cost_analysis()["flops"]


def test_tapping_the_first_encoder_layer_costs_its_three_projections():
    projections = 3 * 2 * BATCH * SOURCE * MODEL.d_model * MODEL.inner_dim
    cost = flops(MODEL, (("encoder_self", 0),))
    # The rest is one normalization: some six operations a number, where each takes 3 x 2 x 80 in the projections.
    assert projections < cost < 1.03 * projections
    assert cost == flops(of_depth(1), (("encoder_self", 0),))


@pytest.mark.parametrize("site", ["encoder_self", "cross"])
def test_layers_above_the_tapped_one_cost_nothing(site):
    stack = "num_encoder_layers" if site == "encoder_self" else "num_decoder_layers"
    shallow, deep = (dataclasses.replace(of_depth(1), **{stack: depth}) for depth in (2, 4))
    assert flops(deep, ((site, 1),)) == flops(shallow, ((site, 1),))


def test_tapping_the_encoder_alone_runs_no_decoder():
    taps = (("encoder_self", -1),)
    assert flops(of_depth(1), taps) == flops(dataclasses.replace(of_depth(1), num_decoder_layers=4), taps)


def test_head_is_computed_only_for_logits():
    taps = (("cross", -1),)
    wide = dataclasses.replace(of_depth(1), vocab_size=10 * MODEL.vocab_size)
    assert flops(of_depth(1), taps) == flops(wide, taps)
    head = 2 * BATCH * TARGET * MODEL.d_model * 9 * MODEL.vocab_size
    assert flops(wide, taps, True) - flops(of_depth(1), taps, True) == pytest.approx(head, rel=0.01)


def test_loop_is_not_even_traced_above_the_tapped_layer():
    config = of_depth(4, scan_layers=True)
    assert "while" not in lower(config, {"encoder_self": 0}, False).as_text()
    assert "while" in lower(config, {"encoder_self": -1}, False).as_text()


def test_frozen_layers_are_not_copied_to_run_over_those_below_a_tap():
    def temporaries(depth, frozen):
        program = lower(of_depth(depth, scan_layers=True), LAST, True, frozen=frozen).compile()
        return program.memory_analysis().temp_size_in_bytes

    layers = abstract_params(of_depth(1))["encoder"]["layers"]
    one_layer = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    copied, in_place = (temporaries(12, frozen) - temporaries(4, frozen) for frozen in (False, True))
    assert copied >= 8 * one_layer
    assert in_place < one_layer / 10
