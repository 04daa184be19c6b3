"""Text from a model: one entry, `make_decoder`, to greedy decoding, sampling and beam search."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from endistill_jax.core.errors import UserError, require, require_at_least, require_choice, require_positive
from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.search import SearchState, beam_search, draw, filter_logits, largest, search
from endistill_jax.sharding import activation_sharding, batch_sharding, param_shardings

STRATEGIES = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated.

    "greedy" takes the most likely token at every step, "sample" draws one, "beam" extends the `beams` most likely
    hypotheses.
    """

    max_length: int  # tokens generated at most, the end included
    strategy: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0  # of "sample": logits are divided by it
    top_k: int = 0  # of "sample": draws from this many of the most likely tokens; 0 means all
    top_p: float = 1.0  # of "sample": draws from the fewest most likely tokens that together have this probability
    beams: int = 4
    # Of "beam": n tokens, the end included, have the score log-probability / n ** length_penalty, as in Hugging Face's
    # `generate` (T5X and Flax take ((5 + n) / 6) ** alpha instead). 0 compares log-probabilities, 1 means per token;
    # more favors long texts.
    length_penalty: float = 1.0
    eos_id: int | None = None  # the token that ends a text; None takes the model's

    def __post_init__(self):
        require_choice(self, strategy=STRATEGIES)
        require_at_least(self, 1, "max_length", "beams")
        require_at_least(self, 0, "top_k")
        require_positive(self, "temperature")
        require(self, "top_p", 0 < self.top_p <= 1, "it must be in (0, 1]")
        require(self, "length_penalty", math.isfinite(self.length_penalty), "it must be a finite number")

    def validate(self, config: ModelConfig) -> None:
        """Checks that the model has a decoder and a vocabulary that the settings fit."""
        if not config.depth("decoder"):
            raise UserError("the model is an encoder alone and generates no text; give one with a decoder")
        size = config.vocab_size
        fits = self.eos_id is None or 0 <= self.eos_id < size
        require(self, "eos_id", fits, f"the model's vocabulary has {size} tokens")
        require(self, "eos_id", self.eos_id != config.pad_id, "the model pads with that; give the token of the end")
        fits = self.strategy != "beam" or size >= 2 * self.beams
        require(self, "beams", fits, f"the model's vocabulary of {size} tokens allows {size // 2} beams at most")


class Decoded(NamedTuple):
    """Generated text, and the sum of the log-probabilities that the model gives to its tokens.

    When sampling too these are from before temperature and filters; of beam search divided by n ** length_penalty.
    """

    tokens: Int[Array, "batch max_length"]  # up to and with the end, then the model's `pad_id`
    scores: Float[Array, " batch"]


def make_decoder(
    config: ModelConfig, decoding: Decoding, *, mesh: Mesh | None = None, sharding: str = "sharded"
) -> Callable[..., Decoded]:
    """Builds the jitted search; make it once for a model and keep it, or it compiles again. It compiles once a shape.

    The mesh None is wherever the arguments are. Parameters that are "sharded" along `fsdp` are gathered while it
    generates; "replicated" is faster where the memory allows it (see `sharding.logical_rules`).

    Returns:
        A function (params, tokens, key=None, row_ids=None) -> `Decoded`: `tokens` are int [batch, source], one example
        a row, padded with the model's `pad_id`, and a row of nothing but padding stays empty, with score 0. `key`, of
        "sample" alone, and `row_ids`, int [batch], by default 0, 1, ..., decide together what is drawn for a row: give
        rows their number in the whole data, and they do not depend on how it is cut into batches.
    """
    decoding.validate(config)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "cpu":
        # There a loop over layers copies each layer's parameters and cache at every token, for twice the time.
        config = dataclasses.replace(config, scan_layers=False)

    def decode(params: Any, tokens: jax.Array, key: jax.Array | None, row_ids: jax.Array | None) -> Decoded:
        with contextlib.nullcontext() if mesh is None else activation_sharding(mesh, sharding):
            return generate(config, decoding, params, tokens, key, row_ids)

    options = {}
    if mesh is not None:
        rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        options = {"in_shardings": (param_shardings(config, mesh, sharding), rows, whole, rows), "out_shardings": rows}
    jitted = jax.jit(decode, **options)

    def checked(
        params: Any, tokens: jax.Array, key: jax.Array | None = None, row_ids: jax.Array | None = None
    ) -> Decoded:
        if key is None and decoding.strategy == "sample":
            raise UserError("strategy 'sample' draws at random and was given no key; give jax.random.key(seed)")
        return jitted(params, tokens, key, row_ids)

    return checked


def generate(
    config: ModelConfig,
    decoding: Decoding,
    params: Any,
    tokens: Int[Array, "batch source"],
    key: Key[Array, ""] | None = None,
    row_ids: Int[Array, " batch"] | None = None,
) -> Decoded:
    """What `make_decoder` jits: a pure function, for programs of which generating is a part."""
    length = decoding.max_length
    eos_id = config.eos_id if decoding.eos_id is None else decoding.eos_id
    if decoding.strategy == "beam":
        found = beam_search(config, params, tokens, length, eos_id, decoding.beams, decoding.length_penalty)
        return Decoded(*found)
    row_ids = jnp.arange(len(tokens)) if row_ids is None else row_ids

    def choose(logits: jax.Array, state: SearchState) -> jax.Array:
        if decoding.strategy == "greedy":
            return largest(logits, 1)[1][:, 0]
        filtered = filter_logits(logits, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
        return draw(filtered, key, row_ids, state.cache.index)

    state = search(config, params, tokens, length, eos_id, choose)
    return Decoded(state.tokens, state.scores)
