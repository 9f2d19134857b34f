"""Measures the accuracy of a classifier: python -m classification.evaluate CHECKPOINT [key.path=value ...]

The command `dat classify evaluate` does the same from anywhere. Its code is in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "evaluate")
