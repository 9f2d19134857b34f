"""AP is pycocotools' own, from every format that can hold a data set; images without annotations are not scored."""

import json

import numpy as np
import pytest
import torch
from coco_scenes import write_config
from commands import dat
from PIL import Image

from dat.detection.checkpoint import detector_state
from dat.detection.config import DataConfig, DetectionConfig
from dat.detection.data import Category, read_dataset
from dat.detection.evaluation import average_precision
from dat.detection.models import build_model
from dat.engine.checkpoint import save_checkpoint
from dat.engine.config import load_config


def write_crowded(root, seed, crowds=True, areas=True):
    """Many objects of all sizes in large images; crowds, and areas of COCO's limits, of segmentations and of 0."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for number in range(12):
        width, height = (int(side) for side in rng.integers(200, 400, 2))
        Image.new("L", (width, height)).save(root / "images" / f"image_{number}.png")
        images.append({"id": 7 * number, "file_name": f"image_{number}.png", "width": width, "height": height})
        for _ in range(rng.integers(0, 30)):
            w, h = rng.uniform(2, 180, 2) * rng.uniform(0.05, 1)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = np.array([x, y, w, h], np.float32).astype(float).tolist()
            crowd = int(crowds and rng.random() < 0.15)
            area = rng.choice([w * h, w * h / 2, 1024, 9216, 0]) if areas else box[2] * box[3]
            entry = {"id": len(annotations) + 1, "image_id": 7 * number, "category_id": int(rng.choice([3, 8, 20]))}
            annotations.append({**entry, "bbox": box, "iscrowd": crowd, "area": float(area)})
    # "ignore" is a key that pycocotools itself overwrites with iscrowd.
    for entry in annotations[::9]:
        entry["ignore"] = 1
    categories = [{"id": 20, "name": "c"}, {"id": 3, "name": "a"}, {"id": 8, "name": "b"}, {"id": 1, "name": "none"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name in ("train", "val"):
        (root / f"{name}.json").write_text(json.dumps(content))
    return content


def detect(content, seed):
    """Boxes near the objects, some of another class, some twice, and more than COCO counts in an image."""
    rng = np.random.default_rng(seed)
    results = []
    for entry in content["annotations"]:
        for _ in range(rng.integers(0, 4)):
            box = np.array(entry["bbox"]) + rng.normal(0, 1, 4) * np.array(entry["bbox"])[[2, 3, 2, 3]] * 0.1
            box[2:] = np.abs(box[2:]) + 0.5
            category = entry["category_id"] if rng.random() < 0.9 else 3
            result = {"image_id": entry["image_id"], "category_id": category, "bbox": box.round(3).tolist()}
            results.append({**result, "score": round(float(rng.random()), 5)})
    for _ in range(150):
        box = [*rng.uniform(0, 100, 2).round(3).tolist(), *rng.uniform(1, 60, 2).round(3).tolist()]
        results.append({"image_id": 7, "category_id": 8, "bbox": box, "score": round(float(rng.random()), 5)})
    return results


def reference(content, results):
    """AP, AP50, AP75, APs, APm, APl and AR100 of pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth = coco.COCO()
    truth.dataset = json.loads(json.dumps(content))
    truth.createIndex()
    run = evaluation.COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return dict(
        zip(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), run.stats[[0, 1, 2, 3, 4, 5, 8]], strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "crowds", "areas"), [("coco", True, True), ("coco copy", True, True), ("voc", True, False), ("yolo", 0, 0)]
)
def test_ap_is_that_of_pycocotools(tmp_path, name, crowds, areas, seed):
    root = tmp_path / "source"
    content = write_crowded(root, seed, crowds, areas)
    results = detect(content, seed)
    expected = reference(content, results)
    assert 0.05 < expected["AP"] < 0.95
    if name != "coco":
        dat("detect", "convert", root, tmp_path / "other", "--to", name.removesuffix(" copy"))
        root = tmp_path / "other"
    found = read_dataset(DataConfig(str(root)), "val")
    # Other formats have no ids: results name classes and images by theirs.
    images = {record.path.name: record.id for record in found.records}
    classes = {category.name: category.id for category in found.categories}
    image_of = {entry["id"]: images[entry["file_name"]] for entry in content["images"]}
    class_of = {entry["id"]: classes.get(entry["name"]) for entry in content["categories"]}
    results = [
        {**result, "image_id": image_of[result["image_id"]], "category_id": class_of[result["category_id"]]}
        for result in results
    ]
    metrics = average_precision(found, results)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def checkpoint(tmp_path, scenes):
    config = load_config(DetectionConfig, write_config(tmp_path, scenes))
    categories = (Category(3, "blue"), Category(11, "red"))
    torch.manual_seed(0)
    model = build_model(config.model, len(categories), weights=False)
    save_checkpoint(tmp_path / "model.pth", {**detector_state(config, categories), "state_dict": model.state_dict()})
    return tmp_path / "model.pth"


def test_a_detector_is_evaluated_on_any_format(checkpoint, scenes, tmp_path):
    """Category ids are the format's: those of COCO's file here, else 0, 1, ..."""
    metrics, ids = [], []
    for name in ("source", "yolo", "voc"):
        root = scenes if name == "source" else tmp_path / name
        if name != "source":
            dat("detect", "convert", scenes, root, "--to", name)
        given = [f"data.root={root}", "data.val.annotations=", "data.val.images=", "train.pictures=0", "train.worst=0"]
        dat("detect", "evaluate", checkpoint, *given, "--out", tmp_path / f"{name}_out", "--device", "cpu")
        metrics.append(json.loads((tmp_path / f"{name}_out/metrics.json").read_text()))
        results = json.loads((tmp_path / f"{name}_out/detections.json").read_text())
        ids.append({result["category_id"] for result in results})
    assert metrics[0] == metrics[1] == metrics[2]
    assert ids == [{3, 11}, {0, 1}, {0, 1}]


def test_images_without_annotations_give_results_in_their_ids(checkpoint, scenes, tmp_path, capsys):
    content = json.loads((scenes / "val.json").read_text())
    del content["annotations"]
    for entry in content["images"]:
        entry["id"] += 580_000
    (scenes / "annotations").mkdir()
    path = scenes / "annotations/image_info_test-dev2017.json"
    path.write_text(json.dumps(content))
    (scenes / "images").rename(scenes / "test2017")
    given = ["data.val.annotations=annotations/image_info_test-dev2017.json", "data.val.images="]
    dat("detect", "evaluate", checkpoint, *given, "--out", tmp_path / "out", "--device", "cpu")
    results = json.loads((tmp_path / "out/detections.json").read_text())
    assert {result["image_id"] for result in results} == {entry["id"] for entry in content["images"]}
    assert all(set(result) == {"image_id", "category_id", "bbox", "score"} for result in results)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["detections.json"]
    assert capsys.readouterr().out == (
        f"{scenes}: COCO, image_info_test-dev2017.json 4 images, 2 classes\n"
        f"{path}: has no annotations, so there is nothing to score; {len(results)} detections are written to "
        f"{tmp_path / 'out/detections.json'}\n"
    )
