"""Attention sites, which positions see each other at each of them, and how many scores are computed at a time."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, ...] = ("encoder", "decoder")


class Segments(NamedTuple):
    """Segment ids of encoder and decoder: 0 is padding; positions with equal ids may attend to each other."""

    encoder: Int[Array, "batch source"]
    decoder: Int[Array, "batch target"]


class Site(NamedTuple):
    """The attention module that every layer of `stack` has, and the side of the batch its vectors come from."""

    stack: Stack
    queries: Stack
    keys: Stack
    causal: bool

    def side(self, vector: str) -> Stack:
        """The side of the batch that the `q`, `k` or `v` vectors come from."""
        return self.queries if vector == "q" else self.keys


SITES = {
    "encoder_self": Site(stack="encoder", queries="encoder", keys="encoder", causal=False),
    "decoder_self": Site(stack="decoder", queries="decoder", keys="decoder", causal=True),
    "cross": Site(stack="decoder", queries="decoder", keys="encoder", causal=False),
}


class RowMasks(NamedTuple):
    """What decides which pairs of positions a relation compares: the arguments of `visible_keys`."""

    query_segments: Int[Array, "batch query"]
    key_segments: Int[Array, "batch key"]
    causal: bool


def row_masks(site: str, relation: str, segments: Segments) -> RowMasks:
    """The masks of a site's relation, such as `qk`: each of its two sets of vectors is from one side of the batch."""
    first, second = (getattr(segments, SITES[site].side(vector)) for vector in relation)
    return RowMasks(first, second, SITES[site].causal)


def visible_keys(
    query_segments: Int[Array, "batch query"], key_segments: Int[Array, "batch key"], causal: bool
) -> Bool[Array, "batch query key"]:
    """Attention mask: each query sees the keys of its own non-zero segment, and if causal none after it.

    Causal compares positions in the arrays, so segments must be contiguous and both sides the same sequence.
    """
    queries, keys = query_segments[:, :, None], key_segments[:, None, :]
    visible = (queries == keys) & (queries != 0)
    if causal:
        visible &= jnp.tri(query_segments.shape[1], key_segments.shape[1], dtype=bool)
    return visible


# Memory limit of a frozen model's attention scores: on TPU a quarter of a v5e's vector memory, which leaves room for
# the position bias; elsewhere a small part of the memory.
ATTENTION_BYTES = {"tpu": 32 << 20, "cpu": 256 << 20, "gpu": 256 << 20}


class Groups(NamedTuple):
    """One block: `examples` x `heads` x `queries` rows of scores."""

    examples: int
    heads: int
    queries: int


def choose_groups(examples: int, heads: int, query_length: int, key_length: int, group_bytes: int) -> Groups:
    """The largest blocks whose float32 scores take at most `group_bytes`.

    Several examples are taken together where all their heads fit. Otherwise the heads of one example are split into
    equal parts, down to two, over which a CPU spreads its work; then its rows, by eights, but never a row itself.
    """
    rows = group_bytes // (4 * key_length)
    fewest = 2 if heads % 2 == 0 else 1
    if rows < fewest * query_length:
        blocks = math.ceil(query_length / max(1, rows // fewest))
        queries = min(8 * math.ceil(query_length / blocks / 8), query_length)  # vector registers have eight rows on TPU
        return Groups(1, fewest, queries)
    pairs = rows // query_length
    together = _largest_divisor(heads, pairs)
    return Groups(_largest_divisor(examples, pairs // heads) if together == heads else 1, together, query_length)


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
