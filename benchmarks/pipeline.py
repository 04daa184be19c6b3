"""Table d: what the input pipeline delivers against what a training step eats.

    python benchmarks/pipeline.py --steps docs/results/performance/step_base_float32.json --out=docs/results/performance

reads the offline corpus (prepared on the first run, then cached) through the same iterator as training, shuffled and
repeated, at the batch and lengths of each step.py result given: packed, and one chunk of text a row. Rows a second over
those that the whole step eats is how many such steps one host's pipeline could feed. First batches, which open files
and fill the shuffle buffer, are timed apart. Nothing else runs meanwhile, as it would in training on an accelerator,
whose host has nothing else to do; on a CPU that trains, both share its cores. Expect 1 minute.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

from measuring import Column, machine, tell

COLUMNS = (
    Column(key="step", title="Step"),
    Column(key="form", title="Rows"),
    Column(key="rows_per_second", title="Rows/s", kind="count"),
    Column(key="tokens_per_second", title="Real tokens/s", kind="count"),
    Column(key="full", title="Positions filled", kind="share"),
    Column(key="needed", title="Rows/s the step eats", kind="number"),
    Column(key="times_needed", title="Times the need", kind="number"),
    Column(key="first_batch", title="First batch (s)", kind="number"),
)
REAL = ("encoder_input_tokens", "decoder_target_tokens")


def measure(task: str, wanted: dict, pack: bool, seconds: float) -> dict:
    """Rows and tokens a second of one form, over so many seconds after the first batches."""
    from endistill_jax.data.pipeline import make_iterator

    began = time.perf_counter()
    iterator = make_iterator(
        task,
        split="train",
        task_feature_lengths={"inputs": wanted["source"], "targets": wanted["target"]},
        batch_size=wanted["batch"],
        seed=0,
        pack=pack,
    )
    next(iterator)
    first_batch = time.perf_counter() - began
    for _ in range(3):  # prefetched while the first was waited for
        next(iterator)
    tokens = positions = 0
    times = []
    while sum(times) < seconds or len(times) < 10:
        began = time.perf_counter()
        batch = next(iterator)
        times.append(time.perf_counter() - began)
        tokens += sum(int((batch[name] != 0).sum()) for name in REAL)
        positions += sum(batch[name].size for name in REAL)
    return {
        "form": "packed" if pack else "not packed",
        # Means: single batches come from a queue, at once or after a wait for several.
        "rows_per_second": wanted["batch"] * len(times) / sum(times),
        "tokens_per_second": tokens / sum(times),
        "full": tokens / positions,
        "first_batch": first_batch,
        "median_batch": statistics.median(times),
        "batches": len(times),
    }


def steps_of(files: list[str]) -> list[dict]:
    """What each step.py result eats; without any, tiny's rows with no step to compare with."""
    if not files:
        return [{"name": "128/48", "batch": 16, "source": 128, "target": 48, "seconds": None}]
    found = []
    for file in files:
        content = json.loads(pathlib.Path(file).read_text())
        settings = content["facts"]["shape"]
        whole = next(row for row in content["rows"] if row["name"] == "whole step")
        sizes = {name: settings[name] for name in ("batch", "source", "target")}
        name = f"{settings['shape']}, {settings['dtype']}, {sizes['source']}/{sizes['target']}"
        found.append(sizes | {"name": name, "seconds": whole["median"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="python_docs_stdlib_span_corruption_v1")
    parser.add_argument("--steps", nargs="*", default=[], help="JSON files of step.py")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow
    facts, rows = machine(), []
    for wanted in steps_of(given.steps):
        needed = None if wanted["seconds"] is None else wanted["batch"] / wanted["seconds"]
        for pack in (True, False):
            row = measure(given.task, wanted, pack, given.seconds)
            times = None if needed is None else row["rows_per_second"] / needed
            rows.append(row | {"step": wanted["name"], "needed": needed, "times_needed": times})
    tell(given.out, "pipeline", f"Input pipeline: {given.task}", rows, COLUMNS, {"machine": facts})


if __name__ == "__main__":
    main()
