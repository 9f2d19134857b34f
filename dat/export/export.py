"""Writes models as ONNX files, torch.export or AOTInductor packages, and compares each with torch before it is kept."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._sympy.value_ranges import ValueRanges

from dat.engine.config import LARGEST_SIDE
from dat.export.aot_inductor import write_compiled
from dat.export.graph import Graph, Tensors
from dat.export.runtime import load_exported
from dat.utils.errors import ConfigError, DataError, ExportError, one_line
from dat.utils.files import find_images, name_full_disk
from dat.utils.images import read_image
from dat.utils.text import echo

# Shape of the batch to trace with: maps of stride 32 have more than two windows along each side, and no side divides
# evenly.
EXAMPLE = (2, 3, 545, 673)
# Loggers of exporters, whose warnings no user can act on; errors are raised.
LOGGERS = ("onnxscript", "onnx_ir", "torch.export", "torch.onnx", "torch.utils.cpp_extension")


@dataclass(frozen=True)
class Samples:
    """Two images in RGB that an exported file is checked on, and where they are from."""

    images: tuple[Image.Image, Image.Image]
    origin: str

    @classmethod
    def read(cls, source: Path | None, validation: Path) -> "Samples":
        """The first readable images of `source`, else of the folder of validation data, else generated ones.

        Raises DataError if `source` is given and has none.
        """
        place = source or validation
        try:
            found = _first_two(find_images(place)[0])
        except DataError:
            if source is not None:
                raise
            return cls((_generate(0), _generate(1)), "generated images")
        # The mirror image stands in for a missing second image.
        return cls((found[0], found[-1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)), str(place))

    def batches(self, sizes: Sequence[int]) -> list[Tensor]:
        """Batches uint8 [B, 3, H, W] of 2 and of 1 images for each size: the first 5:4, all others upright."""
        batches = []
        for count in (2, 1):
            for i, size in enumerate(sizes):
                shape = (size * 5 // 4, size) if i == 0 else (size, size * 3 // 2)
                images = np.stack([np.asarray(image.resize(shape)) for image in self.images[:count]])
                batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        return batches


def _first_two(paths: Sequence[Path]) -> list[Image.Image]:
    """The first two images that can be read, or one. Raises the first error if there is none."""
    found: list[Image.Image] = []
    errors: list[DataError] = []
    for path in paths:
        try:
            found.append(read_image(path))
        except DataError as error:
            errors.append(error)
        if len(found) == 2:
            break
    if not found:
        raise errors[0]
    return found


def _generate(seed: int) -> Image.Image:
    """Coloured blobs of two sizes."""
    rng = np.random.default_rng(seed)
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).resize((640, 480))
        for shape in ((3, 4), (48, 64))
    )
    return Image.blend(coarse, fine, 0.4)


def check_sizes(sizes: Sequence[int] | None, default: int) -> tuple[int, int]:
    """The two shortest edges to check at; by default `default` and a smaller one. Raises ConfigError."""
    if sizes is None:
        return default, max(default * 3 // 4, 1)
    if min(sizes) < 1 or len(set(sizes)) < 2:
        raise ConfigError(f"--sizes are {sizes[0]} and {sizes[1]}, should be two different sizes of at least 1")
    return sizes[0], sizes[1]


def check_path(path: Path, compiled: bool) -> None:
    """Raises ConfigError unless a model can be written to this path, in the format that its suffix names."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--out: {path} should end in .onnx (ONNX) or .pt2 (torch.export)")
    if compiled and path.suffix != ".pt2":
        raise ConfigError(f"--out: {path} should end in .pt2 with --compile")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out: {path} is a folder, or in a folder that does not exist")


def export_checked(graph: Graph, samples: Sequence[Tensors], path: Path, compiled: bool) -> dict[str, float]:
    """Exports a model, runs the file on samples, and moves it to `path` if it gives torch's results.

    Args:
        graph: model to export.
        samples: inputs to compare on.
        path: one that check_path took; nothing is left there, or beside it, if anything fails.
        compiled: write a package of AOTInductor instead of torch.export.

    Returns:
        The largest differences by name.

    Raises:
        ConfigError: a missing library.
        ExportError: torch cannot export the model, or the file gives other results.
    """
    write = _write_onnx if path.suffix == ".onnx" else _write_compiled if compiled else _write_program
    graph.module.eval()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with torch.no_grad(), _quiet(), name_full_disk(path):
            write(graph, temporary)
            worst = _compare(graph, samples, temporary)
        os.replace(temporary, path)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare(graph: Graph, samples: Sequence[Tensors], path: Path) -> dict[str, float]:
    exported = load_exported(path, graph.metadata["kind"], trust=True)
    worst = dict.fromkeys(graph.tolerances, 0.0)
    for inputs in samples:
        for name, value in graph.difference(graph.module(*inputs), exported.run(*inputs)).items():
            # Also true for NaN.
            if not value <= graph.tolerances[name]:
                shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
                raise ExportError(
                    f"{path.name}: {name} of the exported model differ by {value:.2g} from torch's at inputs {shapes}, "
                    f"should be at most {graph.tolerances[name]:g}; nothing was written"
                )
            worst[name] = max(worst[name], value)
    return worst


def _program(graph: Graph) -> Any:
    """The torch.export program, for any size of the named axes."""
    axes = [{axis: _dimension(name, graph) for axis, name in names.items()} for names in graph.inputs.values()]
    try:
        # Otherwise sizes that may be 1 are distinguished from others, and the program takes no others.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return torch.export.export(graph.module, graph.example, dynamic_shapes=tuple(axes), strict=False)
    # It raises errors of every kind, with the cause in the first line.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ExportError(f"torch.export cannot capture this model: {type(error).__name__}: {reason}") from error


def _dimension(axis: str, graph: Graph) -> Any:
    multiple = graph.multiples.get(axis)
    if multiple is None:
        return torch.export.Dim.DYNAMIC
    # A minimum of 1 would be distinguished from other sizes; the program takes one multiple all the same.
    return multiple * torch.export.Dim(axis, min=2, max=LARGEST_SIDE // multiple)


def _write_onnx(graph: Graph, path: Path) -> None:
    try:
        import onnx
        from onnx_ir.passes.common import CommonSubexpressionEliminationPass

        from dat.ops.onnx import translation_table
    except ImportError as error:
        raise ConfigError(f'writing ONNX needs {error.name}: pip install "dat-vision[onnx]"') from error
    exported = torch.onnx.export(
        _program(graph),
        (),
        opset_version=20,
        custom_translation_table=translation_table(),
        optimize=False,
        verbose=False,
    )
    if exported is None:
        raise ExportError("torch.onnx gave no model")
    # Every use of a size has nodes of its own so far, and the optimizer's time grows with the square of their number.
    CommonSubexpressionEliminationPass()(exported.model)
    exported.optimize()
    # Only now, as the optimizer renames values that it merges.
    ends = [*exported.model.graph.inputs, *exported.model.graph.outputs]
    for end, name in zip(ends, [*graph.inputs, *graph.outputs], strict=True):
        end.name = name
    model = exported.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in graph.metadata.items()})
    for values, names in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        for value, axes in zip(values, names.values(), strict=True):
            for axis, name in axes.items():
                dimension = value.type.tensor_type.shape.dim[axis]
                if not dimension.HasField("dim_value"):
                    dimension.dim_param = name
    onnx.save(model, path)


def _write_program(graph: Graph, path: Path) -> None:
    program = _program(graph)
    # torch concludes from the example that sides are above 32 pixels, but the graph takes any.
    for symbol, sizes in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(1, sizes.upper)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(graph.metadata)})


def _write_compiled(graph: Graph, path: Path) -> None:
    echo(f"compiling the {graph.metadata['kind']} model, which can take minutes", error=True)
    inputs = {}
    for (name, axes), example in zip(graph.inputs.items(), graph.example, strict=True):
        sizes = [
            (graph.multiples.get(axes[axis], 1), LARGEST_SIDE) if axis in axes else (size, size)
            for axis, size in enumerate(example.shape)
        ]
        inputs[name] = (str(example.dtype), sizes)
    try:
        write_compiled(_program(graph), inputs, graph.metadata, path)
    # The compiler is missing, or it or torch fails with errors of any type.
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile this model: {one_line(error)}") from error
