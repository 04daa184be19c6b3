"""Models through the family protocol: settings alone decide what runs."""

import dataclasses

import jax
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import LOGITS, Reads
from endistill_jax.models import family
from endistill_jax.models.t5.t5 import T5


def test_settings_name_their_family_and_run_its_model(config, params, batch):
    assert family.family_names() == ["t5"] and family.family_named("t5") is config.family
    reads = LOGITS | Reads(taps={("cross", -1): "qk"})
    expected = T5(config).apply({"params": params}, batch, reads)
    jax.tree.map(np.testing.assert_array_equal, family.apply(config, params, batch, reads), expected)
    in_groups = family.apply(config, params, batch, reads, frozen=True, attention_bytes=300)
    np.testing.assert_allclose(in_groups.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(family.logical_axes(config), is_leaf=lambda x: not isinstance(x, dict)) == (
        jax.tree.structure(family.abstract_params(config))
    )


def test_settings_come_back_from_a_manifest_with_or_without_what_was_added_later(config):
    plain = config.architecture()
    assert not {"family", "bias_per_layer", "pad_id", "eos_id", "decoder_start_id"} & plain.keys()
    assert family.config_from_plain(plain) == family.config_from_plain(plain | {"family": "t5"}) == config
    assert family.config_from_plain(plain | {"eos_id": 2}).architecture() == plain | {"eos_id": 2}
    with pytest.raises(UserError, match=r"no model family 't6'; choose one of t5"):
        family.config_from_plain(plain | {"family": "t6"})
    with pytest.raises(UserError, match="a T5Config has no experts"):
        family.config_from_plain(plain | {"experts": 4})


def test_batches_that_start_and_end_otherwise_than_the_model_are_refused(config):
    family.check_batches(dataclasses.replace(config, pad_id=1, eos_id=2), 2)  # MADLAD-400's
    with pytest.raises(UserError, match="eos_id is 1, and the task's vocabulary ends a text with 2"):
        family.check_batches(config, 2)
    with pytest.raises(UserError, match="decoder_start_id is 3; SeqIO begins every target with 0"):
        family.check_batches(dataclasses.replace(config, decoder_start_id=3), 1)
    family.check_batches(dataclasses.replace(config, decoder_start_id=3, num_decoder_layers=0), 5)
