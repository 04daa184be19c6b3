"""What the blocked forms share: a sum over blocks whose gradient is formed beside its value, on each device by itself.

The gradient of a loss is linear in its cotangent. So it is formed while a block's scores or logits are at hand, and the
backward pass only scales it; nothing of a block outlives it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from endistill_jax.objectives.implementation import MeshAxes


def with_formed_gradient(run: Callable[..., tuple[jax.Array, Any, Any]], student: Any, constants: Any) -> Any:
    """`(value, aux)` of `run(student, constants, with_gradient) -> (value, aux, gradient by student)`.

    Differentiable with respect to `student` through the value alone, a float32 scalar.
    """

    @jax.custom_vjp
    def total(student: Any, constants: Any) -> tuple[jax.Array, Any]:
        value, aux, _ = run(student, constants, False)
        return value, aux

    def forward(student: Any, constants: Any) -> tuple[tuple[jax.Array, Any], Any]:
        value, aux, gradient = run(student, constants, True)
        return (value, aux), gradient

    def backward(gradient: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        factor, _ = cotangents
        return jax.tree.map(lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype), gradient), None

    total.defvjp(forward, backward)
    value, aux = total(student, constants)
    return value, jax.lax.stop_gradient(aux)


def per_device(run: Callable, axes: MeshAxes | None, in_specs: Any, out_specs: Any) -> Callable:
    """`run` on every device of a mesh, over the part of its arguments that is there."""
    if axes is None:
        return run
    return jax.shard_map(run, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
