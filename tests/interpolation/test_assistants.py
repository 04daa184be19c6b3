"""Assistants: whole, falling in size, between teacher and student, and no more of them than the bound needs."""

import dataclasses
import itertools
import random

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.interpolation.assistants import check_assistants, non_embedding_params, plan_assistants, ratios
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.models.t5 import sizes
from endistill_jax.models.t5.config import T5Config

SIZES = ("d_model", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers")
XL, V1_0_3B, LARGE, BASE = sizes.t5_v1_1_xl(), sizes.t5_v1_0_3b(), sizes.t5_v1_1_large(), sizes.t5_v1_1_base()
STUDENT, THIN, SHALLOW = sizes.student_6x6_768(), sizes.student_12x12_384(), sizes.student_12x3_768()


def random_shape(numbers: random.Random) -> T5Config:
    return T5Config(
        vocab_size=1000,
        d_model=numbers.choice((48, 64, 96, 128, 384, 512, 768, 1024, 2048)),
        num_heads=numbers.choice((1, 2, 3, 4, 6, 8, 12, 16, 32)),
        head_dim=numbers.choice((16, 32, 64, 128)),
        mlp_dim=numbers.choice((128, 192, 384, 1024, 2816, 5120)),
        num_encoder_layers=numbers.choice((1, 2, 3, 6, 12, 24)),
        num_decoder_layers=numbers.choice((1, 2, 3, 6, 12, 24)),
        mlp_activations=numbers.choice((("relu",), ("gelu", "linear"))),
    )


def random_pairs(count: int) -> list[tuple[T5Config, T5Config]]:
    numbers, pairs = random.Random(7), []
    while len(pairs) < count:
        pair = sorted((random_shape(numbers), random_shape(numbers)), key=non_embedding_params, reverse=True)
        if non_embedding_params(pair[0]) > 3 * non_embedding_params(pair[1]):
            pairs.append(tuple(pair))
    return pairs


PAIRS = random_pairs(200)


def plans(**settings) -> list[tuple[T5Config, tuple[T5Config, ...], T5Config]]:
    """Teacher, assistants and student of all pairs but the few where some sizes grow so much that none fit between."""
    planned = []
    for teacher, student in PAIRS:
        try:
            planned.append((teacher, plan_assistants(teacher, student, **settings), student))
        except UserError:
            assert any(getattr(student, size) > getattr(teacher, size) for size in SIZES)
    assert len(planned) > 180
    return planned


@pytest.mark.parametrize("config", [XL, V1_0_3B, SHALLOW])
def test_non_embedding_parameters_are_all_but_the_tables_of_words(config):
    tables = (1 if config.tied_head else 2) * config.vocab_size * config.d_model
    assert non_embedding_params(config) == count_params(abstract_params(config)) - tables


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sizes_fall_and_never_turn_back(number):
    for teacher, assistants, student in plans(number=number):
        assert len(assistants) == number
        assert min(ratios(teacher, assistants, student)) > 1
        # An MLP of another kind counts by its parameters.
        compared = SIZES if teacher.mlp_activations == student.mlp_activations else set(SIZES) - {"mlp_dim"}
        for size in compared:
            along = [getattr(config, size) for config in (teacher, *assistants, student)]
            assert along in (sorted(along), sorted(along, reverse=True)), (size, teacher, student)


def test_the_bound_holds_after_rounding_and_fewer_would_break_it():
    for teacher, assistants, student in plans(largest_ratio=2.5):
        assert max(ratios(teacher, assistants, student)) <= 2.5
        for fewer in range(1, len(assistants)):
            assert max(ratios(teacher, plan_assistants(teacher, student, number=fewer), student)) > 2.5


def test_heads_and_tiles_stay_whole():
    for teacher, (assistant,), student in plans(number=1):
        halves = {teacher.head_dim // 2**power for power in range(8)}
        doubles = {teacher.head_dim * 2**power for power in range(8)}
        assert assistant.head_dim in {student.head_dim, *halves, *doubles}
        for size in ("d_model", "mlp_dim"):
            ends = getattr(teacher, size), getattr(student, size)
            if min(ends) >= 384 and not any(end % 128 for end in ends):
                assert getattr(assistant, size) % 128 == 0


@pytest.mark.parametrize("heads", [(4,), (6, 4), (64,), (12, 32)])
def test_relation_heads_that_divide_both_ends_divide_every_assistant(heads):
    seen = 0
    for teacher, assistants, student in plans(number=2, relation_heads=heads):
        valid = [number for number in heads if teacher.inner_dim % number == student.inner_dim % number == 0]
        assert all(assistant.inner_dim % number == 0 for assistant in assistants for number in valid)
        seen += len(valid)
    assert seen > 50


def test_stacks_that_are_alike_at_both_ends_stay_alike_and_others_go_their_own_way():
    assert all(each.num_encoder_layers == each.num_decoder_layers for each in plan_assistants(XL, STUDENT))
    depths = [(each.num_encoder_layers, each.num_decoder_layers) for each in plan_assistants(XL, SHALLOW, number=2)]
    assert depths == [(19, 12), (15, 6)]  # 24 to 12 and 24 to 3, a third of the way each


def test_the_chain_from_xl_to_the_default_student():
    shapes = [
        (each.num_encoder_layers, each.d_model, each.num_heads, each.head_dim, each.mlp_dim)
        for each in plan_assistants(XL, STUDENT, relation_heads=(32,))
    ]
    assert shapes == [(17, 1536, 28, 64, 3968), (12, 1280, 20, 64, 3200), (8, 1024, 16, 64, 2560)]


def test_all_but_the_size_is_the_students():
    student = dataclasses.replace(STUDENT, dropout_rate=0.1, dtype="bfloat16", remat="dots", scan_layers=False)
    sizes = {"d_model", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers"}
    for assistant in plan_assistants(V1_0_3B, student):
        others = {field.name for field in dataclasses.fields(T5Config)} - sizes
        assert {name: getattr(assistant, name) for name in others} == {name: getattr(student, name) for name in others}


def test_no_assistant_where_the_student_is_within_the_bound():
    assert plan_assistants(LARGE, dataclasses.replace(LARGE, num_encoder_layers=12, num_decoder_layers=12)) == ()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((STUDENT, XL, {}), "the student has 2,718,[0-9,]* .* and the teacher, which teaches it, 99,"),
        ((STUDENT, STUDENT, {}), "must have fewer"),
        ((XL, STUDENT, {"number": 0}), "is 0; give 1 or more.*jobs.distill"),
        ((XL, STUDENT, {"number": -1}), "is -1; give 1 or more"),
        ((XL, STUDENT, {"number": 40}), "is 40, but .* give fewer"),
        ((XL, STUDENT, {"largest_ratio": 1.0}), "largest_ratio is 1.0, which no chain"),
        ((XL, STUDENT, {"largest_ratio": float("nan")}), "largest_ratio is nan, which no chain"),
        ((XL, STUDENT, {"largest_ratio": 1.01}), "largest_ratio is 1.01.* give a larger one"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, match):
    teacher, student, settings = arguments
    with pytest.raises(UserError, match=match) as error:
        plan_assistants(teacher, student, **settings)
    assert "\n" not in str(error.value)


def test_assistants_of_ones_own_must_fall_in_size():
    check_assistants(XL, (LARGE, BASE), STUDENT)
    with pytest.raises(UserError, match="assistant 2 has 717,.* assistant 1, which teaches it, 198,"):
        check_assistants(XL, (BASE, LARGE), STUDENT)


def test_parameters_come_near_to_the_geometric_mean():
    for teacher, student in itertools.product((XL, V1_0_3B), (STUDENT, THIN, SHALLOW)):
        assistants = plan_assistants(teacher, student)
        even = (non_embedding_params(teacher) / non_embedding_params(student)) ** (1 / (len(assistants) + 1))
        assert all(abs(ratio / even - 1) < 0.1 for ratio in ratios(teacher, assistants, student))
