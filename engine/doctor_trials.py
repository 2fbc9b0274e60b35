"""What `mentorch doctor` tries of libraries: torch, DALI, apex, ranks, torchvision, torch.compile.

Each of these imports and runs the real thing, so each may fail in any way; the doctor runs them in
processes of their own. All imports are made late: what is missing is a finding, not an error.
"""

import os
import re
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mentorch.engine.doctor_checks import SETUP, Finding, first_line

if TYPE_CHECKING:
    import torch

_PLACEHOLDER_GREY = 128


def import_torch() -> list[Finding]:
    """torch itself: a wheel that is broken, or not for this machine, may even crash."""
    import torch

    return [Finding("import torch", "ok", torch.__version__)]


# ---- DALI and apex ------------------------------------------------------------------------------


def dali() -> list[Finding]:
    """Whether DALI is DALI, and decodes a JPEG with the training graph."""
    names = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in metadata.distributions()}
    real = sorted(name for name in names if re.fullmatch(r"nvidia-dali-cuda\d+", name))
    rows = []
    if "nvidia-dali" in names:
        found = "nvidia-dali, without a CUDA suffix: that package is not NVIDIA's DALI"
        way_out = "pip uninstall nvidia-dali, and install it with its suffix if it is not below"
        rows.append(Finding("nvidia-dali", "warn" if real else "bad", found, way_out))
    if not real:
        way_out = "training from files needs it: pip install nvidia-dali-cuda130 (or -cuda120)"
        return [*rows, Finding("DALI", "absent", "no nvidia-dali-cuda… is installed", way_out)]
    found = ", ".join(f"{name} {metadata.version(name)}" for name in real)
    return [*rows, Finding("DALI", "ok", found), *_decoding()]


def _decoding() -> list[Finding]:
    import torch

    devices = ["cpu"] + ["cuda:0"] * torch.cuda.is_available()
    rows = []
    for device in devices:
        name = "JPEG on the CPU" if device == "cpu" else "JPEG on the GPU"
        off = decoding_error(torch.device(device))
        if off > 1:
            way_out = "pip install --force-reinstall the nvidia-dali-cuda… of this machine's CUDA"
            rows.append(Finding(name, "bad", f"pixels are off by {off} of 255", way_out))
        else:
            rows.append(Finding(name, "ok", "decoded by the training graph"))
    return rows


def decoding_error(device: "torch.device") -> int:
    """How far off the pixels of a grey JPEG come out of the training graph, of 255."""
    import numpy as np

    from mentorch.engine.config import DataConfig
    from mentorch.engine.data.graph import build_graph, to_torch
    from mentorch.engine.data.order import PADDING
    from mentorch.engine.data.source import PLACEHOLDER, EncodedBatch

    start, shape = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    ids = np.array([PADDING])
    batch = EncodedBatch([PLACEHOLDER], start, shape, np.zeros(1, np.int32), ids)
    pipe = build_graph(iter([batch]), 1, 1, DataConfig(image_size=8), device)
    images, _ = pipe.run()
    return int((to_torch(images, device).int() - _PLACEHOLDER_GREY).abs().max())


def apex() -> list[Finding]:
    """NVIDIA's apex, or the package that has its name on the registry, or none."""
    if find_spec("apex") is None:
        way_out = "nothing need be done: torch's own fused optimisers are taken"
        return [Finding("apex", "absent", "not installed", way_out)]
    try:
        from mentorch.engine.optim import has_nvidia_apex
    except ImportError as error:  # of timm; which, by the way, imports whatever is called apex
        return [Finding("apex", "warn", f"something; but {first_line(error)}", SETUP)]
    if has_nvidia_apex():
        return [Finding("apex", "ok", "NVIDIA's, with its compiled optimisers")]
    way_out = "pip uninstall apex; do without, or build github.com/NVIDIA/apex with its extensions"
    found = "not NVIDIA's, or without amp_C (the registry's apex is a web framework)"
    return [Finding("apex", "warn", found, way_out)]


# ---- Ranks, vision, compilation -----------------------------------------------------------------


def backends() -> list[Finding]:
    """What ranks may talk through."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        way_out = "install the ordinary torch of the registry: every run needs gloo"
        return [Finding("gloo", "bad", "this torch has none", way_out)]
    rows = [Finding("gloo", "ok", "in torch")]
    if not dist.is_nccl_available():
        way_out = "only GPUs need it; for them install the ordinary torch of the registry"
        return [*rows, Finding("NCCL", "absent", "this torch has none", way_out)]
    return [*rows, Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))]


def process_group() -> list[Finding]:
    """A world of one rank, really formed, and a sum over it."""
    import torch
    import torch.distributed as dist

    from mentorch.engine.distributed import distributed

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # alone, also where torchrun started us
        os.environ.pop(name, None)
    with distributed() as world:
        for device in {torch.device("cpu"), world.device}:
            ones = torch.ones(8, device=device)
            dist.all_reduce(ones)
            assert ones.sum().item() == 8
        found = f"one rank on {world.device}: {dist.get_backend()}"
    return [Finding("process group", "ok", found)]


def vision() -> list[Finding]:
    """torchvision and timm, imported: beside a torch of another build they do not."""
    import torch

    rows = []
    for name in ("torchvision", "timm"):
        if find_spec(name) is None:
            rows.append(Finding(f"import {name}", "absent", "not installed", SETUP))
            continue
        try:
            __import__(name)
        except Exception as error:  # whatever a library of another build raises
            way_out = f"it must be built for torch {torch.__version__}: {SETUP}"
            rows.append(Finding(f"import {name}", "bad", first_line(error), way_out))
        else:
            rows.append(Finding(f"import {name}", "ok", metadata.version(name)))
    return rows


def compiled_function() -> list[Finding]:
    """A trivial function through torch.compile."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(8.0, device=device)
    torch.testing.assert_close(torch.compile(lambda y: (y * 2).sin() + 1)(x), (x * 2).sin() + 1)
    return [Finding("torch.compile", "ok", f"a function compiled and run on {device}")]
