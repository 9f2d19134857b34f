"""Writes the report of a run again: python -m detection.report RUN

The command `dat detect report` does the same from anywhere. Its code is `report` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "report")
