import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors import safe_open

from dat.models import official

FIXTURE = Path(__file__).parents[1] / "data" / "dat_v1_micro.safetensors"


@pytest.fixture(scope="module")
def fixture():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["official_config"])


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * theirs.abs().max().item())


def test_equals_official_numbers(fixture):
    """Features, logits and gradients that the official code gave in float64 for random weights."""
    tensors, config = fixture
    model = official.build(config, release="2022").eval()
    model.load_state_dict(official.convert(part(tensors, "state."), model), strict=True)
    close(model(tensors["input"]), tensors["logits"], 2e-3)
    model.double()
    x = tensors["input"].double().requires_grad_()
    for i, feature in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        close(feature, tensors[f"stage{i}"])
    logits = model(x)
    close(logits, tensors["logits"])
    (logits * tensors["cotangent"]).sum().backward()
    close(x.grad, tensors["input_grad"])
    gradients = official.convert(part(tensors, "grad."), model)
    assert len(gradients) == 6
    for name, theirs in gradients.items():
        close(model.get_parameter(name).grad, theirs)


def test_upper_case_keys_and_official_defaults(fixture):
    _, config = fixture
    model = official.build({key.upper(): value for key, value in config.items()}, release="2022")
    assert model.num_classes == 10
    assert model.patch_embed.img_size == (64, 64)
    assert model.stages[2].blocks[1].attn.offset_conv.kernel_size == (5, 5)
    assert model.stages[3].blocks[1].attn.offset_conv.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("change", "release", "message"),
    [
        ({}, "2023", "release must be '2022', got '2023'"),
        ({"stage_spec": ["LS", "LS", "LNLD", "LD"]}, "2022", r"stage_spec\[2\]: letters must be L, S or D.*'LNLD'"),
        ({"stage_spec": ["LS", "LS", "LD", "LD"]}, "2022", r"stage_spec\[2\] must have depths\[2\] = 4 letters"),
        ({"attn_drop_rate": 0.1}, "2022", "attn_drop_rate must be 0.0 throughout in release 2022, got 0.1"),
        ({"dwc_pes": [False, False, True, True]}, "2022", "dwc_pes must be False throughout"),
        ({"use_conv_patches": True}, "2022", "use_conv_patches must be False"),
        ({"dimms": [8]}, "2022", "unknown key 'dimms'"),
        ({"heads": [1, 2, 4]}, "2022", "heads must have an entry for each of dims"),
        ({"dim_stem": 16}, "2022", r"dim_stem must equal dims\[0\] = 8, got 16"),
    ],
)
def test_unsupported_configurations(fixture, change, release, message):
    _, config = fixture
    with pytest.raises(ValueError, match=message):
        official.build({**config, **change}, release=release)


def micro(config, checkpoint_path, **arguments):
    stages = [official._stage({**official._DEFAULTS, **config}, i) for i in range(4)]
    sizes = {"img_size": config["img_size"], "num_classes": config["num_classes"], **arguments}
    return timm.create_model("dat_nano", stages=stages, mlp_ratio=4.0, checkpoint_path=str(checkpoint_path), **sizes)


class CfgNode(dict):
    """Pickles like yacs.config.CfgNode: a dictionary with attributes."""


def save_official_file(path, state_dict, monkeypatch):
    module = ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    config = CfgNode(MODEL=CfgNode(TYPE="dat", DEPTHS=[2, 2, 4, 2]))
    config.__dict__["__immutable__"] = True
    torch.save({"model": state_dict, "config": config, "epoch": 299, "max_accuracy": 82.0}, path)
    monkeypatch.undo()


def test_checkpoint_path_reads_official_files(fixture, tmp_path, monkeypatch):
    tensors, config = fixture
    path = tmp_path / "official.pth"
    save_official_file(path, part(tensors, "state."), monkeypatch)
    close(micro(config, path).eval()(tensors["input"]), tensors["logits"], 2e-3)


def test_tables_are_resampled_for_another_image_size(fixture, tmp_path, monkeypatch):
    tensors, config = fixture
    path = tmp_path / "official.pth"
    save_official_file(path, part(tensors, "state."), monkeypatch)
    model = micro(config, path, img_size=96)
    small = tensors["state.stages.2.attns.1.rpe_table"]
    expected = torch.nn.functional.interpolate(small[None], (11, 11), mode="bicubic")[0]
    torch.testing.assert_close(model.stages[2].blocks[1].attn.rpe_table.detach(), expected)
    # The same by set_input_size after loading.
    resized = micro(config, path)
    resized.set_input_size(96)
    for a, b in zip(model.parameters(), resized.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_of_another_model_is_an_error(fixture, tmp_path, monkeypatch):
    tensors, _ = fixture
    path = tmp_path / "official.pth"
    save_official_file(path, part(tensors, "state."), monkeypatch)
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("dat_nano", checkpoint_path=str(path))
