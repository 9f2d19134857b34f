import gc
import multiprocessing
import os
import sys

import pytest
import torch

# Tests run side by side on few cores: one thread each is faster than many, and the tests of threading set their own.
torch.set_num_threads(int(os.environ.get("DAT_TEST_THREADS", "1")))


@pytest.fixture
def fork():
    """Processes as copies of this one, which do not free what earlier tests left: that may wait for threads."""
    gc.collect()
    gc.freeze()
    yield multiprocessing.get_context("fork")
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """Tests that take long start first, so that none of the processes is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _forkserver():
    """Starts the server that forks processes for tests, if any module with tests has imported it."""
    if "processes" in sys.modules:
        sys.modules["processes"].start_forkserver()
