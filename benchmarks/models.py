"""Times whole models beside the formulation of DAT's official code and timm's swin_tiny and convnext_tiny.

    python -m benchmarks.models [--train] [--memory] [--models dat_pp_tiny] [--sizes 224,384,800x1333] [--out FILE]

Each implementation runs in a process of its own, and they take turns; one that runs out of memory is reported as such.
`--natten PYTHON` names the interpreter of an environment with NATTEN 0.14.6 and the old torch that it needs, where the
official form runs as its users run it. Without it the neighbourhoods are computed by plain PyTorch (`plain` in
model_process.py). The official code does not pad windows: models with windows are measured at larger sizes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch

import dat  # noqa: F401  registers its models
from benchmarks.process import Process, peaks, take_turns
from benchmarks.timing import device, integers, names_of, write_json
from dat.layers import DeformableAttention, NeighborhoodAttention, WindowAttention
from dat.models.dat import DAT

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
Row = dict[str, Any]


def describe(model: DAT) -> list[dict[str, Any]]:
    """The stages of a model for `OfficialForm`."""
    stages = []
    for stage in model.stages:
        config: dict[str, Any] = {"blocks": ""}
        for block in stage.blocks:
            attn = block.attn
            config["heads"] = attn.num_heads
            if isinstance(attn, DeformableAttention):
                config["blocks"] += "D"
                names = ("stride", "offset_range_factor", "release")
                config |= {name: getattr(attn, name) for name in names}
                config |= {"groups": attn.num_groups, "kernel_size": attn.offset_conv.kernel_size[0]}
            elif isinstance(attn, NeighborhoodAttention):
                config["blocks"] += "N"
            elif isinstance(attn, WindowAttention):
                config["blocks"] += "S" if attn.shift_size else "L"
                config["window_size"] = attn.window_size
            else:
                raise ValueError(f"the official formulation here has no {type(attn).__name__}")
        stages.append(config)
    return stages


class Competition:
    """Processes of one model at one size and batch, and of its peers."""

    def __init__(self, name: str, size: tuple[int, int], batch: int, options: argparse.Namespace) -> None:
        self.name, self.size, self.batch, self.options = name, size, batch, options
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        model = timm.create_model(name, drop_path_rate=0.0)
        self.stages = describe(model)
        torch.save({"stages": self.stages, "state": model.state_dict()}, self.folder / "weights.pth")

    def __enter__(self) -> "Competition":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def start(self, implementation: str) -> Process:
        # The official code does not pad windows, and timm's Swin does not pad patches.
        windows = 32 * self.stages[0].get("window_size", 1)
        multiple = windows if windows > 32 else 1 if implementation in ("ours", "official") else 32
        spec = {
            "implementation": implementation,
            "model": self.name,
            "batch": self.batch,
            "size": [-(-side // multiple) * multiple for side in self.size],
            "device": str(self.options.device),
            "threads": torch.get_num_threads(),
            "weights": str(self.folder / "weights.pth"),
            "neighborhood": "natten" if self.options.natten else self.options.neighborhood,
        }
        path = self.folder / f"{implementation}.json"
        path.write_text(json.dumps(spec))
        python = self.options.natten if implementation == "official" and self.options.natten else sys.executable
        return Process("benchmarks.model_process", [str(path)], python)

    def row(self, what: str, **results: Any) -> Row:
        return {"model": self.name, "size": list(self.size), "batch": self.batch, "what": what, **results}

    def times(self, implementations: Sequence[str], what: str) -> Row:
        """Milliseconds and images per second of each process."""
        with ExitStack() as stack:
            processes = {name: stack.enter_context(self.start(name)) for name in implementations}
            return self.row(what, **take_turns(processes, what, self.batch, self.options.repeats))

    def memory(self, implementations: Sequence[str], what: str) -> Row:
        """Peak memory of each process in megabytes."""
        return self.row(f"peak of {what}", **peaks(self.start, implementations, "peak", what))

    def blocks(self) -> Iterator[Row]:
        """Peak megabytes of the first deformable block of each stage, and of its attention, forward and backward."""
        for stage, config in enumerate(self.stages):
            index = config["blocks"].find("D")
            if index >= 0:
                for part in ("block", "attention"):
                    found = peaks(self.start, ("ours", "official"), "part", part, stage, index)
                    yield self.row(f"peak of {part} {stage}.{index}", **found)

    def difference(self) -> Row:
        """Difference between our logits and those of the official formulation."""
        logits = []
        for name in ("ours", "official"):
            path = self.folder / f"{name}.out"
            with self.start(name) as process:
                process.ask("output", str(path))
            logits.append(torch.load(path, weights_only=True))
        difference = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
        return self.row("difference", relative=difference.item())


def show(row: Row) -> None:
    size = "x".join(map(str, row["size"]))
    head = f"{row['model']:<16} {size:>8} {row['what']:<18}"
    figures = [f"{k} {json.dumps(v)}" for k, v in row.items() if k not in ("model", "size", "what", "batch")]
    print(head, *figures, sep="  ", flush=True)


def sizes(text: str) -> list[tuple[int, int]]:
    """A type of arguments: sides or HEIGHTxWIDTH with commas between, as (height, width)."""
    sides = [part.partition("x") for part in text.split(",")]
    return [(int(height), int(width or height)) for height, _, width in sides]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = timm.list_models(module="dat")
    parser.add_argument("--models", type=names_of(known), default="dat_pp_tiny", help="names with commas between")
    parser.add_argument("--sizes", type=sizes, default="224,384,800x1333", help="sides or HEIGHTxWIDTH")
    parser.add_argument("--batches", type=integers, default="8,2,1", help="images of a batch, for each size")
    parser.add_argument("--peers", default=",".join(PEERS), help="timm models to measure beside")
    parser.add_argument("--no-official", action="store_true", help="ours beside the timm models alone")
    parser.add_argument("--train", action="store_true", help="training steps too")
    parser.add_argument("--memory", action="store_true", help="peak memory too, of models and of deformable blocks")
    parser.add_argument("--no-times", action="store_true", help="only memory and difference")
    parser.add_argument("--natten", help="Python interpreter of an environment with natten 0.14.6")
    parser.add_argument("--neighborhood", choices=("plain", "ours"), default="plain", help="of the official form")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, with the machine's description")
    options = parser.parse_args(argv)
    if len(options.sizes) != len(options.batches):
        parser.error(f"--batches needs one number for each of the {len(options.sizes)} sizes")
    peers = list(filter(None, options.peers.split(",")))
    if unknown := [name for name in peers if not timm.is_model(name)]:
        parser.error(f"--peers must be models of timm, got {', '.join(unknown)}")
    rows: list[Row] = []

    def add(*more: Row) -> None:
        for row in more:
            show(row)
            rows.append(row | {"device": str(options.device)})
        if options.out:
            write_json(options.out, rows)

    official = () if options.no_official else ("official",)
    implementations = ("ours", *official, *peers)
    passes = ("forward", "step") if options.train else ("forward",)
    for name in options.models:
        for size, batch in zip(options.sizes, options.batches, strict=True):
            with Competition(name, size, batch, options) as competition:
                if official:
                    add(competition.difference())
                for what in passes:
                    if not options.no_times:
                        add(competition.times(implementations, what))
                    if options.memory:
                        add(competition.memory(implementations, what))
                if official and options.memory:
                    add(*competition.blocks())


if __name__ == "__main__":
    main()
