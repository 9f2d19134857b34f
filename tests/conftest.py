import os

import torch

# Tests run side by side on few cores: one thread each is faster than many, and the tests of threading set their own.
torch.set_num_threads(int(os.environ.get("DAT_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items):
    """Tests that take long start first, so that none of the processes is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
