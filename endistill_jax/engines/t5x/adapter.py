"""Our model as a module of T5X, so that T5X evaluates, infers with and fine-tunes it. Needs T5X; see docs/t5x.md."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import flatten_dict, unflatten_dict

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, apply, boxed_init, stack_layers, unstack_layers
from endistill_jax.models.t5 import decoding
from endistill_jax.models.t5.layers import KeysValues

try:
    import t5x  # noqa: F401
except ImportError as error:
    raise UserError(f"the T5X adapter needs T5X, and it cannot be imported ({error}); see docs/t5x.md") from error

_PARTS = ("token_embedder", "encoder", "decoder")


class Transformer(nn.Module):
    """The module of a `t5x.models.EncoderDecoderModel`; its parameters have T5X's own names, unscanned.

    So a T5X checkpoint written by T5X's own network, or exported from here, loads without renaming. Stacking the layers
    and taking them apart again cancel out when it is compiled.

    Attributes:
        config: the model's settings; whether its layers run in a loop is decided here instead:
        loop_layers: run layers in a compiled loop, for short compilation of deep models, at the cost of a stacked copy
            of the parameters.
    """

    config: ModelConfig
    loop_layers: bool = False

    # T5X's convention: cache arrays have layers on the first axis and examples on the second.
    scan_layers: ClassVar[bool] = True

    def setup(self):
        if self.is_initializing():
            boxed = boxed_init(self.config, self.make_rng("params"))
            fresh = {"params": unstack_layers(nn.meta.unbox(boxed)), "params_axes": logical_axes(boxed)}
            for collection, name in ((collection, name) for collection in fresh for name in _PARTS):
                self.variable(collection, name, lambda part: part, fresh[collection][name])

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> jax.Array:
        """One forward pass with teacher forcing: float32 logits [batch, target, vocab_size].

        Tokens are int [batch, source] and [batch, target], 0 is padding; segment ids are given when examples are
        packed. Positions are not needed: distances within an example are those within its row. `decode` also puts an
        empty cache for `target` tokens into the collection "cache".
        """
        if decode:
            rows, length = decoder_input_tokens.shape
            self._put_cache(decoding.init_cache(self.config, rows, length, split=False))
        batch = {
            "encoder_input_tokens": encoder_input_tokens,
            "decoder_input_tokens": decoder_input_tokens,
            "decoder_target_tokens": decoder_target_tokens,
            "encoder_segment_ids": encoder_segment_ids,
            "decoder_segment_ids": decoder_segment_ids,
        }
        batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items() if array is not None}
        config = self.run_config
        dropout = enable_dropout and config.dropout_rate > 0
        key = self.make_rng("dropout") if dropout else None
        return apply(config, self._stacked(), batch, dropout_key=key).logits

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        enable_dropout: bool = False,
    ) -> jax.Array:
        """The encoder's output [batch, source, d_model], without dropout."""
        self._check_no_dropout(enable_dropout)
        segments = encoder_input_tokens > 0 if encoder_segment_ids is None else encoder_segment_ids
        segments = jnp.asarray(segments, jnp.int32)
        return decoding.encode(self.run_config, self._stacked(), encoder_input_tokens, segments)

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        enable_dropout: bool = False,
        decode: bool = True,
        max_decode_length: int | None = None,
    ) -> jax.Array:
        """Decodes one token of each example, [batch, 1]: float32 logits [batch, 1, vocab_size]; updates the cache.

        `encoder_input_tokens` give the padding mask. `decoder_target_tokens` and `max_decode_length` are not read: the
        cache has the length.
        """
        self._check_no_dropout(enable_dropout)
        if not decode:
            raise UserError("Transformer.decode reads one token at a time; call the module itself for whole targets")
        config, params = self.run_config, self._stacked()
        kept = self.get_variable("cache", "decoder")
        cache = decoding.Cache(KeysValues(kept["cached_key"], kept["cached_value"]), kept["cache_index"])
        # Loop-invariant: where layers run one by one, the compiler hoists the projections out of T5X's loop over
        # tokens. In the cache they would be permuted with every change of beams.
        cross = decoding.cross_keys_values(config, params, encoded)
        segments = jnp.asarray(encoder_input_tokens > 0, jnp.int32)
        source = decoding.Source(params, cross, segments)
        logits, cache = decoding.read_tokens(config, source, cache, decoder_input_tokens)
        self._put_cache(cache)
        return logits

    def _put_cache(self, cache: decoding.Cache) -> None:
        # T5X distinguishes the index from arrays with an example axis by its name.
        key, value = cache.kept
        self.put_variable("cache", "decoder", {"cached_key": key, "cached_value": value, "cache_index": cache.index})

    def _stacked(self) -> Any:
        return stack_layers(unfreeze({name: self.get_variable("params", name) for name in _PARTS}))

    @property
    def run_config(self) -> ModelConfig:
        """The model's settings, as it runs."""
        return dataclasses.replace(self.config, scan_layers=self.loop_layers)

    def _check_no_dropout(self, enable_dropout: bool) -> None:
        if enable_dropout and self.config.dropout_rate:
            raise UserError("Transformer.encode and .decode run without dropout; give enable_dropout=False")


def logical_axes(boxed: Any, stacked: bool = False) -> Any:
    """T5X's collection "params_axes" of boxed parameters: `encoder/layers_0/attention/query/kernel_axes` etc.

    The names of our axes that parameters have (`vocab`, `embed`, `joined_kv`, `mlp`, `heads`, `relpos_buckets`,
    `layers`) are T5X's, whose standard partitioning rules and factorization rules know them all. `boxed` is that of
    `boxed_init`, or its shapes; unless `stacked`, the result has one subtree a layer.
    """
    axes = {}
    for (part, *path, name), box in flatten_dict(boxed).items():
        if stacked or path[:1] != ["layers"]:
            axes[part, *path, f"{name}_axes"] = AxisMetadata(box.names)
            continue
        for index in range(box.value.shape[0]):
            axes[part, f"layers_{index}", *path[1:], f"{name}_axes"] = AxisMetadata(box.names[1:])
    return unflatten_dict(axes)
