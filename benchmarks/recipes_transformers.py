"""Fine-tunes transformers' Deformable DETR with transformers' Trainer, for as many CPU minutes as `finetune` takes.

    pip install accelerate
    python -m examples.efficientnet runs/efficientnet_lite0.pth
    python -m benchmarks.recipes_transformers BCCD runs/efficientnet_lite0.pth [--minutes 27] [--steps 2482]

The same data, ImageNet-trained backbone, widths, depths, queries, sizes of images, flips, rates, images a step and
bfloat16 as in configs/detection/finetune.yaml with the keys of its comments, and the same evaluation. transformers has
no denoising, mixed selection, matchability-aware loss or average of the weights; crops and changes of colours are left
out here. transformers takes timm's activations away with the batch norms that it freezes, so the backbone is put in its
place by hand.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    TimmBackboneConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.timing import write_json
from dat.detection.config import DetectionConfig
from dat.detection.data import Annotations, read_splits
from dat.detection.draw import open_record
from dat.detection.evaluation import average_precision
from dat.engine.config import load_config

BACKBONE = "tf_efficientnet_lite0"
FLIPS = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
FROZEN = ("conv_stem", "bn1", "blocks.0.", "blocks.1.")


class Photographs(Dataset):
    """Images and annotations of COCO's form as the processor takes them, flipped both ways at random to train."""

    def __init__(self, annotations: Annotations, flips: bool) -> None:
        self.records, self.flips = annotations.records, flips

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        size = record.height, record.width
        image, boxes = open_record(record), tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=size)
        if self.flips:
            image, boxes = FLIPS(image, boxes)
        boxes = box_convert(boxes, "xyxy", "xywh")
        objects = [
            {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
            for box, label in zip(boxes.tolist(), record.labels.tolist(), strict=True)
        ]
        return {"images": image, "annotations": {"image_id": record.id, "annotations": objects}}


class Stop(TrainerCallback):
    """Ends the training after some CPU minutes of the process, all threads together."""

    def __init__(self, minutes: float) -> None:
        self.end = time.process_time() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= time.process_time() >= self.end


def build(config: DetectionConfig, weights: Path, names: list[str]) -> Any:
    """transformers' two-stage Deformable DETR of the configuration's sizes on the trained backbone."""
    model = config.model
    detector = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=TimmBackboneConfig(backbone=BACKBONE, out_indices=[2, 3, 4], features_only=True),
            d_model=model.embed_dim,
            encoder_layers=model.encoder_depth,
            decoder_layers=model.decoder_depth,
            encoder_attention_heads=model.num_heads,
            decoder_attention_heads=model.num_heads,
            encoder_ffn_dim=model.mlp_dim,
            decoder_ffn_dim=model.mlp_dim,
            num_feature_levels=model.num_levels,
            two_stage=True,
            two_stage_num_proposals=model.num_queries,
            with_box_refine=True,
            auxiliary_loss=True,
            dropout=model.drop_rate,
            id2label=dict(enumerate(names)),
        )
    )
    body = timm.create_model(BACKBONE, features_only=True, out_indices=[2, 3, 4])
    missing = body.load_state_dict(torch.load(weights, weights_only=True), strict=False).missing_keys
    if missing:
        raise SystemExit(f"{weights}: lacks {missing[0]}")
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    detector.model.backbone.model = freeze_batch_norm_2d(body)
    return detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the data")
    parser.add_argument("weights", type=Path, help="of timm's tf_efficientnet_lite0")
    parser.add_argument("--minutes", type=float, default=27.0, help="of one CPU core")
    parser.add_argument("--steps", type=int, default=2482, help="of the whole schedule; finetune's 17 epochs of BCCD")
    parser.add_argument("--lr", type=float, default=8e-4, help="the backbone's is a quarter of it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipes_transformers_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    config = load_config(DetectionConfig, "finetune", [f"data.root={options.data}"])
    data, train = config.data, config.train
    train_set, val_set = read_splits(data)
    detector = build(config, options.weights, [category.name for category in train_set.categories])
    processor = DeformableDetrImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def collate(samples: list[dict[str, Any]], size: int = 0) -> Any:
        edges = {"shortest_edge": size or random.choice(data.train.sizes), "longest_edge": data.train.max_size}
        joined = {name: [sample[name] for sample in samples] for name in samples[0]}
        return processor(**joined, size=edges, return_tensors="pt")

    backbone = [p for n, p in detector.named_parameters() if "backbone" in n and p.requires_grad]
    others = [p for n, p in detector.named_parameters() if "backbone" not in n and p.requires_grad]
    groups = [{"params": others}, {"params": backbone, "lr": options.lr / 4}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=train.weight_decay)
    trainer = Trainer(
        detector,
        TrainingArguments(
            output_dir="runs/transformers",
            per_device_train_batch_size=train.batch_size,
            max_steps=options.steps,
            max_grad_norm=train.clip_grad,
            lr_scheduler_type="cosine",
            warmup_steps=train.warmup_steps,
            use_cpu=True,
            bf16=True,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
        ),
        data_collator=collate,
        train_dataset=Photographs(train_set, flips=True),
        optimizers=(optimizer, None),
        callbacks=[Stop(options.minutes)],
    )
    start = time.process_time()
    trainer.train()
    minutes, steps = (time.process_time() - start) / 60, trainer.state.global_step
    results = []
    for record, sample in zip(val_set.records, Photographs(val_set, flips=False), strict=True):
        with torch.no_grad():
            outputs = detector.eval()(**collate([sample], data.val.size))
        size = torch.tensor([[record.height, record.width]])
        found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size, top_k=100)[0]
        boxes = box_convert(found["boxes"], "xyxy", "xywh")
        for score, label, box in zip(found["scores"], found["labels"], boxes, strict=True):
            detection = {"category_id": val_set.categories[int(label)].id, "bbox": box.tolist(), "score": float(score)}
            results.append({"image_id": record.id, **detection})
    metrics = average_precision(val_set, results)
    row = {"steps": steps, "planned_steps": options.steps, "cpu_minutes": round(minutes, 1)}
    row |= {key: round(metrics[key], 3) for key in ("AP", "AP50", "AP75")}
    print(row)
    write_json(options.out, [row])


if __name__ == "__main__":
    main()
