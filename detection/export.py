"""Exports a detector: python -m detection.export CHECKPOINT --out FILE.onnx

The command `dat detect export` does the same from anywhere. Its code is `export` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "export")
