"""Measures the average precision of a detector: python -m detection.evaluate CHECKPOINT [key.path=value ...]

The command `dat detect evaluate` does the same from anywhere. Its code is `evaluate` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "evaluate")
