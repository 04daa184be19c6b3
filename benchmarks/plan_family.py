"""The plans of all configurations of gin/miniend_3b/, in one table.

    python benchmarks/plan_family.py --plans=plans --out=docs/results/plans

plans every file for the chips that its header names (needs the extra `plan`; two to nine minutes and 5 GiB of memory
for each on two cores), and collects what was found. A plan that is already in the folder of plans is not made again.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

from measuring import Column, tell

FAMILY = pathlib.Path(__file__).parent.parent / "gin" / "miniend_3b"
COLUMNS = (
    Column(key="file", title="File"),
    Column(key="chips", title="Chips"),
    Column(key="mesh", title="Mesh"),
    Column(key="teacher", title="Teacher"),
    Column(key="batch_per_chip", title="Examples a chip", kind="number"),
    Column(key="memory_gib", title="Memory a chip (GiB)"),
    Column(key="temporary_gib", title="Its temporaries (GiB)", kind="number"),
    Column(key="petaflop", title="Model PFLOP a step", kind="number"),
    Column(key="sent_gb", title="GB sent a chip", kind="number"),
    Column(key="step_seconds", title="Step, estimated (s)"),
    Column(key="chip_hours", title="Chip-hours, estimated"),
    Column(key="compile_seconds", title="Compiling it (s)", kind="number"),
    Column(key="host_gb", title="Host memory for that (GB)", kind="number"),
)


def topology_of(file: pathlib.Path) -> str:
    """The chips that a file's header plans for."""
    return re.search(r"--topology=(\S+?)\.?$", file.read_text(), re.MULTILINE)[1]


def plan(file: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """One file's plan, from its folder if it is there."""
    result = folder / "plan.json"
    if not result.exists():
        job = [f"--gin_file={file}", "--plan", f"--topology={topology_of(file)}", f"--plan_dir={folder}"]
        subprocess.run([sys.executable, "-m", "endistill_jax.main", *job], check=False)
    return json.loads(result.read_text())[0]


def row_of(file: pathlib.Path, planned: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; what does not fit says why in place of its memory."""
    asked = planned["asked"]
    row = {
        "file": file.name,
        "chips": planned["topology"],
        "teacher": asked["teacher_sharding"],
        "batch_per_chip": planned["batch_per_chip"],
    }
    found = planned["found"]
    if found["status"] != "compiled":
        return row | {"mesh": asked["mesh"], "memory_gib": planned["reason"]}
    capacity = asked["topology"]["chip"]["memory"] / 2**30
    return row | {
        "mesh": " x ".join(str(size) for size in found["mesh"].values()),
        "memory_gib": f"{planned['memory_per_chip'] / 2**30:.1f} of {capacity:.0f}",
        "temporary_gib": found["memory"]["temporaries"] / 2**30,
        "petaflop": planned["model_flops"] / 1e15,
        "sent_gb": sum(traffic["sent"] for traffic in found["collectives"]) / 1e9,
        "step_seconds": _range(planned["step_seconds"]),
        "chip_hours": _range(planned["run"]["chip_hours"]),
        "compile_seconds": found["compile_seconds"],
        "host_gb": found["host_memory"] / 1e9,
    }


def _range(bounds: dict[str, float] | None) -> str:
    return "-" if bounds is None else f"{bounds['least']:.3g} to {bounds['most']:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=pathlib.Path, default=pathlib.Path("plans"), help="folder of the plans")
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    files = [file for file in sorted(FAMILY.glob("*.gin")) if file.stem != "teacher_flan_t5_xl"]  # v5e_64's shape
    rows = [row_of(file, plan(file, given.plans / file.stem)) for file in files]
    facts = {"assumed": "computing at 60 to 30 % of the peak, exchanging at 80 to 25 % of the bandwidth"}
    tell(given.out, "miniend_3b", "gin/miniend_3b/: memory by the compiler, times by estimate", rows, COLUMNS, facts)


if __name__ == "__main__":
    main()
