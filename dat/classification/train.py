"""The training of a classifier on a data set."""

from collections.abc import Callable
from typing import Any

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.readers import open_split
from dat.classification.trainer import ClassificationTrainer
from dat.engine.distributed import prepare_output, setup_distributed


def train(config: ClassificationConfig, transform: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Runs a whole training, or the rest of it; returns the metrics of its best epoch, as Trainer.run does.

    `transform`: of the user, before the other augmentation, see UserTransform.

    Raises:
        UserError: configuration, data, checkpoint, or a loss that is not finite.
    """
    check_config(config)
    distributed = setup_distributed(config.train.device)
    train_set = open_split(config.data, "train")
    val_set = open_split(config.data, "val", train_set.class_names)
    resume = prepare_output(config.output, config.train.resume, distributed)
    return ClassificationTrainer(config, train_set, val_set, distributed, resume, transform).run()
