"""Detects objects in images and videos: python -m detection.predict MODEL SOURCE [SOURCE ...] --out FOLDER

The command `dat detect predict` does the same from anywhere.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "predict")
