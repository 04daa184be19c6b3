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
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.core.attention import STACKS, Stack
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import LOGITS, Batch, Lengths, Output, Reads

Params = dict[str, Any]


class ModelConfig(Protocol):
    """The settings of a model: a frozen, hashable dataclass with these fields or properties, and any of its own.

    Attributes:
    family: of the model.
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
        """The settings that affect parameters or outputs, as plain data; `config_from_plain` is the inverse.

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


class Parameter(NamedTuple):
    """One tensor of a model: of one layer, if it belongs to a layer.

    Attributes:
        path: where it is in our nested dictionaries, such as `("encoder", "layers", "mlp", "wo", "kernel")`.
        layer: its layer, None outside the stacks.
        shape: its shape without the axis of layers; kernels are [in, out].
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The interchange name, such as `encoder/layers_0/mlp/wo/kernel`."""
        return "/".join(f"layers_{self.layer}" if part == "layers" else part for part in self.path)


class Tensor(NamedTuple):
    """A tensor as a Hugging Face folder keeps it.

    Attributes:
        name: such as `encoder.block.0.layer.0.SelfAttention.q.weight`.
        shape: there.
        transposed: whether it is the other way round than ours, as torch keeps kernels.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


class HuggingFaceFormat(Protocol):
    """How Hugging Face folders keep a family's models.

    Attributes:
        model_types: supported values of `model_type` in config.json.
        ignored: tensors that are skipped.
    """

    model_types: tuple[str, ...]
    ignored: frozenset[str]

    def config_from_json(self, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """The settings in a config.json.

        Raises:
            UserError: naming the file, `where`, and what is wrong in it.
        """
        ...

    def config_to_json(self, config: Any, dtype: str) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UserError: if transformers has no such model.
        """
        ...

    def tensor_of(self, parameter: Parameter) -> Tensor:
        """Where a parameter is kept."""
        ...

    def elsewhere(self, names: frozenset[str], raw: Mapping[str, Any], where: str) -> dict[str, str]:
        """Tensors that are to be read from another name than their own: name -> the one among `names`.

        Raises:
            UserError: if one is nowhere.
        """
        ...

    def copies(self, config: Any) -> dict[str, tuple[str, str]]:
        """Aliases: name -> the tensor's own name, and the error message if their values differ."""
        ...

    def usage(self, config: Any) -> str:
        """The class of transformers that loads such a model."""
        ...


class Family(Protocol):
    """A kind of model.

    Attributes:
        name: of its folder; what a manifest calls it.
        config_type: the class of its settings.
        widths: logical axis -> the setting that a mesh splits along it; a mesh must divide these.
        huggingface: names and settings in Hugging Face folders.
        t5x: names and shapes in T5X's checkpoints; None if T5X has no such network.
    """

    name: str
    config_type: type
    widths: Mapping[str, str]
    huggingface: HuggingFaceFormat
    t5x: Any

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
        """Encodes int [batch, source] tokens once per search; the result has `segments`, 0 at padding."""
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

    def describe(self, config: Any) -> str:
        """What the model is, in a phrase without its size: layers, widths, head."""
        ...

    def check_cut(self, teacher: Any, student: Any, *, equal_widths: bool) -> None:
        """Checks that a student of this family can be initialized from a teacher of it.

        Args:
            teacher: the teacher's settings.
            student: the student's.
            equal_widths: whether the student must be as wide as the teacher.

        Raises:
            UserError: naming the setting, both values, and what would be right.
        """
        ...

    def cut(self, params: Any, *, teacher: Any, student: Any, layers: Mapping[Stack, Any]) -> Any:
        """A student's parameters out of its teacher's: those of some layers, at some indices of every width, float32.

        NumPy arrays if `params` are; checked before.
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
        batch: by SeqIO's feature names; see `core.model_io.Batch`. Token 0 is padding, whatever the model's `pad_id`.
        reads: what is returned.
        dropout_key: None runs without dropout.
        frozen: the parameters are constants: compiled differently, with the same result.
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


def check_batches(config: ModelConfig, eos_id: int) -> None:
    """Checks that a model's special tokens are those of SeqIO's batches.

    There padding is 0 whatever the model's `pad_id`; it is masked, so its id does not matter. But every target starts
        with 0 and ends with the vocabulary's EOS, which must be the model's `decoder_start_id` and `eos_id`.

    Args:
        config: the model's settings.
        eos_id: the vocabulary's end.

    Raises:
        UserError: naming the setting and both ids.
    """
    if config.depth("decoder") and config.decoder_start_id != 0:
        raise UserError(
            f"the model's decoder_start_id is {config.decoder_start_id}, and SeqIO begins every target with 0; "
            "only models that start with 0 are trained and evaluated on its batches"
        )
    if config.depth("decoder") and config.eos_id != eos_id:
        raise UserError(
            f"the model's eos_id is {config.eos_id}, and the task's vocabulary ends a text with {eos_id}; "
            "set eos_id in the model's settings, or give the model its own vocabulary"
        )


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


@functools.cache  # called a dozen times per run, and tracing a model takes a second or more
def _abstract_boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: boxed_init(config, jax.random.key(0)))


_LAYER = re.compile(r"layers_(\d+)")


def unstack_layers(params: Mapping[str, Any]) -> Params:
    """`encoder/layers/...` [layers, ...] -> `encoder/layers_0/...`, `encoder/layers_1/...`, in T5X's names."""
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        layers = rest.pop("layers")
        depth = len(jax.tree.leaves(layers)[0])
        for index in range(depth):
            rest[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
        params[stack] = rest
    return params


def stack_layers(params: Mapping[str, Any]) -> Params:
    """The inverse of `unstack_layers`.

    Raises:
        ValueError: if a stack's layers are not numbered 0, 1, 2, ... without a gap.
    """
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):  # an encoder may be alone
        rest = dict(params[stack])
        layers = {int(m.group(1)): rest.pop(name) for name in list(rest) if (m := _LAYER.fullmatch(name))}
        if sorted(layers) != list(range(len(layers))) or not layers:
            raise ValueError(f"{stack} has layers {sorted(layers)}; expected 0, 1, 2, ... without a gap")
        ordered = [layers[index] for index in range(len(layers))]
        xp = np if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ordered)) else jnp
        rest["layers"] = jax.tree.map(lambda *leaves, xp=xp: xp.stack(leaves), *ordered)
        params[stack] = rest
    return params


def evenly_spaced(size: int, count: int) -> np.ndarray:
    """`count` of the indices 0 .. size - 1, evenly spaced: [count], rising if count is at most size."""
    gaps = max(count - 1, 1)
    return (2 * np.arange(count) * (size - 1) + gaps) // (2 * gaps)  # integers, so that halves always go up
