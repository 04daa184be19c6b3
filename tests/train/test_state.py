"""The train state in a checkpoint: as it always was where the objective carries nothing, and whole where it does."""

import json
from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.objectives import CrossEntropy, ForwardKL, HiddenDistance, InterpolatedTargets, Objective
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings

ADAM = make_optimizer(OptimizerConfig(), 10)


class Before(flax.struct.PyTreeNode):
    """What checkpoints had before objectives had a state."""

    step: jax.Array
    params: Any
    opt_state: Any


def save(folder, state):
    with Checkpointer(str(folder)) as checkpoints:
        checkpoints.save(1, state, {}, {})


def restore(folder, objective, student, teacher, mesh):
    settings = (student, ADAM, objective, teacher)
    shardings = state_shardings(student, ADAM, mesh, objective, teacher).saved()
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(*settings).saved(),
        shardings,
    )
    with Checkpointer(str(folder)) as checkpoints:
        return TrainState(**checkpoints.restore(1, abstract)[0])


def saved_names(folder):
    """What is on disk: every array's name and kind of keys."""
    return json.loads((folder / "1" / "state" / "_METADATA").read_text())["tree_metadata"].keys()


@pytest.fixture(scope="module")
def stateless():
    return Objective(terms=(ForwardKL(), CrossEntropy()))


def test_without_a_state_of_the_objective_a_checkpoint_is_what_it_always_was(
    stateless, student, teacher, mesh, tmp_path
):
    state = init_state(student, ADAM, mesh, jax.random.key(0), objective=stateless, teacher=teacher)
    assert state.objective == {} and state.trainable is state.params
    save(tmp_path / "new", state.saved())
    save(tmp_path / "before", Before(step=state.step, params=state.params, opt_state=state.opt_state))
    assert saved_names(tmp_path / "new") == saved_names(tmp_path / "before")
    for folder in ("new", "before"):
        restored = restore(tmp_path / folder, stateless, student, teacher, mesh)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_parameters_of_terms_and_an_adaptive_share_are_restored(student, teacher, mesh, tmp_path):
    objective = Objective(
        terms=(HiddenDistance(), HiddenDistance(of="decoder"), ForwardKL()),
        interpolated_targets=InterpolatedTargets(steps=10, adaptive_rate=0.1),
    )
    state = init_state(student, ADAM, mesh, jax.random.key(0), objective=objective, teacher=teacher)
    assert state.objective.keys() == {"params", "share"}
    kernels = [params["kernel"] for params in state.objective["params"].values()]
    assert [kernel.shape for kernel in kernels] == [(student.d_model, teacher.d_model)] * 2
    assert np.any(kernels[0] != kernels[1])
    save(tmp_path, state.saved())
    restored = restore(tmp_path, objective, student, teacher, mesh)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
