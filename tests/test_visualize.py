from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dat import visualize
from dat.engine.checkpoint import save_checkpoint
from dat.engine.command import main_guard
from dat.models import DAT, StageConfig
from dat.models.attention_maps import capture_attention, deformable_blocks
from dat.utils import overlays
from dat.utils.errors import CheckpointError, ConfigError, DataError

# Every position bias in both releases, keys that move freely, in a range or not at all, and an odd stride remainder.
D_2022 = {"num_groups": 2, "stride": 2}
D_2023 = {**D_2022, "release": "2023"}
STAGES = {
    "table": StageConfig("LD", 16, 4, **D_2022),
    "table 2023": StageConfig("D", 16, 4, kernel_size=3, offset_range_factor=-1.0, **D_2023),
    "range 2023": StageConfig("D", 16, 4, **D_2023),
    "fixed_pe": StageConfig("D", 16, 4, position_bias="fixed_pe", offset_range_factor=0.0, **D_2022),
    "fixed_pe 2023": StageConfig("D", 16, 4, kernel_size=2, position_bias="fixed_pe", **D_2023),
    "log_cpb": StageConfig("D", 16, 4, position_bias="log_cpb", offset_range_factor=-1.0, **D_2022),
    "log_cpb 2023": StageConfig("D", 16, 4, position_bias="log_cpb", **D_2023),
    "dwc_pe": StageConfig("D", 16, 4, position_bias="dwc_pe", **D_2022),
    "none": StageConfig("D", 16, 4, position_bias="none", **D_2022),
    "no_off": StageConfig("D", 16, 4, no_off=True, **D_2022),
}


def create(*stages: StageConfig, **arguments) -> DAT:
    torch.manual_seed(0)
    model = DAT(stages, img_size=32, num_classes=3, **arguments).double().eval()
    for name, parameter in model.named_parameters():
        if "offset_proj" in name or "table" in name or "log_cpb" in name:
            torch.nn.init.normal_(parameter)
    return model


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_file(tmp_path):
    """A file of 60 x 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_attention_gives_what_the_layer_returns(stage):
    model = create(STAGES[stage])
    (key, layer), *_ = deformable_blocks(model).items()
    seen = {}
    place_keys = layer._place_keys
    layer._place_keys = lambda query: seen.setdefault("keys", place_keys(query))
    modules = {layer: "out", layer.q: "query", layer.v: "value"}

    def keep(module, args, output):
        seen[modules[module]] = output[0]

    handles = [module.register_forward_hook(keep) for module in modules]
    (record,), logits = capture_attention(model, random_image(36, 52))
    del layer._place_keys
    for handle in handles:
        handle.remove()
    assert record.name == f"stages.{key[0]}.blocks.{key[1]}"
    assert record.size == (9, 13)
    assert logits.shape == (3,)
    torch.testing.assert_close(record.positions(), seen["keys"][0][0], rtol=0, atol=0)
    value = seen["value"].unflatten(-1, (4, -1)).transpose(0, 1)
    for row, column in ((0, 0), (3, 7), (8, 12)):
        attention = record.attention(row, column)
        torch.testing.assert_close(attention.sum(-1), attention.new_ones(4))
        attended = (attention[:, None] @ value).flatten()
        if layer.lepe is not None:
            attended = attended + layer.lepe(seen["query"].permute(2, 0, 1)[None])[0, :, row, column]
        torch.testing.assert_close(layer.proj(attended), seen["out"][row, column])


def test_attention_of_half_precision_is_worked_out_in_float32(monkeypatch):
    (record,), _ = capture_attention(create(STAGES["table"]), random_image(36, 52))
    half = replace(record, query=(20 * record.query).bfloat16(), key=(20 * record.key).bfloat16())
    whole = replace(half, query=half.query.float(), key=half.key.float())
    positions = record.positions()
    monkeypatch.setattr(type(record), "positions", lambda _: positions)
    assert torch.equal(half.attention(3, 7), whole.attention(3, 7))


def test_the_reference_is_where_keys_without_offsets_are():
    for name, config in STAGES.items():
        model = create(config)
        (record,), _ = capture_attention(model, random_image(36, 52))
        moved = not torch.equal(record.reference(), record.positions())
        assert moved == (name != "no_off")
        reference = record.reference()
        if not config.no_off:
            torch.nn.init.zeros_(record.layer.offset_proj.weight)
        torch.testing.assert_close(reference, record.positions(), rtol=0, atol=0)


def test_the_position_of_a_corner_is_drawn_in_the_middle_of_its_pixels():
    (record,), _ = capture_attention(create(STAGES["table"]), random_image(36, 52))
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    assert record.pixels(corners).tolist() == [[1.5, 1.5], [49.5, 33.5]]
    view = visualize.View(Image.new("RGB", (104, 36)), (36, 52), (103, 35))
    assert view.to_pixels(record, corners).tolist() == [[3.5, 1.5], [99.5, 33.5]]
    assert view.query_position(record) == (8, 12)
    assert [record.query_at(x, 0)[1] for x in (-0.5, 3.4, 3.6, 51)] == [0, 0, 1, 12]


def test_blocks_are_recorded_in_the_order_asked_for():
    model = create(StageConfig("DLD", 16, 4), StageConfig("LD", 32, 4))
    assert list(deformable_blocks(model)) == [(0, 0), (0, 2), (1, 1)]
    records, _ = capture_attention(model, random_image(32, 32), [(1, 1), (0, 2)])
    assert [(record.name, record.stride) for record in records] == [("stages.1.blocks.1", 8), ("stages.0.blocks.2", 4)]
    with pytest.raises(ValueError, match=r"blocks must be .*\(0, 2\).*got \(0, 1\)"):
        capture_attention(model, random_image(32, 32), [(0, 1)])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_figure_shows_the_recorded_points_and_attention(tmp_path):
    (record,), _ = capture_attention(create(STAGES["table 2023"]), random_image(36, 52))
    view = visualize.View(Image.new("RGB", (52, 36)), (36, 52), (30, 20))
    keys, mean, *heads = visualize.draw_block(record, view, "$title").axes
    groups = [c.get_offsets() for c in keys.collections if len(c.get_offsets()) == 35]
    expected = record.pixels(record.positions()).numpy()
    np.testing.assert_allclose(groups[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(groups[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(groups[2], record.pixels(record.reference())[0].numpy(), rtol=1e-5)
    assert len(heads) == 4
    attention = record.attention(5, 7).numpy()
    panel = heads[2].collections[0]
    np.testing.assert_allclose(panel.get_array(), np.sort(attention[2]))
    np.testing.assert_allclose(panel.get_offsets(), expected[1][attention[2].argsort()], rtol=1e-5)
    sizes = panel.get_sizes()
    np.testing.assert_allclose(sizes / sizes[-1], np.sort(attention[2]) / attention[2].max(), rtol=1e-5)
    assert len(mean.collections[0].get_offsets()) == 70


def test_panels_show_large_images_reduced_in_the_pixels_of_the_image(tmp_path):
    (record,), _ = capture_attention(create(STAGES["table 2023"]), random_image(36, 52))
    for size, shown, aspect in (((3000, 2000), (1024, 683), 1.0), ((4000, 100), (1024, 26), "auto")):
        view = visualize.View(Image.new("RGB", size), (36, 52), (30, 20))
        figure = visualize.draw_block(record, view)
        for panel in figure.axes[:6]:
            (picture,) = panel.images
            assert picture.get_size() == shown[::-1]
            assert picture.get_extent() == [-0.5, size[0] - 0.5, size[1] - 0.5, -0.5]
            assert panel.get_aspect() == aspect
        width, height = figure.axes[0].get_window_extent().size
        assert height >= 0.1 * width


@pytest.mark.parametrize("name", ["dat_nano", "dat_pp_nano"])
def test_command_draws_a_model_by_its_name(name, image_file, tmp_path, capsys):
    out = tmp_path / "new" / "out.png"
    visualize.main([name, str(image_file), "--query", "59", "20", "--out", str(out), "--size", "64"])
    assert capsys.readouterr().err == ""
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]
    with Image.open(out) as drawn:
        assert drawn.width > 1000


def test_command_says_one_line_of_an_error(tmp_path, capsys):
    arguments = ["dat_nano", str(tmp_path / "no.png"), "--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: visualize.main(arguments))
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/no.png: no such image\n"
    assert not any(tmp_path.iterdir())


def test_the_title_says_what_is_drawn(image_file):
    figure = visualize.visualize("dat_nano", image_file, stage=3, size=48)
    assert figure.get_suptitle() == "dat_nano, random weights, input 48×72, query (29.5, 19.5)"
    assert figure.axes[0].get_title() == "stages.3.blocks.1\n2×3 keys, 4 groups"


def test_a_checkpoint_of_the_classifier_brings_its_configuration_and_classes(image_file, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("dat_nano", num_classes=2).eval()
    data = {"img_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    config = {"model": {"backbone": {"name": "dat_nano", "checkpoint_path": "gone.pth"}}, "data": data}
    path = tmp_path / "best.pth"
    state = {"kind": "classification", "config": config, "class_names": ["cat", "dog"], "state_dict": {}}
    save_checkpoint(path, {**state, "state_dict_ema": model.state_dict()})
    loaded = visualize.load_model(str(path))
    image = visualize.to_input(visualize.read_image(image_file), loaded.input)
    assert image.shape == (3, 64, 64)
    scores = model(image[None])[0].softmax(-1)
    label, score = ("cat", "dog")[scores.argmax()], scores.max()
    figure = visualize.visualize(str(path), image_file, (3, 4))
    assert figure.get_suptitle() == f"dat_nano, best.pth, input 64×64, query (3, 4); {label} {score:.0%}"


def test_the_backbone_of_a_detector_is_drawn(image_file, tmp_path):
    torch.manual_seed(3)
    backbone = timm.create_model("dat_nano", features_only=True, out_indices=(-2, -1)).eval()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    data = {"val": {"size": 32}, "mean": [0.5] * 3, "std": [0.25] * 3, "train": {}}
    config = {"model": {"backbone": {"name": "dat_nano", "out_indices": [-2, -1]}}, "data": data}
    path = tmp_path / "best.pth"
    weights = {**state, "query_embed.weight": torch.zeros(3, 4)}
    save_checkpoint(path, {"kind": "detection", "config": config, "class_names": ["cat"], "state_dict": weights})
    loaded = visualize.load_model(str(path))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[f"model.{name}"]), name
    figure = visualize.visualize(str(path), image_file)
    # The shorter side has val.size pixels, and the aspect ratio is kept.
    assert figure.get_suptitle() == "dat_nano, best.pth, input 32×48, query (29.5, 19.5)"
    del weights["backbone.model.patch_embed.proj.bias"]
    save_checkpoint(path, {"kind": "detection", "config": config, "class_names": ["cat"], "state_dict": weights})
    with pytest.raises(CheckpointError, match=r"best.pth: .*patch_embed.proj.bias"):
        visualize.load_model(str(path))


def test_weights_are_loaded_by_name_and_file(image_file, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("dat_nano")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = visualize.load_model(f"dat_nano:{tmp_path}/weights.pth")
    assert loaded.title == "dat_nano, weights.pth"
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_whole_image_becomes_the_normalised_input():
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, -1] = 255
    config = visualize.InputConfig(8, (0.5,) * 3, (0.5,) * 3, "nearest")
    image = visualize.to_input(Image.fromarray(pixels), config, side=10)
    assert image.shape == (3, 10, 20)
    assert (image[:, :, -1] == 1).all()
    assert (image[:, :, :-1] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": "text.png"}, DataError, "text.png: cannot be read as an image"),
        ({"source": "dat_nanno"}, ConfigError, "dat_nanno: neither a timm model"),
        ({"source": "dat_nano:gone.pth"}, ConfigError, "gone.pth: no such file of weights for dat_nano"),
        ({"source": "test_vit"}, ConfigError, "test_vit: has no D"),
        ({"source": "text.png"}, CheckpointError, "text.png: not a checkpoint"),
        ({"query": (60, 3)}, ConfigError, r"--query 60 3: outside of .*, 60 x 40 pixels"),
        ({"query": (float("nan"), 3)}, ConfigError, "--query nan 3: outside"),
        ({"stage": 0}, ConfigError, "--stage 0: no D block there; .*: 2 1, 3 1"),
        ({"stage": 2, "block": 0}, ConfigError, "--stage 2 --block 0: no D block"),
        ({"block": 0}, ConfigError, "--block needs --stage"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, message, image_file, monkeypatch):
    monkeypatch.chdir(image_file.parent)
    (image_file.parent / "text.png").write_text("no image")
    with pytest.raises(error, match=message):
        visualize.visualize(**{"source": "dat_nano", "image": image_file, **arguments})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    from matplotlib.figure import Figure

    out = tmp_path / "out.png"
    out.write_text("old")

    class Full(Figure):
        def savefig(self, path, **arguments):
            path.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        overlays.save_figure(Full(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert out.read_text() == "old"
    with pytest.raises(ConfigError, match=r"out.xyz: should be a file of one of the formats .*png"):
        overlays.save_figure(Figure(), tmp_path / "out.xyz")
