"""What bench/scaling.py computes with: every constant with its unit and where it comes from."""

from collections.abc import Iterable
from typing import NamedTuple

_HERE = "measured 2026-11-23, 2 CPU cores, torch 2.15"
_NCCL = "NCCL, src/graph/tuning.cc at b647562"
_VOLTAGE = "Voltage Park benchmarks, 4 × 8 H100, NCCL 2.24"


class Constant(NamedTuple):
    """A number and its source: measured, cited, counted, or "assumed"."""

    value: float
    unit: str
    source: str


CONSTANTS = {
    "parameters": Constant(55.84e6, "1", "counted: timm's inception_resnet_v2, 1000 classes"),
    "backward_share": Constant(2 / 3, "of compute", "counted: 52.6 of 78.9 GFLOP an image"),
    "rate_low": Constant(300, "images/s a GPU", "assumed (24 TFLOP/s); never measured"),
    "rate_mid": Constant(700, "images/s a GPU", "assumed (55 TFLOP/s); never measured"),
    "rate_high": Constant(1400, "images/s a GPU", "assumed (110 TFLOP/s); never measured"),
    "launch_floor": Constant(25e-3, "s", "assumed: a step's launches, whatever the batch"),
    "jitter": Constant(0.01, "of compute", "assumed: a rank's standard deviation"),
    "bucket": Constant(25 * 2**20, "bytes", "parallel.bucket_mb"),
    "bus_one_host": Constant(480e9, "bytes/s", "peak, 8 H100: NVIDIA/nccl-tests issue 212"),
    "bus_hosts": Constant(331e9, "bytes/s", f"peak at 8 GiB: {_VOLTAGE}; more hosts: assumed"),
    "bucket_efficiency": Constant(0.5, "of the peak", "assumed: buckets are small messages"),
    "tree_base": Constant(14e-6, "s", f"{_NCCL}, tree, LL128"),
    "tree_nvlink": Constant(1.25e-6, "s", f"{_NCCL}, tree, LL128"),
    "tree_network": Constant(8.5e-6, "s", f"{_NCCL}, tree, LL128"),
    "ring_base": Constant(6.6e-6, "s", f"{_NCCL}, ring, LL"),
    "ring_nvlink": Constant(0.6e-6, "s", f"{_NCCL}, ring, LL"),
    "ring_nvlink_hosts": Constant(1e-6, "s", f"{_NCCL}, ring, LL: at least the network overhead"),
    "ring_network": Constant(2.7e-6, "s", f"{_NCCL}, ring, LL"),
    "percentile_keys": Constant(4096, "losses", "kernels/weigh.py, _MOST_KEYS"),
    "percentile_passes": Constant(17, "1", "kernels/percentile.py: 16 digits and the count"),
    "percentile_read": Constant(50e9, "bytes/s", "assumed: one program from the L2 cache"),
    "gloo_hop": Constant(
        144e-6,
        "s",
        f"{_HERE}: 287 µs an all-reduce of 2 ranks, loopback "
        "(two servers, TCP, 1 KB: 354 µs, pytorch/gloo issue 158)",
    ),
    "flag_ranks": Constant(128, "ranks a step", "engine/agreement.py, _RANKS_A_STEP"),
    "decode_cpu": Constant(4.78e-3, "core s an image", "measured: bench/RESULTS.md"),
    "host_cores": Constant(112, "1", "DGX SuperPOD reference architecture, H100: 2 × 56"),
    "host_memory": Constant(2e12, "bytes", "MLPerf Inference 3.1, Dell XE9680 with 8 H100"),
    "hbm": Constant(3.35e12, "bytes/s", f"peak: {_VOLTAGE}"),
    "image_bytes": Constant(89_456, "bytes", "bench/RESULTS.md: its made-up photographs"),
    "storage": Constant(40e9, "bytes/s", "assumed: shared by all hosts"),
    "order_small": Constant(3.4e-8, "s", f"{_HERE}: CPU time 0.67 s for 1 M, 2.8 s for 4 M"),
    "order_large": Constant(5.4e-8, "s", f"{_HERE}: CPU time 20.5 s for 16 M; beyond: assumed"),
    "order_small_up_to": Constant(4e6, "samples", "as the two before"),
    "index_rank": Constant(1.82e-6, "s a row", "measured: bench/RESULTS.md, 4.37 s for 2.4 M"),
    "index_peak": Constant(216, "bytes a row", f"{_HERE}: 1.04 GB for 4.8 M, a rank"),
    "sha256": Constant(0.9e9, "bytes/s", f"{_HERE}: 256 MB, one core"),
    "write": Constant(0.5e9, "bytes/s", f"{_HERE}: 256 MB with fsync, local disk"),
    "read_back": Constant(
        0.7e9, "bytes/s", f"{_HERE}: CPU time 0.37 s for 256 MB, compared with what was written"
    ),
    "resume_hashes": Constant(
        4, "1", "engine/job.py: when chosen, when loaded; by rank 0 the two others that are kept"
    ),
    "to_host": Constant(10e9, "bytes/s", f"assumed, pageable memory (pinned: 46.8, {_VOLTAGE})"),
    "failures": Constant(
        419 / (54 * 24 * 16_384),
        "a GPU-hour",
        "Llama 3 (arXiv 2407.21783): 419 unexpected interruptions, 16,384 H100, 54 days",
    ),
    "detect": Constant(60, "s", "assumed: a crash; a hang costs train.step_timeout, 300 s"),
    "boot": Constant(120, "s", "assumed: scheduler, imports, process groups, first kernels"),
    "batch_goyal": Constant(8192, "images", "Goyal et al., arXiv 1706.02677: no loss up to here"),
}


def value(name: str) -> float:
    """A constant's number."""
    return CONSTANTS[name].value


def rows() -> Iterable[list[str]]:
    """The constants for a table."""
    for name, constant in CONSTANTS.items():
        yield [f"`{name}`", f"{constant.value:.4g}", constant.unit, constant.source]
