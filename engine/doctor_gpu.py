"""What `mentorch doctor` tries of GPUs: driver, devices, Triton, the fused loss.

As in `doctor_trials`, all imports are made late, and a check may fail in any way.
"""

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentorch.engine.doctor_checks import GIB, Finding, first_line

if TYPE_CHECKING:
    import torch

_NO_GPU = "none is needed: all runs on the CPU, slower"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_ERROR = 1e-4  # of fp32 against float64, relative to the largest value; a wrong kernel is far off


def driver() -> list[Finding]:
    """NVIDIA's driver, asked without torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if Path("/proc/driver/nvidia/version").is_file():
            way_out = "start the container with its GPUs: docker run --gpus all"
            found = "the host has NVIDIA's driver, but libcuda.so.1 is not here"
            return [Finding("driver", "bad", found, way_out)]
        way_out = f"{_NO_GPU}; for a GPU install NVIDIA's driver"
        return [Finding("driver", "absent", "no NVIDIA driver", way_out)]
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    found = f"for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"
    error = cuda.cuInit(0)
    if error == _NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        found += f", but no GPU (CUDA_VISIBLE_DEVICES: {visible!r})"
        return [Finding("driver", "absent", found, f"{_NO_GPU}; unset what hides GPUs")]
    if error:
        way_out = "nvidia-smi says more; reload or reinstall the driver, often a reboot does"
        return [Finding("driver", "bad", f"{found}, but CUDA error {error}", way_out)]
    return [Finding("driver", "ok", found)]


def cuda() -> list[Finding]:
    """What torch was built for, and the GPUs it can really use."""
    import torch

    has_gpu = driver()[0].status == "ok"
    if torch.version.cuda is None:
        way_out = "install the ordinary torch of the registry; it runs without a GPU too"
        found = f"torch {torch.__version__} is a wheel without CUDA: torchvision may not import"
        rows = [Finding("torch build", "bad" if has_gpu else "warn", found, way_out)]
    else:
        rows = [Finding("torch build", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}")]
    if not has_gpu:
        return [*rows, Finding("GPU", "absent", "none that a driver knows of", _NO_GPU)]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        way_out = "a newer driver, or a torch for this driver's CUDA (see the rows above)"
        return [*rows, Finding("GPU", "bad", first_line(error), way_out)]
    return [*rows, *map(_gpu, range(torch.cuda.device_count()))]


def _gpu(index: int) -> Finding:
    import torch

    about = torch.cuda.get_device_properties(index)
    bf16 = about.major >= 8
    found = (
        f"{about.name}, {about.total_memory / GIB:.0f} GiB, capability {about.major}."
        f"{about.minor}, {'bf16' if bf16 else 'no bf16'} matrix units"
    )
    name = f"GPU {index}"
    try:
        sum_of_ones = torch.ones(1000, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        way_out = "nvidia-smi -q says more; a torch whose wheels cover this GPU, or another GPU"
        return Finding(name, "bad", f"{found}: {first_line(error)}", way_out)
    if sum_of_ones != 1000:
        return Finding(name, "bad", f"{found}: it cannot count", "this GPU is broken: replace it")
    if not bf16:
        return Finding(name, "warn", found, "fp32 is taken by itself; try --train.precision fp16")
    return Finding(name, "ok", found)


# ---- Kernels ------------------------------------------------------------------------------------


def triton_kernel() -> list[Finding]:
    """A small kernel of ours: compiled and run on a GPU, else compiled for sm_90."""
    import torch

    from mentorch.kernels import backend

    if not backend.HAS_TRITON:
        way_out = "install torch on Linux, which brings Triton; the plain references run meanwhile"
        return [Finding("Triton kernel", "absent", "Triton does not import", way_out)]
    if backend.INTERPRETED:
        found = "TRITON_INTERPRET is set: kernels run in the interpreter, very slowly"
        return [Finding("Triton kernel", "warn", found, "unset TRITON_INTERPRET")]
    if not torch.cuda.is_available():
        size = len(_compile_ahead().asm["cubin"])
        return [Finding("Triton kernel", "ok", f"percentile compiled for sm_90, {size} bytes")]
    from mentorch.kernels.percentile import percentile, percentile_ref

    losses = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs()
    got, wanted = percentile(losses.cuda(), 0.75).item(), percentile_ref(losses, 0.75).item()
    if got != wanted:
        way_out = "pip install --force-reinstall triton, in the release that torch wants"
        return [Finding("Triton kernel", "bad", f"percentile {got} is not {wanted}", way_out)]
    return [Finding("Triton kernel", "ok", "percentile compiled and run: equal to its reference")]


def _compile_ahead() -> Any:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mentorch.kernels.percentile import _percentile_kernel

    pointers = {f"{name}_ptr": "*fp32" for name in ("losses", "avg", "q", "new_avg")}
    numbers = {"B": "i32", "complement": "i64", "decay": "fp32", "decay_complement": "fp32"}
    constants = {"BLOCK": 1024, "ONE_BLOCK": True}
    types = pointers | numbers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_percentile_kernel, types, constants)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32))


def reweight_kernel() -> list[Finding]:
    """The fused loss on the GPU against its definition in float64."""
    import torch

    name = "fused loss"
    if not torch.cuda.is_available():
        return [Finding(name, "absent", "no GPU: the plain definition runs", _NO_GPU)]
    error = reweight_error(torch.device("cuda"))
    if not error <= _ERROR:  # NaN too
        way_out = "do not train on this GPU: run pytest -m gpu, and send us what it says"
        return [Finding(name, "bad", f"relative error {error:.1e} against float64", way_out)]
    return [Finding(name, "ok", f"relative error {error:.1e} against float64")]


def reweight_error(device: "torch.device") -> float:
    """The largest error of loss, weights and gradient, each relative to its largest value."""
    import torch

    from mentorch.kernels.mentor import ClosedForm
    from mentorch.kernels.reweight import reweight, reweight_ref

    random = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=random)
    labels = torch.randint(1000, (64,), generator=random)
    half = torch.tensor(50)
    curriculum = ClosedForm("linear")

    def results(function: Any, logits: torch.Tensor) -> list[torch.Tensor]:
        logits = logits.requires_grad_()
        here = logits.device
        average = torch.full((), 7.0, device=here)
        out = function(logits, labels.to(here), curriculum, average, half.to(here))
        out.loss.backward()
        assert logits.grad is not None
        return [tensor.detach().double().cpu() for tensor in (*out, logits.grad)]

    wanted = results(reweight_ref, logits.double())
    got = results(reweight, logits.to(device))
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(got, wanted, strict=True)]
    return float(torch.stack(errors).max())
