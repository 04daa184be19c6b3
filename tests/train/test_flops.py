"""The formula of a training step against the products of the step's own program."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from counted_flops import count_matmul_flops

from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import abstract_params
from endistill_jax.objectives import (
    AttentionKL,
    HiddenDistance,
    InterpolatedTargets,
    LossImplementation,
    Objective,
    ReverseKL,
    presets,
)
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.train.flops import step_flops
from endistill_jax.train.state import abstract_state
from endistill_jax.train.step import make_train_step

HEADS = {"relation_heads": 4}
OBJECTIVES = {
    "scratch": presets.scratch(),
    "logits": presets.logits(),
    "minilm": presets.minilm(**HEADS),
    "miniend_d": presets.miniend_d(with_logits=False, **HEADS),
    "miniend_e": presets.miniend_e(**HEADS),
    "union": presets.union(**HEADS),
    "other terms": Objective(terms=(AttentionKL(site="cross", num_heads=8), HiddenDistance(), ReverseKL())),
}
# The fast forms fill up rows and tokens to whole registers: lengths that are whole already. So many examples, or half
# of them, is the size of nothing else.
LENGTHS = Lengths(batch=52, source=16, target=24)


def counted(student, teacher, objective, mesh, **settings):
    shape = {"encoder": LENGTHS.source, "decoder": LENGTHS.target}
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: jax.ShapeDtypeStruct((LENGTHS.batch, shape[name[:7]]), jnp.int32) for name in names}
    batch["decoder_loss_weights"] = batch["decoder_target_tokens"]
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        student=student, teacher=teacher, objective=objective, optimizer=optimizer, mesh=mesh, **settings
    )
    teacher_params = abstract_params(teacher) if objective.needs_teacher else None
    state = abstract_state(student, optimizer, objective, teacher)
    counts = count_matmul_flops(step, state, teacher_params, batch)
    # Position biases and their gradients, first summed over examples: the only products with so many terms.
    examples = LENGTHS.batch // settings.get("micro_batches", 1)
    for bias in (student.relative_buckets, examples, LENGTHS.source**2, LENGTHS.target**2):
        counts.pop(bias, None)
    return sum(counts.values())


@pytest.fixture(scope="module")
def models(student, teacher):
    changes = {"num_encoder_layers": 3, "num_decoder_layers": 2, "scan_layers": True, "relative_buckets": 44}
    return [dataclasses.replace(model, relative_max_distance=128, **changes) for model in (student, teacher)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_formula_counts_every_product_of_a_step(name, models, mesh):
    student, teacher = models
    objective = OBJECTIVES[name]
    assert counted(student, teacher, objective, mesh) == step_flops(student, teacher, objective, LENGTHS).total


@pytest.mark.parametrize("name", ["minilm", "union", "other terms"])
def test_formula_counts_what_interpolated_targets_add(name, models, mesh):
    objective = dataclasses.replace(OBJECTIVES[name], interpolated_targets=InterpolatedTargets(steps=3))
    flops = step_flops(*models, objective, LENGTHS).total
    assert counted(*models, objective, mesh) == flops > step_flops(*models, OBJECTIVES[name], LENGTHS).total


def test_micro_batches_change_no_flops(models, mesh):
    counts = [counted(*models, OBJECTIVES["union"], mesh, micro_batches=count) for count in (1, 2)]
    assert counts[0] == counts[1]


def test_forms_of_the_losses_differ_in_no_flops(models, mesh):
    forms = (DENSE, LossImplementation(relations="blocked", vocabulary="blocked"))
    counts = [counted(*models, OBJECTIVES["union"], mesh, implementation=form) for form in forms]
    assert counts[0] == counts[1]


def test_teacher_is_never_differentiated(models, mesh):
    student, teacher = models
    objective = OBJECTIVES["union"]
    deeper = dataclasses.replace(teacher, num_encoder_layers=5)
    more = counted(student, deeper, objective, mesh) - counted(student, teacher, objective, mesh)
    flops = [step_flops(student, model, objective, LENGTHS) for model in (deeper, teacher)]
    assert more == flops[0].teacher - flops[1].teacher > 0
