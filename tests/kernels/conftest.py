import os

import pytest
import torch

from mentorch.kernels.backend import INTERPRETED

if INTERPRETED and "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several workers would wait for each other


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where there is a GPU, `pytest -m gpu` takes the tests of the kernels too."""
    for item in items:
        if torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 before Python starts")
