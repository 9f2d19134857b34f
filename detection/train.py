"""Trains a detector: python -m detection.train CONFIG [key.path=value ...], also under torchrun.

The command `dat detect train` does the same from anywhere.
"""

import argparse

from dat.cli import run_recipe


def main(options: argparse.Namespace) -> None:
    # Imported here, so that --help does not wait for torch.
    from dat.detection.config import DetectionConfig, check_config
    from dat.detection.data import read_dataset
    from dat.detection.overfit import overfit
    from dat.detection.trainer import DetectionTrainer
    from dat.engine.config import load_config
    from dat.engine.distributed import prepare_output, setup_distributed

    config = load_config(DetectionConfig, options.config, options.overrides)
    check_config(config)
    if options.overfit is not None:
        overfit(config, options.overfit)
        return

    distributed = setup_distributed(config.train.device)
    train_set = read_dataset(config.data, "train")
    val_set = read_dataset(config.data, "val", train_set.categories)

    # None, or the checkpoint that train.resume=true continues from.
    resume = prepare_output(config.output, config.train.resume, distributed)
    # Builds the model, its optimizer and its schedule.
    trainer = DetectionTrainer(config, train_set, val_set, distributed, resume)
    trainer.run()


if __name__ == "__main__":
    run_recipe("detect", "train", main)
