"""Compares the runs below a folder: python -m detection.runs DIR

The command `dat detect runs` does the same from anywhere. Its code is `runs` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "runs")
