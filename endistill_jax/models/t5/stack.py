"""Runs a stack of identical layers whose parameters are stacked on a leading axis.

The stack runs as segments: a compiled loop up to the tapped layer, that layer by itself, a loop over the rest. So
exposing one layer stacks nothing for the others, compile time does not grow with depth, and what nobody reads above a
tap is dead code that the compiler removes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from endistill_jax.models.t5.layers import Tap

_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def stacked_init(layer: nn.Module, num_layers: int) -> Callable[[jax.Array, jax.Array, tuple], Any]:
    """An initialiser of `num_layers` layers, each with a key of its own, stacked on a leading axis named "layers"."""

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
    tap_layers: Mapping[str, int],
    run_to_top: bool,
    dropout_key: jax.Array | None,
    frozen: bool = False,
) -> tuple[jax.Array, dict[str, Tap]]:
    """Runs the layers that are needed and exposes the taps asked for.

    Args:
        layer: an unbound layer; its call returns the new residual stream and its taps by site.
        params: its parameters, each leaf [layers, ...].
        x: [batch, length, d_model], the residual stream.
        context: the layer's further arrays (masks, bias, encoder output), the same for every layer.
        tap_layers: site -> index of the layer to expose, 0 <= index < layers.
        run_to_top: whether the stack's output is read; else the stack ends with the highest tapped layer.
        dropout_key: folded with the layer's index; None runs without dropout.
        frozen: a loop takes each layer's parameters from where all layers lie, rather than from a copy of those that it
            runs over. The gradient by the parameters would take a pass over all of them a layer.

    Returns:
        The residual stream where the stack ended, and the taps.
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

    taps: dict[str, Tap] = {}
    done = 0
    for tapped in sorted(set(tap_layers.values())):
        x, exposed = apply_one(apply_segment(x, done, tapped), tapped)
        taps.update({site: exposed[site] for site, index in tap_layers.items() if index == tapped})
        done = tapped + 1
    if run_to_top:
        x = apply_segment(x, done, num_layers)
    return x, taps
