"""Accelerator chips, and the names and devices of their slices and hosts.

    v5e:4x4       a TPU slice by its shape          2*v5e:4x4     two of them, joined by the data center network
    v5e-16        the same slice by its size        v5litepod-16  as Cloud TPU calls it
    h100:8        a host with eight GPUs            gpu:8, cpu:8  any such host, whose chips are not known

v5e and v6e are counted in chips, v4 and v5p in TensorCores, of which a chip has two: v4-64 has 32 chips.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from endistill_jax.core.errors import UserError

TPU_SOURCE = "Google Cloud TPU documentation, pages v4, v5e, v5p and v6e"
GPU_SOURCE = "NVIDIA data sheets, dense figures, SXM boards"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator chip; None where it is unknown.

    Attributes:
        name: as topologies name it.
        platform: "tpu", "gpu" or "cpu".
        memory: bytes of its own memory.
        peak_flops: bfloat16 operations a second.
        memory_bandwidth: bytes a second between chip and memory.
        link_bandwidth: bytes a second that it sends to its neighbors, all links together, one direction.
        network_bandwidth: bytes a second that it sends to another slice or host, its share of the host's.
        source: of the specifications.
    """

    name: str
    platform: str
    memory: int | None = None
    peak_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    source: str = ""


def _tpu(
    name: str, gib: int, teraflops: float, memory_gb: float, links_gbit: float, network_gbit: float | None
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        memory=gib << 30,
        peak_flops=teraflops * 1e12,
        memory_bandwidth=memory_gb * 1e9,
        link_bandwidth=links_gbit * 1e9 / 8,
        network_bandwidth=None if network_gbit is None else network_gbit * 1e9 / 8,
        source=TPU_SOURCE,
    )


def _gpu(name: str, gb: int, teraflops: float, memory_gb: float, links_gb: float) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        memory=int(gb * 1e9),
        peak_flops=teraflops * 1e12,
        memory_bandwidth=memory_gb * 1e9,
        link_bandwidth=links_gb * 1e9,
        source=GPU_SOURCE,
    )


# TPUs' links: the "interchip interconnect bandwidth" in Gbit/s, one direction; the "bidirectional" GB/s of later pages
# count both. Data center network: what the page gives for a chip, or for a pod over its chips; v4's gives none.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", gib=32, teraflops=275, memory_gb=1228, links_gbit=2400, network_gbit=None),
        _tpu("v5e", gib=16, teraflops=197, memory_gb=819, links_gbit=1600, network_gbit=25),
        _tpu("v5p", gib=95, teraflops=459, memory_gb=2765, links_gbit=4800, network_gbit=50),
        _tpu("v6e", gib=32, teraflops=918, memory_gb=1638, links_gbit=3200, network_gbit=100),
        _gpu("a100", gb=80, teraflops=312, memory_gb=2039, links_gb=300),
        _gpu("h100", gb=80, teraflops=989, memory_gb=3350, links_gb=450),
        _gpu("h200", gb=141, teraflops=989, memory_gb=4800, links_gb=450),
        Chip(name="gpu", platform="gpu"),
        Chip(name="cpu", platform="cpu"),
    )
}


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
        chip: their kind.
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
    def name(self) -> str:
        """The name by shape, which `parse_topology` reads."""
        many = f"{self.slices}*" if self.slices > 1 else ""
        return f"{many}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def cloud_name(self) -> str:
        """What Cloud TPU calls the accelerator type of one slice, such as v5litepod-16."""
        kind = {"v5e": "v5litepod"}.get(self.chip.name, self.chip.name)
        return f"{kind}-{math.prod(self.shape) * _CORES_A_CHIP.get(self.chip.name, 1)}"

    @property
    def is_proxy(self) -> bool:
        """Whether the CPU compiler is used as a proxy, as there is none for it here."""
        return self.chip.platform != "tpu"


def parse_topologies(names: str) -> list[Topology]:
    """The topologies of a list with commas between them.

    Raises:
        UserError: a name that is none, with the known ones.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise UserError(f"--topology is empty; give one or more of {known_names()}")
    return [parse_topology(name) for name in given]


def parse_topology(name: str) -> Topology:
    """One topology by its shape or by its size; see the module.

    Raises:
        UserError: a name that is none, with the known ones.
    """
    match = _NAME.fullmatch(name.strip().lower())
    if not match:
        raise UserError(f"--topology: {name!r} is not a topology; known are {known_names()}")
    kind = _CLOUD_NAMES.get(match["kind"], match["kind"])
    sizes = tuple(int(size) for size in match["size"].split("x"))
    slices = int(match["slices"] or 1)
    if kind in _HOSTS:
        if len(sizes) > 1 or sizes[0] < 1 or slices != 1:
            raise UserError(f"--topology: {name!r} is no host; GPUs and CPUs are those of one host, such as {kind}:8")
        return Topology(chip=CHIPS[kind], shape=sizes)
    if kind not in SHAPES:
        near = difflib.get_close_matches(kind, [*SHAPES, *_HOSTS], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--topology: {name!r} is not known; {hint}known are {known_names()}")
    shapes = {tuple(map(int, shape.split("x"))) for shape in SHAPES[kind]}
    if match["mark"] == "-":
        cores = _CORES_A_CHIP[kind]
        found = [shape for shape in shapes if len(sizes) == 1 and math.prod(shape) * cores == sizes[0]]
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
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
