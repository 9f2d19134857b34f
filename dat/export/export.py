"""Writes models as ONNX files, torch.export and AOTInductor packages, each checked before it takes its place."""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dat.engine.config import LARGEST_SIDE
from dat.export.aot_inductor import write_compiled
from dat.export.runtime import load_exported
from dat.utils.errors import ConfigError, UserError, one_line

Tensors = tuple[Tensor, ...]
# loggers of exporters, which tell of steps that no reader can do anything about; errors are raised
CHATTER = ("onnxscript", "onnx_ir", "torch.export", "torch.onnx", "torch.utils.cpp_extension")


class ExportError(UserError, RuntimeError):
    """A model that cannot be exported, or whose exported form does not give its results."""


@dataclass(frozen=True)
class Graph:
    """What is exported: a module in evaluation mode on the CPU, and what its inputs and outputs are.

    Attributes:
        module: tensors to a tuple of tensors; pre- and post-processing are part of it.
        inputs: names of its inputs, in order, each with the names of the axes that may have any size.
        outputs: names of its outputs, in order.
        example: inputs to trace with, whose values do not matter. No axis of any size, of a map in the model either,
            should be 1 long, which broadcasts.
        metadata: what a program has to know beside them, as JSON holds it; see `dat.export.runtime.Exported`.
        difference: (torch's outputs, the exported model's) to the largest differences by name, as `check` judges them.
        tolerances: the largest differences that are allowed, by name.
        multiples: what the sizes of an axis of any size are multiples of, by the axis's name, where they are.
    """

    module: nn.Module
    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    example: Tensors
    metadata: dict[str, Any]
    difference: Callable[[Tensors, Tensors], dict[str, float]]
    tolerances: dict[str, float]
    multiples: dict[str, int] = field(default_factory=dict)


def export_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments that export commands share: checkpoint, --out, --compile, --images and --sizes."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pth or last.pth of a run")
    parser.add_argument("--out", type=Path, required=True, help="file that ends in .onnx or .pt2")
    parser.add_argument("--compile", action="store_true", help="a .pt2 of machine code, by AOTInductor")
    parser.add_argument("--images", type=Path, help="pictures to check on, a file or a folder (the validation data)")
    parser.add_argument("--sizes", type=int, nargs=2, metavar="PIXELS", help="shortest edges to check at")
    return parser


def check_path(path: Path, compiled: bool = False) -> None:
    """Raises ConfigError unless a model can be written to this path, as what its ending says."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--out: {path} should end in .onnx (ONNX) or .pt2 (torch.export)")
    if compiled and path.suffix != ".pt2":
        raise ConfigError(f"--out: {path} should end in .pt2 with --compile")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out: {path} is a folder, or in a folder that does not exist")


def export_checked(graph: Graph, samples: Sequence[Tensors], path: Path, compiled: bool = False) -> dict[str, float]:
    """Exports a model, runs the file on samples, and puts it at `path` if it gives what torch gives.

    Args:
        graph: what to export.
        samples: inputs to compare on.
        path: .onnx or .pt2; nothing is left there, or beside it, if anything fails.
        compiled: .pt2 is a package of AOTInductor, not of torch.export.

    Returns:
        The largest differences by name.

    Raises:
        ConfigError: a path or a library that is missing.
        ExportError: torch cannot export the model, or the file gives other results.
    """
    check_path(path, compiled)
    write = _write_onnx if path.suffix == ".onnx" else _write_compiled if compiled else _write_program
    module = graph.module.eval()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with torch.no_grad(), _without_chatter():
            write(graph, temporary)
            worst = _check(graph, module, samples, temporary)
        os.replace(temporary, path)
    return worst


@contextmanager
def _without_chatter() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in CHATTER]
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


def _check(graph: Graph, module: nn.Module, samples: Sequence[Tensors], path: Path) -> dict[str, float]:
    exported = load_exported(path, graph.metadata["kind"], trust=True)
    worst = dict.fromkeys(graph.tolerances, 0.0)
    for inputs in samples:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        for name, value in graph.difference(module(*inputs), exported.run(*inputs)).items():
            # a NaN is no agreement
            if not value <= graph.tolerances[name]:
                raise ExportError(
                    f"{path.name}: {name} of the exported model differ by {value:.2g} from torch's at inputs {shapes}, "
                    f"should be at most {graph.tolerances[name]:g}; nothing was written"
                )
            worst[name] = max(worst[name], value)
    return worst


def _program(graph: Graph) -> Any:
    """The torch.export program, for any size of the named axes."""
    axes = [{axis: _any_size(name, graph.multiples) for axis, name in names.items()} for names in graph.inputs.values()]
    try:
        # Sizes that may be 1 are not told apart from others, or the program would take no others.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return torch.export.export(graph.module, graph.example, dynamic_shapes=tuple(axes), strict=False)
    # it raises errors of every kind, with the cause in the first line
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ExportError(f"torch.export cannot capture this model: {type(error).__name__}: {reason}") from error


def _any_size(axis: str, multiples: dict[str, int]) -> Any:
    if axis not in multiples:
        return torch.export.Dim.DYNAMIC
    # Once the multiple works as well, but as a least size of 1 it would be told apart from others.
    return multiples[axis] * torch.export.Dim(axis, min=2, max=LARGEST_SIDE // multiples[axis])


def _write_onnx(graph: Graph, path: Path) -> None:
    try:
        import onnx

        from dat.ops.onnx import translation_table
    except ImportError as error:
        raise ConfigError("writing ONNX needs onnx and onnxscript: pip install onnx onnxscript onnxruntime") from error
    program = _program(graph)
    exported = torch.onnx.export(
        program,
        (),
        opset_version=20,
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        custom_translation_table=translation_table(),
        verbose=False,
    )
    if exported is None:
        raise ExportError("torch.onnx gave no model")
    model = exported.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in graph.metadata.items()})
    for value, axes in zip(model.graph.input, graph.inputs.values(), strict=True):
        for axis, name in axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(model, path)


def _write_program(graph: Graph, path: Path) -> None:
    torch.export.save(_program(graph), path, extra_files={"metadata.json": json.dumps(graph.metadata)})


def _write_compiled(graph: Graph, path: Path) -> None:
    print(f"{graph.metadata['kind']} model: compiling, which can take minutes", file=sys.stderr, flush=True)
    inputs = {}
    for (name, axes), example in zip(graph.inputs.items(), graph.example, strict=True):
        sizes = [_sizes(axes.get(axis), size, graph.multiples) for axis, size in enumerate(example.shape)]
        inputs[name] = (str(example.dtype), sizes)
    try:
        write_compiled(_program(graph), inputs, graph.metadata, path)
    # of no compiler, of one that fails, or of torch's own
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile this model: {one_line(error)}") from error


def _sizes(axis: str | None, size: int, multiples: dict[str, int]) -> tuple[int, int]:
    """The smallest and the largest of an axis that has a name if it may have any size, else this one."""
    return (size, size) if axis is None else (multiples.get(axis, 1), LARGEST_SIDE)
