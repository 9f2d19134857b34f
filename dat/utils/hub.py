"""Checkpoints by their path, or by their name on the Hugging Face hub."""

from pathlib import Path

from dat.utils.errors import CheckpointError, one_line

PREFIX = "hf-hub:"
FILE = "best.pth"


def find_checkpoint(name: str | Path) -> Path:
    """The file of a checkpoint.

    Args:
        name: a path, or "hf-hub:OWNER/NAME" for best.pth of a repository of the hub, which is downloaded once;
            "hf-hub:OWNER/NAME@REVISION" for a branch, tag or commit.

    Raises:
        CheckpointError: the file cannot be downloaded.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    from huggingface_hub import hf_hub_download

    repository, _, revision = str(name).removeprefix(PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, FILE, revision=revision or None))
    # Its errors have no common parent: they depend on the HTTP library.
    except Exception as error:
        address = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{FILE}"
        raise CheckpointError(
            f"{name}: cannot be downloaded ({one_line(error, 150)}); fetch {address} and give the path of the file"
        ) from error
