"""Serves a detector over HTTP: python -m detection.serve MODEL

The command `dat detect serve` does the same from anywhere. Its code is `serve` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "serve")
