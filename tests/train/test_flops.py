"""The formula of a training step against the products of the step's own program."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from endistill_jax.models.family import Lengths, abstract_params
from endistill_jax.models.t5.counted_flops import count_matmul_flops
from endistill_jax.objectives import Computation, InterpolatedTargets, Path, Site
from endistill_jax.train.flops import step_flops
from endistill_jax.train.state import abstract_state
from endistill_jax.train.step import make_train_step

SELF, CROSS = (Site(relations=relations, relation_heads=4) for relations in (("qq", "kk", "vv"), ("qk", "vv")))
PATHS = {
    "scratch": Path(lm_weight=1.0),
    "logits": Path(logits_weight=1.0),
    "minilm": Path(encoder_self=SELF, decoder_self=SELF),
    "minilm_logits": Path(encoder_self=SELF, decoder_self=SELF, logits_weight=1.0),
    "decoder": Path(decoder_self=SELF, cross=CROSS),
    "minend": Path(encoder_self=SELF, decoder_self=SELF, cross=CROSS, logits_weight=1.0),
}
# The fast forms fill up rows and tokens to whole registers: lengths that are whole already. So many examples, or half
# of them, is the size of nothing else.
LENGTHS = Lengths(batch=52, source=16, target=24)


def counted(student, teacher, path, mesh, **settings):
    shape = {"encoder": LENGTHS.source, "decoder": LENGTHS.target}
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: jax.ShapeDtypeStruct((LENGTHS.batch, shape[name[:7]]), jnp.int32) for name in names}
    batch["decoder_loss_weights"] = batch["decoder_target_tokens"]
    optimizer = optax.sgd(1.0)
    step = make_train_step(student=student, teacher=teacher, path=path, optimizer=optimizer, mesh=mesh, **settings)
    teacher_params = abstract_params(teacher) if path.needs_teacher else None
    counts = count_matmul_flops(step, abstract_state(student, optimizer), teacher_params, batch)
    # Position biases and their gradients, first summed over examples: the only products with so many terms.
    examples = LENGTHS.batch // settings.get("micro_batches", 1)
    for bias in (student.relative_buckets, examples, LENGTHS.source**2, LENGTHS.target**2):
        counts.pop(bias, None)
    return sum(counts.values())


@pytest.fixture(scope="module")
def models(student, teacher):
    changes = {"num_encoder_layers": 3, "num_decoder_layers": 2, "scan_layers": True, "relative_buckets": 44}
    return [dataclasses.replace(model, relative_max_distance=128, **changes) for model in (student, teacher)]


@pytest.mark.parametrize("name", PATHS)
def test_formula_counts_every_product_of_a_step(name, models, mesh):
    student, teacher = models
    path = PATHS[name]
    assert counted(student, teacher, path, mesh) == step_flops(student, teacher, path, LENGTHS).total


@pytest.mark.parametrize("name", ["minilm", "minend"])
def test_formula_counts_what_interpolated_targets_add(name, models, mesh):
    path = dataclasses.replace(PATHS[name], interpolated_targets=InterpolatedTargets(steps=3))
    flops = step_flops(*models, path, LENGTHS).total
    assert counted(*models, path, mesh) == flops > step_flops(*models, PATHS[name], LENGTHS).total


def test_micro_batches_change_no_flops(models, mesh):
    counts = [counted(*models, PATHS["minend"], mesh, micro_batches=count) for count in (1, 2)]
    assert counts[0] == counts[1]


def test_forms_of_the_losses_differ_in_no_flops(models, mesh):
    forms = (Computation(relations="dense", vocabulary="dense"), Computation(relations="grouped", vocabulary="chunked"))
    counts = [counted(*models, PATHS["minend"], mesh, computation=form) for form in forms]
    assert counts[0] == counts[1]


def test_teacher_is_never_differentiated(models, mesh):
    student, teacher = models
    path = PATHS["minend"]
    deeper = dataclasses.replace(teacher, num_encoder_layers=5)
    more = counted(student, deeper, path, mesh) - counted(student, teacher, path, mesh)
    flops = [step_flops(student, model, path, LENGTHS) for model in (deeper, teacher)]
    assert more == flops[0].teacher - flops[1].teacher > 0


def test_every_path_of_a_gin_file_is_counted():
    folder = pathlib.Path(__file__).parents[2] / "gin" / "paths"
    assert set(PATHS) == {re.sub(r"\.gin$", "", file.name) for file in folder.iterdir()}
