"""Writes the report of a run again: python -m classification.report RUN

The command `dat classify report` does the same from anywhere. Its code is `report` in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "report")
