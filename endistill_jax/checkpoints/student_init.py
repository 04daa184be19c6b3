"""A student that starts from its teacher: some of its layers and, where it is narrower, a slice of every width.

Every parameter's axes have logical names (`embed`, `joined_kv`, `heads`, `mlp`, `vocab`, `layers`, `relpos_buckets`).
One set of teacher indices is chosen for each name, and the student's parameter is the teacher's, taken along each axis
at the set of that axis:

    layers       those listed for the encoder and for the decoder; evenly spaced where none are listed
    embed        evenly spaced channels of the residual stream, the same ones in every layer of both stacks
    heads        evenly spaced attention heads
    joined_kv    of each of these heads, evenly spaced dimensions
    mlp          evenly spaced hidden units
    vocab        the first rows, as many as the student has: what is left out is padding after the vocabulary
    relpos_buckets   all of them

Of n things, k evenly spaced ones are round(i * (n - 1) / (k - 1)) for i = 0 .. k - 1, halves rounded up: the first and
the last are among them. One alone is the first.

A sum over fewer inputs is smaller, so every kernel is multiplied by sqrt(teacher's inputs / student's inputs), and the
queries' once more by sqrt(teacher's head_dim / student's head_dim), as scores are sums over a head's dimensions: the
ratios that T5's own initialisation has between two widths. Embedding, normalisations and position biases keep their
values; a tied head has the same correction from its factor d_model^-0.5. With equal widths every factor is 1.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from endistill_jax.core.errors import UserError
from endistill_jax.core.settings import as_tuple, is_whole
from endistill_jax.core.sites import STACKS
from endistill_jax.models.family import boxed_init
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import param_shardings

KINDS = ("random", "layers", "slice")
WIDTHS = ("d_model", "num_heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentInit:
    """What a student starts from.

    Attributes:
        kind: "random": fresh parameters. "layers": layers of the teacher, whose widths the student must share. "slice":
            layers of the teacher, each cut to the student's widths, none of which may exceed the teacher's.
        encoder_layers: the teacher's layers, from 0, one for each encoder layer of the student, in its order and with
            repetition if so listed; None takes evenly spaced ones.
        decoder_layers: the same for the decoder.
    """

    kind: Literal["random", "layers", "slice"] = "random"
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"StudentInit.kind is {self.kind!r}; choose one of {KINDS}")
        for name in ("encoder_layers", "decoder_layers"):
            listed = getattr(self, name)
            if listed is None:
                continue
            if self.kind == "random":
                raise UserError(f"StudentInit.{name} is {listed}, but kind is 'random'; choose 'layers' or 'slice'")
            layers = as_tuple(listed, f"StudentInit.{name}", "layers, such as (0, 3) or (3,)")
            object.__setattr__(self, name, layers)

    def layers(self, stack: str, teacher: T5Config, student: T5Config) -> tuple[int, ...]:
        """The teacher's layers that become the student's, of "encoder" or "decoder".

        Raises:
            UserError: for a list of another length than the student's depth, a layer that the teacher does not have, or
                no list where the student is deeper than the teacher.
        """
        name = f"StudentInit.{stack}_layers"
        theirs, ours = (getattr(config, f"num_{stack}_layers") for config in (teacher, student))
        listed = getattr(self, f"{stack}_layers")
        if listed is None:
            if ours > theirs:
                raise UserError(
                    f"the student has {ours} {stack} layers and the teacher {theirs}; "
                    f"list {name} (a layer may be taken more than once)"
                )
            return tuple(evenly_spaced(theirs, ours).tolist())
        if len(listed) != ours:
            raise UserError(f"{name} lists {len(listed)} layers, but the student has {ours}; list one for each")
        for layer in listed:
            if not is_whole(layer) or layer >= theirs:
                raise UserError(f"{name} has {layer!r}, but the teacher's {stack} has layers 0 to {theirs - 1}")
        return listed

    def check(self, teacher: T5Config | None, student: T5Config) -> None:
        """Finds what the student cannot take from the teacher.

        Raises:
            UserError: naming the setting, both values, and what would be right.
        """
        if self.kind == "random":
            return
        start = f"StudentInit.kind is {self.kind!r}, but"
        if teacher is None:
            raise UserError(f"{start} there is no teacher; choose 'random'")
        for name in ("mlp_activations", "relative_buckets", "relative_max_distance"):
            theirs, ours = getattr(teacher, name), getattr(student, name)
            if ours != theirs:
                raise UserError(f"{start} the student's {name} is {ours} and the teacher's {theirs}; make them equal")
        if student.tied_head and not teacher.tied_head:
            raise UserError(
                f"{start} the student's head is tied to its embedding and the teacher's is another table; "
                "set the student's tied_head to False"
            )
        for name in (*WIDTHS, "vocab_size"):
            theirs, ours = getattr(teacher, name), getattr(student, name)
            if ours > theirs:
                raise UserError(
                    f"{start} the student's {name} is {ours} and the teacher's {theirs}; make it at most that"
                )
            if ours < theirs and self.kind == "layers" and name in WIDTHS:
                raise UserError(
                    f"{start} the student's {name} is {ours} and the teacher's {theirs}; "
                    "make them equal, or choose 'slice'"
                )
        for stack in STACKS:
            self.layers(stack, teacher, student)

    def facts(self, teacher: T5Config | None, student: T5Config) -> dict[str, Any]:
        """The choice with the layers it comes to, as plain data: equal if and only if the student starts alike."""
        if self.kind == "random":
            return {"kind": self.kind}
        return {"kind": self.kind} | {f"{stack}_layers": list(self.layers(stack, teacher, student)) for stack in STACKS}


RANDOM = StudentInit()


def init_from_teacher(
    init: StudentInit, params: Mapping[str, Any], *, teacher: T5Config, student: T5Config, mesh: Mesh
) -> Any:
    """The student's first parameters, float32 and on their shards.

    Args:
        init: "layers" or "slice", checked.
        params: the teacher's, of any float type, layers stacked. Arrays on the mesh are cut there, by its devices
            together; NumPy arrays are cut on the host.
        teacher: the teacher's settings.
        student: the student's settings.
        mesh: where the student shall lie.
    """
    shardings = param_shardings(student, mesh)

    def cut(params: Mapping[str, Any]) -> Any:
        return cut_params(init, params, teacher=teacher, student=student)

    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        return jax.device_put(cut(params), shardings)
    return jax.jit(cut, out_shardings=shardings)(params)


def cut_params(init: StudentInit, params: Mapping[str, Any], *, teacher: T5Config, student: T5Config) -> Any:
    """The teacher's parameters at the chosen indices, scaled, in float32; NumPy arrays if the teacher's are."""
    widths = width_indices(teacher, student)
    layers = {stack: np.array(init.layers(stack, teacher, student)) for stack in STACKS}

    def cut(path: tuple, leaf: Any, axes: PartitionSpec) -> Any:
        names = [entry.key for entry in path]
        taken = leaf
        for axis, name in enumerate(axes):
            taken = _take(taken, layers[names[0]] if name == "layers" else widths[name], axis)
        scale = 1.0
        if names[-1] == "kernel":
            scale = math.sqrt(leaf.shape[-2] / taken.shape[-2])  # kernels are [..., inputs, outputs]
        if names[-2:] == ["query", "kernel"]:
            scale *= math.sqrt(teacher.head_dim / student.head_dim)
        return taken.astype(np.float32) * scale

    axes = nn.get_partition_spec(jax.eval_shape(lambda: boxed_init(student, jax.random.key(0))))
    return jax.tree_util.tree_map_with_path(cut, _with_head(params, teacher, student), axes)


def width_indices(teacher: T5Config, student: T5Config) -> dict[str, np.ndarray]:
    """Which of the teacher's indices the student takes, by logical axis; layers apart."""
    heads = evenly_spaced(teacher.num_heads, student.num_heads)
    dimensions = evenly_spaced(teacher.head_dim, student.head_dim)
    return {
        "embed": evenly_spaced(teacher.d_model, student.d_model),
        "heads": heads,
        "joined_kv": (heads[:, None] * teacher.head_dim + dimensions).reshape(-1),
        "mlp": evenly_spaced(teacher.mlp_dim, student.mlp_dim),
        "vocab": np.arange(student.vocab_size),
        "relpos_buckets": np.arange(student.relative_buckets),
    }


def evenly_spaced(size: int, count: int) -> np.ndarray:
    """`count` of the indices 0 .. size - 1, evenly spaced: [count], rising if count is at most size."""
    gaps = max(count - 1, 1)
    return (2 * np.arange(count) * (size - 1) + gaps) // (2 * gaps)  # integers, so that halves always go up


def _take(leaf: Any, indices: np.ndarray, axis: int) -> Any:
    # An axis that stays whole is left alone: nothing then crosses between its shards.
    if np.array_equal(indices, np.arange(leaf.shape[axis])):
        return leaf
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.take(leaf, indices, axis, mode="clip")  # in range as they are; other modes make JAX mask


def _with_head(params: Mapping[str, Any], teacher: T5Config, student: T5Config) -> Mapping[str, Any]:
    """A head of its own for a student whose teacher uses its embedding: the same logits."""
    if teacher.tied_head == student.tied_head:
        return params
    kernel = params["token_embedder"]["embedding"].T.astype(np.float32) * teacher.d_model**-0.5
    return {**params, "decoder": {**params["decoder"], "logits_dense": {"kernel": kernel}}}
