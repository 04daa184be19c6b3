"""Initializes a small T5 from a large one. What is taken along each logical axis:

    layers       those that are chosen
    embed        evenly spaced channels of the residual stream, the same ones in every layer of both stacks
    heads        evenly spaced attention heads
    joined_kv    of each of these heads, evenly spaced dimensions
    mlp          evenly spaced hidden units
    vocab        the first rows, as many as the student has: what is left out is padding after the vocabulary
    relpos_buckets   all of them

A sum over fewer inputs is smaller, so every kernel is multiplied by sqrt(teacher's inputs / student's inputs), and the
queries' once more by sqrt(teacher's head_dim / student's head_dim), as scores are sums over a head's dimensions: the
ratios that T5's own initialization has between two widths. Embedding, normalizations and position biases keep their
values; a tied head has the same correction from its factor d_model^-0.5. With equal widths every factor is 1.

A student with a position bias in every layer (umT5) takes those of its layers, or a copy in every layer if the teacher
has one bias a stack.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from endistill_jax.core.attention import STACKS, Stack
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import evenly_spaced, logical_axes
from endistill_jax.models.t5.config import T5Config

WIDTHS = ("d_model", "num_heads", "head_dim", "mlp_dim")


def check_cut(teacher: T5Config, student: T5Config, *, equal_widths: bool) -> None:
    """Checks that a student can be initialized from its teacher; see `models.family.Family`."""
    start = f"StudentInit.kind is {'layers' if equal_widths else 'slice'!r}, but"
    for name in ("mlp_activations", "relative_buckets", "relative_max_distance"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if ours != theirs:
            raise UserError(f"{start} the student's {name} is {ours} and the teacher's {theirs}; make them equal")
    if teacher.bias_per_layer and not student.bias_per_layer:
        raise UserError(
            f"{start} the teacher has a position bias in every layer; set the student's bias_per_layer to True"
        )
    if student.num_decoder_layers and student.tied_head and not teacher.tied_head:
        raise UserError(f"{start} the teacher's head is not its embedding; set the student's tied_head to False")
    for name in (*WIDTHS, "vocab_size"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        found = f"{start} the student's {name} is {ours} and the teacher's {theirs}"
        if ours > theirs:
            raise UserError(f"{found}; make it at most that")
        if ours < theirs and equal_widths and name in WIDTHS:
            raise UserError(f"{found}; make them equal, or choose 'slice'")


def cut_params(
    params: Mapping[str, Any], *, teacher: T5Config, student: T5Config, layers: Mapping[Stack, np.ndarray]
) -> Any:
    """The teacher's parameters at the chosen indices, scaled, in float32; NumPy arrays if the teacher's are."""
    heads = evenly_spaced(teacher.num_heads, student.num_heads)
    dimensions = evenly_spaced(teacher.head_dim, student.head_dim)
    widths = {
        "embed": evenly_spaced(teacher.d_model, student.d_model),
        "heads": heads,
        "joined_kv": (heads[:, None] * teacher.head_dim + dimensions).reshape(-1),
        "mlp": evenly_spaced(teacher.mlp_dim, student.mlp_dim),
        "vocab": np.arange(student.vocab_size),
        "relpos_buckets": np.arange(student.relative_buckets),
    }

    def cut(path: tuple, leaf: Any, axes: PartitionSpec) -> Any:
        names = [entry.key for entry in path]
        indices = widths | {"layers": layers.get(names[0])}
        taken = leaf
        for axis, name in enumerate(axes):
            taken = _take(taken, indices[name], axis)
        scale = 1.0
        if names[-1] == "kernel":
            scale = math.sqrt(leaf.shape[-2] / taken.shape[-2])  # kernels are [..., inputs, outputs]
        if names[-2:] == ["query", "kernel"]:
            scale *= math.sqrt(teacher.head_dim / student.head_dim)
        return taken.astype(np.float32) * scale

    return jax.tree_util.tree_map_with_path(cut, _like_student(params, teacher, student), logical_axes(student))


def _take(leaf: Any, indices: np.ndarray, axis: int) -> Any:
    # Axes taken in full are skipped, which avoids communication between their shards.
    if np.array_equal(indices, np.arange(leaf.shape[axis])):
        return leaf
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.take(leaf, indices, axis, mode="clip")  # in range as they are; other modes make JAX mask


def _like_student(params: Mapping[str, Any], teacher: T5Config, student: T5Config) -> Mapping[str, Any]:
    """The teacher's parameters with the student's names: the same function, of an encoder alone its encoder."""
    if not student.num_decoder_layers:
        params = {name: tree for name, tree in params.items() if name != "decoder"}
    elif student.tied_head != teacher.tied_head:
        kernel = params["token_embedder"]["embedding"].T.astype(np.float32) * teacher.d_model**-0.5
        params = {**params, "decoder": {**params["decoder"], "logits_dense": {"kernel": kernel}}}
    if student.bias_per_layer == teacher.bias_per_layer:
        return params
    params = dict(params)
    for stack in (stack for stack in STACKS if stack in params):
        rest = dict(params[stack])
        table = rest.pop("relpos_bias")["rel_embedding"]
        xp = np if isinstance(table, np.ndarray) else jnp
        repeated = xp.broadcast_to(table, (teacher.depth(stack), *table.shape))
        params[stack] = {**rest, "layers": {**rest["layers"], "relpos_bias": {"rel_embedding": repeated}}}
    return params
