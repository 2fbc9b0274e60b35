import pytest

from .blobs import blobs


@pytest.fixture(scope="session")
def data():
    return blobs()
