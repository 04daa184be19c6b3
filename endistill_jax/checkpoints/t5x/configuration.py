"""Which model a T5X checkpoint holds: sizes from the shapes of its arrays, the rest from the gin file beside it."""

import ast
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from endistill_jax.checkpoints.t5x.locating import Location
from endistill_jax.checkpoints.t5x.names import BIAS, Layout
from endistill_jax.core.errors import UserError
from endistill_jax.core.sites import STACKS
from endistill_jax.models.t5.config import T5Config

EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"

Shape = tuple[int, ...]
_BINDING = re.compile(r"^\s*(?:[\w.]*\bT5Config\.)?(mlp_activations|logits_via_embedding|dropout_rate)\s*=\s*(.+?)\s*$")
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.+?)\s*$")
_DEFAULTS = {True: ("gelu", "linear"), False: ("relu",)}


class Inferred(NamedTuple):
    """What was found out about a checkpoint.

    Attributes:
        config: the model's configuration.
        layout: how its arrays are laid out.
        notes: what could not be read and was assumed, a sentence each.
    """

    config: T5Config
    layout: Layout
    notes: tuple[str, ...]


def infer(shapes: Mapping[str, Shape], location: Location) -> Inferred:
    """Reads a model's configuration from the shapes of its arrays.

    Args:
        shapes: of all arrays, by T5X's names.
        location: for messages, and for the gin file.

    Raises:
        UserError: if an array that tells a size is missing or of another rank, or the sizes make no T5.
    """
    found = _Shapes(shapes, location)
    vocab_size, d_model = found.shape(EMBEDDING, 2)
    layout = _layout(shapes, d_model)
    depths = {stack: found.depth(stack, layout) for stack in STACKS}
    bias = found.layer("encoder", "/".join(BIAS), layout) if layout.bias_per_layer else "/".join(("encoder", *BIAS))
    num_heads, buckets = found.single(bias, layout if layout.bias_per_layer else None, 2)
    query = found.single(found.layer("encoder", "attention/query/kernel", layout), layout, 2, 3)
    inner = query[1] if len(query) == 2 else query[1] * query[2]
    if inner % num_heads:
        raise UserError(f"{location.arrays}: {bias} has {num_heads} heads, which do not divide the queries' {inner}")
    plain = found.layer("encoder", "mlp/wi/kernel", layout) in shapes
    wi = found.single(found.layer("encoder", "mlp/wi/kernel" if plain else "mlp/wi_0/kernel", layout), layout, 2)
    settings, notes = _settings(location, gated=not plain, tied=HEAD not in shapes)
    try:
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            num_heads=num_heads,
            head_dim=inner // num_heads,
            mlp_dim=wi[1],
            num_encoder_layers=depths["encoder"],
            num_decoder_layers=depths["decoder"],
            relative_buckets=buckets,
            tied_head=HEAD not in shapes,
            **settings,
        )
    except UserError as error:
        raise UserError(f"{location.step_folder} holds no T5: {error}") from error
    return Inferred(config, layout, notes)


class _Shapes:
    """Shapes by name, with what to say if one is not there."""

    def __init__(self, shapes: Mapping[str, Shape], location: Location):
        self._shapes = shapes
        self._location = location

    def shape(self, name: str, *ranks: int) -> Shape:
        if name not in self._shapes:
            raise UserError(f"{self._location.index} lacks {name}, which every T5 has")
        shape = self._shapes[name]
        if len(shape) not in ranks:
            raise UserError(f"{self._location.arrays}: {name} has shape {shape}; {ranks[0]} axes were expected")
        return shape

    def single(self, name: str, layout: Layout | None, *ranks: int) -> Shape:
        """The shape of one layer of an array."""
        if layout is None or layout.scan_axis is None:
            return self.shape(name, *ranks)
        shape = self.shape(name, *(rank + 1 for rank in ranks))
        return shape[: layout.scan_axis] + shape[layout.scan_axis + 1 :]

    def layer(self, stack: str, rest: str, layout: Layout) -> str:
        """The name of an array of a stack's first layer, or of all its layers."""
        return f"{stack}/{'layers_0' if layout.scan_axis is None else stack}/{rest}"

    def depth(self, stack: str, layout: Layout) -> int:
        """How many layers a stack has."""
        if layout.scan_axis is None:
            pattern = re.compile(rf"{stack}/layers_(\d+)/")
            numbers = {int(match.group(1)) for name in self._shapes if (match := pattern.match(name))}
            return max(1, len(numbers))
        return self.shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale", 2)[layout.scan_axis]


def _layout(shapes: Mapping[str, Shape], d_model: int) -> Layout:
    biases = [name for name in shapes if name.endswith("/".join(BIAS))]
    if any(name.startswith(f"{stack}/{stack}/") for name in shapes for stack in STACKS):
        # T5X puts layers second unless told otherwise. Where both axes are as long one stack leaves it open.
        scales = [shapes.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale", ()) for stack in STACKS]
        first = any(len(scale) == 2 and scale[1] == d_model and scale[0] != d_model for scale in scales)
        return Layout(scan_axis=0 if first else 1, bias_per_layer=True, split_heads=True)
    per_layer = any("/layers_" in name for name in biases)
    return Layout(scan_axis=None, bias_per_layer=per_layer, split_heads=per_layer)


def _settings(location: Location, *, gated: bool, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Activations and dropout from the closest gin file that says them."""
    told: dict[str, Any] = {}
    for file in location.config_files:
        if file.is_file():
            for name, value in read_gin(file.read_text()).items():
                told.setdefault(name, (value, file))
    notes = []
    if "mlp_activations" in told:
        activations, file = told["mlp_activations"]
        if not isinstance(activations, tuple | list) or len(activations) != 1 + gated:
            raise UserError(f"{file} has mlp_activations {activations}, but the checkpoint has {1 + gated} branches")
    else:
        activations = _DEFAULTS[gated]
        notes.append(f"no gin file beside it says which activations it has; taken as {' x '.join(activations)}")
    if "logits_via_embedding" in told and bool(told["logits_via_embedding"][0]) != tied:
        file = told["logits_via_embedding"][1]
        raise UserError(
            f"{file} has logits_via_embedding = {not tied}, but the checkpoint has {'no' if tied else 'a'} {HEAD}"
        )
    settings = {"mlp_activations": activations}
    if "dropout_rate" in told:
        rate, file = told["dropout_rate"]
        if not isinstance(rate, int | float):
            raise UserError(f"{file} has dropout_rate {rate!r}; a number is expected")
        settings["dropout_rate"] = float(rate)
    return settings, tuple(notes)


def read_gin(text: str) -> dict[str, Any]:
    """`mlp_activations`, `logits_via_embedding` and `dropout_rate` of a T5X model's gin file, as far as it says them.

    The file is not run: bindings of the T5Config are looked for, with literal values or names of macros.
    """
    lines = text.replace("\\\n", " ").splitlines()
    macros = {match.group(1): match.group(2) for line in lines if (match := _MACRO.match(line))}
    found = {}
    for line in lines:
        match = _BINDING.match(line)
        if match:
            value = match.group(2).split(" #")[0].strip()
            value = macros.get(value.removeprefix("%"), value) if value.startswith("%") else value
            try:
                found[match.group(1)] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                continue
    return found
