"""A model that cannot be built is refused when its settings are made, in one line that says what would be right."""

import dataclasses

import pytest

from endistill_jax.core.errors import UserError


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("vocab_size", 0, "whole number of at least 1"),
        ("d_model", 0, "whole number of at least 1"),
        ("num_heads", 0, "whole number of at least 1"),
        ("head_dim", -2, "whole number of at least 1"),
        ("mlp_dim", 0, "whole number of at least 1"),
        ("num_encoder_layers", 0, "whole number of at least 1"),
        ("num_decoder_layers", -1, "at least 0"),
        ("mlp_activations", (), "one or two of"),
        ("mlp_activations", ("gelu", "linear", "relu"), "one or two of"),
        ("mlp_activations", ("swish",), "silu"),
        ("dropout_rate", 1.0, r"\[0, 1\)"),
        ("dropout_rate", -0.1, r"\[0, 1\)"),
        ("relative_buckets", 6, "multiple of 4"),
        ("relative_buckets", 0, "multiple of 4"),
        ("relative_max_distance", 4, "exceed half of relative_buckets"),
        ("dtype", "float16", "bfloat16"),
        ("remat", "some", "dots"),
        ("attention_bytes", 0, "whole number of at least 1"),
        ("pad_id", 23, "0 to 22"),
        ("eos_id", -1, "0 to 22"),
        ("decoder_start_id", 40, "0 to 22"),
        ("eos_id", 0, "would look like padding"),
    ],
)
def test_impossible_setting_is_refused_in_one_line_with_what_would_be_right(config, setting, value, advice):
    with pytest.raises(UserError, match=advice) as error:
        dataclasses.replace(config, **{setting: value})
    assert setting in str(error.value) and "\n" not in str(error.value)


def test_lists_as_gin_gives_them_make_an_equal_and_hashable_config(config):
    listed = dataclasses.replace(config, mlp_activations=["gelu", "linear"])
    assert listed == config and hash(listed) == hash(config)


def test_inner_dim_is_the_heads_width_and_not_the_residual_streams(config):
    assert config.inner_dim == 12 and config.d_model == 10


def test_architecture_names_what_decides_the_function_and_not_how_it_is_executed(config):
    execution = {
        "dtype": "bfloat16",
        "scan_layers": False,
        "remat": "full",
        "attention_bytes": 1000,
        "dropout_rate": 0.5,
        "head_init_scale": 0.1,
    }
    assert dataclasses.replace(config, **execution).architecture() == config.architecture()
    # Of what was added later only what has not its default, so that manifests from before stay equal.
    added = {"bias_per_layer": True, "pad_id": 3, "eos_id": 2, "decoder_start_id": 4}
    decisive = {field.name for field in dataclasses.fields(config)} - set(execution)
    assert set(config.architecture()) == decisive - set(added)
    for name, value in added.items():
        changed = dataclasses.replace(config, **{name: value}).architecture()
        assert changed == config.architecture() | {name: value}
