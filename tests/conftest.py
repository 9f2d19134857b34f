import os

import torch

# Tests run side by side on few cores: one thread each is faster than many, and the tests of threading set their own.
torch.set_num_threads(int(os.environ.get("DAT_TEST_THREADS", "1")))
