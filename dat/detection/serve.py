"""Serves a detector: a page to drop pictures on, and an HTTP endpoint for programs.

    python -m detection.serve MODEL [--host 127.0.0.1] [--port 8000]

MODEL is a checkpoint, or an .onnx or .pt2 that detection.export wrote. / is the page, /detect the endpoint for programs
and /openapi.json its description:

    curl --data-binary @photo.jpg -H "Content-Type: image/jpeg" "http://127.0.0.1:8000/detect?threshold=0.3"
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dat.detection.predictor import load_predictor
from dat.engine.distributed import setup_distributed
from dat.utils.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection.serve", description="Serves a detector over HTTP.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="best.pth of a run, or an exported .onnx or .pt2")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    parser.add_argument("--max-megabytes", type=float, default=16.0, help="largest upload (16)")
    parser.add_argument("--max-megapixels", type=float, default=40.0, help="largest picture (40)")
    parser.add_argument("--max-waiting", type=int, default=256, help="most requests that wait for their turn (256)")
    parser.add_argument("--top-k", type=int, default=100, help="most detections per picture (100)")
    parser.add_argument("--trust", action="store_true", help="load a .pt2, which can run any code")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    for name in ("max_megabytes", "max_megapixels", "max_waiting", "top_k"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}, should be above 0")
    try:
        import uvicorn

        from dat.detection.app import Limits, create_app
    except ImportError as error:
        raise ConfigError(f"serving needs fastapi and uvicorn: pip install fastapi uvicorn ({error})") from error
    device: torch.device = setup_distributed(options.device).device
    predictor = load_predictor(options.model, device, options.top_k, options.trust)
    limits = Limits(round(options.max_megabytes * 2**20), round(options.max_megapixels * 10**6), options.max_waiting)
    print(f"http://{options.host}:{options.port}: {options.model}, {len(predictor.categories)} classes", flush=True)
    # what ends a server as it should
    with suppress(KeyboardInterrupt):
        uvicorn.run(create_app(predictor, limits), host=options.host, port=options.port, log_level="warning")
