"""Sizes of T5 by name: `t5_v1_1_base(dropout_rate=0.1)` is that size with another dropout.

Every function takes any setting of `T5Config` by name, in place of its own. The public checkpoints have 32,128 rows in
their token table (umT5 256,384, MADLAD-400 256,000), whatever their tokenizer's size.
"""

import difflib
from collections.abc import Callable
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config

SIZES: dict[str, Callable[..., T5Config]] = {}


def _size(
    name: str, layers: int, width: int, heads: tuple[int, int], mlp_dim: int, **settings: Any
) -> Callable[..., T5Config]:
    """A function of that name that makes a v1.1 model of so many layers in each stack, with some other settings."""
    shape = {"num_encoder_layers": layers, "num_decoder_layers": layers, "d_model": width, "mlp_dim": mlp_dim}
    own = shape | {"num_heads": heads[0], "head_dim": heads[1]} | settings

    def size(**overrides: Any) -> T5Config:
        return T5Config(**own | overrides)

    size.__name__ = size.__qualname__ = name
    depths = f"{layers}+{own['num_decoder_layers']} layers"
    kind = "ReLU" if "mlp_activations" in own else "gated"
    last = "a position bias in every layer" if own.get("bias_per_layer") else "a head of its own"
    if own.get("tied_head"):
        last = "tied head"
    size.__doc__ = f"{depths}, width {width:,}, {heads[0]} heads x {heads[1]}, {kind} MLP of {mlp_dim:,}, {last}."
    SIZES[name] = size
    return size


_V1_0 = {"vocab_size": 32128, "mlp_activations": ("relu",), "tied_head": True}
t5_v1_0_small = _size("t5_v1_0_small", 6, 512, (8, 64), 2048, **_V1_0)
t5_v1_0_base = _size("t5_v1_0_base", 12, 768, (12, 64), 3072, **_V1_0)
# Its heads together (4,096) are wider than the model: relation heads divide 4,096.
t5_v1_0_3b = _size("t5_v1_0_3b", 24, 1024, (32, 128), 16384, **_V1_0)

_V1_1 = {"vocab_size": 32128}
t5_v1_1_small = _size("t5_v1_1_small", 8, 512, (6, 64), 1024, **_V1_1)
t5_v1_1_base = _size("t5_v1_1_base", 12, 768, (12, 64), 2048, **_V1_1)
t5_v1_1_large = _size("t5_v1_1_large", 24, 1024, (16, 64), 2816, **_V1_1)
t5_v1_1_xl = _size("t5_v1_1_xl", 24, 2048, (32, 64), 5120, **_V1_1)  # "3B"
t5_v1_1_xxl = _size("t5_v1_1_xxl", 24, 4096, (64, 64), 10240, **_V1_1)

_UMT5 = {"vocab_size": 256384, "bias_per_layer": True}
umt5_small = _size("umt5_small", 8, 512, (6, 64), 1024, **_UMT5)
umt5_base = _size("umt5_base", 12, 768, (12, 64), 2048, **_UMT5)
umt5_xl = _size("umt5_xl", 24, 2048, (32, 64), 5120, **_UMT5)
umt5_xxl = _size("umt5_xxl", 24, 4096, (64, 64), 10240, **_UMT5)

# A translation model, which pads with 1 and ends with 2.
madlad400_3b = _size("madlad400_3b", 32, 1024, (16, 128), 8192, vocab_size=256000, pad_id=1, eos_id=2)

# Students: v1.1 base, halved; one whose shallow decoder makes generation cheap, as it runs once a token and the encoder
# once a text; a deep and thin one.
student_6x6_768 = _size("student_6x6_768", 6, 768, (12, 64), 2048, **_V1_1)
student_12x3_768 = _size("student_12x3_768", 12, 768, (12, 64), 2048, num_decoder_layers=3, **_V1_1)
student_12x12_384 = _size("student_12x12_384", 12, 384, (12, 32), 1024, **_V1_1)

# The demo's student and the bundled teacher, for which `vocab_size` must be given. Their few layers use the cores of a
# CPU better one by one than in a loop.
_MINI = {"tied_head": True, "scan_layers": False}
mini_2x2_128 = _size("mini_2x2_128", 2, 128, (4, 32), 256, **_MINI)
mini_4x4_256 = _size("mini_4x4_256", 4, 256, (4, 64), 384, **_MINI)


def build(size: str | Callable[..., T5Config], **overrides: Any) -> T5Config:
    """A size, by its name or as one of the functions above, with some settings in place of its own."""
    if callable(size):
        return size(**overrides)
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SIZES)}"
        raise UserError(f"no model size {size!r}; {advice}")
    return SIZES[size](**overrides)
