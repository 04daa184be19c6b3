"""The relation loss alone, value and gradient: the blocked form against the dense one, time and memory.

    python benchmarks/relation_loss.py --lengths=128,256,512,1024 --relation_heads=12,64

times both forms of every shape in turn, so that whatever else the machine does falls on both, and prints medians as
Markdown and JSON. Temporaries are the compiler's own count. The number of tokens is the same at every length. With
--block_mib the blocked form runs at several block sizes: that is how its defaults were chosen.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.core.attention import RowMasks
from endistill_jax.objectives import LossImplementation
from endistill_jax.objectives.relations import relation_kl
from endistill_jax.objectives.relations_blocked import relation_kl_blocked


def make_inputs(batch: int, length: int, teacher_dim: int, student_dim: int, dtype: str) -> tuple:
    """(student, teacher, segments), with an eighth of the last example padded."""
    rng = np.random.default_rng(0)

    def pair(dim: int) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.asarray(rng.standard_normal((batch, length, dim)), dtype) for _ in range(2))

    segments = np.ones((batch, length), np.int32)
    segments[-1, length - length // 8 :] = 0
    return pair(student_dim), pair(teacher_dim), jnp.asarray(segments)


def compile_form(inputs: tuple, relation_heads: int, causal: bool, block_bytes: int | None, dense: bool):
    """Value and gradient of one form, compiled."""

    def loss(student: tuple, teacher: tuple, segments: jax.Array) -> jax.Array:
        masks = RowMasks(segments, segments, causal)
        if dense:
            return relation_kl(teacher, student, relation_heads, masks)
        implementation = LossImplementation(relation_bytes=block_bytes)
        return relation_kl_blocked(teacher, student, relation_heads, masks, implementation)

    return jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()


def time_interleaved(forms: dict, inputs: tuple, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each form in each round, after one round that is not counted."""
    times = {name: [] for name in forms}
    for counted in (False, *[True] * rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            jax.block_until_ready(form(*inputs))
            if counted:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def measure(length: int, relation_heads: int, given: argparse.Namespace) -> list[dict]:
    """A row for each form at one shape."""
    batch = max(1, given.tokens // length)
    inputs = make_inputs(batch, length, given.teacher_dim, given.student_dim, given.dtype)
    forms = {}
    if 8 * 4 * batch * relation_heads * length**2 <= given.dense_limit_gib * 2**30:
        forms["dense"] = compile_form(inputs, relation_heads, given.causal, None, dense=True)
    for size in given.block_mib:
        name = "blocked" if size is None else f"blocked {size:g} MiB"
        block_bytes = None if size is None else int(size * 2**20)
        forms[name] = compile_form(inputs, relation_heads, given.causal, block_bytes, dense=False)
    return [
        {
            "length": length,
            "relation_heads": relation_heads,
            "batch": batch,
            "form": name,
            "median_ms": round(statistics.median(times), 2),
            "least_ms": round(min(times), 2),
            "temporaries_mib": round(forms[name].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        for name, times in time_interleaved(forms, inputs, given.rounds).items()
    ]


def as_markdown(rows: list[dict]) -> str:
    """One line a row; `times` is how often faster than dense by the medians."""
    dense = {(row["length"], row["relation_heads"]): row for row in rows if row["form"] == "dense"}
    lines = [
        "| length | R | batch | form | median ms | least ms | times | temporaries MiB |",
        "|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        reference = dense.get((row["length"], row["relation_heads"]))
        ratio = f"{reference['median_ms'] / row['median_ms']:.1f}" if reference else ""
        cells = [row["length"], row["relation_heads"], row["batch"], row["form"], row["median_ms"], row["least_ms"]]
        lines.append("| " + " | ".join(map(str, [*cells, ratio, row["temporaries_mib"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=numbers, default=[128, 256, 512, 1024])
    parser.add_argument("--relation_heads", type=numbers, default=[12, 64])
    parser.add_argument("--tokens", type=int, default=2048, help="batch times length")
    parser.add_argument("--teacher_dim", type=int, default=768)
    parser.add_argument("--student_dim", type=int, default=384)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--block_mib", type=lambda text: [float(x) for x in text.split(",")], default=[None])
    parser.add_argument("--dense_limit_gib", type=float, default=4.0, help="larger dense forms are left out")
    given = parser.parse_args()
    rows = [row for length in given.lengths for heads in given.relation_heads for row in measure(length, heads, given)]
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}, {given.dtype}\n\n{as_markdown(rows)}\n")
    print(json.dumps({"jax": jax.__version__, "platform": device.platform, "settings": vars(given), "rows": rows}))


if __name__ == "__main__":
    main()
