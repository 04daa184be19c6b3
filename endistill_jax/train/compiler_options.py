"""XLA compiler options as a setting, by platform, so that TPU options do not break a run on a CPU."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from endistill_jax.core.errors import UserError
from endistill_jax.objectives import LossImplementation, MeshAxes

# Platform -> option -> value, such as {"tpu": {"xla_tpu_enable_latency_hiding_scheduler": True}}.
CompilerOptions = Mapping[str, Mapping[str, str | int | float | bool]]
PLATFORMS = ("cpu", "gpu", "tpu")


def options_of_platform(options: CompilerOptions | None, mesh: Mesh) -> dict[str, str | int | float | bool] | None:
    """The options for the mesh's devices, each validated by compiling a trivial program; None if there are none.

    Raises:
        UserError: naming the unknown platform, or the option that the compiler rejects.
    """
    options = options or {}
    for platform, chosen in options.items():
        if platform not in PLATFORMS or not isinstance(chosen, Mapping):
            raise UserError(
                f"compiler_options has {platform!r}: {chosen!r}; give options by platform ({', '.join(PLATFORMS)}), "
                "such as {'tpu': {'xla_option': value}}"
            )
    platform = LossImplementation(axes=MeshAxes(mesh=mesh)).platform
    chosen = dict(options.get(platform, {}))
    # Compile for local devices; a planned mesh may have none here.
    device = next(iter(mesh.local_devices), mesh.devices.flat[0])
    for name, value in chosen.items():
        _try_option(name, value, platform, device)
    return chosen or None


def _try_option(name: str, value: str | int | float | bool, platform: str, device: jax.Device) -> None:
    if not isinstance(value, (str, int, float, bool)):
        raise UserError(
            f"compiler_options[{platform!r}][{name!r}] is {value!r}; it must be a string, number or truth value"
        )
    number = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(number).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"compiler_options[{platform!r}][{name!r}] = {value!r} is not taken by this compiler ({reason}); "
            "correct it or leave it out"
        ) from error
