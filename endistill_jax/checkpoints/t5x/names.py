"""T5X's names and shapes of a model's tensors, in its two families of layouts.

`t5` keeps one array a tensor, `encoder/layers_0/attention/query/kernel` [embed, joined_kv], and one position bias a
stack. `scalable_t5` splits the heads of attention kernels into an axis of their own, has a position bias in every
layer, and, when scanned, stacks all layers of a tensor in one array: `encoder/encoder/attention/query/kernel`
[embed, layers, heads, kv].
"""

from typing import NamedTuple

from endistill_jax.checkpoints.interchange import Parameter
from endistill_jax.core.sites import STACKS
from endistill_jax.models.t5.config import T5Config

BIAS = ("relpos_bias", "rel_embedding")


class Layout(NamedTuple):
    """How a checkpoint lays out a model.

    Attributes:
        scan_axis: the axis of layers in stacked arrays; None if every layer has arrays of its own.
        bias_per_layer: whether every layer has a position bias.
        split_heads: whether attention kernels are written with an axis of heads; both forms are read in any layout.
    """

    scan_axis: int | None
    bias_per_layer: bool
    split_heads: bool


T5 = Layout(scan_axis=None, bias_per_layer=False, split_heads=False)
SCANNED = Layout(scan_axis=1, bias_per_layer=True, split_heads=True)


class Place(NamedTuple):
    """An array in a checkpoint, and the layer of it that is one tensor of ours (None: all of it)."""

    name: str
    layer: int | None


def place(parameter: Parameter, layout: Layout) -> Place:
    """Where a tensor lies. Of position biases that repeat in every layer it is the first."""
    stack = parameter.path[0]
    if stack in STACKS and parameter.path[1:] == BIAS and layout.bias_per_layer:
        return _in_layer(stack, BIAS, 0, layout)
    if parameter.layer is None:
        return Place(parameter.name, None)
    return _in_layer(stack, parameter.path[2:], parameter.layer, layout)


def bias_places(stack: str, depth: int, layout: Layout) -> list[Place]:
    """Where all copies of a stack's position bias lie."""
    if not layout.bias_per_layer:
        return [Place("/".join((stack, *BIAS)), None)]
    return [_in_layer(stack, BIAS, layer, layout) for layer in range(depth)]


def tensor_shapes(parameter: Parameter, config: T5Config) -> tuple[tuple[int, ...], ...]:
    """Shapes a tensor may be stored in: ours, and for attention kernels the one with an axis of heads."""
    if len(parameter.path) < 2 or parameter.path[-2] not in ("query", "key", "value", "out"):
        return (parameter.shape,)
    heads = (config.num_heads, config.head_dim)
    split = (*heads, config.d_model) if parameter.path[-2] == "out" else (config.d_model, *heads)
    return (parameter.shape, split)


def insert_axis(shape: tuple[int, ...], axis: int, extent: int) -> tuple[int, ...]:
    """A shape with one more axis."""
    return (*shape[:axis], extent, *shape[axis:])


def _in_layer(stack: str, rest: tuple[str, ...], layer: int, layout: Layout) -> Place:
    if layout.scan_axis is None:
        return Place("/".join((stack, f"layers_{layer}", *rest)), None)
    return Place("/".join((stack, stack, *rest)), layer)
