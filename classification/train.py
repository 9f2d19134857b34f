"""Trains a classifier: python -m classification.train CONFIG [key.path=value ...], also under torchrun.

The command `dat classify train` does the same from anywhere.
"""

import argparse

from dat.cli import run_recipe


def main(options: argparse.Namespace) -> None:
    # Imported here, so that --help does not wait for torch.
    from dat.classification.config import ClassificationConfig, check_config
    from dat.classification.readers import open_split
    from dat.classification.trainer import ClassificationTrainer
    from dat.engine.config import load_config
    from dat.engine.distributed import prepare_output, setup_distributed

    config = load_config(ClassificationConfig, options.config, options.overrides)
    check_config(config)
    distributed = setup_distributed(config.train.device)

    train_set = open_split(config.data, "train")
    val_set = open_split(config.data, "val", train_set.class_names)

    # None, or the checkpoint that train.resume=true continues from.
    resume = prepare_output(config.output, config.train.resume, distributed)
    # Builds the model, its optimizer and its schedule.
    trainer = ClassificationTrainer(config, train_set, val_set, distributed, resume)
    trainer.run()


if __name__ == "__main__":
    run_recipe("classify", "train", main)
