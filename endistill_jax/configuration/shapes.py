"""The shape that a file of gin/models/ gives, beside the configuration that is read: a job may need two models."""

from collections.abc import Sequence
from typing import Any

from endistill_jax.configuration.reading import Macro, Reading, read_file
from endistill_jax.errors import UserError
from endistill_jax.model.config import T5Config


def model_config(file: str | None, search_paths: Sequence[str] = ()) -> T5Config | None:
    """Reads a model's shape from a gin file that binds `config.T5Config`; what a run binds of it has no part in it.

    Args:
        file: such as gin/models/t5_v1_1_xl.gin; None gives None.
        search_paths: folders in which it is looked up too.

    Raises:
        UserError: no such file, or it does not bind what a model needs.
    """
    if file is None:
        return None
    reading = Reading()
    read_file(reading, file, search_paths)
    macros = {binding.macro_name: binding.value for binding in reading.bindings if not binding.parameter}

    def resolve(value: Any, name: str) -> Any:
        while isinstance(value, Macro):
            if value.name not in macros:
                raise UserError(f"{file}: {name} is %{value.name}, which the file does not set; set it there")
            value = macros[value.name]
        return value

    fields = {
        binding.parameter: resolve(binding.value, binding.parameter)
        for binding in reading.bindings
        if binding.parameter and binding.selector.rpartition(".")[2] == T5Config.__name__
    }
    try:
        return T5Config(**fields)
    except TypeError as error:
        raise UserError(
            f"{file} is not the shape of a model: {error}; give a file such as those of gin/models/"
        ) from None
