"""The training of a detector on a data set in any of the formats of `dat.detection.data.formats`."""

from collections.abc import Callable
from typing import Any

from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import cut_into_windows, read_splits
from dat.detection.trainer import DetectionTrainer
from dat.engine.distributed import prepare_output, setup_distributed


def train(config: DetectionConfig, transform: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Runs a whole training, or the rest of it; returns the metrics of its best epoch, as Trainer.run does.

    `transform`: of the user, before the other augmentation, see UserTransform.

    Raises UserError, before anything is written, for configurations that cannot work.
    """
    check_config(config)
    distributed = setup_distributed(config.train.device)
    train_set, val_set = read_splits(config.data)
    resume = prepare_output(config.output, config.train.resume, distributed)
    train_set = cut_into_windows(train_set, config.data.train, config.seed)
    return DetectionTrainer(config, train_set, val_set, distributed, resume, transform).run()
