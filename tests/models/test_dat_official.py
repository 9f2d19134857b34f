import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors import safe_open

from dat.models import official

DATA = Path(__file__).parents[1] / "data"


def load(name):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["official_config"])


@pytest.fixture(scope="module")
def fixture():
    return load("dat_v1_micro")


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("name", "release", "gradients"),
    [
        ("dat_v1_micro", "2022", 6),
        ("dat_2022_convs", "2022", 21),
        # Every block but S and L, position biases, convolutions and layer scales, on an image that is not square.
        ("dat_2023_convs", "2023", 37),
        # The other blocks and options, without convolutions.
        ("dat_2023_plain", "2023", 15),
    ],
)
def test_equals_official_numbers(name, release, gradients):
    """Features, logits and gradients that the official code gave in float64 for random weights."""
    tensors, config = load(name)
    model = official.build(config, release).eval()
    model.load_state_dict(official.convert(part(tensors, "state."), model), strict=True)
    close(model(tensors["input"].float()), tensors["logits"], 2e-3)
    model.double()
    x = tensors["input"].double().requires_grad_()
    for i, feature in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        close(feature, tensors[f"stage{i}"])
    logits = model(x)
    close(logits, tensors["logits"])
    (logits * tensors["cotangent"]).sum().backward()
    close(x.grad, tensors["input_grad"])
    converted = official.convert(part(tensors, "grad."), model)
    assert len(converted) == gradients
    for parameter, theirs in converted.items():
        close(model.get_parameter(parameter).grad, theirs)


def test_upper_case_keys_and_official_defaults(fixture):
    _, config = fixture
    model = official.build({key.upper(): value for key, value in config.items()}, release="2022")
    assert model.num_classes == 10
    assert model.img_size == (64, 64)
    assert model.stages[2].blocks[1].attn.offset_conv.kernel_size == (5, 5)
    assert model.stages[3].blocks[1].attn.offset_conv.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("change", "release", "message"),
    [
        ({}, "2024", "release must be '2022' or '2023', got '2024'"),
        ({"stage_spec": ["LS", "LS", "LNLD", "LD"]}, "2022", r"stage_spec\[2\]: letters must be of LSD .*'LNLD'"),
        ({"stage_spec": ["LS", "LS", "LQLD", "LD"]}, "2023", r"stage_spec\[2\]: Q \(QnA\) is not supported.*'LQLD'"),
        ({"stage_spec": ["LS", "LS", "LZLD", "LD"]}, "2023", r"stage_spec\[2\]: letters must be of LSDNPXE .*'LZLD'"),
        ({"stage_spec": ["LS", "LS", "LD", "LD"]}, "2022", r"stage_spec\[2\] must have depths\[2\] = 4 letters"),
        ({"strides": [-1, -1, -1, 1]}, "2023", r"groups\[2\] and strides\[2\] must be at least 1 .* got 2 and -1"),
        ({"attn_drop_rate": 0.1}, "2022", "attn_drop_rate must be 0.0, got 0.1"),
        ({"fixed_pes": [False, False, True, True]}, "2022", "fixed_pes must be False throughout in release 2022"),
        ({"use_lpus": [True] * 4}, "2022", "use_lpus must be False throughout in release 2022"),
        ({"no_offs": [True] * 4, "dwc_pes": [True] * 4}, "2023", r"dwc_pes\[2\] must be False where no_offs is True"),
        ({"dimms": [8]}, "2022", "unknown key 'dimms'"),
        ({"heads": [1, 2, 4]}, "2022", "heads must have an entry for each of dims"),
    ],
)
def test_unsupported_configurations(fixture, change, release, message):
    _, config = fixture
    with pytest.raises(ValueError, match=message):
        official.build({**config, **change}, release=release)


def micro(config, checkpoint_path, **arguments):
    stages = [official._stage({**official._DEFAULTS, **config}, i, "2022") for i in range(4)]
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


def test_published_models_have_official_configurations():
    """The YAML of DAT-T++, and what the entry points make."""
    config = {
        "dim_stem": 64,
        "dims": [64, 128, 256, 512],
        "depths": [2, 4, 18, 2],
        "stage_spec": [["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]],
        "heads": [2, 4, 8, 16],
        "groups": [1, 2, 4, 8],
        "use_pes": [True] * 4,
        "strides": [8, 4, 2, 1],
        "offset_range_factor": [-1] * 4,
        "ksizes": [9, 7, 5, 3],
        "nat_ksizes": [7] * 4,
        "drop_path_rate": 0.2,
    }
    convs = {"use_dwc_mlps": [True] * 4, "use_lpus": [True] * 4, "use_conv_patches": True}
    for name, changes in (("dat_plus_tiny", {}), ("dat_pp_tiny", convs)):
        assert repr(official.build(config | changes, "2023")) == repr(timm.create_model(name))


def test_tables_of_fixed_biases_are_resampled():
    _, config = load("dat_2023_plain")
    small, large = (
        official.build(config, "2023"),
        official.build({**config, "img_size": 96, "window_sizes": [8] * 4}, "2023"),
    )
    large.load_state_dict(small.state_dict())
    small.set_input_size(96)
    for i, j in ((0, 1), (1, 1)):
        ours, theirs = (model.stages[i].blocks[j].attn.state_dict() for model in (large, small))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value)
