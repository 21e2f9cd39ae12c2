"""What the tests of files ask for."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"
