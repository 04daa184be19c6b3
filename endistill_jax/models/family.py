"""A model family: what everything outside `models/` asks of one, and the functions that ask it.

A family is a folder here whose module `family` has a `FAMILY`. A model's settings name their family, so whoever has
the settings of a model needs nothing else: `apply(config, params, batch)` runs it, whichever it is.

Parameters are nested dictionaries of float32 arrays. A subtree called `layers` holds what the layers of a stack have
alike: there every leaf has the layers on its first axis.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

from endistill_jax.core.batch import Batch, Lengths
from endistill_jax.core.errors import UserError
from endistill_jax.core.outputs import LOGITS, Output, Reads
from endistill_jax.core.sites import Stack

Params = dict[str, Any]


class ModelConfig(Protocol):
    """The settings of a model: a frozen, hashable dataclass with these fields or properties, and any of its own.

    Attributes:
        family: what the model is an instance of.
        vocab_size: rows of the token table.
        inner_dim: width of a tap: all heads side by side; what relation heads must divide.
        dropout_rate: 0 draws nothing at random.
        dtype: of activations and matrix products.
        scan_layers: whether layers run in a compiled loop.
        pad_id: the token that fills up the texts that are generated from, and those that are generated.
        eos_id: the token that ends a text.
        decoder_start_id: the decoder's first input.
    """

    @property
    def family(self) -> "Family": ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def inner_dim(self) -> int: ...
    @property
    def dropout_rate(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def scan_layers(self) -> bool: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def decoder_start_id(self) -> int: ...

    def depth(self, stack: Stack) -> int:
        """How many layers a stack has; 0 where the model has no such stack."""
        ...

    def architecture(self) -> dict[str, Any]:
        """The settings that decide parameters and function, as plain data; `config_from_plain` is the inverse.

        What was added later is left out where it has its default, so that models from before stay equal.
        """
        ...


class ForwardFlops(NamedTuple):
    """Operations of one forward pass.

    Attributes:
        encoder: the encoder's layers.
        decoder: the decoder's layers, without their attention to the encoder.
        cross: that attention.
        head: the projection to the vocabulary.
    """

    encoder: int
    decoder: int
    cross: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Family(Protocol):
    """A kind of model.

    Attributes:
        name: of its folder; what a manifest calls it.
        config_type: the class of its settings.
        widths: logical axis -> the setting that a mesh splits along it; a mesh must divide these.
    """

    name: str
    config_type: type
    widths: Mapping[str, str]

    def boxed_init(self, config: Any, key: jax.Array) -> Any:
        """Fresh parameters in Flax's boxes, which carry the logical name of every axis; see `sharding.LOGICAL_RULES`.

        A kernel is the leaf `kernel`, [..., inputs, outputs].
        """
        ...

    def apply(
        self,
        config: Any,
        params: Any,
        batch: Batch,
        reads: Reads,
        *,
        dropout_key: jax.Array | None,
        frozen: bool,
        attention_bytes: int | None,
    ) -> Output:
        """See `apply` of this module."""
        ...

    def forward_flops(self, config: Any, lengths: Lengths, reads: Reads) -> ForwardFlops:
        """See `forward_flops` of this module."""
        ...

    def read_source(self, config: Any, params: Any, tokens: jax.Array) -> Any:
        """Encodes int [batch, source] tokens once for a whole search; the result has `segments`, 0 at padding."""
        ...

    def init_cache(self, config: Any, batch_size: int, max_length: int, beams: int = 1) -> Any:
        """An empty cache for `max_length` positions; `index` is how many were read."""
        ...

    def read_tokens(
        self, config: Any, source: Any, cache: Any, tokens: jax.Array, ancestors: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """One token of each beam -> float32 logits [batch, beams, vocab_size] of the next, and the cache after it.

        Args:
            config: the model's settings.
            source: from `read_source`.
            cache: of the positions before; must not be full.
            tokens: int [batch, beams].
            ancestors: int [batch, beams, positions], the beam that each beam's hypothesis was in at each position, up
                to and with this one. None where there is one beam.
        """
        ...


def apply(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    reads: Reads = LOGITS,
    *,
    dropout_key: jax.Array | None = None,
    frozen: bool = False,
    attention_bytes: int | None = None,
) -> Output:
    """One forward pass with teacher forcing, of which only what is read is computed.

    Args:
        config: the model's settings.
        params: its parameters.
        batch: by SeqIO's feature names; see `core.batch`. Token 0 is padding, whatever the model's `pad_id`.
        reads: what is returned.
        dropout_key: None runs without dropout.
        frozen: the parameters are constants: compiled differently, computed alike.
        attention_bytes: most that the float32 scores of an attention module take at a time on a device; None leaves it
            to the settings.

    Raises:
        UserError: if a layer, or the decoder, does not exist.
    """
    options = {"dropout_key": dropout_key, "frozen": frozen, "attention_bytes": attention_bytes}
    return config.family.apply(config, params, batch, reads, **options)


def forward_flops(config: ModelConfig, lengths: Lengths, reads: Reads = LOGITS) -> ForwardFlops:
    """Floating-point operations of a forward pass that computes only what is read.

    Raises:
        UserError: if a layer, or the decoder, does not exist.
    """
    return config.family.forward_flops(config, lengths, reads)


def boxed_init(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters in Flax's boxes, which carry the logical axis names."""
    return config.family.boxed_init(config, key)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return nn.meta.unbox(boxed_init(config, key))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and types of a model's parameters, without computing any."""
    return nn.meta.unbox(_abstract_boxed(config))


def logical_axes(config: ModelConfig) -> Any:
    """The logical names of every parameter's axes, each a `PartitionSpec`."""
    return nn.get_partition_spec(_abstract_boxed(config))


def count_params(params: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def config_from_plain(plain: Mapping[str, Any]) -> ModelConfig:
    """The settings that `ModelConfig.architecture` gave, as a manifest keeps them; no "family" means T5.

    Raises:
        UserError: if there is no such family, or it has no such setting.
    """
    settings = dict(plain)
    kind = family_named(settings.pop("family", "t5")).config_type
    unknown = settings.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"a {kind.__name__} has no {', '.join(sorted(unknown))}; was it saved by a newer version?")
    return kind(**settings)


def family_named(name: str) -> Family:
    """The family in a folder of this package.

    Raises:
        UserError: if there is none of that name, with those that there are.
    """
    known = family_names()
    if name not in known:
        raise UserError(f"no model family {name!r}; choose one of {', '.join(known)}")
    return importlib.import_module(f"{__package__}.{name}.family").FAMILY


def family_names() -> list[str]:
    """The folders of this package that have a family."""
    here = importlib.import_module(__package__).__path__
    folders = (module.name for module in pkgutil.iter_modules(here) if module.ispkg)
    return [name for name in folders if importlib.util.find_spec(f"{__package__}.{name}.family")]


def _abstract_boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: boxed_init(config, jax.random.key(0)))
