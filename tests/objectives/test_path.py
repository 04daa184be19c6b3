"""What a path asks of the models, and the mistakes that its check names."""

import dataclasses

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.objective import Path, Site


@dataclasses.dataclass(frozen=True)
class Dimensions:
    vocab_size: int = 100
    inner_dim: int = 12
    num_encoder_layers: int = 2
    num_decoder_layers: int = 1


STUDENT = Dimensions()
TEACHER = Dimensions(inner_dim=24, num_encoder_layers=4, num_decoder_layers=6)
CROSS = Site(relations=("qk", "vv"), relation_heads=6)


def _replace(**changes):
    return Path(cross=dataclasses.replace(CROSS, **changes))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (_replace(relations=("qk", "qv")), r"path.cross.relations has 'qv'.* choose from qq, kk, vv, qk"),
        (_replace(relations="qk"), r"path.cross.relations is 'qk'.* must be a tuple such as \('qk', 'vv'\)"),
        (_replace(relations=()), r"path.cross.relations is \(\).* not empty"),
        (_replace(relations=("qk", "vv", "qk")), r"path.cross.relations has 'qk' more than once"),
        (_replace(weight=-1.0), r"path.cross.weight is -1.0; it must be .* 0 or more"),
        (_replace(weight=float("nan")), r"path.cross.weight is nan"),
        (_replace(weight=0.0), r"path teaches nothing"),
        (_replace(relation_heads=5), r"path.cross.relation_heads is 5, .* choose one of 1, 2, 3, 4, 6, 12$"),
        (_replace(relation_heads=24), r"path.cross.relation_heads is 24, .* choose one of 1, 2, 3, 4, 6, 12$"),
        (_replace(relation_heads=0), r"path.cross.relation_heads is 0, .* choose one of 1, 2, 3, 4, 6, 12$"),
        (_replace(teacher_layer=6), r"cross.teacher_layer is 6, but the teacher's decoder has 6 .* from -6 to 5"),
        (_replace(student_layer=-2), r"cross.student_layer is -2, but the student's decoder has 1 .* from -1 to 0"),
        (
            Path(encoder_self=dataclasses.replace(CROSS, student_layer=2)),
            r"encoder_self.student_layer is 2, but the student's encoder has 2 .* from -2 to 1",
        ),
        (Path(), r"path teaches nothing"),
        (Path(logits_weight=-0.5), r"path.logits_weight is -0.5"),
        (Path(lm_weight=float("inf")), r"path.lm_weight is inf"),
        (Path(lm_weight=1.0, z_loss=-1e-4), r"path.z_loss is -0.0001"),
        (Path(logits_weight=1.0, temperature=0.0), r"path.temperature is 0.0; it must be .* above 0"),
        (Path(logits_weight=1.0, temperature=float("nan")), r"path.temperature is nan"),
    ],
)
def test_mistakes_are_named_in_one_line_with_what_would_be_right(path, message):
    with pytest.raises(UserError, match=message) as caught:
        path.validate(STUDENT, TEACHER)
    assert "\n" not in str(caught.value)


def test_learning_from_a_teacher_needs_one():
    for path in (Path(cross=CROSS), Path(logits_weight=1.0)):
        with pytest.raises(UserError, match="there is none"):
            path.validate(STUDENT)


def test_logits_need_vocabularies_of_one_size_and_relations_do_not():
    other = dataclasses.replace(TEACHER, vocab_size=101)
    with pytest.raises(UserError, match="path.logits_weight is 1.0, .* 101 and 100 entries"):
        Path(logits_weight=1.0).validate(STUDENT, other)
    Path(cross=CROSS).validate(STUDENT, other)


def test_sites_that_are_turned_off_are_not_held_against_the_models():
    off = dataclasses.replace(CROSS, weight=0.0, relation_heads=5, student_layer=9)
    Path(cross=off, logits_weight=1.0).validate(STUDENT, TEACHER)


@pytest.mark.parametrize("relation_heads", [1, 2, 3, 4, 6, 12])
def test_all_common_divisors_are_valid_relation_heads(relation_heads):
    _replace(relation_heads=relation_heads).validate(STUDENT, TEACHER)


def test_path_asks_for_no_more_than_it_compares():
    relations_only = Path(
        encoder_self=dataclasses.replace(CROSS, teacher_layer=-3, student_layer=1),
        decoder_self=dataclasses.replace(CROSS, weight=0.0),
    )
    assert relations_only.needs_teacher
    assert relations_only.tap_layers("teacher") == {"encoder_self": -3}
    assert relations_only.tap_layers("student") == {"encoder_self": 1}
    assert not relations_only.needs_logits("teacher") and not relations_only.needs_logits("student")

    scratch = Path(lm_weight=1.0)
    scratch.validate(STUDENT)
    assert not scratch.needs_teacher
    assert scratch.tap_layers("student") == {}
    assert scratch.needs_logits("student") and not scratch.needs_logits("teacher")

    logits = Path(logits_weight=1.0)
    assert logits.needs_teacher and logits.needs_logits("student") and logits.needs_logits("teacher")


def test_paths_are_hashable_so_that_compiled_functions_can_depend_on_them():
    assert hash(Path(cross=CROSS, lm_weight=1.0)) == hash(Path(cross=_replace().cross, lm_weight=1.0))
