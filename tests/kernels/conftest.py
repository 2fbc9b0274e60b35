import os
from pathlib import Path

import pytest
import torch

from mentorch.kernels.backend import INTERPRETED

HERE = Path(__file__).parent

if INTERPRETED and "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several workers would wait for each other


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch():
    """Triton's interpreter patches its language at every call of a device function.

    Only the first call from each module within a launch changes anything; the others took a third
    of the time. Where a release of Triton is built otherwise, it stays as it is.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    if patch is None:
        return
    patched = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where there is a GPU, `pytest -m gpu` takes the tests of the kernels too."""
    for item in items:  # of all folders
        fixtures = {"device", "where"} & set(getattr(item, "fixturenames", ()))
        if torch.cuda.is_available() and fixtures and HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 before Python starts")
