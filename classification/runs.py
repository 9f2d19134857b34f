"""Compares the runs below a folder: python -m classification.runs DIR

The command `dat classify runs` does the same from anywhere. Its code is `runs` in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "runs")
