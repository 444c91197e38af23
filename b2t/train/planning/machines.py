"""GPUs and links by name, from their data sheets, and what is assumed where no sheet says it."""

import math
from dataclasses import dataclass

from b2t.errors import UserError
from b2t.monitor.training import peak_of

GB = 10**9

_MEMORY: dict[str, tuple[float, float]] = {
    # Name: memory in GB, and its bandwidth in GB/s, of the data sheets that PEAK_FLOPS names.
    "H200": (141, 4800),
    "H100 80GB HBM3": (80, 3350),
    "H100 PCIe": (80, 2000),
    "A100-SXM4-80GB": (80, 2039),
    "A100-SXM4-40GB": (40, 1555),
    "L40S": (48, 864),
    "RTX 4090": (24, 1008),
    "RTX 3090": (24, 936),
    "RTX A6000": (48, 768),
    "RTX A5500": (24, 768),
    "RTX A5000": (24, 768),
    "V100-SXM2-32GB": (32, 900),
    "T4": (16, 320),
}

LINKS: dict[str, float] = {
    # GB/s in one direction. PCI Express base specifications: 8, 16, 32 GT/s on 16 lanes, 128b/130b.
    "pcie3": 15.75,
    "pcie4": 31.5,
    "pcie5": 63.0,
    # Data sheets of RTX A5500 (NVLink bridge, 112.5 both ways), A100 (600), H100 (900).
    "nvlink-bridge": 56.25,
    "nvlink3": 300.0,
    "nvlink4": 450.0,
    # Line rates: IEEE 802.3 Ethernet, InfiniBand HDR (200 Gb/s) and NDR (400 Gb/s).
    "1gbe": 0.125,
    "10gbe": 1.25,
    "25gbe": 3.125,
    "100gbe": 12.5,
    "hdr": 25.0,
    "ndr": 50.0,
}


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says; docs/SCALING.md has what one H100 gave for some of it.

    Attributes:
        efficiency: share of the peak that matrix products reach.
        memory_efficiency: share of the memory's bandwidth that other operators reach.
        link_efficiency: share of a link's rate that large messages reach.
        launch_s: seconds of the host for each operator.
        hop_s: seconds of each hop of a collective within a host, and between hosts.
        reserve: bytes of a GPU that CUDA, NCCL and the allocator's gaps take.
    """

    efficiency: float = 0.6
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    launch_s: float = 6e-6
    hop_s: tuple[float, float] = (5e-6, 25e-6)
    reserve: float = 1.0 * 2**30


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, and what joins them.

    Attributes:
        gpu: name of the GPU.
        flops: peak of dense 16-bit matrix products per second.
        bandwidth: of its memory, in bytes per second.
        link, network: names of what joins GPUs of one host, and hosts.
        per_host: GPUs of one host.
        assumed: what no data sheet says.
    """

    gpu: str
    flops: float
    bandwidth: float
    link: str
    network: str
    per_host: int
    assumed: Assumptions

    def rate(self, world: int) -> float:
        """Bytes per second that a ring over ``world`` GPUs carries: its slowest link."""
        rates = [LINKS[self.link]]
        if world > self.per_host:
            rates.append(LINKS[self.network])
        return min(rates) * GB * self.assumed.link_efficiency

    def latency(self, world: int) -> float:
        """Seconds that a collective of no bytes takes: a tree up and down."""
        hop = self.assumed.hop_s[world > self.per_host]
        return 2 * math.ceil(math.log2(max(world, 1))) * hop


def cluster(gpu: str, link: str, network: str, per_host: int, assumed: Assumptions) -> Cluster:
    """Look up a GPU and its links.

    Raises:
        UserError: a name that is not known.
    """
    if gpu not in _MEMORY:
        raise UserError(
            f"--gpu {gpu!r}: no data sheet is known; known are {', '.join(gpu_names())}"
        )
    for option, name in (("--link", link), ("--network", network)):
        if name not in LINKS:
            raise UserError(f"{option} {name!r}: not known; known are {', '.join(LINKS)}")
    flops = peak_of(gpu)
    assert flops is not None, f"{gpu} has no peak"
    return Cluster(gpu, flops, _MEMORY[gpu][1] * GB, link, network, per_host, assumed)


def memory_of(gpu: str) -> float:
    """Bytes of a known GPU."""
    return _MEMORY[gpu][0] * GB


def gpu_names() -> list[str]:
    """GPUs that can be planned for."""
    return list(_MEMORY)
