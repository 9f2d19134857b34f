"""The table of FLOPs that `dat.models.flops` returns."""

import builtins
import re
import warnings

import pytest
import timm
import torch
from torch import nn

import dat


def total(table):
    """Millions of FLOPs in the first row."""
    count, unit = re.search(r"\| model +\| +[\d.]+[KM]? +\| ([\d.]+)([KMG]?)", table).groups()
    return float(count) * {"": 1e-6, "K": 1e-3, "M": 1, "G": 1e3}[unit]


@pytest.mark.parametrize(("name", "megaflops"), [("dat_pp_tiny", 4300), ("test_resnet", None)])
def test_a_name_is_counted_at_the_size_of_its_images(name, megaflops):
    """4.3 G is the paper's figure for DAT-T++."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = dat.models.flops(name)
    assert "| stages.0" in table or "| layer1" in table
    if megaflops:
        assert total(table) == pytest.approx(megaflops, rel=0.01)
    else:
        assert total(dat.models.flops(name, timm.get_pretrained_cfg(name).input_size[1:])) == total(table)


class Detector(nn.Module):
    """A module that needs images and a mask."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images, mask):
        assert mask.dtype == torch.bool
        assert not mask.any()
        assert mask.shape == images[:, 0].shape
        return self.head(self.conv(images).mean((2, 3)))


def test_a_module_that_takes_images_and_a_mask():
    model = Detector().train()
    table = dat.models.flops(model, (10, 20), max_depth=1)
    assert total(table) == pytest.approx((200 * 3 * 8 + 8 * 5) * 1e-6, rel=1e-3)
    assert "| conv" in table
    assert "conv.weight" not in table
    assert model.training


def test_without_fvcore_the_error_names_the_command(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("fvcore"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"^counting FLOPs needs fvcore: pip install fvcore$"):
        dat.models.flops("test_resnet")
