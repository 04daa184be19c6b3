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
    """Contracted length -> operations of the matrix products of that length which the outputs of `function` need.

    The function is traced with arrays or shapes, not run.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> collections.Counter[int]:
    total: collections.Counter[int] = collections.Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (axes, _), _ = params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            total[contracted] += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        inner = sum(map(_count, _inner_programs(params.values())), start=collections.Counter())
        if inner and name in ("while", "cond"):
            raise NotImplementedError(f"a matrix product inside {name}: how often it runs is unknown")
        trip_count = params["length"] if name == "scan" else 1
        for contracted, flops in inner.items():
            total[contracted] += trip_count * flops
    return total


def _inner_programs(params: Iterable[Any]) -> Iterable[Any]:
    for param in params:
        for value in param if isinstance(param, (tuple, list)) else (param,):
            program = getattr(value, "jaxpr", value)
            if hasattr(program, "eqns"):
                yield program
