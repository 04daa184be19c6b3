"""A T5X checkpoint as a source of our tensors."""

from typing import Self

import numpy as np

from endistill_jax.checkpoints.interchange import Parameter, VocabularyFile, check_finite, parameters
from endistill_jax.checkpoints.t5x.arrays import Array, open_arrays
from endistill_jax.checkpoints.t5x.configuration import infer
from endistill_jax.checkpoints.t5x.locating import Location, locate
from endistill_jax.checkpoints.t5x.names import Layout, Place, bias_places, insert_axis, place, tensor_shapes
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.core.sites import STACKS
from endistill_jax.models.t5.config import T5Config
from endistill_jax.storage import is_remote, reading_failure


class T5XSource:
    """An opened checkpoint; see `interchange.Source`.

    Attributes:
        where: the folder of the step.
        config: what model it holds.
        vocabulary: None; T5X keeps none beside its checkpoints.
        pieces: None likewise.
        step: from the name of that folder; 0 if it tells none.
        notes: what could not be read and was assumed, a sentence each.
    """

    vocabulary: VocabularyFile | None = None
    pieces: str | None = None

    def __init__(self, location: Location):
        """Opens every array and checks names, shapes and types.

        Raises:
            UserError: naming file and tensor.
        """
        self.where = str(location.step_folder)
        self.step = location.step
        self._arrays = open_arrays(location)
        shapes = {name: array.shape for name, array in self._arrays.items()}
        self.config, self._layout, self.notes = infer(shapes, location)
        self._held: tuple[str, np.ndarray] | None = None
        _check_names_and_shapes(self._arrays, self.config, self._layout, location)
        self._check_biases()

    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation, of the type it is stored in, finite.

        Raises:
            UserError: naming file and tensor, if it cannot be read or holds NaN or infinity.
        """
        found = place(parameter, self._layout)
        tensor = self._read(found).reshape(parameter.shape)
        check_finite(tensor, f"{self._arrays[found.name].where}: {parameter.name}")
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None

    def _read(self, found: Place) -> np.ndarray:
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

    def _check_biases(self) -> None:
        """Our models have one position bias a stack, as all of T5 but umT5."""
        depths = {"encoder": self.config.num_encoder_layers, "decoder": self.config.num_decoder_layers}
        for stack in STACKS:
            first, *others = bias_places(stack, depths[stack], self._layout)
            expected = self._read(first)
            for other in others:
                if not np.array_equal(self._read(other), expected, equal_nan=True):
                    layer = other.layer if other.layer is not None else other.name
                    raise UserError(
                        f"{self._arrays[other.name].where}: {other.name} differs between layers ({layer} from the "
                        "first); a model with a position bias of its own in every layer, as umT5, is not supported"
                    )
        self._held = None


def open_checkpoint(path: str) -> T5XSource:
    """Opens a T5X checkpoint, T5X's own format or written by Orbax, scanned or not; the optimizer is not read.

    Args:
        path: a T5X model directory (its latest step is taken), the folder of a step, or the msgpack file in it, local
            or gs://.

    Raises:
        UserError: naming file and tensor: nothing there, a missing, damaged, additional or misshapen array, position
            biases that differ from layer to layer.
        StorageFailure: if it cannot be read now.
    """
    try:
        return T5XSource(locate(path))
    except (UserError, StorageFailure):
        raise
    except Exception as error:
        # TensorFlow, which reads the small files there, has errors of its own: no network, no permission.
        if not is_remote(path):
            raise
        raise reading_failure(f"{path} cannot be read", error) from error


def _check_names_and_shapes(arrays: dict[str, Array], config: T5Config, layout: Layout, location: Location) -> None:
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    expected: set[str] = set()
    for parameter in parameters(config):
        stack = parameter.path[0]
        places = [place(parameter, layout)]
        if parameter.path[1] == "relpos_bias":
            places = bias_places(stack, depths[stack], layout)
        for found in places:
            expected.add(found.name)
            if found.name not in arrays:
                raise UserError(f"{location.index} lacks {found.name}")
            shapes = tensor_shapes(parameter, config)
            if found.layer is not None:
                shapes = tuple(insert_axis(shape, layout.scan_axis, depths[stack]) for shape in shapes)
            array = arrays[found.name]
            if array.shape not in shapes:
                raise UserError(
                    f"{array.where}: {found.name} has shape {array.shape}; "
                    f"the other arrays make it {' or '.join(map(str, dict.fromkeys(shapes)))}"
                )
    extra = sorted(arrays.keys() - expected)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{arrays[extra[0]].where}: a T5 has no place for {extra[0]}{more}")
