"""What setup.py builds for."""

import pytest
import torch

pytest.importorskip("setuptools")

import setup


@pytest.mark.parametrize(
    ("version", "visible", "built"),
    [
        ((13, 0), [], "8.0;9.0+PTX;10.0;12.0"),
        ((13, 0), [(7, 5), (9, 0), (7, 5)], "7.5;8.0;9.0+PTX;10.0;12.0"),
        ((12, 6), [(7, 0)], "7.0;8.0;9.0+PTX"),
    ],
)
def test_older_gpus_of_this_machine_are_built_for_too(version, visible, built, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_capability", visible.__getitem__)
    names, flags = setup.cuda_architectures(version)
    assert names == built
    assert [code for code in ("70", "75", "80", "90") if f"sm_{code}" in " ".join(flags)] == [
        name.replace(".", "") for name in names.replace("+PTX", "").split(";")[: -2 if version >= (12, 8) else None]
    ]
