import pytest
import torch

from mentorch.kernels.backend import INTERPRETED


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 before Python starts")
