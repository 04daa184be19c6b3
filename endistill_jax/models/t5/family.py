"""T5 as a family of models; see `models/family.py`."""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax

from endistill_jax.core.model_io import Batch, Output, Reads
from endistill_jax.models.t5 import t5x
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.cutting import check_cut, cut_params
from endistill_jax.models.t5.decoding import init_cache, read_source, read_tokens
from endistill_jax.models.t5.flops import forward_flops
from endistill_jax.models.t5.huggingface import T5InHuggingFace
from endistill_jax.models.t5.t5 import T5, boxed_init


class T5Family:
    """T5 v1.0 and v1.1, umT5, and encoders alone."""

    name = "t5"
    config_type = T5Config
    widths = MappingProxyType({"embed": "d_model", "heads": "num_heads", "mlp": "mlp_dim", "vocab": "vocab_size"})
    huggingface = T5InHuggingFace()
    t5x = t5x

    boxed_init = staticmethod(boxed_init)
    forward_flops = staticmethod(forward_flops)
    read_source = staticmethod(read_source)
    init_cache = staticmethod(init_cache)
    read_tokens = staticmethod(read_tokens)
    check_cut = staticmethod(check_cut)
    cut = staticmethod(cut_params)

    def apply(
        self,
        config: T5Config,
        params: Any,
        batch: Batch,
        reads: Reads,
        *,
        dropout_key: jax.Array | None,
        frozen: bool,
        attention_bytes: int | None,
    ) -> Output:
        if attention_bytes is not None:
            config = dataclasses.replace(config, attention_bytes=attention_bytes)
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        # No parent, so that it may be called from within another module.
        model = T5(config, parent=None)
        return model.apply({"params": params}, batch, reads, deterministic=not rngs, frozen=frozen, rngs=rngs)

    def non_embedding_params(self, config: T5Config) -> int:
        """Relative positions and scales count."""
        kernels = self.mlp_kernels(config) * config.d_model * config.mlp_dim
        attention = 4 * config.d_model * config.inner_dim
        encoder = config.num_encoder_layers * (attention + kernels + 2 * config.d_model)
        decoder = config.num_decoder_layers * (2 * attention + kernels + 3 * config.d_model)
        return encoder + decoder + 2 * (config.d_model + config.num_heads * config.relative_buckets)

    def mlp_kernels(self, config: T5Config) -> int:
        return len(config.mlp_activations) + 1

    def describe(self, config: T5Config) -> str:
        depth = config.num_decoder_layers
        decoder = f"and {depth} decoder layers" if depth else "layers and no decoder"
        parts = [
            f"{config.num_encoder_layers} encoder {decoder}",
            f"width {config.d_model}",
            f"{config.num_heads} heads of {config.head_dim}",
            f"feed-forward width {config.mlp_dim} ({' x '.join(config.mlp_activations)})",
        ]
        if config.bias_per_layer:
            parts.append("a position bias in every layer")
        if config.num_decoder_layers:
            parts.append("the embedding as its head" if config.tied_head else "a head of its own")
        return ", ".join(parts)


FAMILY = T5Family()
