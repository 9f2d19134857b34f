"""Figures with weighted points drawn over an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor

from dat.utils.errors import ConfigError
from dat.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 2.3  # inches
DPI = 130
# Sides of the image in a panel, with some to spare for figures of other resolutions.
MOST_PIXELS = 1024
# Images of other ratios of height to width are stretched.
FLATTEST, TALLEST = 0.15, 3


def create_figure(rows: int, columns: int, image: Image.Image, title: str) -> tuple["Figure", Any]:
    """A figure of empty panels with the image's aspect ratio, and its axes [rows * columns]."""
    # pyplot would keep the figure in memory until it is closed.
    from matplotlib.figure import Figure

    height = PANEL * min(max(image.height / image.width, FLATTEST), TALLEST)
    figure = Figure(figsize=(PANEL * columns, (height + 0.4) * rows + 0.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes:
        panel.axis("off")
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, axes


class Backdrop(NamedTuple):
    """An image darkened, so that points stand out, and reduced to the size of a panel; `size` is the original's."""

    image: Image.Image
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image) -> "Backdrop":
        """The backdrop of an image in RGB; one serves all panels of a figure."""
        reduced = image.copy()
        reduced.thumbnail((MOST_PIXELS, MOST_PIXELS))
        return cls(reduced.point([level * 5 // 8 for level in range(256)] * 3), image.size)

    def draw(self, axes: "Axes") -> None:
        """Draws it on axes in pixels of the image."""
        width, height = self.size
        axes.imshow(self.image, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        if not FLATTEST * width <= height <= TALLEST * width:
            axes.set_aspect("auto")
        axes.set_autoscale_on(False)


def draw_star(axes: "Axes", x: float, y: float) -> None:
    """Marks the position of a query."""
    axes.scatter(x, y, 45, marker="*", color="lime", edgecolors="black", linewidths=0.5, zorder=3)


def scatter(axes: "Axes", points: Tensor, areas: Any, **style: Any) -> None:
    axes.scatter(points[:, 0], points[:, 1], areas, edgecolors="white", zorder=2, **style)


def draw_weighted(
    axes: "Axes", points: Tensor, weights: Tensor, diameter: float, limits: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Draws points by weight: their area starts at zero, their colour runs from the smallest to the largest weight.

    Args:
        axes: of matplotlib, in pixels of an image.
        points: [n, 2], (x, y) in its pixels.
        weights: [n], not negative.
        diameter: of the largest, in typographic points.
        limits: smallest and largest weight of all panels to compare; None: of these weights.

    Returns:
        The limits in use.
    """
    order = weights.argsort()
    weights, points = weights[order], points[order]
    low, high = limits or (weights[0].item(), weights[-1].item())
    areas = weights / max(high, 1e-12) * diameter**2
    scatter(axes, points, areas, c=weights, vmin=low, vmax=high, cmap="plasma", alpha=0.85, linewidths=diameter / 30)
    return low, high


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a file in the format of its suffix; a crash leaves the old file or the new one.

    Raises:
        ConfigError: matplotlib cannot write such files.
        OSError: the file cannot be written; no temporary file stays behind.
    """
    check_format(path)
    from dat.utils.fonts import figure_fonts

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, figure_fonts(figure):
        figure.savefig(temporary)


def check_format(path: Path) -> None:
    """Raises ConfigError if matplotlib is missing or cannot write files of this suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ConfigError(f"{path}: should be a file of one of the formats {', '.join(sorted(known))}")
