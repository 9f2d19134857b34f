"""The failure of one process ends the whole job, with an error: torchrun's work, also while SIGTERM is handled."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

JOB = """
import time
import torch
from dat.engine.command import main_guard
from dat.engine.distributed import setup_distributed, stop_on_sigterm
from dat.utils.errors import DataError

def main():
    distributed = setup_distributed("cpu")
    with stop_on_sigterm():
        distributed.sum(torch.zeros(1))
        if distributed.rank == 1:
            print("fails at", time.time(), flush=True)
            raise DataError("cat.jpg: cannot be read")
        distributed.sum(torch.zeros(1))

main_guard(main)
"""


def test_the_failure_of_one_process_ends_the_job(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "job.py")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ended = time.time()
    assert done.returncode != 0
    assert "error: cat.jpg: cannot be read" in done.stderr
    assert ended - float(done.stdout.split("fails at ")[1].split()[0]) < 60
