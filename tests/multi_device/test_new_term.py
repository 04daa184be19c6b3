"""Terms that a user adds in one file, added_term.py, train sharded, blocked and resumable, with their own metrics."""

import jax
import numpy as np
import pytest
from added_term import EncodedMean, TotalVariation
from tiny_models import STUDENT, TEACHER, packed_batch, random_params

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.objectives import CrossEntropy, LossImplementation, Objective
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.sharding import make_mesh, param_shardings, place_batch
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step

OBJECTIVE = Objective(terms=(TotalVariation(), EncodedMean(coefficient=0.5), CrossEntropy(coefficient=0.1)))
ADAM = make_optimizer(OptimizerConfig(learning_rate=0.01, schedule="constant", eps=1e-3), 10)
MODELS = {"objective": OBJECTIVE, "teacher": TEACHER}
BLOCKED = LossImplementation(vocabulary="blocked", vocabulary_bytes=8 * 4 * 10)


class Run:
    """Steps of the added terms on a mesh."""

    def __init__(self, axes, implementation):
        self.mesh = make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
        self.step = make_train_step(
            student=STUDENT,
            teacher=TEACHER,
            objective=OBJECTIVE,
            optimizer=ADAM,
            mesh=self.mesh,
            implementation=implementation,
        )
        self.teacher_params = jax.device_put(random_params(TEACHER, 1), param_shardings(TEACHER, self.mesh))
        self.batch = place_batch(packed_batch(), self.mesh)

    def start(self):
        return init_state(STUDENT, ADAM, self.mesh, jax.random.key(0), random_params(STUDENT, 0), **MODELS)

    def train(self, state, steps):
        metrics = []
        for _ in range(steps):
            state, measured = self.step(state, self.teacher_params, self.batch)
            metrics.append(jax.device_get(measured))
        return state, metrics

    def restore(self, folder, step):
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(STUDENT, ADAM, **MODELS).saved(),
            state_shardings(STUDENT, ADAM, self.mesh, **MODELS).saved(),
        )
        with Checkpointer(folder) as checkpoints:
            return TrainState(**checkpoints.restore(step, abstract)[0])


@pytest.fixture(scope="module")
def sharded():
    return Run((2, 2, 2), BLOCKED)


@pytest.fixture(scope="module")
def trained(sharded):
    state, metrics = sharded.train(sharded.start(), 3)
    return jax.device_get(state), metrics


def test_they_train_and_each_has_its_metric(trained):
    state, metrics = trained
    for name in ("total_variation", "encoded_mean", "loss"):
        values = [float(each[name][0] / each[name][1]) for each in metrics]
        assert values[-1] < values[0], name
    assert np.abs(state.objective["params"]["encoded_mean"]["scale"] - 1).min() > 1e-4


def test_eight_devices_and_blocks_equal_one_device_and_all_logits(trained):
    alone = Run((1, 1, 1), DENSE)
    one, metrics = alone.train(alone.start(), 3)
    # Rounding grows from step to step.
    for step, tolerance in ((0, 2e-5), (2, 1e-3)):
        for name, pair in metrics[step].items():
            np.testing.assert_allclose(trained[1][step][name], pair, rtol=tolerance, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), trained[0].trainable, one.trainable)


def test_a_run_that_is_saved_and_restored_goes_on_bit_for_bit(sharded, trained, tmp_path):
    state, _ = sharded.train(sharded.start(), 2)
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(2, state.saved(), {}, {})
    resumed, _ = sharded.train(sharded.restore(str(tmp_path), 2), 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), trained[0])
