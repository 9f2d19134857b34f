"""Checks images in class folders: python -m classification.audit FOLDER [key.path=value ...]

The command `dat classify audit` does the same from anywhere. Its code is `audit` in dat/classification/commands.py.
"""

from dat.cli import run_recipe

if __name__ == "__main__":
    run_recipe("classify", "audit")
