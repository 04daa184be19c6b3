"""Options of the compiler reach it, those of other platforms do not, and a wrong one is named before anything runs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Batch
from endistill_jax.objectives import presets
from endistill_jax.sharding import make_mesh
from endistill_jax.train import step as step_module
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import abstract_state
from endistill_jax.train.step import make_train_step, options_of_platform


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices("cpu")[:1])


def test_options_are_those_of_the_platform_of_the_mesh(mesh):
    options = {"cpu": {"xla_cpu_enable_fast_math": True}, "tpu": {"xla_of_a_tpu_that_is_not_here": 1}}
    assert options_of_platform(options, mesh) == {"xla_cpu_enable_fast_math": True}
    assert options_of_platform({"tpu": options["tpu"]}, mesh) is None
    assert options_of_platform(None, mesh) is None


def test_a_host_tries_options_on_a_device_of_its_own(monkeypatch):
    """Not on the first of the mesh, which may be another host's: some compilers refuse to compile for those."""
    tried = []
    monkeypatch.setattr(step_module, "_try_option", lambda *arguments: tried.append(arguments[-1]))
    ours = jax.devices("cpu")[0]
    elsewhere = SimpleNamespace(platform="cpu")
    of_two_hosts = SimpleNamespace(devices=np.array([[[elsewhere, ours]]]), local_devices=[ours])
    options_of_platform({"cpu": {"xla_cpu_enable_fast_math": True}}, of_two_hosts)
    assert tried == [ours]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cpu": {"xla_cpu_enable_fast_math": True, "xla_nope": 7}}, r"\['cpu'\]\['xla_nope'\] = 7 is not taken"),
        ({"cpu": {"xla_cpu_enable_fast_math": "maybe"}}, r"fast_math'\] = 'maybe' is not taken .*not a valid bool"),
        ({"cpu": {"xla_cpu_enable_fast_math": [1]}}, r"fast_math'\] is \[1\]; it must be a string, number or truth"),
        ({"xla_cpu_enable_fast_math": True}, r"give options by platform \(cpu, gpu, tpu\)"),
        ({"cuda": {}}, r"has 'cuda'.*give options by platform \(cpu, gpu, tpu\)"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(mesh, options, told):
    with pytest.raises(UserError, match=told) as error:
        options_of_platform(options, mesh)
    assert "\n" not in str(error.value)


def test_the_step_is_compiled_with_the_options(mesh, student):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    batch: Batch = dict.fromkeys(names, tokens)

    def fusions(options):
        step = make_train_step(
            student=student,
            teacher=None,
            objective=presets.scratch(),
            optimizer=optimizer,
            mesh=mesh,
            compiler_options=options,
        )
        compiled = step.lower(abstract_state(student, optimizer), None, batch).compile()
        return compiled.as_text().count(" fusion(")

    assert fusions({"cpu": {"xla_disable_hlo_passes": "fusion"}}) < fusions(None) / 2
