"""Trains a classifier: python -m classification.train CONFIG [key.path=value ...]

Also under torchrun, one process per GPU. Killed at any moment, the same command with train.resume=true goes on; also
with another number of processes, if train.batch_size x train.accumulate x processes stays.
"""

import argparse

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.readers import open_split
from dat.classification.trainer import Trainer
from dat.engine.config import load_config
from dat.engine.distributed import prepare_output, setup_distributed


def train(config: ClassificationConfig) -> dict[str, float]:
    """Runs a whole training, or what remains of it; returns {"best": top-1, "step", "epoch"}.

    Raises:
        UserError: configuration, data, checkpoint, or a loss that is not finite.
    """
    check_config(config)
    data = config.data
    distributed = setup_distributed(config.train.device)
    pictures = open_split(data, "train")
    class_names = pictures.class_names
    val_pictures = open_split(data, "val", class_names)
    resume = prepare_output(config.output, config.train.resume, distributed)
    trainer = Trainer(config, pictures, val_pictures, distributed, resume)
    lacking = [name for name in class_names if name not in val_pictures.class_names]
    warnings = [f"data.val has no pictures of {len(lacking)} classes, such as {lacking[0]!r}"] if lacking else []
    trainer.run(warnings)
    progress = trainer.progress
    return {"best": progress.best, "step": progress.step, "epoch": progress.epoch}


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.train", description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/classification")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.lr=1e-3")
    arguments = parser.parse_args()
    train(load_config(ClassificationConfig, arguments.config, arguments.overrides))
