"""Registering SeqIO tasks and mixtures, each name with one meaning."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import seqio

from endistill_jax.core.errors import UserError

# T5's limit on a task's size in examples-proportional mixing (Raffel et al. 2020, section 3.5.2).
LARGEST_RATE = 2**19

_registered: dict[str, str] = {}
_Provider = TypeVar("_Provider", seqio.Task, seqio.Mixture)


def register_once(name: str, settings: tuple[object, ...], register: Callable[[], _Provider]) -> _Provider:
    """What `register` returns, or what it returned when this name was first registered with the same settings.

    Args:
      name: of the task or mixture.
      settings: all that it depends on, compared by `repr`.
      register: adds it to SeqIO's registry and returns it; called once for each name.

    Raises:
      UserError: a task or mixture of that name with other settings exists already.
    """
    description = repr(settings)
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        if _registered.get(name) != description:
            raise UserError(f"a task named {name!r} exists with other settings; choose another name")
        return seqio.get_mixture_or_task(name)
    provider = register()
    _registered[name] = description
    return provider


def described(vocabulary: seqio.Vocabulary) -> str:
    """Kind, path and sentinels of a vocabulary, without reading its file, which may be on a bucket."""
    path = getattr(vocabulary, "sentencepiece_model_file", "")
    return f"{type(vocabulary).__name__}({path}, {vocabulary.extra_ids})"


def proportional_mixture(name: str, sizes: Mapping[str, int], *, largest_rate: int = LARGEST_RATE) -> seqio.Mixture:
    """Registers T5's examples-proportional mixture: a task's rate is its number of training examples, at most a limit.

    A task of size 0 is never drawn in training, and evaluated with the others.

    Args:
      name: of the mixture.
      sizes: number of training examples by name of the task.
      largest_rate: the limit; cap on a task's size.

    Raises:
      UserError: a limit below 1, or the name is taken.
    """
    if largest_rate < 1:
        raise UserError(f"largest_rate of mixture {name!r} is {largest_rate}; give a number of examples, at least 1")
    rates = [(task, float(min(size, largest_rate))) for task, size in sizes.items()]
    return register_once(name, (tuple(rates),), lambda: seqio.MixtureRegistry.add(name, rates))
