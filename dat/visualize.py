"""Draws what D blocks look at: python -m dat.visualize MODEL IMAGE --query X Y --out picture.png

Where the keys start (the reference grid), where the offsets move them (colours: groups) and how much the query at
pixel (X, Y) of the image attends to each, as in figures 1 and 5 of DAT (https://arxiv.org/abs/2201.00520). Without
--stage: a row for the last D block of every stage, with some of its heads; with it: one block with all its heads.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import dat  # noqa: F401  registers its models with timm
from dat.models import DAT
from dat.models.attention_maps import BlockAttention, capture_attention, deformable_blocks
from dat.training.config import LARGEST_SIDE, check_range, from_dict
from dat.training.errors import CheckpointError, ConfigError
from dat.training.files import replacing
from dat.training.loop import create_timm_model, isolated_rng, main_guard
from dat.training.pictures import read_picture
from dat.training.rebuild import blaming, load_trained, rebuild
from dat.training.weights import load_classifier_weights, without_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Heads of each block in a figure of several blocks.
OVERVIEW_HEADS = 4
COLUMNS = 6
PANEL = 2.3  # inches
DPI = 130


@dataclass(frozen=True)
class View:
    """A picture to draw on, what the model was given of it, and the query.

    Attributes:
        picture: RGB, of any size; all of it is what the model was given.
        input_size: (H, W) of the model's input.
        query: (x, y) in pixels of `picture`.
    """

    picture: Image.Image
    input_size: tuple[int, int]
    query: tuple[float, float]

    def cell(self, record: BlockAttention) -> tuple[int, int]:
        """(row, column) of the query in a block's map."""
        x, y = ((pixel + 0.5) / factor - 0.5 for pixel, factor in zip(self.query, self.factors, strict=True))
        return record.query_at(x, y)

    def points(self, record: BlockAttention, positions: Tensor) -> Tensor:
        """Positions [..., 2] of a block as pixels of the picture, on the CPU."""
        pixels = record.pixels(positions).cpu()
        return (pixels + 0.5) * pixels.new_tensor(self.factors) - 0.5

    @property
    def factors(self) -> tuple[float, float]:
        """Pixels of the picture per pixel of the input, along x and along y."""
        return self.picture.width / self.input_size[1], self.picture.height / self.input_size[0]


def draw_keys(axes: "Axes", record: BlockAttention, view: View) -> None:
    """Reference grid and deformed points of a block, coloured by group, with lines from where they started."""
    from matplotlib.collections import LineCollection

    draw_picture(axes, view.picture)
    reference, points = (view.points(record, p).float() for p in (record.reference(), record.positions()))
    diameter = 0.45 * _spacing(record) * len(points) ** -0.25
    for start, end, color in zip(reference, points, group_colors(len(points)), strict=True):
        lines = torch.stack((start, end), 1).tolist()
        axes.add_collection(LineCollection(lines, colors=[color], linewidths=0.6, alpha=0.6))
        _scatter(axes, end, diameter**2, color=color, linewidths=diameter / 30)
    axes.scatter(
        reference[0, :, 0], reference[0, :, 1], diameter**2, marker="+", color="white", linewidths=0.8, zorder=3
    )
    rows, columns = record.layer.key_size(record.size)
    axes.set_title(f"{record.name}\n{rows}×{columns} keys, {len(points)} group{'s' * (len(points) > 1)}", fontsize=7)


def draw_attention(axes: "Axes", record: BlockAttention, view: View, head: int | None = None) -> None:
    """Keys by how much the query attends to them: areas from zero, colours from the least to the most of the panel.

    Args:
        axes: of matplotlib.
        record: of the block.
        view: the picture and the query.
        head: whose attention; None: the mean of the heads, over the keys of all groups.
    """
    draw_picture(axes, view.picture)
    row, column = view.cell(record)
    groups = record.layer.num_groups
    attention = record.attention(row, column).cpu().unflatten(0, (groups, -1))
    points = view.points(record, record.positions()).float()
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
    _draw_query(axes, record, view, (row, column))


def draw_weighted(
    axes: "Axes", points: Tensor, weights: Tensor, diameter: float, limits: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Points by their weights, the language of all pictures of attention.

    Args:
        axes: of matplotlib, in pixels of a picture.
        points: [n, 2], (x, y) in its pixels.
        weights: [n], at least 0; areas count from zero, colours from the least to the most of `limits`.
        diameter: of the most, in typographic points.
        limits: least and most of all panels that are to be compared; None: of these weights.

    Returns:
        The least and the most that areas and colours count by.
    """
    order = weights.argsort()
    weights, points = weights[order], points[order]
    low, high = limits or (weights[0].item(), weights[-1].item())
    areas = weights / max(high, 1e-12) * diameter**2
    _scatter(axes, points, areas, c=weights, vmin=low, vmax=high, cmap="plasma", alpha=0.85, linewidths=diameter / 30)
    return low, high


def draw_block(record: BlockAttention, view: View, title: str = "") -> "Figure":
    """A matplotlib figure of one block: its keys, and the attention of the query in the mean and in every head."""
    panels = 2 + record.layer.num_heads
    columns = min(COLUMNS, panels)
    figure, axes = create_figure(math.ceil(panels / columns), columns, view.picture, title)
    draw_keys(axes[0], record, view)
    for head, panel in zip([None, *range(record.layer.num_heads)], axes[1:panels], strict=True):
        draw_attention(panel, record, view, head)
    return figure


def draw_blocks(records: Sequence[BlockAttention], view: View, title: str = "") -> "Figure":
    """A matplotlib figure with a row for each block: its keys, the mean attention, and that of some heads."""
    columns = 2 + min(OVERVIEW_HEADS, max(record.layer.num_heads for record in records))
    figure, axes = create_figure(len(records), columns, view.picture, title)
    for record, row in zip(records, axes.reshape(-1, columns), strict=True):
        shown = min(OVERVIEW_HEADS, record.layer.num_heads)
        heads = [i * record.layer.num_heads // shown for i in range(shown)]
        draw_keys(row[0], record, view)
        for head, panel in zip([None, *heads], row[1:], strict=False):
            draw_attention(panel, record, view, head)
    return figure


def group_colors(groups: int) -> list[Any]:
    """A colour for each group."""
    import matplotlib

    colors = matplotlib.colormaps["tab10" if groups <= 10 else "tab20"]
    return [colors(group % colors.N) for group in range(groups)]


def create_figure(rows: int, columns: int, picture: Image.Image, title: str) -> tuple["Figure", Any]:
    """A figure of empty panels in the shape of the picture, and its axes [rows * columns]."""
    # Not pyplot's figures, which stay in memory until they are closed.
    from matplotlib.figure import Figure

    height = PANEL * min(picture.height / picture.width, 3)
    figure = Figure(figsize=(PANEL * columns, (height + 0.4) * rows + 0.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes:
        panel.axis("off")
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, axes


def draw_picture(axes: "Axes", picture: Image.Image) -> None:
    """The picture, darker, for points to stand out."""
    axes.imshow(picture.point([level * 5 // 8 for level in range(256)] * 3))
    axes.set_autoscale_on(False)


def _draw_query(axes: "Axes", record: BlockAttention, view: View, cell: tuple[int, int]) -> None:
    """A star at the query and a frame around its cell."""
    from matplotlib.patches import Rectangle

    width, height = (record.stride * factor for factor in view.factors)
    corner = cell[1] * width - 0.5, cell[0] * height - 0.5
    axes.add_patch(Rectangle(corner, width, height, fill=False, color="lime", linewidth=0.8))
    draw_star(axes, *view.query)


def draw_star(axes: "Axes", x: float, y: float) -> None:
    """Where a query is."""
    axes.scatter(x, y, 45, marker="*", color="lime", edgecolors="black", linewidths=0.5, zorder=3)


def _scatter(axes: "Axes", points: Tensor, areas: Any, **style: Any) -> None:
    axes.scatter(points[:, 0], points[:, 1], areas, edgecolors="white", zorder=2, **style)


def _spacing(record: BlockAttention) -> float:
    """Typographic points from a key to the next in a panel, within what looks well."""
    return min(max(PANEL * 72 / max(record.layer.key_size(record.size)), 4.0), 16.0)


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a picture file in the format of its suffix; a crash leaves the old file or the new one.

    Raises:
        ConfigError: matplotlib cannot write such files.
        OSError: the file cannot be written; no temporary file stays behind.
    """
    path = Path(path)
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def check_format(path: Path) -> None:
    """Raises ConfigError where matplotlib is missing or writes no files of this suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ConfigError(f"{path}: should be a file of one of the formats {', '.join(sorted(known))}")


@dataclass
class InputConfig:
    """What a classifier's configuration says in `data` of the pictures that it was trained on."""

    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic", "nearest"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what its input should look like.

    Attributes:
        title: its name and where its weights are from.
        data: mean, std, interpolation and the side img_size of its input.
        class_names: empty where not known.
    """

    model: DAT
    title: str
    data: dict[str, Any]
    class_names: list[str] = field(default_factory=list)


def load_model(source: str) -> LoadedModel:
    """A DAT in evaluation mode.

    Args:
        source: its name in timm, for random weights; name:FILE for its weights, official ones too; or a checkpoint of
            this project's classifier.

    Raises:
        ConfigError, CheckpointError: there is no such model or file, or they do not fit.
    """
    name, colon, file = source.partition(":")
    if timm.is_model(name.split(".")[0]):
        return _load_by_name(name, file if colon else None)
    if not Path(source).is_file():
        raise ConfigError(f"{source}: neither a timm model, such as dat_tiny, nor a checkpoint file")
    path = Path(source)
    trained = load_trained(path, "classification")
    backbone, data = trained.config["model"].get("backbone"), trained.config.get("data")
    if not isinstance(backbone, dict) or not isinstance(data, dict):
        raise CheckpointError(f"{path}: its configuration has no model.backbone or no data")
    arguments, names = without_weights(backbone), trained.class_names
    with blaming(path):
        known = {field.name: data[field.name] for field in fields(InputConfig) if field.name in data}
        config = from_dict(InputConfig, known, source)
        check_range(config, ["img_size"], 1, LARGEST_SIDE)
    model = rebuild(lambda: create_timm_model(arguments, num_classes=len(names)), trained.weights, path)
    return LoadedModel(_check_model(model, source), f"{backbone['name']}, {path.name}", asdict(config), names)


def _load_by_name(name: str, file: str | None) -> LoadedModel:
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"{file}: no such file of weights for {name}")
    with isolated_rng(0):
        model = _check_model(create_timm_model({"name": name}, key="MODEL"), name)
    if file is not None:
        load_classifier_weights(model, file)
    data = resolve_model_data_config(model)
    kept = {key: data[key] for key in ("mean", "std", "interpolation")}
    title = f"{name}, {'random weights' if file is None else Path(file).name}"
    return LoadedModel(model, title, {"img_size": data["input_size"][-1], **kept})


def _check_model(model: nn.Module, name: str) -> DAT:
    if not isinstance(model, DAT) or not deformable_blocks(model):
        raise ConfigError(f"{name}: has no D (deformable) blocks to draw")
    return model.eval()


def to_input(picture: Image.Image, data: dict[str, Any], side: int | None = None) -> Tensor:
    """All of a picture as a normalised tensor [3, H, W].

    Args:
        picture: RGB.
        data: see LoadedModel.
        side: of the shorter side of the result, whose aspect ratio is the picture's; None: img_size, square.
    """
    size = (data["img_size"], data["img_size"])
    if side is not None:
        scale = side / min(picture.size)
        size = (round(picture.height * scale), round(picture.width * scale))
    transform = create_transform(
        (3, *size),
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=1.0,
        crop_mode="squash",
    )
    return transform(picture)


def choose_blocks(model: DAT, stage: int | None, block: int | None) -> list[tuple[int, int]]:
    """(stage, block) of the D blocks to draw: of a stage, or of every stage, the last one, unless `block` says which.

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
        raise ConfigError(f"{wanted}: no D block there; the stages and blocks that are: {listed}")
    return list(chosen.values())


def predicted(loaded: LoadedModel, logits: Tensor) -> str:
    """The class that the model finds, where their names are known, as a line of the title."""
    if not loaded.class_names:
        return ""
    score, label = logits.float().softmax(-1).max(-1)
    return f"; {loaded.class_names[int(label)]} {score:.0%}"


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
        image: picture file.
        query: (x, y) in pixels of the picture; None: its centre.
        stage, block: see choose_blocks.
        size: see `side` of to_input.

    Raises:
        ConfigError, CheckpointError, DataError: an argument is wrong; the message says which.
    """
    picture = read_picture(image)
    x, y = query or ((picture.width - 1) / 2, (picture.height - 1) / 2)
    if not (0 <= x < picture.width and 0 <= y < picture.height):
        raise ConfigError(f"--query {x:g} {y:g}: outside of {image}, {picture.width} x {picture.height} pixels")
    loaded = load_model(source)
    chosen = choose_blocks(loaded.model, stage, block)
    tensor = to_input(picture, loaded.data, size)
    with blaming(Path(source)):
        records, logits = capture_attention(loaded.model, tensor, chosen)
    view = View(picture, (tensor.shape[1], tensor.shape[2]), (x, y))
    H, W = view.input_size
    title = f"{loaded.title}, input {H}×{W}, query ({x:g}, {y:g}){predicted(loaded, logits)}"
    return draw_blocks(records, view, title) if stage is None else draw_block(records[0], view, title)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="dat.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a DAT by its name in timm (random weights), name:FILE with weights, or a classifier's best.pth"
    )
    parser.add_argument("image", type=Path, help="a picture file; the model sees all of it")
    parser.add_argument("--query", nargs=2, type=float, metavar=("X", "Y"), help="pixel of the picture (its centre)")
    parser.add_argument("--out", type=Path, required=True, help="picture file: .png, .pdf, .svg, ...")
    parser.add_argument("--stage", type=int, help="from 0; draws one block with all its heads")
    parser.add_argument("--block", type=int, help="of the stage, from 0 (its last D block)")
    parser.add_argument("--size", type=int, help="shorter side of the input, aspect ratio kept (square, as trained)")
    arguments = parser.parse_args()
    if arguments.size is not None and arguments.size < 1:
        raise ConfigError(f"--size is {arguments.size}, should be at least 1")
    check_format(arguments.out)
    query = None if arguments.query is None else (arguments.query[0], arguments.query[1])
    figure = visualize(arguments.model, arguments.image, query, arguments.stage, arguments.block, arguments.size)
    save_figure(figure, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main_guard(main)
