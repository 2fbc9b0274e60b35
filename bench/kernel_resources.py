"""What the compiler makes of every kernel, with no GPU at hand.

    python bench/kernel_resources.py                  # the table, for sm_80, sm_90 and sm_100
    python bench/kernel_resources.py --arch 90 --only cross_entropy

Each kernel is launched by its own launcher on tensors without storage; the launch is caught,
compiled for the wanted chip, and its machine code is read: registers a thread, shared memory, loads
and stores of global memory by width, accesses to local memory (spills) and barriers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import image_launches
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mentorch.kernels import cross_entropy, fused, ledger, percentile, pixels, reweight, rows
from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.mentor import ClosedForm, Curriculum, LstmWeights, MentorWeights
from mentorch.kernels.weigh import Plan

ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = 132  # of the device that the launchers are to plan for: an H100
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Launch:
    """A kernel launch that was caught instead of run."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Resources:
    """What one compiled kernel uses."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    shared_bytes: int
    spills: int
    """Instructions that access local memory."""
    loads: dict[str, int] = field(default_factory=dict)
    """Global loads by width in bits a thread."""
    stores: dict[str, int] = field(default_factory=dict)
    barriers: int = 0
    released: bool | None = None
    """Whether a barrier stands between the rows' stores and the ticket; None without a ticket."""


@contextmanager
def caught_launches() -> Iterator[list[Launch]]:
    """Within it, launching a kernel records the launch and does nothing."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(self, arguments, options))

    with (
        mock.patch.object(triton.runtime.JITFunction, "run", record),
        mock.patch.object(rows, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(pixels, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield launches


def _type(value: Tensor | int) -> str:
    return "*" + _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[str, Any], dict[Any, Any]]:
    """Types, constants and divisibilities of the arguments, as Triton's launcher would infer."""
    types: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (specialize and isinstance(value, int) and value == 1)
        ):
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            types[parameter.name] = tuple(_type(item) for item in value)
            attributes |= {
                (position, i): [["tt.divisibility", 16]]
                for i, item in enumerate(value)
                if isinstance(item, Tensor) and item.data_ptr() % 16 == 0
            }
            continue
        if isinstance(value, Tensor):
            types[parameter.name] = _type(value)
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            types[parameter.name], divisible = "fp32", False
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _released(sass: str) -> bool | None:
    """Whether every warp's stores come before the one thread that draws the ticket."""
    ticket = re.search(r"\bATOMG?\.", sass)
    if ticket is None:
        return None
    stores = [store.end() for store in re.finditer(r"\bSTG\.", sass[: ticket.start()])]
    return bool(stores) and "BAR." in sass[stores[-1] : ticket.start()]


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


_WIDTH = re.compile(r"\.(128|64|U8|S8|U16|S16)\b")


def _by_width(sass: str, instruction: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for operation in re.findall(rf"\b{instruction}(\.[\w.]+)", sass):
        found = _WIDTH.search(operation)
        counts[found[1].lstrip("US") if found else "32"] += 1
    return dict(sorted(counts.items(), key=lambda item: -int(item[0])))


def compile_launch(case: str, launch: Launch, arch: int) -> Resources:
    """Compiles a caught launch for ``sm_{arch}`` and reads what came out."""
    types, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    options = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Resources(
        case=case,
        kernel=launch.kernel.__name__,
        arch=arch,
        warps=launch.options.get("num_warps", 4),
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        loads=_by_width(sass, "LDG"),
        stores=_by_width(sass, "STG"),
        barriers=len(re.findall(r"\bBAR\.", sass)),
        released=_released(sass),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(batch: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _empty(batch, classes, dtype=dtype), _empty(batch, dtype=torch.int64)


SIZES = {  # the size classes: (B, C)
    "tiny": (128, 10),  # several rows a program, unaligned rows
    "one line": (128, 1000),  # one 16-byte line a thread
    "ragged": (128, 1001),  # the same with rows at odd offsets
    "large batch": (4096, 1000),  # 8 warps
    "chunks": (1024, 21841),  # a row in chunks, at odd offsets
    "wide row": (128, 21841),  # as many rows as multiprocessors: each fits on one
    "long": (64, 100_000),  # split rows
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what launches it), over size classes and dtypes."""
    for size, (batch, classes) in SIZES.items():
        for name, dtype in DTYPES.items():
            logits, labels = _logits(batch, classes, dtype)
            row = _empty(batch)
            yield (
                f"cross_entropy {size} {name}",
                lambda z=logits, y=labels: cross_entropy.launch_forward(z, y, -100, 0.0),
            )
            yield (
                f"cross_entropy gradient {size} {name}",
                lambda z=logits, y=labels, r=row: cross_entropy.launch_backward(
                    z, y, _empty(2, len(r)), r, _empty(), _empty(), -100, 0.0
                ),
            )
            yield (
                f"ledger {size} {name}",
                lambda z=logits, y=labels, r=row: ledger.launch_record(
                    _empty(2_400_001, ledger.ROW_BYTES, dtype=torch.uint8), z, y, y, r, r, -100
                ),
            )
    yield from _reweight_cases()
    yield from image_launches.cases(DTYPES)
    for batch in (128, 1024, 4096, 16384, 65536):
        yield (
            f"percentile {batch}",
            lambda b=batch: percentile.launch_percentile(_empty(b), _empty(), 0.75, 0.95),
        )


def _mentor(units: int, hidden: int) -> MentorWeights:
    """A MentorNet of the released dims but for these."""
    lstm = LstmWeights(_empty(4 * units, 2), _empty(4 * units, units), _empty(4 * units))
    width = 2 + 5 + 2 * units
    return MentorWeights(
        _empty(2, 2), _empty(100, 5), lstm, lstm, _empty(hidden, width), _empty(hidden),
        _empty(1, hidden), _empty(1),
    )  # fmt: skip


def _perceptron(steps: int, hidden: int) -> MentorWeights:
    """The two-layer perceptron on the visits as they are."""
    return _mentor(steps, hidden)._replace(forward=None, backward=None, encoder="none")


def _reweight_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    linear = ClosedForm("linear")
    coins, exact = ExampleDropout(20, 0.5, 0.1), ExampleDropout(20, 0.5, 0.1, exact=True)
    released, wide = _mentor(1, 20), _mentor(16, 64)
    logistic = _perceptron(1, 1)._replace(activation="linear")
    variants: list[tuple[str, Curriculum, ExampleDropout, int, str]] = [
        ("linear", linear, coins, 1, "two launches"),
        ("linear, exact dropout", linear, exact, 1, "two launches"),
        ("mentornet", released, coins, 1, "two launches"),
        ("mentornet T=5", released, coins, 5, "two launches"),
        ("mentornet H=16 F=64", wide, coins, 1, "two launches"),
        ("mentornet logistic", logistic, coins, 1, "two launches"),
        ("mentornet perceptron T=5", _perceptron(5, 20), coins, 5, "two launches"),
        ("pd_mixture", ClosedForm("pd_mixture"), coins, 1, "two launches"),
        ("linear, row by row", linear, coins, 1, "row by row"),
        ("mentornet, row by row", released, coins, 1, "row by row"),
        ("linear, on the chip", linear, coins, 1, "on the chip"),
        ("mentornet, on the chip", released, coins, 1, "on the chip"),
    ]
    for size, (batch, classes) in SIZES.items():
        for name, curriculum, dropout, steps, form in variants:
            every = size in ("one line", "chunks", "large batch", "wide row")
            if not every and name != "mentornet":
                continue
            for dtype in ("bf16", "fp32"):
                yield (
                    f"reweight {name}, {size} {dtype}",
                    lambda b=batch, c=classes, d=dtype, cur=curriculum, drop=dropout, t=steps,
                    f=form: _launch_reweight(b, c, DTYPES[d], cur, drop, t, f),
                )  # fmt: skip
    for batch, ranks, by_class in ((128, 8, False), (1024, 8, False), (1024, 1, True)):
        yield (
            f"gathered losses, mentornet, {ranks} × {batch}" + ", by class" * by_class,
            lambda b=batch, r=ranks, of=by_class: _launch_weigh(b, r, of),
        )


def _state(batch: int, curriculum: Curriculum, steps: int) -> tuple[Any, Any]:
    ids = _empty(batch, dtype=torch.int64)
    history = _empty(2_400_001, steps, 2) if steps > 1 else None
    average, step = _empty(), _empty(dtype=torch.int64)
    state = fused.State(average, step, history, None, ids, reweight._theta(curriculum))
    return state, fused.Numbers(39_000, 0, 0, -100)


def _launch_reweight(
    batch: int,
    classes: int,
    dtype: torch.dtype,
    curriculum: Curriculum,
    dropout: ExampleDropout,
    steps: int,
    form: str,
) -> None:
    rest = {"loss_percentile": 0.75, "decay": 0.95, "label_smoothing": 0.0}
    lagged = form == "row by row"
    plan = Plan.of(curriculum, dropout, steps, lagged=lagged, advance=True, **rest)
    arguments = (*_logits(batch, classes, dtype), *_state(batch, curriculum, steps), plan)
    if form == "two launches":
        fused.launch_step(*arguments)
    else:
        fused.launch_one_pass(*arguments)


def _launch_weigh(batch: int, ranks: int, by_class: bool) -> None:
    curriculum = _mentor(1, 20)
    rest = {"loss_percentile": 0.75, "decay": 0.95, "label_smoothing": 0.0}
    plan = Plan.of(curriculum, ExampleDropout(), 1, lagged=False, advance=True, **rest)
    loss, lse, everyone = _empty(batch), _empty(2, batch), _empty(ranks * batch)
    labels = _empty(batch, dtype=torch.int64)
    bases = _empty(ranks * batch) if by_class else None
    state = _state(batch, curriculum, 1)
    fused.launch_weigh(loss, lse, everyone, None, bases, labels, *state, plan)


def resources(arch: int, only: str = "") -> Iterator[Resources]:
    """The resources of every case in whose name the regular expression ``only`` is found."""
    for name, launch in cases():
        if re.search(only, name):
            with caught_launches() as launches:
                launch()
            for caught in launches:
                yield compile_launch(name, caught, arch)


def _row(r: Resources) -> str:
    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{count}×{bits}" for bits, count in counts.items())

    return (
        f"{r.case:<44} sm_{r.arch:<4} {r.warps:>5} {r.registers:>9} {r.shared_bytes:>7} "
        f"{r.spills:>6} {r.barriers:>8}  {widths(r.loads):<26} {widths(r.stores)}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; all by default")
    parser.add_argument("--only", default="", help="cases this regular expression is found in")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit(
            "TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to compile"
        )
    if not args.json:
        print(
            f"{'case':<44} {'chip':<7} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6} "
            f"{'barriers':>8}  {'loads (bits a thread)':<26} stores"
        )
    for arch in args.arch or ARCHITECTURES:
        for found in resources(arch, args.only):
            print(json.dumps(asdict(found)) if args.json else _row(found), flush=True)


if __name__ == "__main__":
    main()
