"""The public class: a detector from a checkpoint, an exported file or a configuration."""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat.detection.checkpoint import check_categories, load_detector
from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import describe_sets, read_dataset
from dat.detection.evaluation import Evaluation
from dat.detection.graph import pad_images
from dat.detection.models.base import BaseDETR
from dat.detection.predictor import Predictor, detect_split
from dat.engine.checkpoint import checkpoint_errors
from dat.engine.config import LARGEST_SIDE, apply_overrides, keyword_overrides, load_config
from dat.engine.distributed import Distributed, setup_distributed
from dat.export.runtime import is_exported, load_exported
from dat.utils.errors import CheckpointError, ConfigError, DataError
from dat.utils.files import check_folder, write_json
from dat.utils.hub import find_checkpoint
from dat.utils.text import echo

logger = logging.getLogger(__name__)


class Detector(Predictor):
    """Detects objects in images; trains, evaluates and exports the model that does."""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        device: str | torch.device = "auto",
        trust: bool = False,
        top_k: int | None = None,
    ) -> "Detector":
        """A trained detector.

        Args:
            path: best.pth or last.pth of a run, an exported .onnx or .pt2, model.safetensors of transformers' DETR or
                Deformable DETR with config.json beside it, or "hf-hub:OWNER/NAME".
            overrides: "key.path=value" for the configuration in a checkpoint, not for its model.
            device: "auto", "cpu", "cuda" or "mps"; exported files run on the CPU.
            trust: load a .pt2, which can run any code.
            top_k: most detections of an image; None: as configured.

        Raises:
            CheckpointError, ConfigError: a file that cannot be used, or wrong arguments.
        """
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ConfigError(f"top_k is {top_k!r}, should be an integer of at least 1")
        detector = cls()
        detector.path = find_checkpoint(path)
        if is_exported(detector.path):
            if overrides:
                raise ConfigError(f"{overrides[0]}: the configuration of an exported model cannot be overridden")
            detector._load_exported(detector.path, top_k, trust)
        else:
            if top_k is not None:
                overrides = [*overrides, f"data.val.top_k={top_k}"]
            detector._load_checkpoint(detector.path, setup_distributed(device), overrides)
        return detector

    @classmethod
    def from_config(cls, name_or_path: str | Path, **overrides: Any) -> "Detector":
        """A detector to train; its number of classes comes from the data.

        Args:
            name_or_path: a YAML file, or the name of an installed one, such as "finetune".
            overrides: keys of the configuration: output="runs/mine", epochs=10 (those of train need no prefix),
                data__val__size=640, or **{"data.val.size": 640}.
        """
        detector = cls()
        detector.config = load_config(DetectionConfig, name_or_path, keyword_overrides(DetectionConfig, overrides))
        check_config(detector.config)
        return detector

    def train(
        self, data: str | Path | None = None, transform: Callable[..., Any] | None = None, **overrides: Any
    ) -> dict[str, Any]:
        """Trains in the folder `output` of the configuration; afterwards this is the detector of the best epoch.

        A detector from a checkpoint starts from its weights; give another `output`.

        Args:
            data: folder of the data (`data.root`); None: that of the configuration.
            transform: augmentation before that of `data.train`: an albumentations.Compose with bbox_params of format
                pascal_voc, or a callable as of torchvision.transforms.v2, which maps (image uint8 [3, H, W], {"boxes"
                tv_tensors.BoundingBoxes XYXY, "labels"}) to the same. Its randomness should be torch's, numpy's or
                Python's global one, then the run is reproducible. A run is resumed with the same one.
            overrides: as for from_config.

        Returns:
            Metrics of the best epoch, as in metrics.json.
        """
        from dat.detection.train import train

        config = self._configure(data, overrides)
        if self.path is not None:
            config = replace(config, model=replace(config.model, checkpoint_path=str(self.path)))
        metrics = train(config, transform)
        self.path = Path(config.output) / "best.pth"
        self._load_checkpoint(self.path, setup_distributed(config.train.device))
        return metrics

    def evaluate(
        self, data: str | Path | None = None, out: str | Path | None = None, **overrides: Any
    ) -> dict[str, Any]:
        """Average precision on the validation data.

        Args:
            data: folder of the data (`data.root`); None: that of the configuration.
            out: folder for metrics.json, detections.json, plots and report.html; None: nothing is written.
            overrides: as for from_config; not of the model.

        Returns:
            AP, AP50, ... and "per_class"; in other processes of torchrun than the first an empty dictionary. Images
            without annotations, such as those of COCO's image_info_test2017.json, give an empty dictionary too, and
            only detections.json is written, with the file's image ids.
        """
        model, distributed, config = self._trained(), self.distributed, self._configure(data, overrides)
        if out is not None:
            check_folder(Path(out), "out")
        val = config.data.val
        annotations = read_dataset(config.data, "val", self.categories, annotated=False)
        if distributed.main:
            echo(describe_sets(annotations))
        with checkpoint_errors(str(self.path)):
            # Results have the ids of the data, which may not be those of the training data.
            results = detect_split(model, config, annotations, distributed, path=self.path)
        if not distributed.main:
            return {}
        if not annotations.annotated:
            text = f"{annotations.path}: has no annotations, so there is nothing to score"
            if out is None:
                raise DataError(f"{text}; `out` should be the folder to write detections.json to")
            Path(out).mkdir(parents=True, exist_ok=True)
            write_json(Path(out) / "detections.json", results)
            echo(f"{text}; {len(results)} detections are written to {Path(out) / 'detections.json'}")
            return {}
        evaluation = Evaluation.of(annotations, results, every=val.tiles > 0)
        metrics = evaluation.metrics()
        for warning in annotations.warnings:
            logger.warning(f"warning: {warning}")
        if out is not None:
            from dat.detection.report import write_report

            out = Path(out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "metrics.json", metrics)
            write_json(out / "detections.json", results)
            # The report is written last, since drawing takes time and may fail.
            write_report(out, config, evaluation, metrics, f"{self.path} on {annotations.path}")
        return metrics

    def export(self, path: str | Path, **options: Any) -> str:
        """Writes .onnx, or .pt2 of torch.export or AOTInductor; options and errors as in `export_detector`.

        Returns:
            A line that says how closely the file gives torch's results.
        """
        from dat.detection.export import export_detector

        model = deepcopy(self._trained()).cpu()
        return export_detector(model, self._configure(), self.categories, Path(path), **options)

    def _trained(self) -> BaseDETR:
        if self.model is None:
            state = "an exported file, which only predicts" if self.config is None else "not trained yet"
            raise ConfigError(f"this detector is {state}; load a checkpoint with Detector.from_checkpoint")
        return self.model

    def _configure(
        self, data: str | Path | None = None, named: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
    ) -> DetectionConfig:
        if self.config is None:
            raise ConfigError(f"{self.path}: an exported file has no configuration; this needs a checkpoint")
        values = ({} if data is None else {"data.root": str(data)}) | dict(named or {})
        config = apply_overrides(self.config, [*keyword_overrides(DetectionConfig, values), *overrides])
        check_config(config)
        if self.model is not None and config.model != self.config.model:
            raise ConfigError(f"model.* is decided by {self.path}, should not be overridden")
        return config

    def _load_checkpoint(self, path: Path, distributed: Distributed, overrides: Sequence[str] = ()) -> None:
        self.distributed = distributed
        loaded = load_detector(path, distributed.device)
        self.config, self.model, self.categories = loaded.config, loaded.model, loaded.categories
        self._set_model(loaded.model, self._configure(overrides=overrides))

    def _load_exported(self, path: Path, top_k: int | None, trust: bool) -> None:
        exported = load_exported(path, "detection", trust)
        metadata = exported.metadata
        self.size, self.max_size, multiple = (
            self._pixels(metadata, name) for name in ("size", "max_size", "padded_to")
        )
        self.categories = check_categories(metadata.get("category_ids"), metadata["class_names"], path)

        def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
            # A compiled model does not pad its inputs itself.
            padded = "padded_to" in metadata
            found = exported.run(*(pad_images(images, sizes, multiple) if padded else (images, sizes)))
            return tuple(output[:, :top_k] if output.ndim > 1 else output for output in found)

        self.run = run

    def _pixels(self, metadata: dict[str, Any], name: str) -> int:
        value = metadata.get(name, 1 if name == "padded_to" else None)
        if not isinstance(value, int) or not 1 <= value <= LARGEST_SIDE:
            raise CheckpointError(f"{self.path}: its metadata has {name} {value!r}, should be 1 to {LARGEST_SIDE}")
        return value
