"""Draws the figures of how_it_works.md from the layers themselves: python docs/figures.py"""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dat.layers import DeformableAttention, MSDeformAttn

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#15803d", "#9ca3af"


def draw_grid(axes: Axes, height: int, width: int, color: str = GREY) -> None:
    """Pixels of a feature map as squares of side 1, with pixel (0, 0) centred at the origin."""
    for row in range(height):
        for column in range(width):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=0.7))
    axes.set_xlim(-0.7, width - 0.3)
    axes.set_ylim(height - 0.3, -0.7)
    axes.set_aspect("equal")
    axes.axis("off")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black", width: float = 1.2):
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def bilinear() -> Figure:
    """One sample between four pixels, and one that lies partly outside of the map."""
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    draw_grid(axes, 4, 7)
    for x, y in ((2.3, 1.6), (6.25, 2.0)):
        for row in (int(y), int(y) + 1):
            for column in (int(x), int(x) + 1):
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                if weight > 0 and column < 7:
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=BLUE, alpha=0.75 * weight))
                    axes.text(column, row + 0.36, f"{weight:.2f}", ha="center", va="center", fontsize=9, zorder=4)
        axes.plot(x, y, "o", color=ORANGE, markersize=7, zorder=5)
    axes.plot(*zip(*[(c, r) for r in range(4) for c in range(7)], strict=True), ".", color="black", markersize=3)
    axes.text(2.3, -0.85, "(x, y) = (2.3, 1.6)", ha="center", color=ORANGE, fontsize=10)
    axes.text(6.9, 2.75, "outside\ncounts as 0", ha="left", va="center", fontsize=9)
    axes.set_xlim(-0.7, 8.4)
    axes.set_ylim(3.7, -1.2)
    return figure


def offset_layer(factor: float, stride: int = 2) -> tuple[DeformableAttention, torch.Tensor]:
    """A layer of the release of 2022 with random offsets, and queries of an 8 x 8 map."""
    torch.manual_seed(4)
    layer = DeformableAttention(32, 4, stride=stride, offset_range_factor=factor)
    torch.nn.init.normal_(layer.offset_proj.weight, std=0.45 if factor > 0 else 0.09)
    return layer, torch.randn(1, 8, 8, 32)


@torch.no_grad()
def offsets() -> Figure:
    """Keys at their reference points, moved within a range, and moved freely."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    layer, query = offset_layer(1.0)
    layer.offset_proj.weight.zero_()
    reference = layer.positions(query)[0, 0]
    titles = {"reference points": 0.0, "offsets within a range": 1.0, "offsets without a range": -1.0}
    for axes, (title, factor) in zip(panels, titles.items(), strict=True):
        draw_grid(axes, 8, 8)
        axes.set_title(title, fontsize=11)
        start = (reference + 1) / 2 * 7
        axes.plot(start[:, 0], start[:, 1], "+", color="black", markersize=8)
        if not factor:
            continue
        layer, query = offset_layer(factor)
        moved = (layer.positions(query)[0, 0] + 1) / 2 * 7
        half = 7 / 2 * factor / 4
        for (x, y), end in zip(start.tolist(), moved.tolist(), strict=True):
            if half > 0:
                corner = (x - half, y - half)
                axes.add_patch(Rectangle(corner, 2 * half, 2 * half, facecolor=BLUE, alpha=0.1, edgecolor="white"))
            axes.plot((x, end[0]), (y, end[1]), color=BLUE, linewidth=1)
        axes.plot(moved[:, 0], moved[:, 1], "o", color=BLUE, markersize=5)
    return figure


def coordinates() -> Figure:
    """A row of four pixels under both conventions, and where the two releases put queries and keys."""
    figure, panels = plt.subplots(2, 1, figsize=(8.2, 5.0), layout="constrained", height_ratios=(2.0, 3.4))
    keys, queries = 2, 4
    conventions = {
        "-1 and 1 on the outer edges (align_corners=False)": (lambda p: (p + 1) / 2 * 4 - 0.5, False),
        "-1 and 1 on the centres of the first and last pixel (align_corners=True)": (lambda p: (p + 1) / 2 * 3, True),
    }
    for axes, (title, (pixel, corners)) in zip(panels, conventions.items(), strict=True):
        for column in range(4):
            axes.add_patch(Rectangle((column - 0.5, 0), 1, 1, facecolor="#f3f4f6", edgecolor=GREY))
            axes.plot(column, 0.5, ".", color="black", markersize=4)
        for position in (-1, -0.5, 0, 0.5, 1):
            axes.plot((pixel(position),) * 2, (-0.25, 0.08), color="black", linewidth=1)
            axes.text(pixel(position), -0.3, f"{position:g}", ha="center", va="top", fontsize=9)
        if corners:
            rows = (
                ("queries, 2022", GREEN, 1.25, [(i + 0.5) / queries * 2 - 1 for i in range(queries)], "s"),
                ("queries, 2023", GREEN, 1.6, [i / (queries - 1) * 2 - 1 for i in range(queries)], "s"),
                ("keys, 2022", ORANGE, 2.05, [(i + 0.5) / keys * 2 - 1 for i in range(keys)], "^"),
                ("keys, 2023", ORANGE, 2.4, [(i + 0.5) / (keys - 1) * 2 - 1 for i in range(keys)], "^"),
            )
            for label, color, height, places, marker in rows:
                axes.plot([pixel(p) for p in places], [height] * len(places), marker, color=color, markersize=6)
                axes.text(-0.75, height, label, ha="right", va="center", fontsize=9, color=color)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlim(-2.4, 5.2)
        axes.set_ylim(-0.7, 2.7 if corners else 1.3)
        axes.set_aspect("equal")
        axes.axis("off")
    return figure


def bias() -> Figure:
    """The table of position biases, and the window of it that two queries of a 4 x 5 map see."""
    height, width = 4, 5
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", width_ratios=(5, 8, 8))
    rng = torch.Generator().manual_seed(1)
    keys = torch.rand(6, 2, generator=rng) * torch.tensor([width - 1.0, height - 1.0])
    table = torch.nn.functional.interpolate(
        torch.randn(1, 1, 4, 5, generator=rng), (2 * height - 1, 2 * width - 1), mode="bicubic", align_corners=True
    )[0, 0]
    draw_grid(panels[0], height, width)
    panels[0].set_title("map: two queries, six keys", fontsize=10)
    panels[0].plot(keys[:, 0], keys[:, 1], "^", color=ORANGE, markersize=6)
    for axes, (x, y), color in zip(panels[1:], ((1, 1), (4, 2)), (GREEN, BLUE), strict=True):
        panels[0].plot(x, y, "s", color=color, markersize=8)
        axes.imshow(table, cmap="Greys", alpha=0.6)
        draw_grid(axes, 2 * height - 1, 2 * width - 1, "white")
        left, top = x - 0.5, y - 0.5
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=2.5))
        place = torch.tensor([x + width - 1.0, y + height - 1.0]) - keys
        axes.plot(place[:, 0], place[:, 1], "^", color=ORANGE, markersize=6)
        axes.plot(width - 1, height - 1, "+", color="black", markersize=9)
        axes.set_title(f"table, query at row {y}, column {x}", fontsize=10, color=color)
    return figure


@torch.no_grad()
def levels() -> Figure:
    """Samples of one query on four levels, of an untrained layer: in pixels they are alike, in the image not."""
    sizes = ((32, 32), (16, 16), (8, 8), (4, 4))
    layer = MSDeformAttn(64, len(sizes), num_heads=8, num_points=4)
    offset = layer.sampling_offsets.bias.view(8, len(sizes), 4, 2)
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
    reference = torch.tensor([0.45, 0.55])
    for level, (axes, (h, w)) in enumerate(zip(panels, sizes, strict=True)):
        center = reference * torch.tensor([w, h]) - 0.5
        draw_grid(axes, h, w, "#d1d5db")
        points = (center + offset[:, level]).flatten(0, 1)
        colors = [plt.get_cmap("tab10")(head) for head in range(8) for _ in range(4)]
        axes.scatter(points[:, 0], points[:, 1], 12, color=colors, zorder=3)
        axes.plot(*center.tolist(), "*", color="black", markersize=9)
        axes.set_title(f"stride {2 ** (level + 3)}: {h} x {w}", fontsize=10)
        margin = max(0.7, 4.8 - w / 2)
        axes.set_xlim(-margin, w - 1 + margin)
        axes.set_ylim(h - 1 + margin, -margin)
    return figure


def block(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.0, height: float = 0.9) -> None:
    style = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor=color, edgecolor="#374151",
    )  # fmt: skip
    axes.add_patch(style)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def detector() -> Figure:
    """Deformable DETR from image to boxes; dashed: the second stage."""
    figure, axes = plt.subplots(figsize=(10.4, 4.1), layout="constrained")
    block(axes, 1.0, 2.0, "image\n[3, H, W]", "white", 1.5)
    block(axes, 3.3, 2.0, "backbone\nany timm model", "#dbeafe")
    block(axes, 5.9, 2.0, "levels\nstride 8, 16, 32, 64", "#f3f4f6", 2.3)
    block(axes, 8.6, 2.0, "encoder\nevery position\nis a query", "#dcfce7", 2.1, 1.2)
    block(axes, 11.4, 2.0, "decoder\n300 queries,\nlayer by layer", "#ffedd5", 2.1, 1.2)
    block(axes, 14.1, 2.0, "classes and boxes\nof each query", "white", 2.3)
    for start, end in ((1.75, 2.3), (4.3, 4.75), (7.05, 7.55), (9.65, 10.35), (12.45, 12.95)):
        arrow(axes, (start, 2.0), (end, 2.0))
    block(axes, 8.0, 4.0, "class and box head\non every position", "#f3f4f6", 2.3)
    block(axes, 11.6, 4.0, "best 300 boxes:\nreferences of the queries", "#f3f4f6", 3.0)
    for start, end in (((8.2, 2.6), (8.2, 3.55)), ((9.15, 4.0), (10.1, 4.0)), ((11.4, 3.55), (11.4, 2.6))):
        arrow(axes, start, end, ORANGE)
    axes.text(14.4, 4.0, "two-stage", color=ORANGE, fontsize=10, ha="center", va="center")
    block(axes, 11.4, 0.2, "learned queries and points", "#f3f4f6", 3.0, 0.7)
    arrow(axes, (11.4, 0.55), (11.4, 1.4), GREEN)
    axes.text(14.4, 0.2, "single stage", color=GREEN, fontsize=10, ha="center", va="center")
    axes.set_xlim(0, 15.5)
    axes.set_ylim(-0.4, 4.7)
    axes.axis("off")
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (bilinear, offsets, coordinates, bias, levels, detector)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for draw in FIGURES:
        figure = draw()
        figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
