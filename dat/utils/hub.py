"""Checkpoints by their path, or by their name on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from dat.utils.errors import CheckpointError, one_line

PREFIX = "hf-hub:"
# A checkpoint of this project, and the files of a model of transformers.
FILE, WEIGHTS, CONFIG = "best.pth", "model.safetensors", "config.json"


def find_checkpoint(name: str | Path) -> Path:
    """The file of a checkpoint.

    Args:
        name: a path, or "hf-hub:OWNER/NAME" for best.pth of a repository of the hub, else its model.safetensors with
            config.json beside it; "hf-hub:OWNER/NAME@REVISION" for a branch, tag or commit. Files are downloaded once,
            into the cache of huggingface_hub; HF_HUB_OFFLINE=1 uses the cache alone.

    Raises:
        CheckpointError: a file cannot be downloaded.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = str(name).removeprefix(PREFIX).partition("@")
    try:
        return _download(repository, revision, FILE)
    # Its errors have no common parent: they depend on the HTTP library.
    except Exception as error:
        reason = error
    # Without a network every attempt would take a minute.
    offline = isinstance(reason, LocalEntryNotFoundError)
    try:
        _download(repository, revision, CONFIG, local_files_only=offline)
        return _download(repository, revision, WEIGHTS, local_files_only=offline)
    except Exception:
        place = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{FILE}"
        raise CheckpointError(
            f"{name}: cannot be downloaded ({one_line(reason, 150)}); fetch {place} (of transformers: {WEIGHTS} and "
            f"{CONFIG}, into one folder) and give the path of the file"
        ) from reason


def _download(repository: str, revision: str, file: str, **options: Any) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, revision=revision or None, **options))
