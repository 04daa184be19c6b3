"""The shapes that annotations promise, checked while every term is traced and text is generated."""

import subprocess
import sys

import pytest

CHECKED = """
from jaxtyping import install_import_hook

modules = ["core.attention", "core.model_io", "objectives", "models.t5", "models.generation"]
install_import_hook([f"endistill_jax.{name}" for name in modules], "beartype.beartype")

import dataclasses
import functools

import jax
import jax.numpy as jnp
from tiny_models import STUDENT, TEACHER, packed_batch

from endistill_jax.models.family import abstract_params, apply
from endistill_jax.models.generation.generation import Decoding, generate
from endistill_jax.models.t5.layers import RMSNorm
from endistill_jax.objectives import (
    AttentionKL, CrossEntropy, ForwardKL, GeneralizedJSD, HiddenDistance, InterpolatedTargets, LossImplementation,
    Objective, ReverseKL, SkewedKL, relations,
)
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.objectives.relations import relation_scores
from endistill_jax.train.state import init_objective, trainable
from endistill_jax.train.step import LossFunction

objective = Objective(
    terms=(
        *(term for site in ("encoder_self", "cross") for term in relations(site, ("qk", "vv"), relation_heads=4)),
        AttentionKL(site="decoder_self", num_heads=8), HiddenDistance(), HiddenDistance(of="decoder", distance="l2"),
        ForwardKL(temperature=2.0), ReverseKL(), GeneralizedJSD(), SkewedKL(), CrossEntropy(z_loss=0.1),
    ),
    interpolated_targets=InterpolatedTargets(steps=3, adaptive_rate=0.1),
)
for implementation in (DENSE, LossImplementation()):
    function = LossFunction(student=STUDENT, teacher=TEACHER, objective=objective, implementation=implementation)

    def gradient(params, teacher_params, batch, key, step):
        carried = jax.tree.map(lambda x: x, init_objective(objective, key, STUDENT, TEACHER))
        import flax.linen as nn

        trained, weights = trainable(params, nn.meta.unbox(carried)), objective.weights(batch)
        run = jax.value_and_grad(function, has_aux=True)
        (loss, _), found = run(trained, teacher_params, batch, weights=weights, step=step, share=carried["share"])
        return objective.interpolated_targets.update(step, carried["share"], loss), found

    models, step = (abstract_params(STUDENT), abstract_params(TEACHER)), jax.ShapeDtypeStruct((), "int32")
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in packed_batch().items()}
    jax.eval_shape(gradient, *models, batch, jax.eval_shape(lambda: jax.random.key(0)), step)

for settings in ({}, {"strategy": "sample", "top_k": 3, "top_p": 0.9}, {"strategy": "beam", "beams": 2}):
    for scan_layers in (True, False):
        for bias_per_layer in (True, False):
            config = dataclasses.replace(TEACHER, scan_layers=scan_layers, bias_per_layer=bias_per_layer)
            run = functools.partial(generate, config, Decoding(max_length=5, **settings))
            tokens = jax.ShapeDtypeStruct((3, 7), "int32")
            jax.eval_shape(run, abstract_params(config), tokens, jax.eval_shape(lambda: jax.random.key(0)))

config = dataclasses.replace(TEACHER, attention_bytes=64, tied_head=False, dropout_rate=0.1)
jax.eval_shape(lambda params, batch: apply(config, params, batch), abstract_params(config), batch)
wrong = (
    lambda: relation_scores((jnp.ones((2, 3, 8)), jnp.ones((2, 4, 6))), (jnp.ones((2, 3), int),) * 2, 2),
    lambda: RMSNorm(TEACHER, parent=None).init(jax.random.key(0), jnp.ones((2, 3))),
)
for function in wrong:
    try:
        function()
    except Exception as error:
        print("checked", type(error).__name__)
"""


def test_every_term_keeps_its_shapes_and_a_wrong_one_is_noticed(request):
    pytest.importorskip("beartype")
    root = request.config.rootpath
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root / 'tests')!r})\n{CHECKED}"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["checked TypeCheckError"] * 2
