"""Names of the official DINO and of detrex' are converted, in full size."""

import json
import re

import pytest
import torch
from commands import dat
from torchvision.models.swin_transformer import SwinTransformer

from dat.detection import official
from dat.detection.checkpoint import load_detector
from dat.detection.config import DetectionConfig
from dat.detection.models import build_model
from dat.engine.config import load_config

LAYER = r"^((?:en|de)coder)\.(\d+)\."
DETECTRON_RESNET = (
    (r"^backbone\.(conv1)\.", r"backbone.stem.\1."),
    (r"^backbone\.bn1\.", "backbone.stem.conv1.norm."),
    (r"^backbone\.layer(\d)\.(\d+)\.bn(\d)\.", r"backbone.layer\1.\2.conv\3.norm."),
    (r"^(backbone\.layer\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone\.layer\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^backbone\.layer(\d)\.", lambda m: f"backbone.res{int(m[1]) + 1}."),
)
DETREX_LAYERS = {
    "encoder": {"self_attn": "attentions.0", "norm1": "norms.0", "norm2": "norms.1"},
    "decoder": {
        "self_attn": "attentions.0.attn",
        "cross_attn": "attentions.1",
        "norm2": "norms.0",
        "norm1": "norms.1",
        "norm3": "norms.2",
    },
}
FFN = {"linear1": "ffns.0.layers.0.0", "linear2": "ffns.0.layers.1"}


def mlp_names(name):
    """MLPs have a list of layers, without the activations between them."""
    return re.sub(
        r"(bbox_embed\.(?:\d+\.)?|ref_point_head\.)(\d)\.(\w+)$",
        lambda m: f"{m[1]}layers.{int(m[2]) // 2}.{m[3]}",
        name,
    )


def official_names(name, depth):
    """The official names of a tensor."""
    name = mlp_names(name)
    head = re.match(r"(class|bbox)_embed\.0\.", name)
    if head:
        heads = [f"{head[1]}_embed.{i}.{name[head.end() :]}" for i in range(depth)]
        return [*heads, *(f"transformer.decoder.{alias}" for alias in heads)]
    if name.startswith("backbone."):
        return [name.replace("backbone.", "backbone.0.body.")]
    if name.startswith(("input_proj.", "label_enc.")):
        return [name]
    name = name.replace("query_embed.", "tgt_embed.").replace("decoder_norm.", "decoder.norm.")
    name = name.replace("ref_point_head.", "decoder.ref_point_head.")
    return ["transformer." + re.sub(LAYER, r"\1.layers.\2.", name)]


def detrex_names(name, depth):
    name = mlp_names(name).replace("enc_out_class_embed.", f"class_embed.{depth}.")
    name = name.replace("enc_out_bbox_embed.", f"bbox_embed.{depth}.")
    if name.startswith(("class_embed.", "bbox_embed.")):
        return [name, f"transformer.decoder.{name}"]
    if name.startswith("backbone."):
        for pattern, replacement in DETECTRON_RESNET:
            name = re.sub(pattern, replacement, name)
        return [name]
    if name.startswith("label_enc."):
        return [name]
    match = re.match(r"input_proj\.(\d+)\.([01])\.", name)
    if match:
        level = int(match[1])
        place = f"convs.{level}" if level < 3 else f"extra_convs.{level - 3}"
        return [f"neck.{place}.{('conv', 'norm')[int(match[2])]}.{name[match.end() :]}"]
    name = "level_embeds" if name == "level_embed" else name
    name = name.replace("query_embed.", "tgt_embed.").replace("decoder_norm.", "decoder.norm.")
    name = name.replace("ref_point_head.", "decoder.ref_point_head.")
    match = re.match(LAYER + r"(\w+)\.", name)
    if match:
        part = (DETREX_LAYERS[match[1]] | FFN)[match[3]]
        name = f"{match[1]}.layers.{match[2]}.{part}.{name[match.end() :]}"
    return [f"transformer.{name}"]


def expanded(tensors):
    """Tensors of these shapes that hold one number each."""
    return {name: torch.tensor(float(i)).expand(t.shape) for i, (name, t) in enumerate(tensors.items())}


@pytest.mark.parametrize(
    ("config", "overrides", "names", "classes"),
    [
        ("dino_r50_4scale", [], official_names, 91),
        ("dino_r50_5scale", [], official_names, 91),
        ("dino_r50_4scale", ["model.share_heads=false"], detrex_names, 80),
    ],
)
def test_files_in_full_size_fit(config, overrides, names, classes):
    config = load_config(DetectionConfig, config, overrides)
    with torch.device("meta"):
        model = build_model(config.model, classes, weights=False)
    own = expanded(model.state_dict())
    theirs = {alias: tensor for name, tensor in own.items() for alias in names(name, 6)}
    if names is official_names:
        # dn_labelbook_size is 91, and the table has one label more.
        theirs["label_enc.weight"] = own["label_enc.weight"][:1].expand(92, -1)
        # known from the published files
        for known in (
            "transformer.tgt_embed.weight",
            "transformer.decoder.ref_point_head.layers.1.bias",
            "transformer.enc_out_bbox_embed.layers.2.weight",
            "transformer.decoder.layers.5.cross_attn.sampling_offsets.weight",
            "class_embed.5.bias",
            "backbone.0.body.layer4.2.bn3.running_var",
        ):
            assert known in theirs
    else:
        for known in (
            "backbone.res5.2.conv3.norm.running_var",
            "backbone.res2.0.shortcut.weight",
            "neck.extra_convs.0.conv.weight",
            "transformer.level_embeds",
            "transformer.decoder.layers.5.attentions.0.attn.in_proj_weight",
            "transformer.encoder.layers.0.ffns.0.layers.0.0.weight",
            "class_embed.6.bias",
        ):
            assert known in theirs
    converted = official.convert(theirs, model)
    assert converted.keys() == own.keys()
    for name, tensor in converted.items():
        assert tensor.shape == own[name].shape, name
        assert tensor.flatten()[0] == own[name].flatten()[0], name


def swin_names(state):
    """The official names of torchvision's Swin, whose norms of the maps are not in it."""
    renamed = {}
    for name, tensor in state.items():
        place, _, rest = name.removeprefix("features.").partition(".")
        if name.startswith(("norm.", "head.")):
            continue
        if place == "0":
            name = "patch_embed." + rest.replace("0.", "proj.").replace("2.", "norm.")
        elif int(place) % 2:
            name = f"layers.{int(place) // 2}.blocks.{rest}".replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        else:
            name = f"layers.{int(place) // 2 - 1}.downsample.{rest}"
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("prefix", ["backbone.0.", "backbone."], ids=["official", "detrex"])
def test_a_swin_with_converted_weights_gives_the_official_maps(prefix):
    """On maps that are no multiple of the window, which torchvision pads and rolls as the official detectors do."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}
    theirs = SwinTransformer(patch_size=[4, 4], window_size=[7, 7], stochastic_depth_prob=0.0, **sizes).eval().double()
    norms = [torch.nn.LayerNorm(width).double() for width in (16, 32, 64)]
    for parameter in (*theirs.parameters(), *(p for norm in norms for p in norm.parameters())):
        torch.nn.init.normal_(parameter, std=0.2)
    state = swin_names(theirs.state_dict())
    state |= {f"norm{i}.{key}": t for i, norm in enumerate(norms, 1) for key, t in norm.state_dict().items()}

    changes = "{name: swin_tiny_patch4_window7_224, always_partition: true, out_indices: [1, 2, 3], %s}"
    changes %= ", ".join(f"{key}: {value}" for key, value in sizes.items())
    config = load_config(DetectionConfig, "dino_swin_tiny", [f"model.backbone={changes}"])
    model = build_model(config.model, 3, weights=False).eval().double()
    converted = official.convert({prefix + name: tensor for name, tensor in state.items()}, model)
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in converted.items()}
    model.backbone.load_state_dict(backbone)

    images = torch.randn(2, 3, 272, 320, dtype=torch.double)
    x, expected = images, []
    with torch.no_grad():
        for i, part in enumerate(theirs.features):
            x = part(x)
            if i in (3, 5, 7):
                expected.append(norms[i // 2 - 1](x).permute(0, 3, 1, 2))
        found = model.backbone(images)
    torch.testing.assert_close(found, expected)


def test_own_names_stay():
    config = load_config(DetectionConfig, "dino_r50_4scale", ["model.backbone.name=test_resnet", "model.freeze=[]"])
    with torch.device("meta"):
        model = build_model(config.model, 3, weights=False)
    assert official.convert(expanded(model.state_dict()), model).keys() == model.state_dict().keys()


def test_heads_that_differ_need_a_model_with_one_for_each_layer():
    config = load_config(DetectionConfig, "dino_r50_4scale", ["model.backbone.name=test_resnet", "model.freeze=[]"])
    with torch.device("meta"):
        model = build_model(config.model, 3, weights=False)
    theirs = {f"class_embed.{i}.bias": torch.full((3,), float(i)) for i in range(2)}
    with pytest.raises(ValueError, match=r"class_embed.1.bias differs .* it needs a model with share_heads=False"):
        official.convert(theirs, model)


@pytest.mark.parametrize(("names", "overrides"), [(official_names, []), (detrex_names, ["model.share_heads=false"])])
def test_the_command_keeps_the_heads_of_the_classes(names, overrides, tmp_path):
    """Of the encoder too, which scores all classes."""
    small = ["model.backbone.name=test_resnet", "model.freeze=[]", "model.embed_dim=16", "model.num_queries=5"]
    overrides = [*small, "model.num_heads=2", "model.encoder_depth=1", "model.decoder_depth=2", *overrides]
    torch.manual_seed(0)
    model = build_model(load_config(DetectionConfig, "dino_r50_4scale", overrides).model, 7, weights=False).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    theirs = {alias: tensor for name, tensor in model.state_dict().items() for alias in names(name, 2)}
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    ids = (2, 3, 6)
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    files = ("dino_r50_4scale", tmp_path / "theirs.pth", "--annotations", annotations, "--out", tmp_path / "ours.pth")
    dat("detect", "convert", *files, *overrides)
    ours, images = load_detector(tmp_path / "ours.pth", torch.device("cpu")).model, torch.randn(1, 3, 64, 96)
    assert ours.label_enc.weight.equal(model.label_enc.weight[list(ids)])
    for key in ("class_embed.0.weight", "enc_out_class_embed.bias"):
        assert ours.state_dict()[key].equal(model.state_dict()[key][list(ids)])
    # With all classes, the converted model selects other proposals; here the other classes never win.
    for head in (*model.class_embed, model.enc_out_class_embed):
        head.bias.data[[0, 1, 4, 5]] = -100
    with torch.no_grad():
        found, wanted = ours(images), model(images)
    torch.testing.assert_close(found["pred_boxes"], wanted["pred_boxes"])
    torch.testing.assert_close(found["pred_logits"], wanted["pred_logits"][..., list(ids)])
