"""Detects objects in images and videos: python -m detection.predict MODEL SOURCE [SOURCE ...] --out FOLDER

The command `dat detect predict` does the same from anywhere. Its code is `predict` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "predict")
