"""Teacher assistants: the shapes between a large teacher and a small student, for interpolated distillation.

There are n assistants between teacher and student, the i-th at the fraction f = i / (n + 1). The target of every size
of its shape, and of its non-embedding parameters P, is a geometric mean:

    size_f = size_teacher ^ (1 - f) * size_student ^ f          P_f likewise

Sizes are rounded:

    depth                   of encoder and decoder each, rounded to the nearest
    d_model, mlp_dim        multiples of the largest power of two up to 128 that divides both ends' and is at most a
                            third of the smaller: of 128 wherever both ends are multiples of it and at least 384
    num_heads               multiples of four, or of the largest power of two below that fits as above, and such that
                            the given relation heads divide the joined heads
    head_dim                the teacher's, then the student's; halves or doubles of the teacher's in between
    all else                the student's: kind of MLP and head, vocabulary, relative positions, execution

Of each width the multiples below and above its mean are candidates, with each head_dim; the combination whose
parameters are nearest to P_f is taken. Sizes are monotonic along the chain, so that a stage may start from a slice of
its teacher. Where the kinds of MLP differ, the teacher's mlp_dim counts as the width at which the student's kind has as
many parameters.

How far one stage should reach is not known for encoder-decoders. The default bound of 2.5 on the ratio of non-embedding
parameters follows the law of capacity gap of Zhang et al. (arXiv 2311.07052), by which the best teacher of a student is
a fixed number of times its size: that was measured on decoder-only models. This reading of interpolated distillation is
ours.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig

LARGEST_RATIO = 2.5
MOST = 64
TILE = 128
HEADS = 4

# What has a geometric mean.
_DEPTHS = ("num_encoder_layers", "num_decoder_layers")
_WIDTHS = ("d_model", "num_heads", "mlp_dim")
_Sizes = dict[str, float]


def non_embedding_params(config: ModelConfig) -> int:
    """Parameters without the token table and without a head of its own."""
    return config.family.non_embedding_params(config)


def plan_assistants(
    teacher: ModelConfig,
    student: ModelConfig,
    *,
    number: int | None = None,
    largest_ratio: float = LARGEST_RATIO,
    relation_heads: Sequence[int] = (),
) -> tuple[ModelConfig, ...]:
    """The assistants between a teacher and a student, largest first; see the module for their shapes.

    Args:
        teacher: shape of the teacher.
        student: shape of the student; assistants are of its kind.
        number: how many; None takes the fewest whose rounded shapes keep the bound, none where the student itself does.
        largest_ratio: bound on the ratio of non-embedding parameters of every two neighbors; unused with a `number`.
        relation_heads: numbers that must divide the joined heads, as they do in teacher and student.
    """
    check_assistants(teacher, (), student)
    fitting = [heads for heads in relation_heads if teacher.inner_dim % heads == student.inner_dim % heads == 0]
    divisor = math.lcm(1, *fitting)
    if number is not None:
        if number < 1:
            raise UserError(f"the number of assistants is {number}; give 1 or more, or run jobs.distill without any")
        planned = _interpolate(teacher, student, number, divisor)
        if planned is None:
            raise UserError(
                f"the number of assistants is {number}, but between teacher and student there are not so many shapes "
                "of whole tiles and heads; give fewer"
            )
        return planned
    for count in range(MOST + 1):
        planned = _interpolate(teacher, student, count, divisor)
        if planned is None:
            break
        if max(ratios(teacher, planned, student)) <= largest_ratio:
            return planned
    raise UserError(
        f"largest_ratio is {largest_ratio}, which no chain of at most {MOST} assistants of whole tiles and heads keeps "
        "between this teacher and this student; give a larger one, or the number of assistants"
    )


def ratios(teacher: ModelConfig, assistants: Sequence[ModelConfig], student: ModelConfig) -> list[float]:
    """Of every stage: non-embedding parameters of its teacher to those of its student."""
    sizes = map(non_embedding_params, (teacher, *assistants, student))
    return [larger / smaller for larger, smaller in itertools.pairwise(sizes)]


def check_assistants(teacher: ModelConfig, assistants: Sequence[ModelConfig], student: ModelConfig) -> None:
    """Checks that every model has fewer non-embedding parameters than its teacher."""
    names = ("the teacher", *(f"assistant {number}" for number in range(1, len(assistants) + 1)), "the student")
    sizes = map(non_embedding_params, (teacher, *assistants, student))
    for (larger, most), (smaller, least) in itertools.pairwise(zip(names, sizes, strict=True)):
        if least >= most:
            raise UserError(
                f"{smaller} has {least:,} non-embedding parameters and {larger}, which teaches it, {most:,}; "
                "it must have fewer"
            )


def _interpolate(
    teacher: ModelConfig, student: ModelConfig, number: int, divisor: int
) -> tuple[ModelConfig, ...] | None:
    """So many assistants; None if their sizes would not fall from one to the next."""
    start, end = _sizes(teacher, student), _sizes(student, student)
    most, least = non_embedding_params(teacher), non_embedding_params(student)
    assistants: list[ModelConfig] = []
    before, above, head_dims = start, most, _head_dims(teacher.head_dim, student.head_dim)
    for share in (index / (number + 1) for index in range(1, number + 1)):
        means = {name: start[name] ** (1 - share) * end[name] ** share for name in start}
        candidates = [
            shape
            for head_dim in head_dims
            for shape in _shapes(student, means, before, end, _units(teacher, student, head_dim, divisor), head_dim)
            if least < non_embedding_params(shape) < above
        ]
        if not candidates:
            return None
        wanted = math.log(most) * (1 - share) + math.log(least) * share
        best = min(candidates, key=lambda shape: abs(math.log(non_embedding_params(shape)) - wanted))
        assistants.append(best)
        before, above = _sizes(best, student), non_embedding_params(best)
        head_dims = head_dims[head_dims.index(best.head_dim) :]
    return tuple(assistants)


def _head_dims(first: int, last: int) -> list[int]:
    """From one to the other by halves or doubles, as far as they are whole; then the other."""
    steps = [first]
    while first > last and steps[-1] % 2 == 0 and steps[-1] // 2 > last:
        steps.append(steps[-1] // 2)
    while first < last and steps[-1] * 2 < last:
        steps.append(steps[-1] * 2)
    return steps if last == first else [*steps, last]


def _sizes(config: ModelConfig, student: ModelConfig) -> _Sizes:
    """A model's sizes, its MLP as wide as one of the student's kind with as many parameters."""
    sizes: _Sizes = {name: getattr(config, name) for name in (*_DEPTHS, *_WIDTHS)}
    sizes["mlp_dim"] *= config.family.mlp_kernels(config) / student.family.mlp_kernels(student)
    return sizes


def _units(teacher: ModelConfig, student: ModelConfig, head_dim: int, divisor: int) -> dict[str, int]:
    """What each width is a multiple of."""
    units = {name: _unit(TILE, getattr(teacher, name), getattr(student, name)) for name in ("d_model", "mlp_dim")}
    heads = _unit(HEADS, teacher.num_heads, student.num_heads)
    return units | {"num_heads": math.lcm(heads, divisor // math.gcd(divisor, head_dim))}


def _unit(largest: int, *ends: int) -> int:
    """The largest power of two up to `largest`, itself one, that divides the ends and is at most a third of each."""
    unit = math.gcd(largest, *ends)
    while unit > 1 and 3 * unit > min(ends):
        unit //= 2
    return unit


def _shapes(
    student: ModelConfig, means: _Sizes, before: _Sizes, end: _Sizes, units: dict[str, int], head_dim: int
) -> Iterator[ModelConfig]:
    """All shapes of the nearest depths and of the widths around their means, none outside of its neighbors' sizes."""
    depths = {name: math.floor(means[name] + 0.5) for name in _DEPTHS}
    choices = [_around(means[name], before[name], end[name], units[name]) for name in _WIDTHS]
    for widths in itertools.product(*choices):
        yield dataclasses.replace(student, head_dim=head_dim, **depths, **dict(zip(_WIDTHS, widths, strict=True)))


def _around(mean: float, one: float, other: float, unit: int) -> list[int]:
    """The multiples of `unit` nearest to `mean` between two sizes, inclusive."""
    least, most = min(one, other), max(one, other)
    mean = min(max(mean, least), most)
    return [size for size in {math.floor(mean / unit) * unit, math.ceil(mean / unit) * unit} if least <= size <= most]
