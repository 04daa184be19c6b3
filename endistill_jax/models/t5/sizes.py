"""Sizes of T5 by name: `t5_v1_1_base(dropout_rate=0.1)` is that size with another dropout.

Every function takes any setting of `T5Config` by name, in place of its own. The public checkpoints have 32,128 rows in
their token table (umT5 256,384, MADLAD-400 256,000), whatever their tokenizer's size.
"""

import difflib
from collections.abc import Callable
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config

_UMT5 = {"vocab_size": 256384, "bias_per_layer": True}
# Few layers: one by one they use the cores of a CPU better than in a loop.
_MINI = {"tied_head": True, "scan_layers": False}


def t5_v1_0_small(**overrides: Any) -> T5Config:
    """T5 v1.0 small: 6+6 layers, width 512, 8 heads x 64, ReLU MLP of 2,048, tied head."""
    return _v1_0(6, 512, (8, 64), 2048, overrides)


def t5_v1_0_base(**overrides: Any) -> T5Config:
    """T5 v1.0 base: 12+12 layers, width 768, 12 heads x 64, ReLU MLP of 3,072, tied head."""
    return _v1_0(12, 768, (12, 64), 3072, overrides)


def t5_v1_0_3b(**overrides: Any) -> T5Config:
    """T5 v1.0 3B: 24+24 layers, width 1,024, 32 heads x 128, ReLU MLP of 16,384, tied head.

    Its heads together (4,096) are wider than the model: relation heads divide 4,096.
    """
    return _v1_0(24, 1024, (32, 128), 16384, overrides)


def t5_v1_1_small(**overrides: Any) -> T5Config:
    """T5 v1.1 small: 8+8 layers, width 512, 6 heads x 64, gated MLP of 1,024, a head of its own."""
    return _v1_1(8, 512, (6, 64), 1024, overrides)


def t5_v1_1_base(**overrides: Any) -> T5Config:
    """T5 v1.1 base: 12+12 layers, width 768, 12 heads x 64, gated MLP of 2,048, a head of its own."""
    return _v1_1(12, 768, (12, 64), 2048, overrides)


def t5_v1_1_large(**overrides: Any) -> T5Config:
    """T5 v1.1 large: 24+24 layers, width 1,024, 16 heads x 64, gated MLP of 2,816, a head of its own."""
    return _v1_1(24, 1024, (16, 64), 2816, overrides)


def t5_v1_1_xl(**overrides: Any) -> T5Config:
    """T5 v1.1 XL ("3B"): 24+24 layers, width 2,048, 32 heads x 64, gated MLP of 5,120, a head of its own."""
    return _v1_1(24, 2048, (32, 64), 5120, overrides)


def t5_v1_1_xxl(**overrides: Any) -> T5Config:
    """T5 v1.1 XXL: 24+24 layers, width 4,096, 64 heads x 64, gated MLP of 10,240, a head of its own."""
    return _v1_1(24, 4096, (64, 64), 10240, overrides)


def umt5_small(**overrides: Any) -> T5Config:
    """umT5 small: 8+8 layers, width 512, 6 heads x 64, gated MLP of 1,024, a position bias in every layer."""
    return t5_v1_1_small(**_UMT5 | overrides)


def umt5_base(**overrides: Any) -> T5Config:
    """umT5 base: 12+12 layers, width 768, 12 heads x 64, gated MLP of 2,048, a position bias in every layer."""
    return t5_v1_1_base(**_UMT5 | overrides)


def umt5_xl(**overrides: Any) -> T5Config:
    """umT5 XL: 24+24 layers, width 2,048, 32 heads x 64, gated MLP of 5,120, a position bias in every layer."""
    return t5_v1_1_xl(**_UMT5 | overrides)


def umt5_xxl(**overrides: Any) -> T5Config:
    """umT5 XXL: 24+24 layers, width 4,096, 64 heads x 64, gated MLP of 10,240, a position bias in every layer."""
    return t5_v1_1_xxl(**_UMT5 | overrides)


def madlad400_3b(**overrides: Any) -> T5Config:
    """MADLAD-400 3B: 32+32 layers, width 1,024, 16 heads x 128, gated MLP of 8,192, a head of its own.

    A translation model with 256,000 rows, which pads with 1 and ends with 2.
    """
    return _v1_1(32, 1024, (16, 128), 8192, {"vocab_size": 256000, "pad_id": 1, "eos_id": 2} | overrides)


def student_6x6_768(**overrides: Any) -> T5Config:
    """A student of 6+6 layers, width 768: 12 heads x 64, gated MLP of 2,048, a head of its own (v1.1 base, halved)."""
    return _v1_1(6, 768, (12, 64), 2048, overrides)


def student_12x3_768(**overrides: Any) -> T5Config:
    """A student of 12+3 layers, width 768: 12 heads x 64, gated MLP of 2,048, a head of its own.

    A shallow decoder makes generation cheap: it runs once a token, the encoder once a text.
    """
    return _v1_1(12, 768, (12, 64), 2048, {"num_decoder_layers": 3} | overrides)


def student_12x12_384(**overrides: Any) -> T5Config:
    """A student of 12+12 layers, width 384: 12 heads x 32, gated MLP of 1,024, a head of its own (deep and thin)."""
    return _v1_1(12, 384, (12, 32), 1024, overrides)


def mini_2x2_128(*, vocab_size: int, **overrides: Any) -> T5Config:
    """The demo's student: 2+2 layers, width 128, 4 heads x 32, gated MLP of 256, tied head."""
    return _v1_1(2, 128, (4, 32), 256, _MINI | {"vocab_size": vocab_size} | overrides)


def mini_4x4_256(*, vocab_size: int, **overrides: Any) -> T5Config:
    """The bundled teacher: 4+4 layers, width 256, 4 heads x 64, gated MLP of 384, tied head."""
    return _v1_1(4, 256, (4, 64), 384, _MINI | {"vocab_size": vocab_size} | overrides)


def build(size: str | Callable[..., T5Config], **overrides: Any) -> T5Config:
    """A size, by its name or as one of the functions above, with some settings in place of its own."""
    if callable(size):
        return size(**overrides)
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SIZES)}"
        raise UserError(f"no model size {size!r}; {advice}")
    return SIZES[size](**overrides)


def _v1_0(layers: int, width: int, heads: tuple[int, int], mlp_dim: int, overrides: dict[str, Any]) -> T5Config:
    return _v1_1(layers, width, heads, mlp_dim, {"mlp_activations": ("relu",), "tied_head": True} | overrides)


def _v1_1(layers: int, width: int, heads: tuple[int, int], mlp_dim: int, overrides: dict[str, Any]) -> T5Config:
    shape = {"d_model": width, "num_heads": heads[0], "head_dim": heads[1], "mlp_dim": mlp_dim}
    depth = {"num_encoder_layers": layers, "num_decoder_layers": layers}
    return T5Config(**{"vocab_size": 32128} | shape | depth | overrides)


_V1_0 = (t5_v1_0_small, t5_v1_0_base, t5_v1_0_3b)
_V1_1 = (t5_v1_1_small, t5_v1_1_base, t5_v1_1_large, t5_v1_1_xl, t5_v1_1_xxl)
_MULTILINGUAL = (umt5_small, umt5_base, umt5_xl, umt5_xxl, madlad400_3b)
_STUDENTS = (student_6x6_768, student_12x3_768, student_12x12_384, mini_2x2_128, mini_4x4_256)
SIZES = {size.__name__: size for size in (*_V1_0, *_V1_1, *_MULTILINGUAL, *_STUDENTS)}
