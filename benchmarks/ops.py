"""Measures the ops beside every other implementation that this machine can run.

    python -m benchmarks.ops [--quick] [--only encoder,decoder] [--out benchmarks/results]

Time, peak memory and error against float64, forward and backward, in float32 and half precision. The workloads are
Deformable DETR's attention (encoder: a query for every pixel, decoder: 300 queries; 8 heads of 32 channels, 4 levels, 4
points), as a whole and its sampling alone, DAT's sampling of keys, and a deformable convolution. Further sections:
torch.compile of the attention, growth with queries and images, scaling with threads. Results go to ops_cpu.json or
ops_<gpu>.json in --out.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_cuda_peers, ops_measure, ops_table, ops_work
from benchmarks.ops_peers import OURS, compiled_peers, peer, sampling_peers, whole_path
from benchmarks.timing import device, machine, names_of, write_json

Rows = Iterator[dict[str, Any]]


def attention(section: str, args: argparse.Namespace) -> Rows:
    """The whole attention and its sampling alone, in the encoder or the decoder."""
    sampled, _ = sampling_peers(args.device)
    on_gpu, _ = ops_cuda_peers.load(args.device, args.folders)
    whole = [OURS["attention"], *map(whole_path, (OURS["sampling"], *sampled)), *on_gpu]
    for size in ops_work.SIZES[: 1 if args.quick else None]:
        name = f"{section} {size[0]}x{size[1]}"
        queries = None if section == "encoder" else ops_work.QUERIES
        work = ops_work.attention(name, ops_work.levels(size), queries, args.device)
        yield from ops_measure.measure(section, work, whole, args.device, args.budget)
        implementations = [OURS["sampling"], *sampled]
        yield from ops_measure.measure(section, ops_work.sampling(work), implementations, args.device, args.budget)


def encoder(args: argparse.Namespace) -> Rows:
    yield from attention("encoder", args)


def decoder(args: argparse.Namespace) -> Rows:
    yield from attention("decoder", args)


def dat(args: argparse.Namespace) -> Rows:
    for size in ops_work.DAT_SIZES[: 1 if args.quick else None]:
        for stage in ops_work.DAT_STAGES:
            work = ops_work.dat(*stage, size, args.device)
            yield from ops_measure.measure(
                "dat", work, (OURS["dat"], peer("dat", args.device)), args.device, args.budget / 4
            )


def dcn(args: argparse.Namespace) -> Rows:
    work = ops_work.dcn(args.device)
    yield from ops_measure.measure("dcn", work, (OURS["dcn"], peer("dcn", args.device)), args.device, args.budget)


def compiled(args: argparse.Namespace) -> Rows:
    """torch.compile of the encoder's attention, in float32; compilation is not included in the times."""
    for size in ops_work.SIZES[: 1 if args.quick else None]:
        work = ops_work.attention(f"encoder {size[0]}x{size[1]}", ops_work.levels(size), None, args.device)
        peers, _ = compiled_peers(args.device)
        if peers:
            implementations = (OURS["attention"], peer("attention", args.device), *peers)
            implementations = [i.only(torch.float32) for i in implementations]
            yield from ops_measure.measure("compiled", work, implementations, args.device, args.budget)


def growth(args: argparse.Namespace) -> Rows:
    yield from ops_measure.growth(args.device, args.budget)


def threads(args: argparse.Namespace) -> Rows:
    if args.device.type == "cpu":
        sizes = ops_work.SIZES[: 1 if args.quick else None]
        works = (ops_work.attention(f"encoder {s[0]}x{s[1]}", ops_work.levels(s), None, args.device) for s in sizes)
        yield from ops_measure.scaling(list(works), args.device, args.budget)


SECTIONS = {f.__name__: f for f in (encoder, decoder, dat, dcn, compiled, growth, threads)}
# Left out of --quick, unless --only names them.
SLOW = ("compiled", "growth")


def kept(path: Path, measured: list[str]) -> list[dict[str, Any]]:
    """Rows of sections that were not measured in this run, from an earlier file of the same machine."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["machine"] != machine():
        print(f"{path} was written on another machine, or with another torch: its rows are dropped")
        return []
    return [row for row in before["rows"] if row.get("section") in SECTIONS and row["section"] not in measured]


def missing(args: argparse.Namespace) -> list[str]:
    """Reasons why peers were not measured."""
    reasons = sampling_peers(args.device)[1] + ops_cuda_peers.load(args.device, args.folders)[1]
    if "compiled" in args.only:
        reasons += compiled_peers(args.device)[1]
    if args.device.type != "cpu" and "threads" in args.only:
        reasons.append("threads: of a CPU only")
    return reasons


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="less work, few repeats; not written unless --out says where"
    )
    parser.add_argument(
        "--only", type=names_of(SECTIONS), help=f"of {','.join(SECTIONS)}; rows of others stay in the file"
    )
    parser.add_argument("--out", type=Path, help="folder or .json file; default: benchmarks/results")
    original = "folder with the built extension MultiScaleDeformableAttention of fundamentalvision/Deformable-DETR"
    parser.add_argument("--original", type=Path, help=original)
    parser.add_argument("--dcnv4", type=Path, help="folder with the built package DCNv4 of OpenGVLab/DCNv4")
    args = parser.parse_args(argv)
    args.only = args.only or [name for name in SECTIONS if not args.quick or name not in SLOW]
    args.folders = {name: getattr(args, name) for name in ("original", "dcnv4")}
    args.budget = 1.0 if args.quick else 10.0
    if args.out is None and not args.quick:
        args.out = Path("benchmarks/results")
    if args.out is not None and args.out.suffix != ".json":
        gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
        args.out = args.out / f"ops_{re.sub(r'[^a-z0-9]+', '_', gpu.lower())}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for reason in missing(args):
        print("not measured:", reason)
    rows: list[dict[str, Any]] = []
    for name, section in SECTIONS.items():
        if name in args.only:
            measured = list(section(args))
            rows += measured
            print(ops_table.table(measured), flush=True)
    if args.out:
        rows += kept(args.out, args.only)
        rows.sort(key=lambda row: list(SECTIONS).index(row["section"]))
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
