"""The command `dat`, and the arguments of every command.

    dat detect train|evaluate|predict|export|serve|audit|report|runs|convert ...
    dat classify train|evaluate|predict|export|audit|report|runs ...
    dat flops NAME [--size H W]
    dat ops

torch is imported only once the arguments are parsed, so that --help answers at once. The recipes of a checkout, such
as `python -m detection.train`, take the same arguments.
"""

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TASKS = {"detect": "detection", "classify": "classification"}
SUMMARIES = {
    "train": "train a model, or resume a run",
    "evaluate": "measure a trained model on validation data",
    "predict": "run a model on images and videos",
    "export": "write a trained model as ONNX, torch.export or AOTInductor file",
    "serve": "serve a detector over HTTP, with a page to drop images on",
    "audit": "check a data set before training on it",
    "report": "write the report of a run again",
    "runs": "compare the runs below a folder",
    "convert": "write data in another format, or make a checkpoint from weights of other projects",
}
COMMANDS = {
    "detect": tuple(SUMMARIES),
    "classify": ("train", "evaluate", "predict", "export", "audit", "report", "runs"),
}
DESCRIPTIONS = {
    "train": "Writes to the folder `output` of the configuration: config.yaml, last.pth, best.pth, train.log, "
    "log.jsonl, tensorboard/ and in the end metrics.json, plots, images and report.html. Runs under torchrun too, one "
    "process per GPU. After an interruption the same command with train.resume=true continues the run.",
    "evaluate": "Prints the metrics by class, and writes metrics.json, plots, images and report.html. Runs under "
    "torchrun too.",
    "predict": "Writes annotated images and tables of all predictions (JSON and CSV) into the folder --out.",
    "export": "Writes the model with its pre- and post-processing. The file is written only if it gives torch's "
    "results on real images, at two sizes and batch sizes 1 and 2.",
    "serve": "/ is the page, /detect the endpoint for programs, /openapi.json its description: curl --data-binary "
    '@photo.jpg -H "Content-Type: image/jpeg" "http://127.0.0.1:8000/detect?threshold=0.3"',
    "audit": "Prints statistics of the data and all problems; writes audit.json and sheets of sample images. The "
    "exit code is 1 if something would stop training, else 0.",
    "report": "Overrides change the configuration of the run, for instance data.root after the data has moved.",
    "runs": "Prints a table, the best run first: metrics of the best epoch, and what differs in the configurations.",
    "convert": "With --to: writes the data in the folder SRC, in any format that training reads, to the new folder "
    "DST, and says what the format cannot hold. Without: makes a checkpoint of the weights DST of the model of the "
    "configuration SRC. Official and transformers' detectors number classes by COCO's category ids: the classes of the "
    "annotations are kept, in the order of their ids.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a mistake of the user ends it with one line and exit code 1.

    Args:
        arguments: without the name of the program; None: those of the process.
    """
    function, options = parse(sys.argv[1:] if arguments is None else arguments)
    run(function, options)


def run_recipe(task: str, command: str) -> None:
    """Runs the function of `dat TASK COMMAND` with the arguments of the process as its options."""
    options = parse_command(task, command, sys.argv[1:], f"python -m {TASKS[task]}.{command}")
    run(find_function(task, command), options)


def run(function: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> None:
    """Calls a function with its options, and ends with one line on errors that a user can fix."""
    from dat.engine.command import main_guard
    from dat.utils.errors import ConfigError

    # Pillow's remarks on odd files do not name them; files that cannot be used are reported.
    warnings.filterwarnings("ignore", module="PIL")

    def call() -> None:
        try:
            function(options)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("dat"):
                raise
            if error.name in sys.stdlib_module_names:
                text = f"this needs Python's {error.name}, which this system lacks; on Windows it runs under WSL 2"
                raise ConfigError(text) from error
            raise ConfigError(f'this needs {error.name}: pip install "dat-vision[train]"') from error

    main_guard(call)


def parse(arguments: Sequence[str]) -> tuple[Callable[[argparse.Namespace], Any], argparse.Namespace]:
    """The function of a command, and its options."""
    from dat import __version__

    parser = argparse.ArgumentParser("dat", description="Detectors and classifiers on deformable attention.")
    parser.add_argument("--version", action="version", version=__version__)
    helps = "; ".join(f"{task}: {', '.join(commands)}" for task, commands in COMMANDS.items())
    parser.add_argument("command", choices=[*TASKS, "flops", "ops"], help=f"{helps}; flops: count the operations of a "
                        "model; ops: test the compiled ops")  # fmt: skip
    task = parser.parse_args(arguments[:1]).command
    if task == "flops":
        return flops, flops_parser().parse_args(arguments[1:])
    if task == "ops":
        return ops, ops_parser().parse_args(arguments[1:])
    lines = "\n".join(f"  {name:9} {SUMMARIES[name]}" for name in COMMANDS[task])
    parser = argparse.ArgumentParser(
        f"dat {task}", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"commands:\n{lines}"
    )
    parser.add_argument("command", choices=COMMANDS[task], metavar="COMMAND", help="see below; each has its own --help")
    command = parser.parse_args(arguments[1:2]).command
    return find_function(task, command), parse_command(task, command, arguments[2:])


def find_function(task: str, command: str) -> Callable[[argparse.Namespace], Any]:
    """The function of `dat TASK COMMAND`; its module is imported when it is called."""
    return lambda options: getattr(importlib.import_module(f"dat.{TASKS[task]}.commands"), command)(options)


def parse_command(task: str, command: str, arguments: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """The options of `dat TASK COMMAND`; `prog`: the name of the program in messages."""
    summary = f"{SUMMARIES[command][0].upper()}{SUMMARIES[command][1:]}."
    parser = argparse.ArgumentParser(prog or f"dat {task} {command}", description=f"{summary} {DESCRIPTIONS[command]}")
    ADD_ARGUMENTS[command](parser, task == "detect")
    options = parser.parse_intermixed_args(arguments)
    if command == "predict":
        options.overrides, options.sources = split_overrides(options.sources)
        if not options.sources:
            parser.error("SOURCE: should be an image, a video, a folder or a pattern")
    return options


def _add_train(parser: argparse.ArgumentParser, detect: bool) -> None:
    text = "YAML file, or the name of one in configs/, such as finetune"
    parser.add_argument("config", metavar="CONFIG", help=text)
    _add_overrides(parser, "such as data.root=FOLDER train.lr=1e-3")
    if detect:
        text = "instead, overfit N training images in `output`/overfit, and print the likely reasons if that fails"
        parser.add_argument("--overfit", type=_at_least(1), metavar="N", help=text)


def _add_evaluate(parser: argparse.ArgumentParser, detect: bool) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pth or last.pth of a run, or hf-hub:OWNER/NAME")
    _add_overrides(parser, "changes the configuration that the checkpoint carries, such as data.root=FOLDER")
    parser.add_argument("--out", type=Path, help="folder of the results (evaluation/ beside the checkpoint)")
    _add_device(parser)
    if detect:
        _add_detection(parser)
    else:
        text = "also by the reassessed labels of ImageNet (default: timm's copy of real.json; arXiv:2006.07159)"
        parser.add_argument("--real", nargs="?", const="", metavar="FILE", help=text)
        text = "also on the images of ImageNet-V2 (arXiv:1902.10811)"
        parser.add_argument("--v2", type=Path, metavar="FOLDER", help=text)


def _add_predict(parser: argparse.ArgumentParser, detect: bool) -> None:
    _add_model(parser)
    text = 'image, video, folder, pattern such as "day*/*.jpg", or key.path=value for the configuration of a checkpoint'
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    threshold = 0.3 if detect else 0.0
    text = f"lowest score, 0 to 1, of predictions that are {'drawn' if detect else 'kept'} ({threshold})"
    parser.add_argument("--threshold", type=_at_least(0.0, 1.0), default=threshold, help=text)
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes (all)")
    text = (
        "save crops of the drawn detections, a folder for each class"
        if detect
        else "put each image into a folder of its class"
    )
    parser.add_argument("--crops", action="store_true", help=f"also {text}")
    parser.add_argument("--batch-size", type=_at_least(1), default=8, help="images in memory (8)")
    parser.add_argument(
        "--every", type=_at_least(1), default=1, metavar="N", help="only every N-th frame of videos (1)"
    )
    if detect:
        parser.add_argument("--show-points", action="store_true", help="also draw where each detection sampled")
        _add_detection(parser)
        _add_top_k(parser)
    else:
        parser.add_argument("--sheet", type=_at_least(0), default=48, help="images in predictions.png (48)")
    _add_trust(parser)
    _add_device(parser)


def _add_export(parser: argparse.ArgumentParser, detect: bool) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pth or last.pth of a run, or hf-hub:OWNER/NAME")
    parser.add_argument("--out", type=Path, required=True, help="file that ends in .onnx or .pt2 (torch.export)")
    text = "write a .pt2 of machine code for processors such as this one, by AOTInductor, which takes minutes"
    parser.add_argument("--compile", action="store_true", help=text)
    parser.add_argument("--images", type=Path, help="image or folder to check the file on (the validation data)")
    parser.add_argument("--sizes", type=_at_least(1), nargs=2, metavar="PIXELS", help="two shortest edges to check at")
    if detect:
        _add_top_k(parser)


def _add_serve(parser: argparse.ArgumentParser, detect: bool) -> None:
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: only this machine)")
    parser.add_argument(
        "--port", type=_at_least(0, 65535), default=8000, help="port to listen at, 0: a free one (8000)"
    )
    text = "name under which a proxy or network reaches the server; addresses and localhost need none"
    parser.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help=text)
    text = "secret that requests must hold; better in the variable DAT_SERVE_TOKEN, which other users do not see"
    parser.add_argument("--token", help=text)
    parser.add_argument("--max-megabytes", type=_at_least(0.0), default=16.0, help="largest upload (16)")
    parser.add_argument("--max-megapixels", type=_at_least(0.0), default=40.0, help="largest image (40)")
    parser.add_argument("--max-waiting", type=_at_least(1), default=256, help="most requests in the queue (256)")
    text = "most requests of a client per second (100); twice as many may come at once"
    parser.add_argument("--max-rate", type=_at_least(1.0), default=100.0, help=text)
    _add_detection(parser)
    _add_top_k(parser)
    _add_trust(parser)
    _add_device(parser)


def _add_audit(parser: argparse.ArgumentParser, detect: bool) -> None:
    text = "folder of the data, or the YAML file or name of the configuration that is to train"
    parser.add_argument("data", metavar="DATA", help=text if detect else f"{text}; a .tar of class folders too")
    _add_overrides(parser, f"such as {'data.train.annotations=a.json' if detect else 'data.val.path=test'}")
    if detect:
        parser.add_argument("--config", default="detection/finetune", help="configuration that is to train (finetune)")
    out = Path("runs/audit_detection" if detect else "runs/audit_classification")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of the results ({out})")
    parser.add_argument("--samples", type=_at_least(0), default=16, help="images on a sheet (16)")


def _add_report(parser: argparse.ArgumentParser, detect: bool) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or interrupted")
    _add_overrides(parser, "replaces a value of its configuration")


def _add_runs(parser: argparse.ArgumentParser, detect: bool) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="searched with its subfolders")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")


def _add_convert(parser: argparse.ArgumentParser, detect: bool) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of data; for weights the configuration")
    text = "folder to write, absent or empty; or weights: .pth, .bin or .safetensors of the configuration's model"
    parser.add_argument("target", type=Path, metavar="DST", help=text)
    parser.add_argument("--to", metavar="FORMAT", help="of the data to write: coco, yolo or voc")
    parser.add_argument("--link", action="store_true", help="make symbolic links to the images instead of copies")
    _add_overrides(parser, "for weights: replaces a value of the configuration")
    parser.add_argument("--annotations", type=Path, help="for weights: COCO JSON with the classes to keep")
    parser.add_argument("--out", type=Path, help="for weights: checkpoint to write")


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    text = "best.pth or last.pth of a run, an exported .onnx or .pt2, or hf-hub:OWNER/NAME"
    parser.add_argument("model", metavar="MODEL", help=text)


def _add_top_k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top-k", type=_at_least(1), help="most detections of an image (those of the configuration)")


def _add_detection(parser: argparse.ArgumentParser) -> None:
    """Options that replace those of `data.val`."""
    text = "search larger images in overlapping tiles with sides of this many pixels, such as 800"
    parser.add_argument("--tiles", type=_at_least(0), metavar="PIXELS", help=f"{text} (as configured, or none)")
    text = "fraction of a tile by which neighbours overlap (0.25)"
    parser.add_argument("--tile-overlap", type=_at_least(0.0, 0.9), metavar="FRACTION", help=text)
    text = "do not also search the whole image, for objects larger than the overlap"
    parser.add_argument("--tiles-only", dest="whole_image", action="store_false", default=None, help=text)
    text = "drop detections whose IoU with a better one of their class is larger (as configured, or 1: none)"
    parser.add_argument("--nms", type=_at_least(0.0, 1.0), metavar="IOU", help=text)
    text = "only the best class of each query, where detectors may give an object several"
    parser.add_argument("--one-class-per-object", dest="one_class", action="store_true", default=None, help=text)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust", action="store_true", help="load a .pt2, which can run any code")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def _at_least(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """A type for argparse: finite numbers of the type of `low`, in low..high."""

    def convert(text: str) -> float:
        try:
            value = type(low)(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            kind = "an integer" if isinstance(low, int) else "a number"
            limits = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"is {text}, should be {kind} {limits}")
        return value

    return convert


ADD_ARGUMENTS = {
    "train": _add_train,
    "evaluate": _add_evaluate,
    "predict": _add_predict,
    "export": _add_export,
    "serve": _add_serve,
    "audit": _add_audit,
    "report": _add_report,
    "runs": _add_runs,
    "convert": _add_convert,
}


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The key.path=value arguments, and the others; the name of a file that exists is no override."""
    overrides = [text for text in arguments if re.match(r"[\w.]+=", text) and not Path(text).exists()]
    return overrides, [text for text in arguments if text not in overrides]


def flops_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dat flops", description="Prints the operations of a model, module by module.")
    parser.add_argument("name", metavar="NAME", help="timm model, such as dat_tiny, or a configuration of a detector")
    parser.add_argument("--size", type=_at_least(1), nargs=2, metavar=("H", "W"), help="of the image, in pixels")
    return parser


def ops_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dat ops", description="Says which compiled ops are available, and tests them.")
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    return parser


def flops(options: argparse.Namespace) -> None:
    """Prints the table of `dat.models.flops`, of a timm model or of the detector of a configuration."""
    import timm
    from torch import nn

    from dat.models import flops as count
    from dat.utils.errors import ConfigError
    from dat.utils.text import echo

    model: nn.Module | str = options.name
    size = options.size
    if not timm.is_model(options.name):
        from dat.detection.config import DetectionConfig
        from dat.detection.models import build_model
        from dat.engine.config import load_config

        config = load_config(DetectionConfig, options.name)
        # COCO's largest category id is 90.
        model = build_model(config.model, 91, weights=False)
        size = size or (config.data.val.size, config.data.val.max_size)
    try:
        echo(str(count(model, None if size is None else tuple(size))))
    except ImportError as error:
        raise ConfigError(f'counting needs {error.name}: pip install "dat-vision[flops]"') from error


def ops(options: argparse.Namespace) -> None:
    """Runs the self-test of the ops, `python -m dat.ops`."""
    from dat.ops.__main__ import main as report

    sys.exit(report([] if options.json is None else ["--json", options.json]))


if __name__ == "__main__":
    main()
