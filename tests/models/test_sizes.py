"""The sizes by name: what the public checkpoints count, and what may be asked of them."""

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.models.t5 import sizes

# Parameters of the public checkpoints, shared embeddings counted once.
PUBLISHED = {
    "t5_v1_0_small": 60_506_624,
    "t5_v1_0_base": 222_903_552,
    "t5_v1_0_3b": 2_851_598_336,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "umt5_small": 306_601_984,
    "madlad400_3b": 2_940_374_016,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_has_the_parameters_of_the_published_checkpoint(name):
    assert count_params(abstract_params(sizes.build(name))) == PUBLISHED[name]


@pytest.mark.parametrize("name", sizes.SIZES)
def test_first_line_of_a_size_says_layers_width_and_heads(name):
    config = sizes.build(name, **({"vocab_size": 400} if name.startswith("mini") else {}))
    line = sizes.SIZES[name].__doc__.splitlines()[0]
    for fact in (
        f"{config.num_encoder_layers}+{config.num_decoder_layers} layers",
        f"width {config.d_model:,}",
        f"{config.num_heads} heads x {config.head_dim}",
        f"MLP of {config.mlp_dim:,}",
    ):
        assert fact in line
    assert ("position bias in every layer" in line) == config.bias_per_layer
    assert config.bias_per_layer or ("tied head" in line) == config.tied_head


def test_size_takes_any_setting_and_refuses_what_is_none():
    named, called = sizes.build("umt5_base", dropout_rate=0.1), sizes.build(sizes.umt5_base, dropout_rate=0.1)
    assert named == called == sizes.umt5_base(dropout_rate=0.1) != sizes.umt5_base()
    assert sizes.student_12x3_768(num_decoder_layers=2).num_decoder_layers == 2
    with pytest.raises(TypeError, match="depth"):
        sizes.t5_v1_1_base(depth=3)
    with pytest.raises(UserError, match=r"no model size 't5_v1_1_bas'; did you mean t5_v1_1_base\?"):
        sizes.build("t5_v1_1_bas")
    with pytest.raises(UserError, match="no model size 'huge'; choose one of t5_v1_0_small"):
        sizes.build("huge")
