"""The table of published accelerator specifications."""

import dataclasses

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
