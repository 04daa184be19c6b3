"""A T5X checkpoint as a source of our tensors.

Its sizes come from the shapes of its arrays; activations and dropout only from the gin files next to it.
"""

import ast
import dataclasses
import re
from typing import Any

import numpy as np

from endistill_jax.checkpoints.interchange import Source, check_finite, parameters
from endistill_jax.checkpoints.t5x.arrays import open_arrays
from endistill_jax.checkpoints.t5x.files import Location, locate
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.models.family import Parameter, family_named
from endistill_jax.storage import is_remote, reading_failure

_BINDING = re.compile(r"^\s*(?:[\w.]*\bT5Config\.)?(mlp_activations|logits_via_embedding|dropout_rate)\s*=\s*(.+?)\s*$")
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.+?)\s*$")


def open_checkpoint(path: str) -> "T5XSource":
    """Opens a T5X checkpoint, T5X's own format or written by Orbax, scanned or not; the optimizer is not read.

    The path, local or gs://, is a T5X model directory (its latest step is taken), the folder of a step, or the msgpack
    file in it.
    """
    try:
        return T5XSource(locate(path))
    except (UserError, StorageFailure):
        raise
    except Exception as error:
        # TensorFlow, which reads the small files of buckets, has errors of its own: no network, no permission.
        if is_remote(path) or isinstance(error, OSError):
            raise reading_failure(f"{path} cannot be read", error) from error
        raise


class T5XSource(Source):
    """An opened checkpoint, of which every array's name, shape and type is checked; see `interchange.Source`."""

    def __init__(self, location: Location):
        self.where = str(location.step_folder)
        self.step = location.step
        self._arrays = open_arrays(location)
        shapes = {name: array.shape for name, array in self._arrays.items()}
        # The networks that come with T5X are T5's.
        self._format = family_named("t5").t5x
        where = self._format.Where(str(location.step_folder), str(location.index), str(location.arrays))
        config, self._layout = self._format.infer(shapes, where)
        settings, self.notes = _gin_settings(location, gated=len(config.mlp_activations) == 2, tied=config.tied_head)
        self.config = dataclasses.replace(config, **settings)
        self._held: tuple[str, np.ndarray] | None = None
        self._check_names_and_shapes(location)
        self.config = dataclasses.replace(self.config, bias_per_layer=self._biases_differ())

    def close(self) -> None:
        self._held = None

    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation, of the type it is stored in, finite."""
        found = self._format.places(parameter, self.config, self._layout)[0]
        tensor = self._read(found).reshape(parameter.shape)
        check_finite(tensor, f"{self._arrays[found.name].where}: {parameter.name}")
        return tensor

    def _read(self, found: Any) -> np.ndarray:
        """One tensor. An array whose pieces hold several layers each is read once, and held for its other layers."""
        array = self._arrays[found.name]
        axis = self._layout.scan_axis
        if self._held is not None and self._held[0] != found.name:
            self._held = None
        if found.layer is None:
            return array.read(...)
        index = (*(slice(None),) * axis, found.layer)
        if array.layered(axis):
            return array.read(index)
        if self._held is None:
            self._held = (found.name, array.read(...))
        return self._held[1][index]

    def _check_names_and_shapes(self, location: Location) -> None:
        axis = self._layout.scan_axis
        expected: set[str] = set()
        for parameter in parameters(self.config):
            shapes = self._format.tensor_shapes(parameter, self.config)
            for found in self._format.places(parameter, self.config, self._layout):
                expected.add(found.name)
                if found.name not in self._arrays:
                    raise UserError(f"{location.index} lacks {found.name}")
                wanted = shapes
                if found.layer is not None:
                    depth = self.config.depth(parameter.path[0])
                    wanted = tuple(self._format.insert_axis(shape, axis, depth) for shape in shapes)
                array = self._arrays[found.name]
                if array.shape not in wanted:
                    raise UserError(
                        f"{array.where}: {found.name} has shape {array.shape}; "
                        f"the other arrays make it {' or '.join(map(str, dict.fromkeys(wanted)))}"
                    )
        extra = sorted(self._arrays.keys() - expected)
        if extra:
            raise UserError(f"{self._arrays[extra[0]].where}: a T5 has no place for {extra[0]}")

    def _biases_differ(self) -> bool:
        """Whether layers have position biases of their own, as umT5's, or all of a stack the same one."""
        differ = False
        for parameter in parameters(self.config):
            first, *others = self._format.places(parameter, self.config, self._layout)
            if others:
                expected = self._read(first)
                differ |= any(not np.array_equal(self._read(other), expected, equal_nan=True) for other in others)
        self._held = None
        return differ


def _gin_settings(location: Location, *, gated: bool, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Activations and dropout from the closest gin file that sets them, and what was assumed, a sentence each."""
    given: dict[str, Any] = {}
    for file in location.config_files:
        if file.is_file():
            for name, value in read_gin(file.read_text()).items():
                given.setdefault(name, (value, file))
    notes = ()
    if "mlp_activations" in given:
        activations, file = given["mlp_activations"]
        if not isinstance(activations, tuple | list) or len(activations) != 1 + gated:
            raise UserError(f"{file} has mlp_activations {activations}, but the checkpoint has {1 + gated} branches")
    else:
        activations = ("gelu", "linear") if gated else ("relu",)
        notes = (f"no gin file beside it says which activations it has; taken as {' x '.join(activations)}",)
    if "logits_via_embedding" in given and bool(given["logits_via_embedding"][0]) != tied:
        file = given["logits_via_embedding"][1]
        raise UserError(
            f"{file} has logits_via_embedding = {not tied}, but the checkpoint has "
            f"{'no' if tied else 'a'} decoder/logits_dense/kernel"
        )
    settings = {"mlp_activations": activations}
    if "dropout_rate" in given:
        settings["dropout_rate"] = float(given["dropout_rate"][0])
    return settings, notes


def read_gin(text: str) -> dict[str, Any]:
    """`mlp_activations`, `logits_via_embedding` and `dropout_rate` of a T5X model's gin file, as far as it says them.

    The file is not run: bindings of the ModelConfig are looked for, with literal values or names of macros.
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
