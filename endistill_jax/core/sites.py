"""The attention sites: which stack they are in, where their vectors come from, and how they are masked."""

from typing import Literal, NamedTuple

from jaxtyping import Array, Int

from endistill_jax.core.batch import Segments

Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, ...] = ("encoder", "decoder")


class Site(NamedTuple):
    """One attention module of every layer of a stack.

    Attributes:
        stack: whose layers have it.
        queries: the side of the batch that its queries come from.
        keys: the side that its keys and values come from.
        causal: whether a query sees no key after itself.
    """

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
    """What decides which pairs of positions a relation compares: see `visible_keys`."""

    query_segments: Int[Array, "batch query"]
    key_segments: Int[Array, "batch key"]
    causal: bool


def row_masks(site: str, relation: str, segments: Segments) -> RowMasks:
    """The masks of a site's relation, such as `qk`: each of its two sets of vectors is from one side of the batch."""
    first, second = (getattr(segments, SITES[site].side(vector)) for vector in relation)
    return RowMasks(first, second, SITES[site].causal)
