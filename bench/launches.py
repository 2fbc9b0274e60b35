"""Kernels that a training step launches, predicted without a GPU.

    python bench/launches.py                          # Inception-ResNet-v2
    python bench/launches.py --model resnet50 --size 96

One step of each provider of `bench_train` is taken on the CPU, on small images: how many operators
it calls does not depend on their size. Counted are ATen's operators that launch a kernel (not views
and allocations; a convolution's backward one for each gradient), operators on lists by the chunks
of torch's multi-tensor kernels, and our own kernels (not run: numbers do not matter). What a GPU's
libraries launch besides (a split reduction, a change of memory format) is not seen here:
`bench_train` counts the launches that there are.

A captured step is one launch of a graph, and what the host does around it, by reading `Spade` and
`Captured` and not by counting: two copies of the batch into its places, the learning rate, the
average's share (where an average is kept), clones of the norm and of the losses.
"""

import argparse
import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from roofline_count import _launches, _no_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_providers import TimmLoop, make_work, setup
from train_subjects import LARGE, Subject
from triton.runtime import interpreter

from mentorch.engine.kernel_families import family

WHO = ("timm", "mentorch-plain", "mentorch", "mentorch-fast", "mentorch-fused")
_AROUND_A_GRAPH = 6
# Of torch's multi-tensor kernels, by how many lists they take: tensors a launch. (newer: more)
_TENSORS, _PIECES, _PIECE = (110, 64, 48, 36, 30), 320, 65_536


def of_call(func: Any, args: Any) -> int:
    """Launches of an operator."""
    name = func.overloadpacket.__name__
    if not name.startswith(("_foreach", "_fused")):
        return 0 if _no_kernel(func) else _launches(func, args)
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    pieces = sum(-(-tensor.numel() // _PIECE) for tensor in lists[0])
    at_once = _TENSORS[min(len(lists) + ("Scalar" in str(func)), len(_TENSORS)) - 1]
    return max(-(-len(lists[0]) // at_once), -(-pieces // _PIECES))


class Launches(TorchDispatchMode):
    """Counts launches by family, and keeps no tensor: autograd would copy gradients then."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if launched := of_call(func, args):
            self.found[family(f"aten::{func.overloadpacket.__name__}")] += launched
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_counted(found: Counter[str]) -> Iterator[None]:
    """Counts our kernels' launches under "ours", and runs none: numbers do not matter here."""

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        found["ours"] += 1

    with mock.patch.object(interpreter.GridExecutor, "__call__", counted):
        yield


def count(who: str, subject: Subject, dtype: torch.dtype) -> Counter[str]:
    """Launches of a provider's eager step, by family of operators."""
    loop = setup(f"{who}-eager", make_work(subject, dtype, torch.device("cpu")))
    if isinstance(loop, TimmLoop):  # what torch does by itself on a GPU
        for group in loop.optimizer.param_groups:
            group["foreach"] = True
    with kernels_counted(Counter()):
        loop.step()  # makes what is made once
    with Launches() as counted, kernels_counted(counted.found):
        loop.step()
    return counted.found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="inception_resnet_v2", help="a model of timm's registry")
    parser.add_argument("--size", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--who", nargs="+", default=list(WHO), help="providers of bench_train")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    subject = Subject(options.model, options.model, options.size, batch=2)
    who = options.who if options.model == LARGE else [w for w in options.who if w in WHO[:3]]
    counts = {name: count(name, subject, torch.bfloat16) for name in who}
    if options.json:
        print(json.dumps(counts))
        return
    families = sorted({f for found in counts.values() for f in found})
    print("| launches a step |", " | ".join(counts), "|\n|---|" + "---:|" * len(counts))
    for one in families:
        print(f"| {one} |", " | ".join(f"{found[one]:,}" for found in counts.values()), "|")
    print("| all, eager |", " | ".join(f"{found.total():,}" for found in counts.values()), "|")
    captured = [str(1 + _AROUND_A_GRAPH) if name != "timm" else "–" for name in counts]
    print("| captured |", " | ".join(captured), "|")


if __name__ == "__main__":
    main()
