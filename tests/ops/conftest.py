import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Deterministic mode fills empty tensors with NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
