"""What a model generates, and what it gives to targets, does not depend on the mesh."""

import jax
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.predictor import Predictor
from endistill_jax.models.family import init_params
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import make_mesh

CONFIG = T5Config(
    vocab_size=32, d_model=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1
)
INPUTS = [(5, 6, 1), (7, 1), (8, 9, 10, 11, 12, 1)]
TARGETS = [(4, 1), (5, 6, 1)]


class Examples:
    """What a predictor reads of SeqIO's datasets: every input with each of the targets."""

    def as_numpy_iterator(self):
        pairs = [(inputs, targets) for inputs in INPUTS for targets in TARGETS]
        for index, (inputs, targets) in enumerate(pairs):
            yield index, {"encoder_input_tokens": np.asarray(inputs), "decoder_target_tokens": np.asarray(targets)}


def make_predictor(*mesh, devices=None, batch_size=4):
    decoding = Decoding(max_length=4, strategy="sample")
    return Predictor(CONFIG, decoding, make_mesh(*mesh, devices=devices), batch_size=batch_size, inputs_length=8)


def test_the_mesh_changes_neither_texts_nor_scores():
    params = init_params(CONFIG, jax.random.key(0))
    one, many = make_predictor(1, 1, 1, devices=jax.devices()[:1]), make_predictor(2, 2, 2)
    (tokens, scores), (spread_tokens, spread_scores) = (
        each.generate(jax.device_put(params, each.shardings), INPUTS) for each in (one, many)
    )
    np.testing.assert_array_equal(tokens, spread_tokens)
    np.testing.assert_allclose(scores, spread_scores, rtol=1e-5)
    ranked, spread_ranked = (each.score(jax.device_put(params, each.shardings), Examples()) for each in (one, many))
    assert [index for index, _ in ranked] == [index for index, _ in spread_ranked] == list(range(6))
    np.testing.assert_allclose([s for _, s in ranked], [s for _, s in spread_ranked], rtol=1e-5)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(UserError, match="batch size is 6; it must be a multiple of 4 .*choose 4 or 8"):
        make_predictor(2, 2, 2, batch_size=6)
