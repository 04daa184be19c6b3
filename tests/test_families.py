"""Distillation between the kinds of T5: a bias in every layer on either side, and encoders alone."""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Objective, presets
from endistill_jax.objectives.relations import relations
from endistill_jax.sharding import make_mesh, param_shardings, place_batch
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import init_state
from endistill_jax.train.step import make_train_step

T5 = T5Config(vocab_size=19, d_model=8, num_heads=2, head_dim=6, mlp_dim=10, num_encoder_layers=2, num_decoder_layers=2)
UMT5 = dataclasses.replace(T5, bias_per_layer=True)
UNION = presets.union(relation_heads=2)
ENCODER = Objective(terms=relations("encoder_self", ("qq", "kk", "vv"), relation_heads=2))


def alone(config):
    return dataclasses.replace(config, num_decoder_layers=0)


CASES = {
    "umT5 to umT5": (UMT5, UMT5, UNION),
    "umT5 to T5": (UMT5, T5, UNION),
    "encoder of T5 to one of umT5 alone": (T5, alone(UMT5), ENCODER),
}


def batch():
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(1, 19, (2, length)).astype(np.int32) for length in (6, 5))
    inputs[1, 4:] = targets[1, 3:] = 0
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_bring_the_student_nearer_and_move_every_bias_below_what_is_read(case):
    teacher, student, objective = CASES[case]
    teacher = dataclasses.replace(teacher, d_model=12)
    objective.validate(student, teacher)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, warmup_steps=1, weight_decay=0.0), 8)
    shapes = {"student": student, "teacher": teacher, "objective": objective}
    step = make_train_step(**shapes, optimizer=optimizer, mesh=mesh)
    params = jax.jit(lambda: init_params(student, jax.random.key(1)))()
    before = jax.tree.map(np.asarray, params)
    state = init_state(student, optimizer, mesh, jax.random.key(0), params, objective=objective, teacher=teacher)
    teacher_params = jax.device_put(
        jax.jit(lambda: init_params(teacher, jax.random.key(2)))(), param_shardings(teacher, mesh)
    )
    placed, losses = place_batch(batch(), mesh), []
    for _ in range(8):
        state, metrics = step(state, teacher_params, placed)
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.9 * losses[0] and np.isfinite(losses).all()
    if student.bias_per_layer:
        for stack in ("encoder", "decoder")[: 2 if student.num_decoder_layers else 1]:
            old, new = (tree[stack]["layers"]["relpos_bias"]["rel_embedding"] for tree in (before, state.params))
            # The last layer's bias is above a tap of it: only what reads a stack to its end moves that.
            moved = [not np.array_equal(old[layer], np.asarray(new)[layer]) for layer in range(2)]
            assert moved[0] and moved[1] == (objective is UNION)
