"""The same scenes in many formats, written without the code that is tested."""

import itertools
import json
import random
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

NAMES = ("blue", "red")
COLORS = ((30, 60, 220), (220, 30, 30))
# Every fifth image, by name: the rule for data without a validation split.
VAL = (4, 9, 14, 19)


def make_scenes(folder: Path, count: int = 20) -> list[dict]:
    """Images with two boxes each, some with decimals and at borders; returns name, size and objects of each."""
    folder.mkdir(parents=True)
    rng, scenes = random.Random(0), []
    for number in range(count):
        width, height = ((80, 60), (56, 72))[number % 2]
        image, objects = Image.new("RGB", (width, height), (60, 60, 60)), []
        for k in range(2):
            side = rng.randrange(14, 28)
            x, y = rng.randrange(width - side), rng.randrange(height - side)
            box = (x, y, side, side) if k else (x + rng.randrange(8) / 8, y + 0.5, side - 0.875, side - 0.5)
            label = rng.randrange(2)
            ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill=COLORS[label])
            objects.append((label, box))
        objects[0] = (objects[0][0], (0, 0, 20, 21)) if number == 3 else objects[0]
        objects[1] = (objects[1][0], (width - 20, height - 19, 20, 19)) if number == 4 else objects[1]
        name = f"scene_{number + 1}.jpg"
        image.save(folder / name)
        scenes.append({"name": name, "size": (width, height), "objects": objects})
    return scenes


def coco(scenes: list[dict], prefix: str = "", first: int = 1) -> str:
    images, annotations = [], []
    # Files are in no order of their own.
    for number, scene in reversed(list(enumerate(scenes, start=first))):
        width, height = scene["size"]
        images.append({"id": number, "file_name": prefix + scene["name"], "width": width, "height": height})
        for label, box in scene["objects"]:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": label + first, "iscrowd": 0}
            annotations.append({**annotation, "bbox": list(box), "area": box[2] * box[3]})
    categories = [{"id": label + first, "name": name} for label, name in enumerate(NAMES)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def yolo(scene: dict) -> str:
    width, height = scene["size"]
    lines = [
        f"{label} {(x + w / 2) / width!r} {(y + h / 2) / height!r} {w / width!r} {h / height!r}\n"
        for label, (x, y, w, h) in scene["objects"]
    ]
    return "".join(lines)


def voc(scene: dict) -> str:
    width, height = scene["size"]
    objects = "".join(
        f"\t<object>\n\t\t<name>{NAMES[label]}</name>\n\t\t<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>\n\t</object>\n"
        for label, (x, y, w, h) in scene["objects"]
    )
    return (
        f"<annotation>\n\t<filename>{scene['name']}</filename>\n\t<size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>\n{objects}</annotation>\n"
    )


def cvat(scenes: list[dict]) -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    images = ""
    for number, scene in enumerate(scenes):
        boxes = "".join(
            f'    <box label="{NAMES[label]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"></box>\n'
            for label, (x, y, w, h) in scene["objects"]
        )
        width, height = scene["size"]
        images += (
            f'  <image id="{number}" name="{scene["name"]}" width="{width}" height="{height}">\n{boxes}  </image>\n'
        )
    head = f"<version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n{head}\n{images}</annotations>\n'


def labelme(scene: dict) -> str:
    width, height = scene["size"]
    shapes = [
        {"label": NAMES[label], "points": [[x, y], [x + w, y + h]], "group_id": None, "shape_type": "rectangle"}
        for label, (x, y, w, h) in scene["objects"]
    ]
    shapes[0] |= {"points": [[x, y] for x, y in itertools.product(*zip(*shapes[0]["points"], strict=True))]}
    shapes[0] |= {"shape_type": "polygon"}
    sides = {"imageHeight": height, "imageWidth": width}
    return json.dumps({"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": scene["name"], **sides})


def jsonl(scenes: list[dict]) -> str:
    rows = [
        {
            "file_name": scene["name"],
            "objects": {
                "bbox": [box for _, box in scene["objects"]],
                "categories": [label for label, _ in scene["objects"]],
            },
        }
        for scene in scenes
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_all(folder: Path) -> dict[str, Path]:
    """Folders of the same 20 images and 40 boxes, by format; those without splits need the rule for validation."""
    scenes = make_scenes(folder / "source")
    splits = {
        "train": [scene for i, scene in enumerate(scenes) if i not in VAL],
        "val": [scenes[i] for i in VAL],
    }
    roots = {}

    def write(name: str, texts: dict[str, str], images: dict[str, list[dict]]) -> None:
        roots[name] = folder / name
        for file, text in texts.items():
            (roots[name] / file).parent.mkdir(parents=True, exist_ok=True)
            (roots[name] / file).write_text(text, encoding="utf-8")
        for place, some in images.items():
            (roots[name] / place).mkdir(parents=True, exist_ok=True)
            for scene in some:
                shutil.copy(folder / "source" / scene["name"], roots[name] / place / scene["name"])

    train, val = splits["train"], splits["val"]
    write("coco", {"train.json": coco(train), "val.json": coco(val)}, {"images": scenes})
    files = {"train/_annotations.coco.json": coco(train), "valid/_annotations.coco.json": coco(val)}
    write("roboflow", files, {"train": train, "valid": val})
    labels = {
        f"labels/{split}/{Path(scene['name']).stem}.txt": yolo(scene) for split in splits for scene in splits[split]
    }
    description = "path: /home/me/data\ntrain: images/train\nval: images/val\nnames: [blue, red]\n"
    write("yolo", {"data.yaml": description, **labels}, {f"images/{split}": some for split, some in splits.items()})
    lists = {
        f"ImageSets/Main/{split}.txt": "".join(f"{Path(scene['name']).stem}\n" for scene in some)
        for split, some in splits.items()
    }
    annotations = {f"Annotations/{Path(scene['name']).stem}.xml": voc(scene) for scene in scenes}
    write("voc", {**lists, **annotations}, {"JPEGImages": scenes})
    write("cvat_coco", {"annotations/instances_default.json": coco(scenes)}, {"images": scenes})
    write("label_studio_coco", {"result.json": coco(scenes, "images/", 0)}, {"images": scenes})
    write("cvat_xml", {"annotations.xml": cvat(scenes)}, {"images": scenes})
    flat = {f"labels/{Path(scene['name']).stem}.txt": yolo(scene) for scene in scenes}
    write("label_studio_yolo", {"classes.txt": "blue\nred\n", "notes.json": "{}", **flat}, {"images": scenes})
    darknet = {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "obj.names": "blue\nred\n",
        "train.txt": "".join(f"data/obj_train_data/{scene['name']}\n" for scene in scenes),
        **{f"obj_train_data/{Path(scene['name']).stem}.txt": yolo(scene) for scene in scenes},
    }
    write("darknet", darknet, {"obj_train_data": scenes})
    beside = {f"{s}/{Path(x['name']).stem}.xml": voc(x) for s, some in (("train", train), ("valid", val)) for x in some}
    write("roboflow_voc", beside, {"train": train, "valid": val})
    flat = {f"{Path(scene['name']).stem}.json": labelme(scene) for scene in scenes}
    write("labelme", flat, {"": scenes})
    card = (
        "---\nlicense: mit\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: objects\n"
        "    sequence:\n    - name: bbox\n      sequence: float32\n      length: 4\n    - name: categories\n"
        "      dtype:\n        class_label:\n          names:\n            '0': blue\n            '1': red\n---\n"
    )
    files = {"train/metadata.jsonl": jsonl(train), "validation/metadata.jsonl": jsonl(val), "README.md": card}
    write("huggingface", files, {"train": train, "validation": val})
    return roots
