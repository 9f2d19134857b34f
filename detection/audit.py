"""Checks detection data: python -m detection.audit FOLDER [key.path=value ...]

The command `dat detect audit` does the same from anywhere. Its code is `audit` in dat/detection/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("detect", "audit")
