"""Times of several things in turn, what the machine can do at most, and the reports of benchmarks."""

import contextlib
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import Column, Row, markdown_table, print_table

Times = dict[str, list[float]]  # name -> seconds of each round
CEILING = "matmul"


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 2, rest: float = 0.2) -> Times:
    """Runs all in turn, A B C A B C, so that whatever else the machine does falls on all of them.

    Args:
        runs: name -> what to time; returns when its work is done.
        rounds: how often each is timed.
        warm_up: rounds before, not counted.
        rest: seconds before each, in which another library's threads stop waiting for work.
    """
    times: Times = {name: [] for name in runs}
    for turn in range(-warm_up, rounds):
        for name, run in runs.items():
            time.sleep(rest)
            began = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
    return times


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Fails if JAX compiles anything inside: counted by its compilation events."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if seen:
        raise RuntimeError(f"{len(seen)} programs were compiled in the rounds that are timed; all belong before them")


def matmul_runs(dtypes: Sequence[str], sizes: Sequence[int] = ()) -> dict[str, Callable[[], Any]]:
    """Square products by `jnp.dot`, named "matmul <dtype> <size>"; see `ceilings`."""
    sizes = sizes or ((1024, 2048, 3072) if jax.default_backend() == "cpu" else (4096, 8192, 16384))
    dot, rng, runs = jax.jit(jnp.dot), np.random.default_rng(0), {}
    for dtype in dtypes:
        for size in sizes:
            factors = [jnp.asarray(rng.standard_normal((size, size), np.float32), dtype) for _ in range(2)]
            runs[f"{CEILING} {dtype} {size}"] = lambda factors=factors: jax.block_until_ready(dot(*factors))
    return runs


def ceilings(times: Times, prefix: str = CEILING) -> dict[str, float]:
    """By dtype the most operations a second, of the sizes timed, that square products reached by their medians."""
    found: dict[str, float] = {}
    for name, seconds in times.items():
        kind, _, rest = name.partition(" ")
        if kind == prefix:
            dtype, size = rest.split()
            found[dtype] = max(found.get(dtype, 0.0), 2 * int(size) ** 3 / statistics.median(seconds))
    return found


def timed_row(name: str, seconds: Sequence[float], flops: int, tokens: int) -> dict[str, Any]:
    """The timing columns of a row: `flops` and `tokens` are those of one run."""
    median = statistics.median(seconds)
    return {
        "name": name,
        "seconds": list(seconds),
        "median": median,
        "least": min(seconds),
        "gflops": flops / median / 1e9,
        "tokens_per_second": tokens / median,
        "microseconds": 1e6 * median / tokens,
    }


def machine() -> dict[str, Any]:
    """What was measured on."""
    device = jax.devices()[0]
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def tell(
    out: str | None, name: str, title: str, rows: Sequence[Row], columns: Sequence[Column], facts: Mapping[str, Any]
) -> None:
    """Prints the table and the facts; with `out`, a folder, writes `name.md` and `name.json` (all keys, exact)."""
    print_table(rows, columns, title=title)
    notes = "".join(f"{key}: {_short(value)}\n" for key, value in facts.items())
    print(f"\n{notes}", flush=True)
    if out:
        bullets = "".join(f"- {line}\n" for line in notes.splitlines())
        write_atomically(f"{out}/{name}.md", f"## {title}\n\n{markdown_table(rows, columns)}\n{bullets}")
        write_atomically(f"{out}/{name}.json", json_text({"facts": facts, "rows": rows}, indent=2) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
