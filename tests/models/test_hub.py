import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from dat.models import StageConfig, hub, push_to_hf_hub, save_for_hf

STAGES = (
    StageConfig("LSX", 16, 2),
    StageConfig("PND", 32, 2, num_groups=2, stride=2, position_bias="fixed_pe", release="2023", layer_scale=0.5),
)
NAMES = ["cat", "dog", "Übergröße: 3"]
# In a process that knows nothing of this one: the model, with features only, for other classes, and the card's example.
FRESH = """
import sys, timm, torch, dat
from PIL import Image
folder, code = sys.argv[1:]
name, x = f"local-dir:{folder}", torch.load(f"{folder}/x.pt", weights_only=True)
exec(code, values := {"image": Image.new("RGB", (90, 70))})
model = timm.create_model(name, pretrained=True).eval()
features = timm.create_model(name, pretrained=True, features_only=True).eval()
other = timm.create_model(name, pretrained=True, num_classes=5).eval()
with torch.no_grad():
    outputs = [model(x), *features(x), other.forward_features(x), other(x), values["output"]]
torch.save((outputs, model.pretrained_cfg["label_names"]), f"{folder}/y.pt")
"""


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("dat_nano", num_classes=3, stages=STAGES, img_size=(64, 96), mlp_ratio=2.0, in_chans=3)
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96)


def load(folder, **arguments):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


def test_a_fresh_process_loads_the_model(model, x, tmp_path):
    folder = tmp_path / "mine"
    save_for_hf(model, folder, label_names=NAMES)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "config.json",
        "mine",
        "model.safetensors",
    ]
    torch.save(x, folder / "x.pt")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("local-dir:mine", f"local-dir:{folder}")
    subprocess.run([sys.executable, "-c", FRESH, str(folder), code], check=True, cwd=Path(__file__).parents[2])
    (logits, *features, final, other, output), names = torch.load(folder / "y.pt", weights_only=True)
    assert names == NAMES
    assert other.shape == (2, 5)
    assert output.shape == (1, 3)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x))
        expected, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(features, intermediates)
        torch.testing.assert_close(final, expected)


def test_changes_since_construction_are_kept(x, tmp_path):
    model = timm.create_model("dat_pp_nano", num_classes=3, drop_path_rate=0.1, in_chans=1).eval()
    model.set_input_size((96, 160))
    model.reset_classifier(4, "max")
    save_for_hf(model, tmp_path, datasets="me/cats", data_config={"mean": [0.5], "std": [0.2], "crop_mode": "center"})
    again = load(tmp_path)
    torch.testing.assert_close(again(x[:, :1]), model(x[:, :1]))
    data = timm.data.resolve_model_data_config(again)
    assert (data["input_size"], data["mean"], data["crop_mode"]) == ((1, 96, 160), [0.5], "center")
    assert "drop_path_rate" not in json.loads((tmp_path / "config.json").read_text())["model_args"]
    # The same again: from a loaded model, over the old files, with weights that lie in another order.
    again.to(memory_format=torch.channels_last)
    save_for_hf(again, tmp_path)
    torch.testing.assert_close(load(tmp_path)(x[:, :1]), model(x[:, :1]))


def test_labels_are_kept(model, tmp_path):
    save_for_hf(model, tmp_path / "a", label_names=NAMES, label_descriptions={"cat": "a cat"})
    save_for_hf(load(tmp_path / "a"), tmp_path / "b")
    cfg = load(tmp_path / "b").pretrained_cfg
    assert (cfg["label_names"], cfg["label_descriptions"]) == (NAMES, {"cat": "a cat"})


def test_model_card(model, tmp_path):
    save_for_hf(model, tmp_path / "mine", datasets=["Me/Cats", "b"], metrics={"accuracy": 0.87}, license="cc-by-4.0")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "cc-by-4.0")
    assert (data.datasets, data.metrics, data.model_name) == (["Me/Cats", "b"], ["accuracy"], "mine")
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Me/Cats", "accuracy", 0.87)
    assert {"timm", "image-classification"} <= set(data.tags)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    for text in (
        *hub.PAPERS.values(),
        *hub.CITATIONS,
        f"**Parameters (M):** {parameters:.2f}",
        "**Image size:** 64 x 96",
        "accuracy: 0.87",
        'timm.create_model("local-dir:mine", pretrained=True)',
    ):
        assert text in card.text
    assert load(tmp_path / "mine").pretrained_cfg["license"] == "cc-by-4.0"
    model.reset_classifier(0)
    save_for_hf(model, tmp_path / "bare")
    data = ModelCard.load(tmp_path / "bare" / "README.md").data
    assert (data.pipeline_tag, data.license) == ("image-feature-extraction", "apache-2.0")
    assert data.eval_results is data.datasets is None


def pruned(model):
    model.prune_intermediate_layers([0])
    return model


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda model: nn.Linear(2, 2), {}, "model must be a DAT made by .* got Linear without pretrained_cfg"),
        (lambda model: hub.DAT(STAGES), {}, "model must be a DAT made by .* got DAT without pretrained_cfg"),
        (lambda model: timm.create_model("dat_nano", features_only=True), {}, "features_only, got FeatureGetterNet"),
        (pruned, {}, r"model must be as timm.create_model made it.* got another stages\.1\.downsample"),
        (None, {"label_names": ["cat"]}, "label_names must have 3 entries, one for each class, got 1"),
        (None, {"metrics": {"accuracy": 0.5}}, r"datasets must name what metrics \['accuracy'\] were measured on"),
    ],
)
def test_errors_leave_nothing_behind(model, tmp_path, change, arguments, message):
    model = change(model) if change else model
    with pytest.raises(ValueError, match=message) as error:
        save_for_hf(model, tmp_path / "a" / "b", **arguments)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.name != "a"]


def test_directory_is_a_file(model, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"directory must be a folder or a new path, .*a is a file"):
        save_for_hf(model, tmp_path / "a")
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(ValueError, match="b is a file or a broken link"):
        save_for_hf(model, tmp_path / "b")


def test_what_fails_on_the_way_leaves_the_old_files(model, tmp_path, monkeypatch):
    save_for_hf(model, tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(hub, "generate_readme", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_for_hf(timm.create_model("dat_nano"), tmp_path / "a")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class Hub:
    """Stands in for huggingface_hub.HfApi: repositories are folders."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def __call__(self, token, **_):
        self.calls.append(("token", token))
        return self

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        self.calls.append(("create_repo", repo_id, private))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, filename, revision):
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", options))
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}", pr_url=None)

    def download(self, repo_id, filename, **_):
        return str(self.root / repo_id / filename)


def test_push(model, x, tmp_path, monkeypatch):
    api = Hub(tmp_path)
    monkeypatch.setattr(hub, "HfApi", api)
    address = push_to_hf_hub(model, "mine", token="secret", private=True, commit_message="First", label_names=NAMES)
    assert address == "https://hub/me/mine"
    assert api.calls == [
        ("token", "secret"),
        ("create_repo", "me/mine", True),
        ("upload_folder", {"revision": None, "create_pr": False, "commit_message": "First"}),
    ]
    folder = tmp_path / "me" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = folder / "README.md"
    assert 'timm.create_model("hf-hub:me/mine", pretrained=True)' in card.read_text()
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", api.download)
    again = timm.create_model("hf-hub:me/mine", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    # A card that is there may have been written by hand.
    card.write_text("by hand")
    model.reset_classifier(2)
    push_to_hf_hub(model, "me/mine")
    assert card.read_text() == "by hand"
    assert timm.create_model("hf-hub:me/mine").num_classes == 2


def test_push_of_what_cannot_be_saved_makes_no_repository(model, tmp_path, monkeypatch):
    api = Hub(tmp_path)
    monkeypatch.setattr(hub, "HfApi", api)
    with pytest.raises(ValueError, match="label_names must have 3 entries"):
        push_to_hf_hub(model, "me/mine", label_names=["cat"])
    assert api.calls == [("token", None)]
