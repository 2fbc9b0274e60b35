import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none; `pytest -m gpu` runs just them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
