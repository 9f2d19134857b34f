"""Trains a detector: python -m detection.train CONFIG [key.path=value ...], also under torchrun.

The command `dat detect train` does the same from anywhere. Its code is `train` in dat/detection/train.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "train")
