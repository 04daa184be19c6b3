"""Distill large T5-like models into small, task-agnostic encoder-decoder students.

    import endistill_jax as ed

    teacher = ed.load("bundled")
    teacher.generate("Return the <extra_id_0> of items in a list.")

Public names are imported lazily, so that the import itself is fast and needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from endistill_jax import objectives as objective_terms
    from endistill_jax.checkpoints.student_init import StudentInit
    from endistill_jax.core.errors import UserError
    from endistill_jax.core.model_io import Reads
    from endistill_jax.jobs.distill import distill
    from endistill_jax.model import Model, load
    from endistill_jax.models.t5 import sizes
    from endistill_jax.objectives import Objective, presets
    from endistill_jax.train.experiment import Data, Experiment, Run, Teacher
    from endistill_jax.train.optimizer import OptimizerConfig

__all__ = [
    "Data",
    "Experiment",
    "Model",
    "Objective",
    "OptimizerConfig",
    "Reads",
    "Run",
    "StudentInit",
    "Teacher",
    "UserError",
    "distill",
    "load",
    "objective_terms",
    "presets",
    "sizes",
]

_MODULES = {
    "objective_terms": "objectives",
    "presets": "objectives.presets",
    "sizes": "models.t5.sizes",
}
_MODULE_OF = {
    "Data": "train.experiment",
    "Experiment": "train.experiment",
    "Model": "model",
    "Objective": "objectives",
    "OptimizerConfig": "train.optimizer",
    "Reads": "core.model_io",
    "Run": "train.experiment",
    "StudentInit": "checkpoints.student_init",
    "Teacher": "train.experiment",
    "UserError": "core.errors",
    "distill": "jobs",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _MODULE_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
