"""T5 and umT5 in T5X's checkpoints: names and shapes of a model's tensors, in T5X's two families of layouts.

`t5` keeps one array a tensor, `encoder/layers_0/attention/query/kernel` [embed, joined_kv], and one position bias a
stack. `scalable_t5` splits the heads of attention kernels into an axis of their own, has a position bias in every
layer, and, when scanned, stacks all layers of a tensor in one array: `encoder/encoder/attention/query/kernel`
[embed, layers, heads, kv]. A model with one bias a stack has it repeated there; umT5's differ from layer to layer.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from endistill_jax.core.attention import STACKS
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import Parameter
from endistill_jax.models.t5.config import T5Config

BIAS = ("relpos_bias", "rel_embedding")
EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"
# What T5X's network has built in.
_FIXED = {"relative_buckets": 32, "relative_max_distance": 128, "layer_norm_epsilon": 1e-6}
# The fields of T5X's T5Config, in its order, and ours.
_NETWORK = {"vocab_size": "vocab_size", "emb_dim": "d_model", "num_heads": "num_heads"}
_NETWORK |= {name: name for name in ("num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim")}
_NETWORK |= {"mlp_activations": "mlp_activations", "dropout_rate": "dropout_rate", "logits_via_embedding": "tied_head"}
_ACTIVATIONS = ("relu", "gelu", "silu", "linear")

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a checkpoint lays out a model."""

    scan_axis: int | None  # of layers in stacked arrays; None if every layer has arrays of its own
    bias_per_layer: bool  # whether every layer has a position bias
    split_heads: bool  # whether attention kernels are written with an axis of heads; any layout may be read with one


PLAIN = Layout(scan_axis=None, bias_per_layer=False, split_heads=False)
SCALABLE = Layout(scan_axis=None, bias_per_layer=True, split_heads=True)
SCANNED = Layout(scan_axis=1, bias_per_layer=True, split_heads=True)


class Place(NamedTuple):
    """An array in a checkpoint, and the layer of it that is one tensor of ours (None: all of it)."""

    name: str
    layer: int | None


class Where(NamedTuple):
    """What messages call the parts of a checkpoint."""

    step_folder: str
    index: str
    arrays: str


def places(parameter: Parameter, config: T5Config, layout: Layout) -> list[Place]:
    """All places that hold a tensor: more than one for a stack's position bias that repeats in every layer."""
    stack = parameter.path[0]
    if layout.bias_per_layer and parameter.path[1:] == BIAS:
        return [_in_layer(stack, BIAS, layer, layout) for layer in range(config.depth(stack))]
    if parameter.layer is None:
        return [Place(parameter.name, None)]
    return [_in_layer(stack, parameter.path[2:], parameter.layer, layout)]


def tensor_shapes(parameter: Parameter, config: T5Config) -> tuple[tuple[int, ...], ...]:
    """Shapes a tensor may be stored in: ours, and for attention kernels one with an axis of heads too."""
    if len(parameter.path) < 2 or parameter.path[-2] not in ("query", "key", "value", "out"):
        return (parameter.shape,)
    heads = (config.num_heads, config.head_dim)
    split = (*heads, config.d_model) if parameter.path[-2] == "out" else (config.d_model, *heads)
    return (parameter.shape, split)


def insert_axis(shape: tuple[int, ...], axis: int, extent: int) -> tuple[int, ...]:
    return (*shape[:axis], extent, *shape[axis:])


def _in_layer(stack: str, rest: tuple[str, ...], layer: int, layout: Layout) -> Place:
    if layout.scan_axis is None:
        return Place("/".join((stack, f"layers_{layer}", *rest)), None)
    return Place("/".join((stack, stack, *rest)), layer)


def infer(shapes: Mapping[str, Shape], where: Where) -> tuple[T5Config, Layout]:
    """The sizes of a model and how it is laid out, from the shapes of its arrays by T5X's names.

    Shapes do not show whether layers that each have a position bias have the same one: one a stack is taken. Nor does
    a checkpoint say token ids: T5's are taken.
    """

    def shape(name: str, *ranks: int) -> Shape:
        if name not in shapes:
            raise UserError(f"{where.index} lacks {name}, which every T5 has")
        if len(shapes[name]) not in ranks:
            raise UserError(f"{where.arrays}: {name} has shape {shapes[name]}; {ranks[0]} axes were expected")
        return shapes[name]

    vocab_size, d_model = shape(EMBEDDING, 2)
    layout = _layout(shapes, d_model)

    def of_layer(name: str, *ranks: int) -> Shape:
        """The shape of one layer of an array."""
        if layout.scan_axis is None:
            return shape(name, *ranks)
        stacked = shape(name, *(rank + 1 for rank in ranks))
        return stacked[: layout.scan_axis] + stacked[layout.scan_axis + 1 :]

    def depth(stack: str) -> int:
        if layout.scan_axis is not None:
            return shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale", 2)[layout.scan_axis]
        pattern = re.compile(rf"{stack}/layers_(\d+)/")
        return max(1, len({match.group(1) for match in map(pattern.match, shapes) if match}))

    first = "encoder/layers_0" if layout.scan_axis is None else "encoder/encoder"
    bias = "/".join((first if layout.bias_per_layer else "encoder", *BIAS))
    num_heads, buckets = of_layer(bias, 2)
    query = of_layer(f"{first}/attention/query/kernel", 2, 3)
    inner = math.prod(query[1:])
    if inner % num_heads:
        raise UserError(f"{where.arrays}: {bias} has {num_heads} heads, which do not divide the queries' {inner}")
    plain = f"{first}/mlp/wi/kernel" in shapes
    try:
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            num_heads=num_heads,
            head_dim=inner // num_heads,
            mlp_dim=of_layer(f"{first}/mlp/{'wi' if plain else 'wi_0'}/kernel", 2)[1],
            num_encoder_layers=depth("encoder"),
            num_decoder_layers=depth("decoder"),
            relative_buckets=buckets,
            tied_head=HEAD not in shapes,
            mlp_activations=("relu",) if plain else ("gelu", "linear"),
        )
    except UserError as error:
        raise UserError(f"{where.step_folder} holds no T5: {error}") from error
    return config, layout


def _layout(shapes: Mapping[str, Shape], d_model: int) -> Layout:
    if any(name.startswith(f"{stack}/{stack}/") for name in shapes for stack in STACKS):
        # T5X puts layers second by default. Where both axes are as long one stack leaves it open.
        scales = [shapes.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale", ()) for stack in STACKS]
        first = any(len(scale) == 2 and scale[1] == d_model and scale[0] != d_model for scale in scales)
        return Layout(scan_axis=0 if first else 1, bias_per_layer=True, split_heads=True)
    per_layer = any("/layers_" in name and name.endswith("/".join(BIAS)) for name in shapes)
    return Layout(scan_axis=None, bias_per_layer=per_layer, split_heads=per_layer)


def network_settings(config: T5Config, layout: Layout) -> tuple[str, dict[str, Any]]:
    """The folder of `t5x.examples` with a model's network, and the fields of its T5Config."""
    if not config.num_decoder_layers:
        raise UserError("the model is an encoder alone; T5X's networks have a decoder")
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise UserError(f"the model has {name} {getattr(config, name)}; T5X's network has {value} built in")
    unknown = [name for name in config.mlp_activations if name not in _ACTIVATIONS]
    if unknown:
        raise UserError(f"mlp_activations has {unknown[0]}; T5X's network knows {', '.join(_ACTIVATIONS)}")
    settings = {theirs: getattr(config, ours) for theirs, ours in _NETWORK.items()}
    if layout == PLAIN:
        return "t5", settings
    scan = {} if layout.scan_axis is None else {"param_scan_axis": layout.scan_axis}
    return "scalable_t5", settings | {"scan_layers": layout.scan_axis is not None} | scan


def choose_layout(config: T5Config, *, scanned: bool) -> Layout:
    """How a model is written: for the network of `t5` where that can have it, unless scanned layers are asked for."""
    if scanned:
        return SCANNED
    return SCALABLE if config.bias_per_layer else PLAIN
