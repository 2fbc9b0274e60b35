"""How fast a training step could be at best: what it needs, over what the device can do.

    python bench/roofline.py                                        # three models, measured here
    python bench/roofline.py --model resnet50 --size 224 --batch 64
    python bench/roofline.py --count-only                           # what a step needs, no device
    python bench/roofline.py --write                                # and bench/results/roofline-*

`roofline_count` says how a step is counted (bf16, channels-last), `roofline_ops` what is taken for
fused, `roofline_measure` what is measured. A roof is the rate at which a step would go if nothing
but that one thing took time; no step is faster than the lowest, unless its tensors stay in a cache
(a small student's may: memory is measured by copies that do not).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from data_session import device as device_name
from harness import RESULTS, origin
from roofline_count import Count, count_step
from roofline_measure import Speeds, measure, typical

MODELS = {  # side of the images, batch, classes
    "inception_resnet_v2": (299, 256, 1000),
    "resnet50": (224, 256, 1000),
    "cifar_resnet32": (32, 128, 10),
}
# NVIDIA's data sheets: dense bf16 FLOP/s on tensor cores, without sparsity.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
EAGER = ("compute, measured", "memory, eager", "launches, eager")
AT_BEST = ("compute, measured", "memory, fused", "launches, CUDA graph")


def roofs(count: Count, speeds: Speeds, peak_flop_s: float | None = None) -> dict[str, float]:
    """Images/s by each roof.

    Args:
        count: what a step needs.
        speeds: what the device can do.
        peak_flop_s: of the data sheet, where it is known.
    """
    seconds = {
        "compute, measured": count.flop / speeds.matmul_flop_s["bf16"],
        "memory, eager": count.eager_bytes / speeds.copy_bytes_s,
        "memory, fused": count.fused_bytes / speeds.copy_bytes_s,
        "launches, eager": count.launches * speeds.launch_us / 1e6,
    }
    if peak_flop_s is not None:
        seconds["compute, data sheet"] = count.flop / peak_flop_s
    if speeds.graph_launch_us is not None:
        seconds["launches, CUDA graph"] = count.launches * speeds.graph_launch_us / 1e6
    return {name: count.batch / s for name, s in seconds.items()}


def binding(found: dict[str, float], names: tuple[str, ...]) -> str:
    """The lowest of the roofs named; those that are not known are left out."""
    return min((name for name in names if name in found), key=lambda name: found[name])


def needs(count: Count) -> dict[str, Any]:
    """What a step needs, in numbers; bytes and FLOP an image."""
    return {
        "batch": count.batch,
        "parameters": count.parameters,
        "convolutions": len(count.convolutions),
        "forward_macs": count.macs,
        "flop": count.flop / count.batch,
        "eager_bytes": count.eager_bytes / count.batch,
        "fused_bytes": count.fused_bytes / count.batch,
        "eager_bytes_by_family": {
            name: size / count.batch for name, size in count.bytes_by_family().items()
        },
        "optimiser_bytes_a_step": count.optimiser_bytes,
        "launches_a_step": count.launches,
        "share_of_1x1": count.share(one_by_one=True),
        "share_off_64": count.share(off_64=True),
        "share_of_linear": count.linear_macs / count.macs,
    }


def described(name: str, size: int, need: dict[str, Any]) -> Iterator[str]:
    """Lines on what a step needs."""
    yield (
        f"{name}, {size} px, batch {need['batch']}: {need['parameters'] / 1e6:.2f} M parameters, "
        f"{need['convolutions']} convolutions, {need['forward_macs'] / 1e9:.2f} GMAC forward"
    )
    yield (
        f"  an image: {need['flop'] / 1e9:.2f} GFLOP, {need['eager_bytes'] / 1e6:.1f} MB eager, "
        f"{need['fused_bytes'] / 1e6:.1f} MB fused; a step: {need['launches_a_step']:,} launches, "
        f"optimiser {need['optimiser_bytes_a_step'] / 1e6:.0f} MB"
    )
    families = need["eager_bytes_by_family"].items()
    yield "  MB an image, eager: " + ", ".join(f"{n} {b / 1e6:.1f}" for n, b in families)
    yield (
        f"  of the multiply-adds {need['share_of_1x1']:.0%} in 1×1 convolutions, "
        f"{need['share_off_64']:.0%} in convolutions with channels off 64, "
        f"{need['share_of_linear']:.2%} in linear layers (all that torch has in fp8)"
    )


def measured(speeds: Speeds) -> Iterator[str]:
    """Lines on what the device can do."""
    products = ", ".join(f"{n} {f / 1e12:.3g} TFLOP/s" for n, f in speeds.matmul_flop_s.items())
    yield f"  copy {speeds.copy_bytes_s / 1e9:.1f} GB/s; matrix product {products}"
    for shape, rate in speeds.conv_flop_s.items():
        yield f"  convolution {shape}: {rate / 1e12:.3g} TFLOP/s (bf16, forward)"
    graph = speeds.graph_launch_us
    in_graph = "" if graph is None else f", in a CUDA graph {graph:.2f} µs"
    yield f"  a launch {speeds.launch_us:.2f} µs{in_graph}"


def roof_lines(found: dict[str, float]) -> Iterator[str]:
    """The roofs, lowest first, and which binds."""
    for name, rate in sorted(found.items(), key=lambda item: item[1]):
        yield f"  roof {name:<22} {rate:>12,.1f} images/s"
    yield f"  binds: eager {binding(found, EAGER)}; at best {binding(found, AT_BEST)}"


def run(name: str, size: int, batch: int, classes: int, count_only: bool) -> dict[str, Any]:
    """Counts a model's step, measures the device, prints both; returns the record."""
    count = count_step(name, size, batch, classes)
    need = needs(count)
    record: dict[str, Any] = {"model": name, "image_size": size, "needs": need}
    print("\n".join(described(name, size, need)), flush=True)
    if count_only:
        return record
    on_gpu = torch.cuda.is_available()
    speeds = measure(
        torch.device("cuda" if on_gpu else "cpu"),
        typical(count.convolutions),
        batch=batch if on_gpu else 4,
        matmul_n=8192 if on_gpu else 2048,
        copy_size=2**30 if on_gpu else 2**28,
    )
    found = roofs(count, speeds, PEAKS.get(torch.cuda.get_device_name()) if on_gpu else None)
    print("\n".join((*measured(speeds), *roof_lines(found))), flush=True)
    return {**record, "measured": asdict(speeds), "roofs_images_s": found}


def write(records: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Keeps the records of a device and day in a file."""
    facts = {"subject": "roofline", "device": device_name(), **origin()}
    words = "".join(c if c.isalnum() else " " for c in facts["device"].lower()).split()
    path = folder / f"roofline-{'-'.join(words)}-{facts['date']}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "models": records}, indent=1) + "\n")
    return path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help=f"of timm's registry or ours; default {', '.join(MODELS)}")
    for option in ("size", "batch", "classes"):
        parser.add_argument(f"--{option}", type=int, help="with --model: another than its own")
    parser.add_argument("--count-only", action="store_true", help="measure nothing")
    parser.add_argument("--write", action="store_true", help="keep it in bench/results")
    args = parser.parse_args()
    if not args.model and (args.size or args.batch or args.classes):
        parser.error("--size, --batch and --classes go with --model")
    if args.write and args.count_only:
        parser.error("--write keeps what was measured, and --count-only measures nothing")
    return args


def main() -> None:
    args = arguments()
    records = []
    for name in [args.model] if args.model else MODELS:
        own = MODELS.get(name, (224, 256, 1000))
        given = (args.size, args.batch, args.classes)
        size, batch, classes = (g or o for g, o in zip(given, own, strict=True))
        records.append(run(name, size, batch, classes, args.count_only))
    if args.write:
        print(f"written: {write(records)}")


if __name__ == "__main__":
    main()
