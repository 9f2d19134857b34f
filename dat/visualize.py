"""Draws the keys and the attention of deformable blocks: python -m dat.visualize MODEL IMAGE --query X Y --out FILE

For each block: the reference points of the keys (+), the moved keys (colours: groups), and how much the query at pixel
(X, Y) of the image attends to each key, as in figures 1 and 5 of DAT (https://arxiv.org/abs/2201.00520). Without
--stage there is a row for the last D block of every stage, with some of its heads; with it, one block with all heads.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import dat  # noqa: F401  registers its models with timm
from dat.engine.backbones import create_timm_model, load_classifier_weights, without_weights
from dat.engine.checkpoint import Trained, build_and_load, checkpoint_errors, read_trained
from dat.engine.command import main_guard
from dat.engine.config import LARGEST_SIDE, check_range, from_dict
from dat.engine.seeds import isolated_rng
from dat.models import DAT
from dat.models.attention_maps import BlockAttention, capture_attention, deformable_blocks
from dat.utils.errors import CheckpointError, ConfigError
from dat.utils.images import read_image
from dat.utils.overlays import (
    PANEL,
    Backdrop,
    check_format,
    create_figure,
    draw_star,
    draw_weighted,
    save_figure,
    scatter,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Heads of each block in a figure of several blocks.
OVERVIEW_HEADS = 4
COLUMNS = 6


@dataclass(frozen=True)
class View:
    """An image to draw on, the size at which the model saw it, and the query.

    Attributes:
        image: RGB, of any size; the model saw all of it.
        input_size: (H, W) of the model's input.
        query: (x, y) in pixels of `image`.
    """

    image: Image.Image
    input_size: tuple[int, int]
    query: tuple[float, float]

    @cached_property
    def backdrop(self) -> Backdrop:
        """The image as all panels show it, darkened and reduced."""
        return Backdrop.of(self.image)

    @property
    def factors(self) -> tuple[float, float]:
        """Pixels of the image per pixel of the input, along x and along y."""
        return self.image.width / self.input_size[1], self.image.height / self.input_size[0]

    def query_position(self, record: BlockAttention) -> tuple[int, int]:
        """(row, column) of the query in a block's feature map."""
        x, y = ((pixel + 0.5) / factor - 0.5 for pixel, factor in zip(self.query, self.factors, strict=True))
        return record.query_at(x, y)

    def to_pixels(self, record: BlockAttention, positions: Tensor) -> Tensor:
        """Converts a block's positions [..., 2] to pixels of the image, float32 on the CPU."""
        pixels = record.pixels(positions).cpu().float()
        return (pixels + 0.5) * pixels.new_tensor(self.factors) - 0.5


def group_colors(groups: int) -> list[Any]:
    """A colour for each group."""
    import matplotlib

    colors = matplotlib.colormaps["tab10" if groups <= 10 else "tab20"]
    return [colors(group % colors.N) for group in range(groups)]


def draw_keys(axes: "Axes", record: BlockAttention, view: View) -> None:
    """Draws reference points and moved keys of a block, coloured by group, joined by lines."""
    from matplotlib.collections import LineCollection

    view.backdrop.draw(axes)
    reference, points = (view.to_pixels(record, p) for p in (record.reference(), record.positions()))
    diameter = 0.45 * _spacing(record) * len(points) ** -0.25
    for start, end, color in zip(reference, points, group_colors(len(points)), strict=True):
        lines = torch.stack((start, end), 1).tolist()
        axes.add_collection(LineCollection(lines, colors=[color], linewidths=0.6, alpha=0.6))
        scatter(axes, end, diameter**2, color=color, linewidths=diameter / 30)
    x, y = reference[0].unbind(-1)
    axes.scatter(x, y, s=diameter**2, marker="+", color="white", linewidths=0.8, zorder=3)
    rows, columns = record.layer.key_size(record.size)
    axes.set_title(f"{record.name}\n{rows}×{columns} keys, {len(points)} group{'s' * (len(points) > 1)}", fontsize=7)


def draw_attention(axes: "Axes", record: BlockAttention, view: View, head: int | None = None) -> None:
    """Draws keys by the attention of the query; `head` None averages over heads, on the keys of all groups."""
    from matplotlib.patches import Rectangle

    view.backdrop.draw(axes)
    row, column = view.query_position(record)
    groups = record.layer.num_groups
    attention = record.attention(row, column).cpu().unflatten(0, (groups, -1))
    points = view.to_pixels(record, record.positions())
    diameter = 0.7 * _spacing(record)
    if head is None:
        attention, points = attention.mean(1).flatten(), points.flatten(0, 1)
        title, color = "mean of heads", "black"
        diameter *= groups**-0.5
    else:
        group = head * groups // record.layer.num_heads
        attention, points = attention.flatten(0, 1)[head], points[group]
        title, color = f"head {head}, group {group}", group_colors(groups)[group]
    low, high = draw_weighted(axes, points, attention, diameter)
    axes.set_title(f"{title}\n{low:.2%} to {high:.2%}", fontsize=7, color=color)
    # Draw a frame around the part of the image that the query's position covers.
    width, height = (record.stride * factor for factor in view.factors)
    corner = column * width - 0.5, row * height - 0.5
    axes.add_patch(Rectangle(corner, width, height, fill=False, color="lime", linewidth=0.8))
    draw_star(axes, *view.query)


def draw_block(record: BlockAttention, view: View, title: str = "") -> "Figure":
    """A figure of one block: its keys, and the attention of the query averaged and in every head."""
    heads = record.layer.num_heads
    columns = min(COLUMNS, 2 + heads)
    figure, axes = create_figure(math.ceil((2 + heads) / columns), columns, view.image, title)
    _draw_panels(axes, record, view, range(heads))
    return figure


def draw_blocks(records: Sequence[BlockAttention], view: View, title: str = "") -> "Figure":
    """A figure with a row for each block: its keys, the mean attention, and that of some heads."""
    columns = 2 + min(OVERVIEW_HEADS, max(record.layer.num_heads for record in records))
    figure, axes = create_figure(len(records), columns, view.image, title)
    for record, row in zip(records, axes.reshape(-1, columns), strict=True):
        shown = min(OVERVIEW_HEADS, record.layer.num_heads)
        _draw_panels(row, record, view, [i * record.layer.num_heads // shown for i in range(shown)])
    return figure


def _draw_panels(axes: Sequence["Axes"], record: BlockAttention, view: View, heads: Sequence[int]) -> None:
    draw_keys(axes[0], record, view)
    for head, panel in zip([None, *heads], axes[1:], strict=False):
        draw_attention(panel, record, view, head)


def _spacing(record: BlockAttention) -> float:
    """Typographic points between neighbouring keys of a panel, within limits that look well."""
    return min(max(PANEL * 72 / max(record.layer.key_size(record.size)), 4.0), 16.0)


@dataclass
class InputConfig:
    """Preprocessing of a model: `img_size` is the side of a square, or the shorter side."""

    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    square: bool = True


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its name and the origin of its weights, its input, and its classes if known."""

    model: DAT
    title: str
    input: InputConfig
    class_names: list[str] = field(default_factory=list)


def load_model(source: str) -> LoadedModel:
    """Loads a DAT in evaluation mode.

    Args:
        source: its name in timm, for random weights; name:FILE for its weights, official ones too; or a checkpoint of
            this project's classifiers or detectors, of which the backbone is taken.

    Raises:
        ConfigError, CheckpointError: there is no such model or file, or they do not fit.
    """
    name, colon, file = source.partition(":")
    if timm.is_model(name.split(".")[0]):
        return _load_by_name(name, file if colon else None)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{source}: neither a timm model, such as dat_tiny, nor a checkpoint file")
    trained = read_trained(path, None)
    backbone, data = trained.config["model"].get("backbone"), trained.config.get("data")
    if not isinstance(backbone, dict) or not isinstance(data, dict):
        raise CheckpointError(f"{path}: its configuration has no model.backbone or no data")
    with checkpoint_errors(path):
        input_config = _input_config(data, trained.state["kind"] == "detection", source)
    model, names = _load_backbone(without_weights(backbone), trained, path)
    return LoadedModel(_check_model(model, source), f"{backbone['name']}, {path.name}", input_config, names)


def _input_config(data: dict[str, Any], detection: bool, source: str) -> InputConfig:
    known = {field.name: data[field.name] for field in fields(InputConfig) if field.name in data}
    if detection:
        known |= {"img_size": data["val"]["size"], "square": False}
    config = from_dict(InputConfig, known, source)
    check_range(config, ["img_size"], 1, LARGEST_SIDE)
    return config


def _load_backbone(arguments: dict[str, Any], trained: Trained, path: Path) -> tuple[nn.Module, list[str]]:
    """The model of a classifier and its classes, or the backbone of a detector, which has none."""
    names = trained.class_names
    if trained.state["kind"] == "classification":
        return build_and_load(
            lambda: create_timm_model(arguments, num_classes=len(names)), trained.weights, path
        ), names
    prefix = "backbone."
    weights = {key.removeprefix(prefix): value for key, value in trained.weights.items() if key.startswith(prefix)}
    features = build_and_load(lambda: create_timm_model(arguments, features_only=True), weights, path)
    return features.get_submodule("model") if hasattr(features, "model") else features, []


def _load_by_name(name: str, file: str | None) -> LoadedModel:
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"{file}: no such file of weights for {name}")
    with isolated_rng(0):
        model = _check_model(create_timm_model({"name": name}, key="MODEL"), name)
    if file is not None:
        load_classifier_weights(model, file)
    data = resolve_model_data_config(model)
    title = f"{name}, {'random weights' if file is None else Path(file).name}"
    return LoadedModel(
        model, title, InputConfig(data["input_size"][-1], data["mean"], data["std"], data["interpolation"])
    )


def _check_model(model: nn.Module, name: str) -> DAT:
    if not isinstance(model, DAT) or not deformable_blocks(model):
        raise ConfigError(f"{name}: has no D (deformable) blocks to draw")
    return model.eval()


def to_input(image: Image.Image, config: InputConfig, side: int | None = None) -> Tensor:
    """The whole image as a normalised tensor [3, H, W].

    Args:
        image: RGB.
        config: see InputConfig.
        side: shorter side of the result, which keeps the aspect ratio; None: as the model was trained.
    """
    size = (config.img_size, config.img_size)
    if side is not None or not config.square:
        scale = (side or config.img_size) / min(image.size)
        size = (round(image.height * scale), round(image.width * scale))
    transform = create_transform(
        (3, *size),
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=1.0,
        crop_mode="squash",
    )
    return transform(image)


def choose_blocks(model: DAT, stage: int | None, block: int | None) -> list[tuple[int, int]]:
    """(stage, block) of the D blocks to draw: the last one of `stage`, or of every stage, or `block` of `stage`.

    Raises:
        ConfigError: there is no such block.
    """
    present = list(deformable_blocks(model))
    if block is not None and stage is None:
        raise ConfigError("--block needs --stage")
    chosen = {i: (i, j) for i, j in present if stage in (None, i) and block in (None, j)}
    if not chosen:
        wanted = f"--stage {stage}" + ("" if block is None else f" --block {block}")
        listed = ", ".join(f"{i} {j}" for i, j in present)
        raise ConfigError(f"{wanted}: no D block there; the D blocks are, by stage and block: {listed}")
    return list(chosen.values())


def visualize(
    source: str,
    image: Path,
    query: tuple[float, float] | None = None,
    stage: int | None = None,
    block: int | None = None,
    size: int | None = None,
) -> "Figure":
    """The figure that the command writes.

    Args:
        source: see load_model.
        image: file.
        query: (x, y) in pixels of the image; None: its centre.
        stage, block: see choose_blocks.
        size: see `side` of to_input.

    Raises:
        ConfigError, CheckpointError, DataError: an argument is wrong; the message names it.
    """
    pixels = read_image(image)
    x, y = query or ((pixels.width - 1) / 2, (pixels.height - 1) / 2)
    if not (0 <= x < pixels.width and 0 <= y < pixels.height):
        raise ConfigError(f"--query {x:g} {y:g}: outside of {image}, {pixels.width} x {pixels.height} pixels")
    loaded = load_model(source)
    chosen = choose_blocks(loaded.model, stage, block)
    tensor = to_input(pixels, loaded.input, size)
    with checkpoint_errors(Path(source)):
        records, logits = capture_attention(loaded.model, tensor, chosen)
    H, W = tensor.shape[1:]
    title = f"{loaded.title}, input {H}×{W}, query ({x:g}, {y:g})"
    if loaded.class_names:
        score, label = logits.float().softmax(-1).max(-1)
        title += f"; {loaded.class_names[int(label)]} {score:.0%}"
    view = View(pixels, (H, W), (x, y))
    return draw_blocks(records, view, title) if stage is None else draw_block(records[0], view, title)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dat.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a DAT by its name in timm (random weights), name:FILE with weights, or a best.pth trained here"
    )
    parser.add_argument("image", type=Path, help="image file; the model sees all of it")
    parser.add_argument("--query", nargs=2, type=float, metavar=("X", "Y"), help="pixel of the image (its centre)")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .png, .pdf, .svg, ...")
    parser.add_argument("--stage", type=int, help="from 0; draws one block with all its heads")
    parser.add_argument("--block", type=int, help="of the stage, from 0 (its last D block)")
    parser.add_argument("--size", type=int, help="shorter side of the input, aspect ratio kept (as trained)")
    options = parser.parse_args(arguments)
    if options.size is not None and options.size < 1:
        raise ConfigError(f"--size is {options.size}, should be at least 1")
    check_format(options.out)
    query = None if options.query is None else (options.query[0], options.query[1])
    figure = visualize(options.model, options.image, query, options.stage, options.block, options.size)
    save_figure(figure, options.out)
    print(options.out)


if __name__ == "__main__":
    main_guard(main)
