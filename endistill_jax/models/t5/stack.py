"""Runs a stack of identical layers whose parameters are stacked on a leading axis.

The stack runs as segments: a compiled loop up to the tapped layer, that layer by itself, a loop over the rest. So
exposing one layer stacks nothing for the others, compile time does not grow with depth, and unused layers above a tap
are dead code that the compiler removes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from endistill_jax.core.errors import UserError
from endistill_jax.core.outputs import Output, Reads, Tap, resolve_layer
from endistill_jax.core.sites import SITES, Stack
from endistill_jax.models.t5.config import T5Config

_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class StackReads(NamedTuple):
    """The requested outputs of one stack.

    Attributes:
        taps: (site, layer) as requested -> index of the layer, from 0.
        hidden: (stack, layer) as requested -> index of the layer, from 0.
        to_top: whether the stack's output is read; else it ends with the highest layer that is.
    """

    taps: Mapping[tuple[str, int], int]
    hidden: Mapping[tuple[str, int], int]
    to_top: bool


def check_reads(config: T5Config, reads: Reads) -> None:
    """Refuses to read of a site, or of a decoder, that is not there.

    Raises:
        UserError: naming what is.
    """
    for site, _ in reads.taps:
        if site not in SITES:
            raise UserError(f"there is no attention site {site!r}; choose one of {', '.join(SITES)}")
    if config.num_decoder_layers or not reads.decoder:
        return
    what = [f"{site} of layer {layer}" for site, layer in reads.taps if SITES[site].stack == "decoder"]
    what += [f"the residual stream of decoder layer {layer}" for stack, layer in reads.hidden if stack == "decoder"]
    what += ["the head's logits"] * reads.head
    raise UserError(f"the model is an encoder alone (num_decoder_layers is 0): {what[0]} cannot be read of it")


def stack_reads(reads: Reads, stack: Stack, depth: int, *, to_top: bool) -> StackReads:
    """The part of `reads` that is of one stack of so many layers.

    Raises:
        UserError: if a layer does not exist.
    """
    taps = {
        (site, layer): resolve_layer(layer, depth, site) for site, layer in reads.taps if SITES[site].stack == stack
    }
    hidden = {(name, layer): resolve_layer(layer, depth, name) for name, layer in reads.hidden if name == stack}
    return StackReads(taps, hidden, to_top)


def stacked_init(layer: nn.Module, num_layers: int) -> Callable[[jax.Array, jax.Array, tuple], Any]:
    """An initializer of `num_layers` layers, each with a key of its own, stacked on a leading axis named "layers"."""

    def init(key: jax.Array, x: jax.Array, context: tuple) -> Any:
        def init_one(key: jax.Array) -> Any:
            return layer.init({"params": key}, x, *context, deterministic=True)["params"]

        stacked = jax.vmap(init_one)(jax.random.split(key, num_layers))
        return jax.tree.map(
            lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
            stacked,
            is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
        )

    return init


def run_layers(
    layer: nn.Module,
    params: Any,
    x: jax.Array,
    context: tuple,
    reads: StackReads,
    dropout_key: jax.Array | None,
    frozen: bool = False,
) -> tuple[jax.Array, Output]:
    """Runs the layers that are needed and exposes what is read of them.

    Args:
        layer: an unbound layer; its call returns the new residual stream and its taps by site.
        params: its parameters, each leaf [layers, ...].
        x: [batch, length, d_model], the residual stream.
        context: the layer's further arrays (masks, bias, encoder output), the same for every layer.
        reads: of this stack.
        dropout_key: folded with the layer's index; None runs without dropout.
        frozen: a loop indexes into the stacked parameters, rather than into a slice of those that it runs over. The
            gradient with respect to the parameters would then take a pass over all of them per layer.

    Returns:
        The residual stream where the stack ended, and an output with the taps and residual streams that are read.
    """
    cfg = layer.config
    num_layers = len(jax.tree.leaves(params)[0])

    def apply(x: jax.Array, layer_params: Any, index: jax.Array) -> tuple[jax.Array, dict[str, Tap]]:
        rngs = {} if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, index)}
        return layer.apply({"params": layer_params}, x, *context, deterministic=dropout_key is None, rngs=rngs)

    looped = alone = apply
    if cfg.remat != "none":
        # Outside a loop the compiler would merge what is computed twice, and keep it after all.
        looped, alone = (
            jax.checkpoint(apply, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=prevent) for prevent in (False, True)
        )

    def apply_one(x: jax.Array, index: int) -> tuple[jax.Array, dict[str, Tap]]:
        return alone(x, jax.tree.map(lambda leaf: leaf[index], params), jnp.asarray(index))

    def layer_at(index: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)

    def apply_segment(x: jax.Array, start: int, stop: int) -> jax.Array:
        if cfg.scan_layers and stop - start > 1 and frozen:
            indices = jnp.arange(start, stop)
            return jax.lax.scan(lambda x, index: (apply(x, layer_at(index), index)[0], None), x, indices)[0]
        if cfg.scan_layers and stop - start > 1:
            segment = jax.tree.map(lambda leaf: leaf[start:stop], params)
            return jax.lax.scan(lambda x, xs: (looped(x, *xs)[0], None), x, (segment, jnp.arange(start, stop)))[0]
        for index in range(start, stop):
            x, _ = apply_one(x, index)
        return x

    taps: dict[tuple[str, int], Tap] = {}
    hidden: dict[tuple[str, int], jax.Array] = {}
    done = 0
    for exposed_layer in sorted({*reads.taps.values(), *reads.hidden.values()}):
        x, exposed = apply_one(apply_segment(x, done, exposed_layer), exposed_layer)
        taps |= {key: exposed[key[0]] for key, index in reads.taps.items() if index == exposed_layer}
        hidden |= {key: x for key, index in reads.hidden.items() if index == exposed_layer}
        done = exposed_layer + 1
    if reads.to_top:
        x = apply_segment(x, done, num_layers)
    return x, Output(taps=taps, hidden=hidden)
