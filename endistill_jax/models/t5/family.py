"""T5 as a family of models; see `models/family.py`."""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax

from endistill_jax.core.batch import Batch
from endistill_jax.core.outputs import Output, Reads
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.decoding import init_cache, read_source, read_tokens
from endistill_jax.models.t5.flops import forward_flops
from endistill_jax.models.t5.t5 import T5, boxed_init


class T5Family:
    """T5 v1.0 and v1.1."""

    name = "t5"
    config_type = T5Config
    widths = MappingProxyType({"embed": "d_model", "heads": "num_heads", "mlp": "mlp_dim", "vocab": "vocab_size"})

    boxed_init = staticmethod(boxed_init)
    forward_flops = staticmethod(forward_flops)
    read_source = staticmethod(read_source)
    init_cache = staticmethod(init_cache)
    read_tokens = staticmethod(read_tokens)

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
        """One forward pass; see `models.family.apply`."""
        if attention_bytes is not None:
            config = dataclasses.replace(config, attention_bytes=attention_bytes)
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        # No parent, so that it may be called from within another module.
        model = T5(config, parent=None)
        return model.apply({"params": params}, batch, reads, deterministic=not rngs, frozen=frozen, rngs=rngs)


FAMILY = T5Family()
