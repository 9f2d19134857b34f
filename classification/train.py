"""Trains a classifier: python -m classification.train CONFIG [key.path=value ...], also under torchrun.

The command `dat classify train` does the same from anywhere. Its code is `train` in dat/classification/train.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "train")
