"""Two layouts of the same parameters: stacked for the compiled loop, one subtree a layer for interchange."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.core.sites import STACKS

_LAYER = re.compile(r"layers_(\d+)")

Params = dict[str, Any]


def unstack_layers(params: Mapping[str, Any]) -> Params:
    """`encoder/layers/...` [layers, ...] -> `encoder/layers_0/...`, `encoder/layers_1/...`, in T5X's names."""
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        layers = rest.pop("layers")
        depth = len(jax.tree.leaves(layers)[0])
        for index in range(depth):
            rest[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
        params[stack] = rest
    return params


def stack_layers(params: Mapping[str, Any]) -> Params:
    """The inverse of `unstack_layers`.

    Raises:
        ValueError: if a stack's layers are not numbered 0, 1, 2, ... without a gap.
    """
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        layers = {int(m.group(1)): rest.pop(name) for name in list(rest) if (m := _LAYER.fullmatch(name))}
        if sorted(layers) != list(range(len(layers))) or not layers:
            raise ValueError(f"{stack} has layers {sorted(layers)}; expected 0, 1, 2, ... without a gap")
        ordered = [layers[index] for index in range(len(layers))]
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ordered)) else jnp
        rest["layers"] = jax.tree.map(lambda *leaves, xp=xp: xp.stack(leaves), *ordered)
        params[stack] = rest
    return params
