"""The public class: a classifier from a checkpoint, an exported file or a configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.data import make_transform
from dat.classification.evaluate import evaluate_split, open_v2, real_accuracy
from dat.classification.graph import TOP, ClassifierGraph
from dat.classification.model import build_classifier
from dat.classification.readers import open_split
from dat.classification.report import write_report
from dat.engine.checkpoint import build_and_load, checkpoint_errors, read_trained
from dat.engine.config import apply_overrides, from_dict, keyword_overrides, load_config
from dat.engine.distributed import Distributed, setup_distributed
from dat.export.runtime import is_exported, load_exported
from dat.utils.errors import CheckpointError, ConfigError
from dat.utils.files import check_folder, write_json
from dat.utils.hub import find_checkpoint
from dat.utils.images import to_image

CPU = Distributed(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, its probability, 0 to 1, and `top`, the first few (label, score)."""

    label: str
    score: float
    top: list[tuple[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """{"label", "score", "top": [{"label", "score"}]}, scores rounded to six digits, as in predictions.json."""
        top = [{"label": label, "score": round(score, 6)} for label, score in self.top]
        return {**top[0], "top": top}


@dataclass
class Classifier:
    """Labels images; trains, evaluates and exports the model that does.

        classifier = Classifier.from_checkpoint("runs/mine/best.pth")
        print(classifier.predict("photo.jpg").label)

    Attributes:
        config: configuration; only `data` for an exported file.
        class_names: label i is the i-th; none before training.
        model: in evaluation mode; None for an exported file and before training.
        path: of the checkpoint or exported file; None before training.
        run: uint8 images [B, 3, H, W] to a tuple whose first is the logits [B, K]; None before training.
        distributed: this process, and the device of the model.
    """

    config: ClassificationConfig
    class_names: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    path: Path | None = None
    run: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    distributed: Distributed = CPU

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        device: str | torch.device = "auto",
        trust: bool = False,
    ) -> "Classifier":
        """A trained classifier, with its averaged weights where it has them.

        Args:
            path: best.pth or last.pth of a run, an exported .onnx or .pt2, or "hf-hub:OWNER/NAME".
            overrides: "key.path=value" for the configuration in a checkpoint.
            device: "auto", "cpu", "cuda", ..., in a job of torchrun for each process. Exported files run on the CPU.
            trust: load a .pt2, which can run any code.
        Raises:
            CheckpointError, ConfigError: a file that cannot be used, or wrong arguments.
        """
        path = find_checkpoint(path)
        if is_exported(path):
            return cls._from_exported(path, overrides, trust)
        trained = read_trained(path, "classification")
        with checkpoint_errors(path):
            config = from_dict(ClassificationConfig, trained.config, str(path))
            check_config(config)
        config = apply_overrides(config, overrides)
        check_config(config)
        names, backbone = trained.class_names, config.model.backbone
        model = build_and_load(lambda: build_classifier(backbone, len(names), weights=False), trained.weights, path)
        distributed = setup_distributed(device)
        graph = ClassifierGraph(model, config.data, len(names)).to(distributed.device).eval()
        # A closure would keep the model in copies of this, and could not be pickled.
        return cls(config, names, model, path, partial(_run, graph, distributed.device), distributed)

    @classmethod
    def _from_exported(cls, path: Path, overrides: Sequence[str], trust: bool) -> "Classifier":
        if overrides:
            raise ConfigError(f"{overrides[0]}: the configuration of an exported model cannot be overridden")
        exported = load_exported(path, "classification", trust)
        names = ("img_size", "crop_pct", "crop_mode", "interpolation")
        with checkpoint_errors(path):
            stored = {name: exported.metadata.get(name) for name in names}
            config = from_dict(ClassificationConfig, {"data": stored}, str(path))
            check_config(config)
        return cls(config, exported.metadata["class_names"], None, path, exported.run)

    @classmethod
    def from_config(cls, name_or_path: str | Path, **overrides: Any) -> "Classifier":
        """A classifier to train; its classes come from the data.

        Args:
            name_or_path: a YAML file, or the name of one of configs/classification, such as "dat_nano_folder".
            overrides: keys of the configuration: output="runs/mine", epochs=10 (those of train need no prefix),
                data__img_size=96, or **{"data.img_size": 96}.
        """
        config = load_config(ClassificationConfig, name_or_path, keyword_overrides(ClassificationConfig, overrides))
        check_config(config)
        return cls(config)

    def predict(self, images: Any, top_k: int = TOP, batch_size: int = 64) -> Any:
        """Labels images.

        Args:
            images: an image or a list of images, as `dat.utils.images.to_image` takes them: a path, a PIL image, an
                array [H, W, 3] of uint8, or a tensor [3, H, W].
            top_k: number of classes in Prediction.top.
            batch_size: images that run together.

        Returns:
            The Prediction of the image, or a list of them.

        Raises:
            ConfigError: `top_k` or `batch_size` below 1.
            DataError: an image that cannot be used.
            CheckpointError: the model fails.
        """
        for name, number in (("top_k", top_k), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"{name} is {number}, should be at least 1")
        if not isinstance(images, (list, tuple)):
            return self._predict([images], top_k)[0]
        batches = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
        return [prediction for batch in batches for prediction in self._predict(batch, top_k)]

    def _predict(self, images: Sequence[Any], top_k: int) -> list[Prediction]:
        run, shape = self.run, (len(images), len(self.class_names))
        if run is None:
            raise ConfigError("this classifier is not trained yet; use train, or Classifier.from_checkpoint")
        transform = make_transform(self.config.data, training=False, normalize=False)
        batch = torch.stack([transform(to_image(image)) for image in images])
        with torch.inference_mode(), checkpoint_errors(str(self.path)):
            logits = run(batch)[0].float()
            if logits.shape != shape:
                raise CheckpointError(f"{self.path}: gives logits {list(logits.shape)}, should be {list(shape)}")
            if not logits.isfinite().all():
                raise CheckpointError(f"{self.path}: gives numbers that are NaN or infinite")
            scores, labels = logits.softmax(1).topk(min(top_k, shape[1]))
        tops = [
            [(self.class_names[k], score) for k, score in zip(*row, strict=True)]
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        return [Prediction(*top[0], top) for top in tops]

    def train(
        self, data: str | Path | None = None, transform: Callable[..., Any] | None = None, **overrides: Any
    ) -> dict[str, Any]:
        """Trains in the folder `output` of the configuration; afterwards this is the classifier of the best epoch.

        A classifier from a checkpoint starts from its weights; give another `output`.

        Args:
            data: folder of the data (`data.root`); None: that of the configuration.
            transform: augmentation before that of `data.augment`: an albumentations.Compose, or a callable that maps a
                PIL image in RGB to one, as those of torchvision.transforms.v2. Its randomness should be torch's,
                numpy's or Python's global one, then the run is reproducible. A run is resumed with the same one.
            overrides: as for from_config.

        Returns:
            Metrics of the best epoch, as in metrics.json.
        """
        from dat.classification.train import train

        config = self._configure(data, overrides)
        if self.path is not None:
            self.trained_model()
            config.model.backbone["checkpoint_path"] = str(self.path)
        metrics = train(config, transform)
        best = Path(config.output) / "best.pth"
        vars(self).update(vars(Classifier.from_checkpoint(best, device=config.train.device)))
        return metrics

    def evaluate(
        self,
        data: str | Path | None = None,
        out: str | Path | None = None,
        real: str | None = None,
        v2: str | Path | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """Accuracy on the validation data.

        Args:
            data: folder of the data (`data.root`); None: that of the configuration.
            out: folder for metrics.json, plots and report.html; None: nothing is written.
            real: real.json, ImageNet's reassessed labels (arXiv:2006.07159), "" for timm's copy; adds "real".
            v2: folder of ImageNet-V2 (arXiv:1902.10811); adds "v2".
            overrides: as for from_config.

        Returns:
            "top1" and "top5" in percent, "loss", "per_class", ...; in other processes of torchrun than the first an
            empty dictionary.
        """
        model, config, names = self.trained_model(), self._configure(data, overrides), self.class_names
        if out is not None:
            check_folder(Path(out), "out")
        split = open_split(config.data, "val", names)
        with checkpoint_errors(str(self.path)):
            results, more = evaluate_split(model, config, split, self.distributed)
            metrics = results.summarize(names, **more)
            if real is not None:
                metrics["real"] = real_accuracy(results, split, real)
            if v2 is not None:
                other = open_v2(Path(v2), len(names))
                metrics["v2"] = evaluate_split(model, config, other, self.distributed)[0].metrics()
        if not self.distributed.main:
            return {}
        if out is not None:
            out = Path(out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "metrics.json", metrics)
            # Last, since drawing takes time, and may fail.
            text = f"{self.path} on {len(results.index)} images\n{split.note}".strip()
            write_report(out, config, names, results, split, metrics, text)
        return metrics

    def export(self, path: str | Path, **options: Any) -> str:
        """Writes .onnx, or .pt2 of torch.export or AOTInductor; options and errors as in `export_classifier`.

        Returns:
            A line that says how closely the file gives torch's results.
        """
        from dat.classification.export import export_classifier

        return export_classifier(self.trained_model(), self.config.data, self.class_names, Path(path), **options)

    def trained_model(self) -> nn.Module:
        """The model. Raises ConfigError for an exported file and before training."""
        if self.model is None:
            kind = f"{self.path} is an exported model" if self.path else "this classifier is not trained yet"
            raise ConfigError(f"{kind}; this needs a checkpoint, best.pth or last.pth of a run")
        return self.model

    def _configure(self, data: str | Path | None, overrides: dict[str, Any]) -> ClassificationConfig:
        given = overrides if data is None else {"data.root": data, **overrides}
        config = apply_overrides(self.config, keyword_overrides(ClassificationConfig, given))
        check_config(config)
        return config


def _run(graph: ClassifierGraph, device: torch.device, images: Tensor) -> tuple[Tensor, ...]:
    return graph(images.to(device))
