"""Accelerator chips, and the names and devices of their slices and hosts.

    v5e:4x4       a TPU slice by its shape          2*v5e:4x4     two of them, joined by the data center network
    v5e-16        the same slice by its size        v5litepod-16  as Cloud TPU calls it
    h100:8        a host with eight GPUs            gpu:8, cpu:8  any such host, whose chips are not known

v5e and v6e are counted in chips, v4 and v5p in TensorCores, of which a chip has two: v4-64 has 32 chips.
"""

import dataclasses
import math
import re
from typing import Any

from endistill_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator chip; None where a figure is unknown.

    Attributes:
        memory: bytes of its own memory.
        peak_flops: bfloat16 operations a second.
        memory_bandwidth: bytes a second between chip and memory.
        link_bandwidth: bytes a second that it sends to its neighbors, all links together, one direction.
        network_bandwidth: bytes a second that it sends to another slice or host, its share of the host's.
    """

    name: str
    platform: str
    memory: int | None = None
    peak_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    source: str = ""


_SOURCES = {
    "tpu": "Google Cloud TPU documentation, pages v4, v5e, v5p and v6e",
    "gpu": "NVIDIA data sheets, dense figures, SXM boards",
}
# Memory in bytes; FLOP/s; GB/s of memory; Gbit/s of all links in one direction, which a TPU page calls "interchip
# interconnect bandwidth" ("bidirectional" GB/s of later pages count both); Gbit/s of the data center network, what the
# page gives for a chip, or for a pod over its chips (v4's gives none).
_FIGURES = {
    "v4": (32 << 30, 275e12, 1228, 2400, None),
    "v5e": (16 << 30, 197e12, 819, 1600, 25),
    "v5p": (95 << 30, 459e12, 2765, 4800, 50),
    "v6e": (32 << 30, 918e12, 1638, 3200, 100),
    "a100": (80e9, 312e12, 2039, 2400, None),
    "h100": (80e9, 989e12, 3350, 3600, None),
    "h200": (141e9, 989e12, 4800, 3600, None),
}


def _chip(name: str, memory: float, peak_flops: float, memory_gb: float, links: float, network: float | None) -> Chip:
    platform = "tpu" if name.startswith("v") else "gpu"
    return Chip(
        name=name,
        platform=platform,
        memory=int(memory),
        peak_flops=peak_flops,
        memory_bandwidth=memory_gb * 1e9,
        link_bandwidth=links * 1e9 / 8,
        network_bandwidth=None if network is None else network * 1e9 / 8,
        source=_SOURCES[platform],
    )


CHIPS = {name: _chip(name, *figures) for name, figures in _FIGURES.items()}
CHIPS |= {name: Chip(name=name, platform=name) for name in ("gpu", "cpu")}  # any such host

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "v4": _CUBES}
_CORES_A_CHIP = {"v5e": 1, "v6e": 1, "v5p": 2, "v4": 2}
_CLOUD_NAMES = {"v5litepod": "v5e"}
_HOSTS = tuple(name for name, chip in CHIPS.items() if chip.platform != "tpu")
_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<kind>[a-z]\w*)(?P<mark>[:-])(?P<size>\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips that run one program.

    Attributes:
        shape: chips of one slice along each of its axes; of a host, their number.
        slices: such slices, joined by the data center network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def slice_name(self) -> str:
        """One slice by its shape, such as `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """The name by shape, which `parse_topology` reads."""
        return f"{self.slices}*{self.slice_name}" if self.slices > 1 else self.slice_name

    @property
    def cloud_name(self) -> str:
        """What Cloud TPU calls the accelerator type of one slice, such as v5litepod-16."""
        kind = {"v5e": "v5litepod"}.get(self.chip.name, self.chip.name)
        return f"{kind}-{math.prod(self.shape) * _CORES_A_CHIP.get(self.chip.name, 1)}"

    @property
    def is_proxy(self) -> bool:
        """Whether the CPU compiler stands in: only the TPU compiler works without its chips."""
        return self.chip.platform != "tpu"


def parse_topologies(names: str) -> tuple[Topology, ...]:
    """The topologies of a comma-separated list."""
    given = [name for name in names.split(",") if name.strip()]
    if not given:
        raise UserError(f"--topology is empty; give one or more of {known_names()}")
    return tuple(map(parse_topology, given))


def parse_topology(name: str) -> Topology:
    """One topology by its shape or by its size; see the module."""
    name = name.strip()
    match = _NAME.fullmatch(name.lower())
    kind = match and _CLOUD_NAMES.get(match["kind"], match["kind"])
    if kind not in (*SHAPES, *_HOSTS):
        raise UserError(f"--topology: {name!r} is not known; known are {known_names()}")
    sizes = tuple(int(size) for size in match["size"].split("x"))
    slices = int(match["slices"] or 1)
    if kind in _HOSTS:
        if len(sizes) > 1 or sizes[0] < 1 or slices != 1:
            raise UserError(f"--topology: {name!r} is no host; GPUs and CPUs are those of one host, such as {kind}:8")
        return Topology(chip=CHIPS[kind], shape=sizes)
    shapes = [tuple(map(int, shape.split("x"))) for shape in SHAPES[kind]]
    if match["mark"] == "-":
        found = [shape for shape in shapes if (math.prod(shape) * _CORES_A_CHIP[kind],) == sizes]
    else:
        found = [shape for shape in shapes if shape == sizes]
    if not found or slices < 1:
        raise UserError(f"--topology: there is no {name}; {kind} has {_names_of(kind)}")
    return Topology(chip=CHIPS[kind], shape=found[0], slices=slices)


def known_names() -> str:
    """All names, for messages and for the documentation."""
    listed = "; ".join(_names_of(kind) for kind in SHAPES)
    return f"{listed}; {', '.join(f'{host}:8' for host in _HOSTS)} (any number); 2*v5e:4x4 for two slices"


def _names_of(kind: str) -> str:
    sizes = [math.prod(map(int, shape.split("x"))) * _CORES_A_CHIP[kind] for shape in SHAPES[kind]]
    return ", ".join(f"{kind}:{shape} ({kind}-{size})" for shape, size in zip(SHAPES[kind], sizes, strict=True))


def environment(topology: Topology) -> dict[str, str]:
    """Environment variables that a process needs before it imports JAX, so that `devices` works in it."""
    if topology.is_proxy:
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.chips}",
        }
    return {
        "JAX_PLATFORMS": "cpu",
        # libtpu only compiles here: it must not look for TPUs, and must tolerate another process using it.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.cloud_name,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for; a TPU's cannot run anything."""
    import jax
    from jax.experimental import topologies

    if topology.is_proxy:
        return jax.devices()[: topology.chips]
    settings: dict[str, Any] = {}
    if math.prod(topology.shape) == 1:
        settings["chips_per_host_bounds"] = [1, 1, 1]
    if topology.chip.name == "v4":
        settings["chip_config_name"] = "megacore"  # both cores of a chip as one device, as Cloud TPU has them
    if topology.slices > 1:
        settings["num_slices"] = topology.slices
    name = topology.slice_name
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
