"""Block sizes of attention scores: how many examples, heads and queries are computed at a time."""

import dataclasses
import math

# Memory limit of a frozen model's attention scores: on TPU a quarter of a v5e's vector memory, which leaves room for
# the position bias; elsewhere a small part of the memory.
ATTENTION_BYTES = {"tpu": 32 << 20, "cpu": 256 << 20, "gpu": 256 << 20}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """One block: `examples` x `heads` x `queries` rows of scores."""

    examples: int
    heads: int
    queries: int


def choose_groups(examples: int, heads: int, query_length: int, key_length: int, group_bytes: int) -> Groups:
    """The largest blocks whose float32 scores take at most `group_bytes`.

    Several examples are taken together where all their heads fit; else the heads of one example are split up into
    equal parts, down to two, over which a CPU spreads its work; then the rows, by eights, but never a row.
    """
    row_bytes = 4 * key_length
    rows = group_bytes // row_bytes
    fewest = 2 if heads % 2 == 0 else 1
    if rows < fewest * query_length:
        blocks = math.ceil(query_length / max(1, rows // fewest))
        queries = min(8 * math.ceil(query_length / blocks / 8), query_length)  # vector registers have eight rows on TPU
        return Groups(examples=1, heads=fewest, queries=queries)
    pairs = rows // query_length
    together = _largest_divisor(heads, pairs)
    return Groups(
        examples=_largest_divisor(examples, pairs // heads) if together == heads else 1,
        heads=together,
        queries=query_length,
    )


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def platform_attention_bytes(platform: str) -> int:
    """The entry of `ATTENTION_BYTES` for "cpu", "gpu" or "tpu"; of GPUs for what is none of them."""
    return ATTENTION_BYTES.get(platform, ATTENTION_BYTES["gpu"])
