"""The SLURM script, with stand-ins for SLURM's commands: what it starts, and when it queues itself again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$CALLS"; fi
"""

SRUN = """#!/bin/bash
echo "$MASTER_ADDR:$MASTER_PORT $@" >> "$CALLS"
exit "$CODE"
"""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_a_job_whose_time_is_up_queues_itself_again(tmp_path, code, requeued):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"CODE": str(code), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]"}
    arguments = ["bash", str(SCRIPT), "a.yaml", "data.root=my data"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    started, *rest = (tmp_path / "calls").read_text().splitlines()
    assert started.startswith("node7:23456 --kill-on-bad-exit=1 .venv/bin/python -m detection.train a.yaml")
    assert started.endswith("data.root=my data train.resume=true")
    assert rest == (["requeue 123456"] if requeued else [])
