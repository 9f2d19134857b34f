"""Exports a classifier: python -m classification.export CHECKPOINT --out FILE.onnx

The command `dat classify export` does the same from anywhere. Its code is `export` in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "export")
