"""Data-parallel training by formula: ``python -m benchmarks.scaling_model [--help]``.

A step is computed (the roofline of ``benchmarks.roofline_model`` divided by the share of it that is reached), gradients
are summed over the GPUs in buckets as backward makes them, and SyncBatchNorm stops for two small collectives a layer.
Every assumption is a field of ``Cluster`` or of ``Training``. Times are seconds and sizes bytes, if not said otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from benchmarks.roofline import H100, Ceilings, limit
from benchmarks.roofline_model import Kernel, network, step

GPUS = (1, 8, 16, 64, 256, 1024)
BATCHES = (256, 64)
MICRO = 1e6


@dataclass(frozen=True)
class Cluster:
    """What connects the GPUs. Each number is an assumption until it is measured on the cluster in question.

    Raises:
        ValueError: a number that no cluster can have.
    """

    #: GPUs. An HGX H100 board has 8.
    gpus_per_node: int = 8
    #: Bytes/s of a GPU, each direction. NVLink 4 of the H100's data sheet: 900 GB/s, both directions together.
    node_bandwidth: float = 450e9
    #: Bytes/s of a GPU, each direction. One NDR InfiniBand port of 400 Gb/s for each GPU, as a DGX H100 has.
    network_bandwidth: float = 50e9
    #: Of both bandwidths, what a collective reaches with large messages. Assumed; nothing was measured.
    bandwidth_share: float = 0.8
    #: Seconds of one hop within a node. Assumed: some kernels' worth of flags and copies over NVLink.
    node_latency: float = 1.5e-6
    #: Seconds of one hop between nodes. Assumed: switches, adapters and the GPU that looks for the message.
    network_latency: float = 5e-6
    #: Seconds before a collective does anything: its launch, and waiting for the kernel before it. Assumed.
    launch: float = 10e-6

    def __post_init__(self) -> None:
        _positive("gpus_per_node", self.gpus_per_node)
        for name in ("node_bandwidth", "network_bandwidth", "bandwidth_share"):
            _positive(name, getattr(self, name))
        for name in ("node_latency", "network_latency", "launch"):
            _not_negative(name, getattr(self, name))
        if self.bandwidth_share > 1:
            raise ValueError(f"bandwidth_share must be at most 1, got {self.bandwidth_share!r}")

    @classmethod
    def measured(cls, ranks: int, small: float, large: float, size: float) -> Cluster:
        """One node, from the seconds that ``ranks`` of it take to sum a few bytes and to sum ``size`` bytes, in a ring.

        Raises:
            ValueError: the large sum is not the slower one, so that there is no bandwidth to find.
        """
        if not 0 < small < large:
            raise ValueError(
                f"a large sum must take longer than a small one, got {large!r} s and {small!r} s"
            )
        hops = 2 * (ranks - 1)
        bandwidth = hops / ranks * size / (large - small)
        return cls(
            gpus_per_node=ranks,
            node_bandwidth=bandwidth,
            bandwidth_share=1.0,
            node_latency=small / hops,
            launch=0.0,
        )

    def nodes(self, gpus: int) -> int:
        """Nodes that the GPUs fill.

        Raises:
            ValueError: a node would be filled in part only.
        """
        _positive("gpus", gpus)
        if gpus > self.gpus_per_node and gpus % self.gpus_per_node:
            raise ValueError(f"{gpus} GPUs do not fill nodes of {self.gpus_per_node}: use a multiple of it")
        return max(1, gpus // self.gpus_per_node)

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to sum ``size`` bytes over the GPUs: the faster of a ring and a hierarchy, as NCCL chooses too."""
        if gpus == 1:
            return 0.0
        return self.launch + min(self.ring(size, gpus), self.hierarchy(size, gpus))

    def ring(self, size: float, gpus: int) -> float:
        """2 (n - 1) hops, in which 2 (n - 1) / n of the bytes leave every GPU.

        There are as many rings as GPUs in a node, so that each port carries its part of what leaves the node.
        """
        hops = 2 * (gpus - 1)
        return hops * self._hop(gpus) + hops / gpus * size / self._ring_bandwidth(gpus)

    def hierarchy(self, size: float, gpus: int) -> float:
        """Reduce-scatter in the node, a tree between nodes for each GPU's part, all-gather in the node."""
        nodes = self.nodes(gpus)
        local = gpus // nodes
        inside = self.ring(size, local)
        if nodes == 1:
            return inside
        moved = 2 * (nodes - 1) / nodes * size / local
        hops = 2 * math.ceil(math.log2(nodes))
        return inside + hops * self.network_latency + moved / (self.network_bandwidth * self.bandwidth_share)

    def _hop(self, gpus: int) -> float:
        """The mean latency of a ring's hops: one of each node leaves it."""
        nodes = self.nodes(gpus)
        leaving = nodes / gpus if nodes > 1 else 0.0
        return leaving * self.network_latency + (1 - leaving) * self.node_latency

    def _ring_bandwidth(self, gpus: int) -> float:
        ports = self.gpus_per_node * self.network_bandwidth
        slowest = self.node_bandwidth if self.nodes(gpus) == 1 else min(self.node_bandwidth, ports)
        return slowest * self.bandwidth_share


@dataclass(frozen=True)
class Training:
    """What is trained, and how each GPU does it.

    Raises:
        ValueError: a number that cannot be; names are checked by ``step``.
    """

    arch: str = "resnet50"
    #: Images of a GPU and step.
    batch: int = 256
    #: Pixels of a side.
    image_size: int = 224
    #: Of activations.
    dtype: str = "bf16"
    #: How a step is run, by ``roofline_model.step``.
    way: str = "folded"
    #: Of one GPU. Those that the roofline takes for an H100.
    ceilings: Ceilings = H100
    #: Of the roofline that is reached. Assumed: no GPU has run these kernels yet.
    achieved_share: float = 0.5
    #: Seconds of a step that are known, where one was measured; it takes the place of roofline and share.
    step_seconds: float | None = None
    #: Bytes of a gradient's element on the wire. DDP under autocast sums float32; with its bf16 hook it is 2.
    gradient_bytes: int = 4
    #: Bytes of parameters after which a bucket of DDP is full; its default. Parameters are float32.
    bucket_bytes: int = 25 << 20
    #: The same of the first bucket, which is to start early; DDP's default.
    first_bucket_bytes: int = 1 << 20
    #: Standard deviation of a GPU's step time / its mean, normal and independent. Assumed.
    variation: float = 0.01
    #: Collectives of a SyncBatchNorm layer: all-reduces of 2 C + 1 float64 forward, and of 2 C float32 backward.
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        _positive("achieved_share", self.achieved_share)
        _positive("gradient_bytes", self.gradient_bytes)
        _positive("bucket_bytes", self.bucket_bytes)
        _positive("first_bucket_bytes", self.first_bucket_bytes)
        _not_negative("variation", self.variation)
        if self.step_seconds is not None:
            _positive("step_seconds", self.step_seconds)


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed together: when the last of them is there, and how large they are on the wire."""

    ready: float
    size: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step on so many GPUs, by what they are spent on."""

    gpus: int
    batch: int
    compute: float
    all_reduce: float
    exposed: float
    sync: float
    stragglers: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.sync + self.stragglers

    @property
    def efficiency(self) -> float:
        """Of one GPU's speed, what each of them keeps."""
        return self.compute / self.step

    @property
    def images_per_second(self) -> float:
        return self.gpus * self.batch / self.step


def predict(gpus: int, training: Training, cluster: Cluster) -> Prediction:
    """One step. Sums of gradients run beside backward and take nothing from it; all else waits.

    Raises:
        ValueError: numbers that do not go together.
    """
    compute, backward_end, buckets = schedule(training)
    durations = [cluster.all_reduce(bucket.size, gpus) for bucket in buckets]
    return Prediction(
        gpus=gpus,
        batch=training.batch,
        compute=compute,
        all_reduce=sum(durations),
        exposed=exposed(buckets, durations, backward_end) if gpus > 1 else 0.0,
        sync=sync_seconds(training, cluster, gpus) if training.sync_batch_norm else 0.0,
        stragglers=compute * training.variation * largest_of(gpus),
    )


def exposed(buckets: Sequence[Bucket], durations: Sequence[float], backward_end: float) -> float:
    """Seconds from the end of backward to the end of the last sum: one after the other, none before it is ready."""
    end = 0.0
    for bucket, duration in zip(buckets, durations, strict=True):
        end = max(end, bucket.ready) + duration
    return max(0.0, end - backward_end)


def sync_seconds(training: Training, cluster: Cluster, gpus: int) -> float:
    """Of all SyncBatchNorm layers: statistics are waited for, so that nothing of it is hidden."""
    channels = [conv.outputs for conv in network(training.arch, training.image_size).convs]
    return sum(
        cluster.all_reduce(8 * (2 * count + 1), gpus) + cluster.all_reduce(4 * 2 * count, gpus)
        for count in channels
    )


def largest_of(gpus: int) -> float:
    """The expected largest of so many independent standard normal numbers: all wait for the slowest.

    It is the integral of 1 - cdf(x)^n - cdf(-x)^n over x > 0.
    """
    _positive("gpus", gpus)
    if gpus == 1:
        return 0.0
    cdf, width = NormalDist().cdf, 0.01
    return width * sum(
        1 - cdf(x) ** gpus - cdf(-x) ** gpus for x in (width * (i + 0.5) for i in range(int(8 / width)))
    )


def schedule(training: Training) -> tuple[float, float, list[Bucket]]:
    """Seconds of the step, seconds until backward has ended, and the buckets in the order that they are summed.

    A block is one function of autograd, so all of its gradients are there when its backward ends.
    """
    forward, backward, last = _parts(training)
    times = [limit(kernels, training.ceilings) for kernels in (forward, *backward.values(), last)]
    share = sum(times) / training.step_seconds if training.step_seconds else training.achieved_share
    now, ready = times[0] / share, {}
    for block, seconds in zip(backward, times[1:-1], strict=True):
        now += seconds / share
        ready[block] = now
    sizes = _parameters(training)
    buckets: list[Bucket] = []
    filled = 0
    for block in backward:
        for size in sizes[block]:
            filled += size
            if filled >= (training.bucket_bytes if buckets else training.first_bucket_bytes):
                buckets.append(Bucket(ready[block], filled / 4 * training.gradient_bytes))
                filled = 0
    if filled:
        buckets.append(Bucket(now, filled / 4 * training.gradient_bytes))
    return sum(times) / share, now, buckets


def _parts(training: Training) -> tuple[list[Kernel], dict[str, list[Kernel]], list[Kernel]]:
    """The kernels of forward, those of backward by block in their order, and the optimizer's."""
    t = training
    kernels = step(t.arch, t.batch, t.image_size, t.dtype, t.way, whole=True)
    rest = [kernel for kernel in kernels if kernel.block == "rest"]
    body = [kernel for kernel in kernels if kernel.block != "rest"]
    top = network(t.arch, t.image_size).blocks[-1].name
    turn = 1 + next(i for i, kernel in enumerate(body) if kernel.name in (f"{top} end", f"{top} relu"))
    head = 1 + next(i for i, kernel in enumerate(rest) if kernel.name == "loss")
    backward: dict[str, list[Kernel]] = {"rest": rest[head:-1]}
    for kernel in body[turn:]:
        backward.setdefault(kernel.block, []).append(kernel)
    return body[:turn] + rest[:head], backward, rest[-1:]


def _parameters(training: Training) -> dict[str, list[int]]:
    """Bytes of every parameter in float32 by block, in the order that DDP fills its buckets: the last one first."""
    net = network(training.arch, training.image_size)
    blocks = {"stem": [net.stem]}
    blocks |= {
        block.name: [*block.convs, *([block.downsample] if block.downsample else [])] for block in net.blocks
    }
    sizes = {"rest": [4 * net.classes, 4 * net.classes * net.features]}
    for name, convs in blocks.items():
        sizes[name] = [
            4 * size for conv in reversed(convs) for size in (conv.outputs, conv.outputs, conv.weights)
        ]
    assert sum(map(sum, sizes.values())) == 4 * net.parameters
    return sizes


# What is printed.


def cluster_table(training: Training, cluster: Cluster, gpus: Sequence[int] = GPUS) -> str:
    """A row for each number of GPUs, with float32 gradients, bf16 ones, and SyncBatchNorm over all of them."""
    heads = (
        *("GPUs", "all-reduce us", "exposed us", "exposed us, bf16", "stragglers us", "efficiency"),
        *("img/s", "SyncBN us", "efficiency, SyncBN", "img/s, SyncBN"),
    )
    lines = [_row(heads), "| ---: |" + " ---: |" * (len(heads) - 1)]
    for count in gpus:
        plain = predict(count, training, cluster)
        half = predict(count, replace(training, gradient_bytes=2), cluster)
        sync = predict(count, replace(training, sync_batch_norm=True), cluster)
        micros = [_us(t) for t in (plain.all_reduce, plain.exposed, half.exposed, plain.stragglers)]
        with_sync = [_us(sync.sync), f"{sync.efficiency:.1%}", f"{sync.images_per_second:,.0f}"]
        lines.append(
            _row(
                [
                    *(f"{count:,}", *micros, f"{plain.efficiency:.1%}"),
                    *(f"{plain.images_per_second:,.0f}", *with_sync),
                ]
            )
        )
    return "\n".join(lines)


#: Of each line of ``doubt_table``: what is changed, and the fields of Cluster and of Training that it changes.
DOUBTS: tuple[tuple[str, dict[str, float], dict[str, float]], ...] = (
    ("as assumed", {}, {}),
    ("the whole roofline is reached", {}, {"achieved_share": 1.0}),
    ("a quarter of the roofline is reached", {}, {"achieved_share": 0.25}),
    ("half the bandwidth share", {"bandwidth_share": 0.4}, {}),
    ("hops twice as slow", {"node_latency": 3e-6, "network_latency": 1e-5}, {}),
    ("collectives start in 20 us, not 10", {"launch": 20e-6}, {}),
    ("steps vary by 3 %, not 1 %", {}, {"variation": 0.03}),
)


def doubt_table(training: Training, cluster: Cluster, gpus: int = 1024) -> str:
    """What becomes of the result where an assumption is wrong."""
    heads = ("assumption", "step ms", "exposed us", "SyncBN us", "efficiency", "efficiency, SyncBN")
    lines = [_row(heads), "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, of_cluster, of_training in DOUBTS:
        changed, other = replace(training, **of_training), replace(cluster, **of_cluster)  # type: ignore[arg-type]
        plain = predict(gpus, changed, other)
        sync = predict(gpus, replace(changed, sync_batch_norm=True), other)
        times = (f"{plain.step * 1e3:.1f}", _us(plain.exposed), _us(sync.sync))
        lines.append(_row([name, *times, f"{plain.efficiency:.1%}", f"{sync.efficiency:.1%}"]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(seconds: float) -> str:
    return f"{seconds * MICRO:,.0f}"


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value!r}")


def _not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must not be negative, got {value!r}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_model", description=__doc__)
    parser.add_argument("--arch", default="resnet50", help="one of the ten ResNets (default: resnet50)")
    parser.add_argument("--batch", type=int, default=256, help="images of a GPU (default: 256)")
    parser.add_argument("--share", type=float, default=0.5, help="of the roofline reached (default: 0.5)")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="default: 1 to 1024")
    options = parser.parse_args(arguments)
    try:
        training = Training(arch=options.arch, batch=options.batch, achieved_share=options.share)
        tables = (
            cluster_table(training, Cluster(), options.gpus),
            doubt_table(training, Cluster(), max(options.gpus)),
        )
    except ValueError as error:
        parser.error(str(error))
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
