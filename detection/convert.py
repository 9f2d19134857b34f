"""Converts data: python -m detection.convert SRC DST --to coco|yolo|voc
Converts official weights: python -m detection.convert CONFIG WEIGHTS --annotations FILE --out CHECKPOINT

The command `dat detect convert` does the same from anywhere. Its code is `convert` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "convert")
