"""The interface of model families, and the functions that dispatch to it.

A family is a folder here whose module `family` has a `FAMILY`. A model's settings name their family, so
`apply(config, params, batch)` runs any model, given its settings.

Parameters are nested dictionaries of float32 arrays. A subtree called `layers` holds what the layers of a stack have
alike: every leaf there has the layers on its first axis. For interchange, `unstack_layers` gives each layer a subtree.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from endistill_jax.core.attention import STACKS, Stack
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import LOGITS, Batch, Lengths, Output, Reads

Params = dict[str, Any]


@runtime_checkable
class ModelConfig(Protocol):
    """The settings of a model: a frozen, hashable dataclass with these fields or properties, and any of its own."""

    family: "Family"
    vocab_size: int  # rows of the token table
    inner_dim: int  # width of a tap: all heads side by side; what relation heads must divide
    dropout_rate: float  # 0 draws nothing at random
    dtype: str  # of activations and matrix products
    scan_layers: bool  # whether layers run in a compiled loop
    pad_id: int  # fills up the texts that are generated from, and those that are generated
    eos_id: int  # ends a text
    decoder_start_id: int  # the decoder's first input

    def depth(self, stack: Stack) -> int:
        """How many layers a stack has; 0 where the model has no such stack."""

    def architecture(self) -> dict[str, Any]:
        """The settings that affect parameters or outputs, as plain data; `config_from_plain` is the inverse.

        Settings added later are left out at their default, so that models from before stay equal.
        """


class ForwardFlops(NamedTuple):
    """Operations of one forward pass; the decoder's are without its attention to the encoder, which is `cross`."""

    encoder: int
    decoder: int
    cross: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


class Parameter(NamedTuple):
    """One tensor of a model: of one layer, if it belongs to a layer."""

    path: tuple[str, ...]  # in our nested dictionaries, such as `("encoder", "layers", "mlp", "wo", "kernel")`
    layer: int | None  # None outside the stacks
    shape: tuple[int, ...]  # without the axis of layers; kernels are [in, out]

    @property
    def name(self) -> str:
        """The interchange name, such as `encoder/layers_0/mlp/wo/kernel`."""
        return "/".join(f"layers_{self.layer}" if part == "layers" else part for part in self.path)


class Tensor(NamedTuple):
    """Name and shape of a tensor in a Hugging Face folder; `transposed` if it is the other way round than ours."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


class HuggingFaceFormat(Protocol):
    """How Hugging Face folders keep a family's models."""

    model_types: tuple[str, ...]  # supported values of `model_type` in config.json
    ignored: frozenset[str]  # tensors that are skipped

    def config_from_json(self, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """The settings in a config.json; a `UserError` names the file, `where`."""

    def config_to_json(self, config: Any, dtype: str) -> dict[str, Any]:
        """The content of config.json; a `UserError` if transformers has no such model."""

    def tensor_of(self, parameter: Parameter) -> Tensor:
        """Where a parameter is kept."""

    def elsewhere(self, names: frozenset[str], raw: Mapping[str, Any], where: str) -> dict[str, str]:
        """Tensors to read from another name than their own: name -> the one among `names`."""

    def copies(self, config: Any) -> dict[str, tuple[str, str]]:
        """Aliases: name -> the tensor's own name, and the error message if their values differ."""

    def usage(self, config: Any) -> str:
        """The class of transformers that loads such a model."""


class Family(Protocol):
    """A kind of model."""

    name: str  # of its folder; what a manifest calls it
    config_type: type  # of its settings
    widths: Mapping[str, str]  # logical axis -> the setting that a mesh splits along it, and so must divide
    huggingface: HuggingFaceFormat
    t5x: Any  # names and shapes in T5X's checkpoints; None if T5X has no such network

    def boxed_init(self, config: Any, key: Key[Array, ""]) -> Any:
        """Fresh parameters in Flax's boxes, which carry the logical name of every axis; see `sharding.LOGICAL_RULES`.

        A kernel is the leaf `kernel`, [..., inputs, outputs].
        """

    def apply(
        self,
        config: Any,
        params: Any,
        batch: Batch,
        reads: Reads,
        *,
        dropout_key: Key[Array, ""] | None,
        frozen: bool,
        attention_bytes: int | None,
    ) -> Output:
        """See `apply` of this module."""

    def forward_flops(self, config: Any, lengths: Lengths, reads: Reads) -> ForwardFlops:
        """Operations of a forward pass that computes only what is read."""

    def read_source(self, config: Any, params: Any, tokens: Int[Array, "batch source"]) -> Any:
        """Encodes the input, once per search; the result has `segments`, 0 at padding."""

    def init_cache(self, config: Any, batch_size: int, max_length: int, beams: int = 1) -> Any:
        """An empty cache for `max_length` positions; `index` is how many were read."""

    def read_tokens(
        self,
        config: Any,
        source: Any,
        cache: Any,
        tokens: Int[Array, "batch beams"],
        ancestors: Int[Array, "batch beams positions"] | None = None,
    ) -> tuple[Float[Array, "batch beams vocab"], Any]:
        """One token of each beam -> float32 logits of the next, and the cache after it, which must not be full before.

        `ancestors` is the beam that each beam's hypothesis was in at each position, up to and with this one. So
        hypotheses can change beams without moving the cache. None where there is one beam.
        """

    def non_embedding_params(self, config: Any) -> int:
        """Parameters without the token table and without a head of its own; in closed form, as plans ask often."""

    def mlp_kernels(self, config: Any) -> int:
        """Matrices of an MLP, one more where it is gated."""

    def describe(self, config: Any) -> str:
        """What the model is, in a phrase without its size: layers, widths, head."""

    def check_cut(self, teacher: Any, student: Any, *, equal_widths: bool) -> None:
        """Checks that a student of this family can be initialized from a teacher of it, and be as wide if it must.

        A `UserError` names the setting, both values, and what would be right.
        """

    def cut(self, params: Any, *, teacher: Any, student: Any, layers: Mapping[Stack, Any]) -> Any:
        """A student's parameters out of its teacher's: those of some layers, at some indices of every width, float32.

        NumPy arrays if `params` are; checked before.
        """


def apply(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    reads: Reads = LOGITS,
    *,
    dropout_key: Key[Array, ""] | None = None,
    frozen: bool = False,
    attention_bytes: int | None = None,
) -> Output:
    """One forward pass with teacher forcing, of which only what is read is computed; without a key, without dropout.

    Token 0 is padding, whatever the model's `pad_id`. If `frozen`, the parameters are constants: compiled differently,
    with the same result. `attention_bytes` is the most that the float32 scores of an attention module take at a time on
    a device; None leaves it to the settings.
    """
    options = {"dropout_key": dropout_key, "frozen": frozen, "attention_bytes": attention_bytes}
    return config.family.apply(config, params, batch, reads, **options)


def forward_flops(config: ModelConfig, lengths: Lengths, reads: Reads = LOGITS) -> ForwardFlops:
    """Floating-point operations of a forward pass that computes only what is read."""
    return config.family.forward_flops(config, lengths, reads)


def boxed_init(config: ModelConfig, key: Key[Array, ""]) -> Any:
    """Fresh parameters in Flax's boxes, which carry the logical axis names."""
    return config.family.boxed_init(config, key)


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters."""
    return nn.meta.unbox(boxed_init(config, key))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and types of a model's parameters, without computing any."""
    return nn.meta.unbox(_abstract_boxed(config))


def logical_axes(config: ModelConfig) -> Any:
    """The logical names of every parameter's axes, each a `PartitionSpec`."""
    return nn.get_partition_spec(_abstract_boxed(config))


@functools.cache  # called a dozen times per run, and tracing a model takes a second or more
def _abstract_boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: boxed_init(config, jax.random.key(0)))


def count_params(params: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def config_from_plain(plain: Mapping[str, Any]) -> ModelConfig:
    """The settings that `ModelConfig.architecture` gave, as a manifest keeps them; no "family" means T5."""
    settings = dict(plain)
    kind = family_named(settings.pop("family", "t5")).config_type
    unknown = settings.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"a {kind.__name__} has no {', '.join(sorted(unknown))}; was it saved by a newer version?")
    return kind(**settings)


def check_batches(config: ModelConfig, eos_id: int) -> None:
    """Checks that a model's start and end are those of SeqIO's batches, whose vocabulary ends texts with `eos_id`."""
    # Padding is 0 there whatever the model's `pad_id`; it is masked, so its id does not matter.
    if config.depth("decoder") and config.decoder_start_id != 0:
        raise UserError(f"the model's decoder_start_id is {config.decoder_start_id}; SeqIO begins every target with 0")
    if config.depth("decoder") and config.eos_id != eos_id:
        found = f"the model's eos_id is {config.eos_id}, and the task's vocabulary ends a text with {eos_id}"
        raise UserError(f"{found}; set eos_id in the model's settings, or give the model its own vocabulary")


def family_named(name: str) -> Family:
    """The family in a folder of this package."""
    known = family_names()
    if name not in known:
        raise UserError(f"no model family {name!r}; choose one of {', '.join(known)}")
    return importlib.import_module(f"{__package__}.{name}.family").FAMILY


def family_names() -> list[str]:
    """The folders of this package that have a family."""
    here = importlib.import_module(__package__).__path__
    folders = (module.name for module in pkgutil.iter_modules(here) if module.ispkg)
    return [name for name in folders if importlib.util.find_spec(f"{__package__}.{name}.family")]


def unstack_layers(params: Mapping[str, Any]) -> Params:
    """`encoder/layers/...` [layers, ...] -> `encoder/layers_0/...`, `encoder/layers_1/...`, in T5X's names."""
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        layers = rest.pop("layers")
        for index in range(len(jax.tree.leaves(layers)[0])):
            rest[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
        params[stack] = rest
    return params


def stack_layers(params: Mapping[str, Any]) -> Params:
    """The inverse of `unstack_layers`; the layers of a stack must be numbered 0, 1, 2, ... without a gap."""
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        matches = [match for match in map(re.compile(r"layers_(\d+)").fullmatch, rest) if match]
        layers = {int(match.group(1)): rest.pop(match.group()) for match in matches}
        if sorted(layers) != list(range(len(layers))) or not layers:
            raise ValueError(f"{stack} has layers {sorted(layers)}; expected 0, 1, 2, ... without a gap")
        ordered = [layers[index] for index in range(len(layers))]
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ordered)) else jnp
        rest["layers"] = jax.tree.map(lambda *leaves, xp=xp: xp.stack(leaves), *ordered)
        params[stack] = rest
    return params


def evenly_spaced(size: int, count: int) -> np.ndarray:
    """`count` of the indices 0 .. size - 1, evenly spaced: [count], rising if count is at most size.

    They are round(i * (size - 1) / (count - 1)) for i = 0 .. count - 1, halves rounded up, so the first and the last
    are among them. A single one is the first.
    """
    gaps = max(count - 1, 1)
    return (2 * np.arange(count) * (size - 1) + gaps) // (2 * gaps)  # integers, so that halves always go up
