"""Peak memory of bringing in a large checkpoint, against what the issue of memory allows: the target and two tensors.

    python benchmarks/import_memory.py --model=t5_v1_1_xl --stored=float32 --folder=/tmp/xl

writes a Hugging Face folder of random weights of the model's shapes (11 GB for XL in float32; kept, and used again, if
--folder is given), then, each in a process of its own:

    load     reads it onto a mesh of forced host devices, as `distill` does with its teacher
    import   runs `jobs.import_checkpoint` on it
    export   runs `jobs.export` on what was imported

and prints, as Markdown and JSON, the peak of the process above its level before the first tensor. "Anonymous" is memory
that the process owns; "resident" counts pages of the mapped checkpoint too, which the system takes back when it needs
them. Host devices keep their arrays in the same memory, so the target's bytes are part of every peak.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np


class PeakMemory:
    """Samples this process's resident and anonymous memory, in bytes, until it is stopped."""

    def __init__(self):
        self.start, self.peak = self._now(), self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stop.set()
        self._thread.join()
        return {name: self.peak[name] - self.start[name] for name in self.start}

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            now = self._now()
            self.peak = {name: max(now[name], self.peak[name]) for name in now}

    @staticmethod
    def _now() -> dict[str, int]:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        kilobytes = {"resident": "VmRSS", "anonymous": "RssAnon"}
        return {name: int(values[key].split()[0]) * 1024 for name, key in kilobytes.items()}


class RandomLeaf:
    """Stands in for a large parameter; its layers are drawn when requested."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self.seed = shape, seed

    def __getitem__(self, layer: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, layer))
        return rng.standard_normal(self.shape[1:], dtype=np.float32)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)


def generate(folder: str, size: str, stored: str) -> None:
    """Writes the checkpoint, unless it is there."""
    import jax

    from endistill_jax.checkpoints import huggingface
    from endistill_jax.models.family import abstract_params
    from endistill_jax.models.t5 import sizes

    if (pathlib.Path(folder) / "config.json").exists():
        return
    config = sizes.build(size)
    leaves, tree = jax.tree.flatten(abstract_params(config))
    params = jax.tree.unflatten(tree, [RandomLeaf(leaf.shape, seed) for seed, leaf in enumerate(leaves)])
    huggingface.save(folder, params, config, dtype=stored)


def measure(step: str, folder: str, out: str, dtype: str) -> dict:
    """One step in this process."""
    import jax

    from endistill_jax import jobs
    from endistill_jax.checkpoints.models import open_model
    from endistill_jax.sharding import make_mesh

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    began, peak = time.monotonic(), PeakMemory()
    if step == "load":
        open_model(folder, dtype).load(make_mesh(1, len(jax.devices()), 1))
    elif step == "import":
        jobs.import_checkpoint(source=folder, model_dir=f"{out}/imported", dtype=dtype)
    else:
        jobs.export(model=f"{out}/imported", folder=f"{out}/exported", dtype=dtype)
    return {"step": step, "seconds": round(time.monotonic() - began, 1), **peak.stop()}


def run_step(step: str, folder: str, out: str, dtype: str, devices: int) -> dict:
    """One step in a process of its own, so that its peak is its own."""
    flags = f"--xla_force_host_platform_device_count={devices}" if step == "load" else ""
    command = [sys.executable, __file__, f"--step={step}", f"--folder={folder}", f"--out={out}", f"--dtype={dtype}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def tell(rows: list[dict], sizes: dict[str, int]) -> None:
    """The table, and the JSON of it."""
    gigabyte = 1 << 30
    for name, size in sizes.items():
        print(f"{name}: {size / gigabyte:.2f} GiB")
    print("\n| step | seconds | peak anonymous | peak resident | anonymous above the target |\n|---|---|---|---|---|")
    for row in rows:
        above = (row["anonymous"] - sizes["target"]) / gigabyte
        peaks = " | ".join(f"{row[name] / gigabyte:.2f} GiB" for name in ("anonymous", "resident"))
        print(f"| {row['step']} | {row['seconds']} | {peaks} | {above:.2f} GiB |")
    print(json.dumps({"sizes": sizes, "steps": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="t5_v1_1_xl", help="size of the checkpoint")
    parser.add_argument("--stored", default="float32", help="type of its tensors")
    parser.add_argument("--dtype", default="bfloat16", help="type of the parameters that it becomes")
    parser.add_argument("--devices", type=int, default=4, help="forced host devices of `load`")
    parser.add_argument("--folder", help="where the checkpoint is, or is to be written")
    parser.add_argument("--out", help="where `import` and `export` write; a temporary folder if not given")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(measure(given.step, given.folder, given.out, given.dtype)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = given.folder or f"{temporary}/checkpoint", given.out or temporary
        generate(folder, given.model, given.stored)
        rows = [run_step(step, folder, out, given.dtype, given.devices) for step in ("load", "import", "export")]
        tell(rows, sizes_of(given.model, given.stored, given.dtype))


def sizes_of(size: str, stored: str, dtype: str) -> dict[str, int]:
    """Bytes of the largest stored tensor, of the checkpoint and of the parameters that it becomes."""
    import math

    import jax.numpy as jnp

    from endistill_jax.checkpoints.interchange import parameters
    from endistill_jax.models.t5 import sizes

    numbers = [math.prod(parameter.shape) for parameter in parameters(sizes.build(size))]
    stored_bytes, bytes_each = (jnp.dtype(name).itemsize for name in (stored, dtype))
    return {
        "largest tensor": max(numbers) * stored_bytes,
        "checkpoint": sum(numbers) * stored_bytes,
        "target": sum(numbers) * bytes_each,
    }


if __name__ == "__main__":
    main()
