"""A student cut from a teacher on the mesh is the one that is cut on the host, and lies where a student lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.checkpoints.student_init import StudentInit, cut_params, init_from_teacher
from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import make_mesh, param_shardings

TEACHER = T5Config(
    vocab_size=40,
    d_model=24,
    num_heads=8,
    head_dim=6,
    mlp_dim=56,
    num_encoder_layers=3,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=12,
)
NARROW = {"d_model": 8, "num_heads": 4, "head_dim": 4, "mlp_dim": 16}
SETTINGS = {
    "layers": (StudentInit(kind="layers", encoder_layers=(2, 0)), {"num_encoder_layers": 2, "num_decoder_layers": 1}),
    "slice": (StudentInit(kind="slice"), {"num_encoder_layers": 2, **NARROW}),
}


@pytest.mark.parametrize("axes", [(1, 2, 4), (2, 4, 1)])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_student_cut_on_the_mesh_is_the_one_cut_on_the_host_and_lies_on_its_shards(kind, axes):
    init, changes = SETTINGS[kind]
    student = dataclasses.replace(TEACHER, **changes)
    mesh = make_mesh(*axes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(jnp.bfloat16), abstract_params(TEACHER))
    expected = cut_params(init, params, teacher=TEACHER, student=student)
    on_mesh = jax.device_put(params, param_shardings(TEACHER, mesh))

    def compare(expected, actual, sharding):
        assert actual.dtype == expected.dtype == np.float32
        assert actual.sharding.is_equivalent_to(sharding, actual.ndim)
        np.testing.assert_array_equal(expected, actual)

    for given in (on_mesh, params):
        ours = init_from_teacher(init, given, teacher=TEACHER, student=student, mesh=mesh)
        jax.tree.map(compare, expected, ours, param_shardings(student, mesh))
