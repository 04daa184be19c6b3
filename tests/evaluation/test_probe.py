"""Contracts of the probe: what it sums, that it is zero for the teacher itself, and what it must not depend on."""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation import JointEvaluation
from endistill_jax.evaluation.probe import evaluate_probe, make_probe_step
from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import ForwardKL, HiddenDistance, Objective, relations
from endistill_jax.sharding import make_mesh
from endistill_jax.train.step import LossFunction

LENGTHS = {"source": (6, 3, 5, 2, 6, 4), "target": (5, 2, 3, 4, 1, 5)}
OBJECTIVE = Objective(
    terms=(
        *relations("encoder_self", ("qq", "vv"), relation_heads=2),
        *relations("decoder_self", ("qq", "vv"), relation_heads=2),
        *relations("cross", ("qk", "vv"), relation_heads=2, teacher_layer=0, coefficient=0.5),
        ForwardKL(),
    )
)
STUDENT = T5Config(
    vocab_size=32,
    d_model=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.1,
)
TEACHER = dataclasses.replace(STUDENT, d_model=16, head_dim=8, num_encoder_layers=2, num_decoder_layers=2)


@pytest.fixture(scope="module")
def examples():
    """Six examples of uneven lengths."""
    rng = np.random.default_rng(0)

    def tokens(lengths):
        rows = rng.integers(2, 32, (len(lengths), max(lengths))).astype(np.int32)
        return np.where(np.arange(max(lengths)) < np.asarray(lengths)[:, None], rows, 0).astype(np.int32)

    targets = tokens(LENGTHS["target"])
    return {
        "encoder_input_tokens": tokens(LENGTHS["source"]),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


@pytest.fixture(scope="module")
def models():
    """The parameters of student and teacher."""
    make = jax.jit(init_params, static_argnums=0)
    return make(STUDENT, jax.random.key(0)), make(TEACHER, jax.random.key(1))


@pytest.fixture(scope="module")
def step():
    return make_probe_step(objective=OBJECTIVE, student=STUDENT, teacher=TEACHER, mesh=make_mesh())


def batched(examples, size):
    """Batches of one size, the last filled up with rows of zeros."""
    count = len(examples["decoder_target_tokens"])
    padded = {name: np.pad(array, ((0, -count % size), (0, 0))) for name, array in examples.items()}
    return [{name: array[start : start + size] for name, array in padded.items()} for start in range(0, count, size)]


def test_terms_are_those_of_the_dense_objective_over_all_examples(examples, models, step):
    report = evaluate_probe(step, OBJECTIVE, *models, batched(examples, 6))
    still = dataclasses.replace(STUDENT, dropout_rate=0.0)
    weights = OBJECTIVE.weights(examples)
    dense = LossFunction(student=still, teacher=TEACHER, objective=OBJECTIVE)
    _, sums = dense(models[0], models[1], examples, weights=weights)
    assert dict(report.terms) == pytest.approx({name: float(sums[name] / weights[name]) for name in weights}, rel=1e-5)
    assert len(report.terms) == 7 and min(report.terms.values()) > 0
    weighted = sum(value / 2 for name, value in report.terms.items() if name.startswith(("encoder", "decoder")))
    weighted += sum(value / 4 for name, value in report.terms.items() if name.startswith("cross"))
    assert report.loss == pytest.approx(weighted + report.terms["logits"])


@pytest.mark.parametrize("size", [1, 4])
def test_terms_do_not_depend_on_batches_and_padding_rows(examples, models, step, size):
    whole = evaluate_probe(step, OBJECTIVE, *models, batched(examples, 6))
    cut = evaluate_probe(step, OBJECTIVE, *models, batched(examples, size))
    assert dict(cut.terms) == pytest.approx(dict(whole.terms), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself(examples, models):
    terms = [*relations("cross", ("qk", "vv"), relation_heads=2), ForwardKL()]
    objective = Objective(terms=terms)
    itself = make_probe_step(objective=objective, student=TEACHER, teacher=TEACHER, mesh=make_mesh())
    report = evaluate_probe(itself, objective, models[1], models[1], batched(examples, 6))
    assert max(map(abs, report.terms.values())) < 1e-5


def test_batches_without_anything_to_compare_are_refused(examples, models, step):
    empty = [{name: np.zeros_like(array) for name, array in examples.items()}]
    with pytest.raises(UserError, match="nothing to compare for encoder_self/qq"):
        evaluate_probe(step, OBJECTIVE, *models, empty)


def test_a_term_with_parameters_of_its_own_is_refused():
    objective = Objective(terms=(HiddenDistance(),))
    with pytest.raises(UserError, match="a probe cannot compute hidden/encoded"):
        make_probe_step(objective=objective, student=STUDENT, teacher=TEACHER, mesh=make_mesh())


def test_several_evaluations_report_all_their_figures(examples, models, step):
    class Asks:
        def __init__(self, batches):
            self.batches = batches

        def evaluate(self, config, params):
            return evaluate_probe(step, OBJECTIVE, params, models[1], self.batches)

    class Counts:
        def evaluate(self, config, params):
            return self

        def scalars(self, prefix=""):
            return {f"{prefix}arrays": 3.0}

        def summary(self):
            return "3 arrays"

    report = JointEvaluation(evaluations=(Counts(), Asks(batched(examples, 6)))).evaluate(STUDENT, models[0])
    assert list(report.scalars("x/"))[0] == "x/arrays" and "x/probe/cross/qk@0:-1" in report.scalars("x/")
    assert report.summary().startswith("3 arrays, from the teacher ")
