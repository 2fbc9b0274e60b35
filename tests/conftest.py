import os

# Asked by way of NVML, torch does not open the GPU here: ranks forked from here could not then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# torch.compile's own processes are no use to tests that run side by side, and ranks forked beside
# its threads hang.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch


def pytest_configure(config):
    """A GPU is seen by `pytest -m gpu` alone, which runs just the tests that need one.

    Autograd decides in its first backward pass whether it wants threads, as it does where there is
    a GPU, and what is forked after that has no autograd: ranks of other tests could not train.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        # Now: after a fake tensor (torch.compile) it would think that there is a GPU.
        torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(items):
    """Slow tests come first, so that no worker waits at the end for another's long one.

    Tests marked gpu are skipped where there is none.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and `-m gpu`"))
