"""Save and upload models as timm's hub folders: config.json, model.safetensors and a model card.

To upload a classifier trained with this project:

    state = torch.load("runs/mine/best.pth", weights_only=True)
    names, data = state["class_names"], state["config"]["data"]
    model = timm.create_model("dat_nano", num_classes=len(names), checkpoint_path="runs/mine/best.pth")
    dat.models.save_for_hf(
        model,
        "dat_nano_mine",
        label_names=names,
        datasets="mine",
        metrics={"accuracy": 0.87},
        data_config={key: data[key] for key in ("img_size", "mean", "std", "crop_pct", "interpolation")},
    )

and back by `timm.create_model("local-dir:dat_nano_mine", pretrained=True)`, after `import dat`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from timm.models._hub import generate_readme
from torch import Tensor, nn

from dat.models.dat import DAT, StageConfig

CODE = "https://github.com/LeapLabTHU/DAT"
PAPERS = {
    "Vision Transformer with Deformable Attention": "https://arxiv.org/abs/2201.00520",
    "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention": "https://arxiv.org/abs/2309.01430",
}
CITATIONS = (
    """@InProceedings{Xia_2022_CVPR,
  author    = {Xia, Zhuofan and Pan, Xuran and Song, Shiji and Li, Li Erran and Huang, Gao},
  title     = {Vision Transformer With Deformable Attention},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022},
  pages     = {4794--4803}
}""",
    """@article{xia2023dat,
  author  = {Xia, Zhuofan and Pan, Xuran and Song, Shiji and Li, Li Erran and Huang, Gao},
  title   = {DAT++: Spatially Dynamic Vision Transformer with Deformable Attention},
  journal = {arXiv preprint arXiv:2309.01430},
  year    = {2023}
}""",
)
USAGE = """
```python
import dat  # registers the models with timm
import timm

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
output = model(transform(image).unsqueeze(0))  # image: a PIL image in RGB; output: {output}

features = timm.create_model("{source}", pretrained=True, features_only=True)
```"""


def save_for_hf(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    label_descriptions: Mapping[str, str] | None = None,
    datasets: str | Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    data_config: Mapping[str, Any] | None = None,
    description: str | None = None,
    source: str | None = None,
) -> None:
    """Write a folder for `timm.create_model("local-dir:DIRECTORY", pretrained=True)`, with a model card, README.md.

    Args:
        model: a DAT made by `timm.create_model`, whose arguments are kept except for drop rates. Classes and the size
            of the tables are saved as they are now.
        directory: a new folder, which appears once everything is written, or an existing one, whose files of these
            names are replaced.
        label_names: a name for each class; None: those that the model came with, if any.
        label_descriptions: a text for each name.
        datasets: datasets that the model was trained on, by their names on the hub.
        metrics: values on the first of datasets, by the hub's names of metrics, such as "accuracy".
        license: license of the weights, by its name on the hub; None: that of the model's pretrained_cfg.
        data_config: preprocessing of the images, by timm's names (img_size, mean, std, crop_pct, crop_mode,
            interpolation); the rest is taken from the pretrained_cfg, and the size from the model's img_size if it was
            given one.
        description: first sentence of the card; None: one about the architecture.
        source: name for loading the model, as shown in the card; None: "local-dir:" and the folder's name.

    Raises:
        ValueError: the model is not a whole DAT made by timm, directory is a file, label_names do not fit the classes,
            or there are metrics without datasets.
    """
    directory = Path(os.path.realpath(directory))
    if os.path.lexists(directory) and not directory.is_dir():
        raise ValueError(f"directory must be a folder or a new path, {directory} is a file or a broken link")
    cfg = _pretrained_cfg(model)
    num_classes = model.num_classes
    if label_names is not None and len(label_names) != num_classes:
        raise ValueError(f"label_names must have {num_classes} entries, one for each class, got {len(label_names)}")
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    if metrics and not datasets:
        raise ValueError(f"datasets must name what metrics {list(metrics)} were measured on, got none")
    license = license or cfg.get("license") or "unknown"
    config: dict[str, Any] = {"pretrained_cfg": {"license": license}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    if label_descriptions is not None:
        config["label_descriptions"] = dict(label_descriptions)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        folder = Path(temporary) / directory.name
        _save(model, folder, config, data_config)
        source = source or f"local-dir:{directory.name}"
        _card(model, folder, description, source, datasets, metrics or {}, license).save(folder / "README.md")
        if not directory.exists():
            os.rename(folder, directory)
            return
        for file in folder.iterdir():
            os.replace(file, directory / file.name)


def push_to_hf_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str = "Add model",
    **kwargs: Any,
) -> str:
    """Upload the folder of `save_for_hf`, for `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)`.

    Args:
        model: as in `save_for_hf`.
        repo_id: "OWNER/NAME" or, for one's own, "NAME"; created if it does not exist. An existing card is kept.
        token: access token of the hub; None: that of `hf auth login`.
        revision: branch to upload to; None: main.
        private: whether a new repository is private.
        create_pr: open a pull request instead of committing.
        commit_message: message of the commit.
        kwargs: arguments of `save_for_hf`, except source.

    Returns:
        Address of the commit or the pull request.

    Raises:
        ValueError: as in `save_for_hf`; nothing is uploaded then.
    """
    # Write the folder before creating a repository, which raises for a wrong model or argument.
    with tempfile.TemporaryDirectory() as temporary:
        api = HfApi(token=token, library_name="timm", library_version=timm.__version__)
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        folder = Path(temporary) / name.rpartition("/")[2]
        save_for_hf(model, folder, source=f"hf-hub:{name}", **kwargs)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if api.file_exists(name, "README.md", revision=revision):
            (folder / "README.md").unlink()
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=commit_message
        )
    return commit.pr_url or commit.commit_url


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, DAT) or not cfg:
        kind = f"{type(model).__name__}{'' if cfg else ' without pretrained_cfg'}"
        raise ValueError(f"model must be a DAT made by timm.create_model without features_only, got {kind}")
    return cfg


def _save(model: nn.Module, folder: Path, config: dict[str, Any], data_config: Mapping[str, Any] | None) -> None:
    """Write weights and config.json, and check that they fit each other."""
    args, data_config = timm.models.get_model_args(model), dict(data_config or {})
    if args.get("img_size") and not data_config.keys() & {"img_size", "input_size"}:
        data_config["img_size"] = args["img_size"]
    stages = args.get("stages")
    args = {} if stages is None else {"stages": [asdict(s) if isinstance(s, StageConfig) else s for s in stages]}
    # safetensors refuses weights in channels_last memory format.
    handle = model.register_state_dict_post_hook(_make_contiguous)
    try:
        timm.models.save_for_hf(model, str(folder), config, args, safe_serialization=True, data_config=data_config)
    finally:
        handle.remove()
    again = timm.create_model(f"local-dir:{folder}", device="meta").state_dict()
    state = model.state_dict()
    for name in [*state, *again]:
        if name not in state or name not in again or state[name].shape != again[name].shape:
            raise ValueError(
                f"model must be as timm.create_model made it, except for classes and set_input_size, got another {name}"
            )


def _make_contiguous(module: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
    state_dict.update({name: value.contiguous() for name, value in state_dict.items() if isinstance(value, Tensor)})


def _card(
    model: nn.Module,
    folder: Path,
    description: str | None,
    source: str,
    datasets: list[str],
    metrics: Mapping[str, float],
    license: str,
) -> ModelCard:
    config = json.loads((folder / "config.json").read_text())
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    height, width = config["pretrained_cfg"]["input_size"][1:]
    details: dict[str, Any] = {
        "Architecture": f"`{config['architecture']}`",
        "Parameters (M)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "Classes": model.num_classes,
        "Image size": f"{height} x {width}; other sizes run too",
        "Papers": [f"[{title}]({address})" for title, address in PAPERS.items()],
        "Official code": CODE,
    }
    if datasets:
        details["Trained on"] = datasets
    if metrics:
        details[f"Metrics on {datasets[0]}"] = dict(metrics)
    facts = {
        "description": description or f"{config['architecture']}, a Vision Transformer with Deformable Attention.",
        "details": details,
        "usage": USAGE.format(source=source, output=f"1 x {model.num_classes or model.num_features}"),
        "citation": CITATIONS,
    }
    card = ModelCard(generate_readme(facts, folder.name))
    results = [EvalResult(task, datasets[0], datasets[0], name, value) for name, value in metrics.items()]
    card.data = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "dat", "vision-transformer", "deformable-attention"],
        license=license,
        datasets=datasets or None,
        metrics=list(metrics) or None,
        model_name=folder.name,
        eval_results=results or None,
    )
    return card
