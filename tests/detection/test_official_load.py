"""Whole detectors that a model starts from: model.checkpoint_path."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dat.detection import official
from dat.detection.models import ModelConfig, build_model
from dat.engine.checkpoint import save_checkpoint
from dat.utils.errors import CheckpointError, ConfigError

KINDS = {
    "detr": {"kind": "detr"},
    "deformable": {},
    "refined": {"box_refine": True},
    "two-stage": {"box_refine": True, "two_stage": True},
}


def config(kind="deformable_detr", **changes):
    return ModelConfig.variants[kind](
        **{
            "backbone": {"name": "test_resnet", "out_indices": [-1]},
            "num_queries": 5,
            "embed_dim": 16,
            "num_heads": 2,
            "encoder_depth": 1,
            "decoder_depth": 2,
            "mlp_dim": 24,
            **changes,
        }
    )


def new_model(seed, num_classes=7, **changes):
    torch.manual_seed(seed)
    model = build_model(config(**changes), num_classes)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor)
    return model


def official_names(model):
    """The tensors as the official code names them: the inverse of official.convert for what the tests use."""
    detr = model.scores == "softmax"
    state = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            name = f"backbone.0.body.{rest}"
        elif part in ("encoder", "decoder"):
            rest = rest.replace("cross_attn", "multihead_attn") if detr else rest
            name = f"transformer.{part}.layers.{rest}"
        elif part in ("decoder_norm", "encoder_norm"):
            name = f"transformer.{part.replace('_', '.')}.{rest}"
        elif part in (
            "level_embed",
            "reference_points",
            "enc_output",
            "enc_output_norm",
            "pos_trans",
            "pos_trans_norm",
        ):
            name = f"transformer.{name}"
        elif part == "bbox_embed":
            *head, index, leaf = name.split(".")
            name = ".".join([*head, "layers", str(int(index) // 2), leaf])
        state[name] = tensor
    return state


def assert_same(ours, theirs, but=()):
    for name, tensor in theirs.state_dict().items():
        if not name.startswith(tuple(but)):
            assert tensor.equal(ours.state_dict()[name]), name


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_an_official_checkpoint(kind, tmp_path):
    """It carries its command line, which weights_only has to be told of."""
    theirs, path = new_model(1, **kind), tmp_path / "official.pth"
    arguments = argparse.Namespace(lr=1e-4, lr_backbone_names=["backbone.0"], masks=False)
    torch.save({"model": official_names(theirs), "optimizer": {"state": {}}, "epoch": 49, "args": arguments}, path)
    ours = build_model(config(checkpoint_path=str(path), **kind), 7)
    assert_same(ours, theirs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_run_of_ones_own_with_its_averaged_weights(kind, suffix, tmp_path):
    theirs, path = new_model(1, **kind), tmp_path / f"best{suffix}"
    if suffix == ".pth":
        other = new_model(2, **kind).state_dict()
        state = {"state_dict": other, "state_dict_ema": theirs.state_dict(), "kind": "detection"}
        save_checkpoint(path, state)
    else:
        save_file(theirs.state_dict(), path)
    assert_same(build_model(config(checkpoint_path=str(path), **kind), 7), theirs)


def test_another_number_of_classes_makes_new_class_heads_and_keeps_the_rest(kind, tmp_path):
    theirs, path = new_model(1, num_classes=91, **kind), tmp_path / "official.pth"
    torch.save({"model": official_names(theirs)}, path)
    ours = build_model(config(**kind), 7)
    heads = {name: t.clone() for name, t in ours.state_dict().items() if name.startswith("class_embed.")}
    assert official.load(ours, path) is False
    assert_same(ours, theirs, but=["class_embed."])
    assert heads
    assert all(t.equal(ours.state_dict()[name]) for name, t in heads.items())
    assert official.load(build_model(config(**kind), 91), path) is True


def test_nothing_is_fetched_for_a_model_whose_weights_follow(tmp_path):
    """Neither the backbone's file nor the detector's needs to exist when a run's own checkpoint is loaded."""
    backbone = {"name": "test_resnet", "checkpoint_path": "no.pth"}
    build_model(config(backbone=backbone, checkpoint_path="no.pth"), 7, weights=False)
    path = tmp_path / "whole.pth"
    torch.save({"model": new_model(1, backbone={"name": "test_resnet"}).state_dict()}, path)
    build_model(config(backbone=backbone, checkpoint_path=str(path)), 7)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_that_do_not_fit_are_one_line(tmp_path):
    model, path = build_model(config(), 7), tmp_path / "file.pth"
    with pytest.raises(ConfigError, match=r"model.checkpoint_path: no such file: .*file.pth"):
        official.load(model, path)
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(CheckpointError, match=r"file.pth: not a checkpoint, or a truncated one"):
        official.load(model, path)
    torch.save({"model": official_names(model), "args": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"file.pth: not a checkpoint, or a truncated one"):
        official.load(model, path)
    for other, message in [
        ({"num_queries": 6}, r"query_embed.weight is \(6, 32\), should be \(5, 32\)"),
        ({"kind": "detr"}, r"of another architecture: it lacks level_embed"),
        ({"box_refine": True}, r"class_embed.1.weight differs from the other layers' heads: it needs .*box_refine"),
    ]:
        torch.save({"model": official_names(new_model(1, **other))}, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            official.load(model, path)
        assert "\n" not in str(caught.value)
