"""Matrix products counted in a traced program: what the formulas of flops are checked against.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here it counts as often.
"""

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.interpreters import partial_eval


def count_matmul_flops(function: Callable, *args: Any) -> collections.Counter[int]:
    """Operations of all matrix products that the outputs of `function` need, by the length of the contracted axes.

    Args:
        function: traced, not run.
        args: arrays or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
        Contracted length -> 2 x products' sizes, so that products of one kind can be identified by a unique length.

    Raises:
        NotImplementedError: if a loop with an unknown trip count, or a branch, contains a product.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> collections.Counter[int]:
    total: collections.Counter[int] = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = _contracted_length(equation)
            total[contracted] += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        trip_count = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = sum(map(_count, _inner_programs(equation.params.values())), start=collections.Counter())
        if inner and equation.primitive.name in ("while", "cond"):
            raise NotImplementedError(
                f"a matrix product inside {equation.primitive.name}: how often it runs is unknown"
            )
        for contracted, flops in inner.items():
            total[contracted] += trip_count * flops
    return total


def _contracted_length(equation: Any) -> int:
    (axes, _), _ = equation.params["dimension_numbers"]
    return math.prod(equation.invars[0].aval.shape[axis] for axis in axes)


def _inner_programs(params: Iterable[Any]) -> Iterable[Any]:
    for param in params:
        for value in param if isinstance(param, (tuple, list)) else (param,):
            program = getattr(value, "jaxpr", value)
            if hasattr(program, "eqns"):
                yield program
