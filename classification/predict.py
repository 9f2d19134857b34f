"""Labels images and videos: python -m classification.predict MODEL SOURCE [SOURCE ...] --out FOLDER

The command `dat classify predict` does the same from anywhere. Its code is `predict` in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "predict")
