"""The device that the tests in this folder run on; without a GPU whoever imports this is skipped.

DAT_GPU_TESTS=dry runs on the CPU all that can run there, to see that the tests work before a card is at hand.
"""

import os

import pytest
import torch

from dat.ops import MISSING

DRY = os.environ.get("DAT_GPU_TESTS") == "dry"
if not DRY and not torch.cuda.is_available():
    pytest.skip("no GPU (see `make test-gpu`)", allow_module_level=True)
if not DRY and MISSING["_C_cuda"] is not None:
    pytest.fail(f"the CUDA library is not in use: {MISSING['_C_cuda']}", pytrace=False)
DEVICE = torch.device("cpu" if DRY else "cuda")
needs_card = pytest.mark.skipif(DRY, reason="needs a GPU")
