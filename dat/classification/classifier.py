"""An image classifier: from a checkpoint or a configuration to predictions, metrics and exported files."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.data import make_transform
from dat.classification.graph import TOP, ClassifierGraph
from dat.classification.model import build_classifier
from dat.classification.readers import open_split
from dat.engine.checkpoint import build_and_load, checkpoint_errors, read_trained
from dat.engine.config import apply_overrides, from_dict, keyword_overrides, load_config
from dat.engine.distributed import setup_distributed
from dat.utils.errors import CheckpointError, ConfigError, one_line
from dat.utils.images import to_image

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, its probability, 0 to 1, and `top`, the first few (label, score)."""

    label: str
    score: float
    top: list[tuple[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """{"label", "score", "top": [{"label", "score"}]} with scores of six digits, as in predictions.json."""
        top = [{"label": label, "score": round(score, 6)} for label, score in self.top]
        return {**top[0], "top": top}


@dataclass
class Classifier:
    """A classifier: its configuration, class names (label i is the i-th) and what runs it.

        classifier = Classifier.from_checkpoint("runs/mine/best.pth")
        print(classifier.predict("photo.jpg").label)

    Attributes:
        network: in evaluation mode; None where the classifier is not trained yet, or an exported file.
        source: file that it is from, for messages.
        run: uint8 images [B, 3, H, W] to logits [B, K] and more outputs; None where it is not trained yet.
    """

    config: ClassificationConfig
    class_names: list[str] = field(default_factory=list)
    network: nn.Module | None = None
    source: Path | None = None
    run: Callable[[Tensor], tuple[Tensor, ...]] | None = None

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
            path: best.pth or last.pth of a run; "hf-hub:OWNER/NAME", a repository of the Hugging Face hub that holds
                best.pth; or an exported .onnx or .pt2, which runs on the CPU and only predicts.
            overrides: "key.path=value" that change the configuration in the checkpoint.
            device: "auto", "cpu", "cuda", ...
            trust: whether to load a .pt2, which can run any code.
        Raises:
            CheckpointError: not such a file, or its weights do not fit the model.
            ConfigError: an override that is wrong or, for an exported file, any.
        """
        path = _download(path) if isinstance(path, str) and path.startswith("hf-hub:") else Path(path)
        if path.suffix.lower() in (".onnx", ".pt2"):
            return cls._from_exported(path, overrides, trust)
        trained = read_trained(path, "classification")
        with checkpoint_errors(path):
            config = from_dict(ClassificationConfig, trained.config, str(path))
            check_config(config)
        config = apply_overrides(config, overrides)
        check_config(config)
        names = trained.class_names
        network = build_and_load(
            lambda: build_classifier(config.model.backbone, len(names), weights=False), trained.weights, path
        )
        device = setup_distributed(device).device if isinstance(device, str) else device
        graph = ClassifierGraph(network.eval(), config.data, len(names)).to(device).eval()
        return cls(config, names, network, path, lambda images: graph(images.to(device)))

    @classmethod
    def _from_exported(cls, path: Path, overrides: Sequence[str], trust: bool) -> "Classifier":
        from dat.export.runtime import load_exported

        if overrides:
            raise ConfigError(f"{overrides[0]}: the configuration of an exported model cannot be changed")
        exported = load_exported(path, "classification", trust)
        names = ("img_size", "crop_pct", "crop_mode", "interpolation")
        with checkpoint_errors(path):
            stored = {name: exported.metadata.get(name) for name in names}
            config = from_dict(ClassificationConfig, {"data": stored}, str(path))
            check_config(config)
        return cls(config, exported.metadata["class_names"], None, path, exported.run)

    @classmethod
    def from_config(cls, name_or_path: str | Path, **overrides: Any) -> "Classifier":
        """An untrained classifier, to `train`, of a YAML file or of one of configs/classification by its name.

        `overrides` are keys of the configuration: epochs=5 (those of train need no prefix), data__img_size=96, or
        **{"data.img_size": 96}. Raises ConfigError.
        """
        named = not Path(name_or_path).suffix and "/" not in str(name_or_path)
        path = f"classification/{name_or_path}" if named else name_or_path
        config = load_config(ClassificationConfig, path, keyword_overrides(ClassificationConfig, overrides))
        check_config(config)
        return cls(config)

    @property
    def model(self) -> nn.Module:
        """The network. Raises ConfigError for an exported or an untrained classifier, which has none."""
        if self.network is None:
            kind = f"{self.source} is an exported model" if self.run else "this classifier is not trained yet"
            raise ConfigError(f"{kind}; this needs a checkpoint, best.pth or last.pth of a run")
        return self.network

    def predict(self, images: ImageLike | Sequence[ImageLike], top_k: int = TOP, batch_size: int = 64) -> Any:
        """The Prediction of an image, or the list of those of several.

        Args:
            images: a path, PIL image, array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, or tensor [C, H, W] of
                uint8 or of floats 0 to 1; or a sequence of these.
            top_k: number of classes in `top`.
            batch_size: images that run together.
        Raises:
            DataError: an image that cannot be read, or an array that is not one.
            CheckpointError: the model does not run, or gives no probabilities.
        """
        if isinstance(images, (list, tuple)):
            batches = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
            return [prediction for batch in batches for prediction in self._predict(batch, top_k)]
        return self._predict([images], top_k)[0]

    def _predict(self, images: Sequence[Any], top_k: int) -> list[Prediction]:
        run = self.run
        if run is None:
            raise ConfigError("this classifier is not trained yet; it should be from a checkpoint, or trained")
        transform = make_transform(self.config.data, training=False, normalize=False)
        batch = torch.stack([transform(to_image(image)) for image in images])
        with torch.inference_mode(), checkpoint_errors(self.source or "the model"):
            logits = run(batch)[0].float()
            if logits.shape != (len(images), len(self.class_names)):
                wanted = [len(images), len(self.class_names)]
                raise CheckpointError(f"{self.source}: gives logits {list(logits.shape)}, should be {wanted}")
            if not logits.isfinite().all():
                raise CheckpointError(f"{self.source}: gives numbers that are NaN or infinite")
            scores, labels = logits.softmax(1).topk(min(top_k, logits.shape[1]))
        tops = [
            [(self.class_names[k], score) for k, score in zip(*row, strict=True)]
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        return [Prediction(*top[0], top) for top in tops]

    def train(self, data: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
        """Trains, from the present weights if there are any, and takes over the best epoch's model.

        Args:
            data: `data.root`, see README; None: that of the configuration.
            overrides: see from_config, for instance output="runs/mine", epochs=5.

        Returns:
            The content of the run's metrics.json.
        Raises:
            UserError: configuration, data, checkpoint, or a loss that is not finite.
        """
        from dat.classification.train import train

        config = self._configured(data, overrides)
        if self.run is not None and self.model is not None:
            config.model.backbone["checkpoint_path"] = str(self.source)
        train(config)
        output = Path(config.output)
        vars(self).update(vars(Classifier.from_checkpoint(output / "best.pth", device=config.train.device)))
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))

    def evaluate(self, data: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
        """Metrics of the validation split, as metrics.json has them: top1 and top5 in percent, loss, per_class ...

        The arguments are those of `train`. Warns of unreadable images. Under torchrun each process takes a share.
        """
        from dat.classification.evaluate import measure

        device = next(self.model.parameters()).device
        changed = replace(self, config=self._configured(data, overrides))
        split = open_split(changed.config.data, "val", self.class_names)
        distributed = replace(setup_distributed(device.type), device=device)
        results, speed, warning = measure(changed, split, distributed)
        if warning:
            warnings.warn(warning, stacklevel=2)
        return results.summarize(self.class_names, **speed)

    def export(self, path: str | Path, compiled: bool = False) -> None:
        """Writes an .onnx or .pt2 with pre- and post-processing, after its outputs were compared with torch's.

        `compiled`: the .pt2 is machine code, by AOTInductor. Raises ConfigError or ExportError.
        """
        from dat.classification.export import export_classifier

        export_classifier(self, Path(path), compiled)

    def _configured(self, data: str | Path | None, overrides: dict[str, Any]) -> ClassificationConfig:
        given = overrides if data is None else {"data.root": data, **overrides}
        config = apply_overrides(self.config, keyword_overrides(ClassificationConfig, given))
        check_config(config)
        return config


def _download(address: str) -> Path:
    """best.pth of "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", from the cache or the hub."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = address.removeprefix("hf-hub:").partition("@")
    try:
        return Path(hf_hub_download(repository, "best.pth", revision=revision or None))
    # The hub's errors derive from these, those of names that are none from ValueError.
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{address}: cannot fetch best.pth: {one_line(error)}") from error
