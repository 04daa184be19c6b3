"""The shape that a file of gin/models/ gives, beside the configuration that is read: a job may need two models."""

from collections.abc import Sequence

from endistill_jax.configuration.values import FileValues
from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config


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
    values = FileValues(file, search_paths)
    fields = {
        binding.parameter: values.literal(binding.value, binding.parameter)
        for binding in values.bindings
        if binding.selector.rpartition(".")[2] == T5Config.__name__
    }
    try:
        return T5Config(**fields)
    except TypeError as error:
        raise UserError(
            f"{file} is not the shape of a model: {error}; give a file such as those of gin/models/"
        ) from None
