"""Finding trained models: the bundled teacher is what its documentation says."""

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.fingerprint import fingerprint_params, fingerprint_vocabulary
from endistill_jax.checkpoints.models import BUNDLED_FOLDER, open_model
from endistill_jax.core.errors import UserError
from endistill_jax.data.vocabulary import bundled_vocabulary
from endistill_jax.models.family import count_params
from endistill_jax.sharding import make_mesh, param_shardings


@pytest.fixture(scope="module")
def bundled():
    return open_model("bundled", "bfloat16", scan_layers=False)


def test_the_bundled_teacher_has_the_size_that_is_documented(bundled):
    assert count_params(bundled.params) == 7_608_064
    assert sum(file.stat().st_size for file in BUNDLED_FOLDER.iterdir()) < 16_000_000
    assert (bundled.config.num_encoder_layers, bundled.config.num_decoder_layers, bundled.config.d_model) == (4, 4, 256)


def test_the_bundled_teacher_speaks_the_vocabulary_of_the_offline_tasks(bundled):
    vocabulary = bundled_vocabulary()
    assert bundled.vocabulary == fingerprint_vocabulary(vocabulary)
    assert bundled.config.vocab_size == 8192 >= vocabulary.vocab_size


def test_a_models_type_is_what_was_asked_for_and_its_fingerprint_is_not_of_the_type(bundled):
    assert bundled.params["token_embedder"]["embedding"].dtype == "bfloat16"
    assert bundled.fingerprint == fingerprint_params(open_model("bundled").params)
    assert not bundled.config.scan_layers and bundled.config.dtype == "bfloat16"


def test_what_is_loaded_moves_to_where_it_is_asked_for_next():
    model, mesh = open_model("bundled"), make_mesh()
    on_host = model.load()
    assert isinstance(on_host["token_embedder"]["embedding"], np.ndarray)
    for placement in ("sharded", "replicated"):
        wanted = param_shardings(model.config, mesh, placement)
        placed = model.load_on(mesh, placement)
        assert jax.tree.map(lambda leaf: leaf.sharding, placed) == wanted
        assert model.load_on(mesh, placement) is placed and model.params is placed
    np.testing.assert_array_equal(
        placed["token_embedder"]["embedding"], on_host["token_embedder"]["embedding"], strict=True
    )


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        open_model(str(tmp_path))
    with pytest.raises(UserError, match="no model at .*nowhere; give 'bundled'"):
        open_model(str(tmp_path / "nowhere"))
