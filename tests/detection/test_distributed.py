"""Two processes train and evaluate as one process does."""

import json
import os

import pytest
import torch
from coco_scenes import write_json, write_scenes
from commands import dat
from processes import run_processes

from dat.detection import Detector
from dat.detection.criterion import SetCriterion
from dat.detection.matcher import HungarianMatcher
from dat.engine import distributed
from dat.engine.checkpoint import load_checkpoint
from dat.utils.errors import ConfigError

# No images of two sizes in a batch, whose padding would differ, none left out, and no batch norm.
BACKBONE = "model.backbone={name: test_convnext, out_indices: [0, 1, 2]}"
SAME = ["data.train.sizes=[48]", "data.train.crop=0", "model.drop_rate=0", BACKBONE]
PLAIN = [*SAME, "train.epochs=2", "train.eval_batch_size=1", "train.pictures=0", "train.worst=0"]


@pytest.fixture
def one_size(config_file, scenes):
    """A configuration whose eight training and three validation images, uneven shares, are of one size."""
    for split, count in (("train", 16), ("val", 6)):
        data = write_scenes(scenes, split, count)
        data["images"] = data["images"][::2]
        ids = {image["id"] for image in data["images"]}
        # objects are spread unevenly too: the second image has none
        ids -= {data["images"][1]["id"]}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
        write_json(scenes / f"{split}.json", data)
    return config_file


def weights(folder):
    return load_checkpoint(folder / "last.pth")["state_dict"]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((value.double() - b[name].double()).abs().max().item() for name, value in a.items())


class RecordingAdamW(torch.optim.AdamW):
    """Keeps the gradients of the first step in the file `path`.

    The larger eps: Adam makes whole steps of gradients that are rounding alone, such as those of the keys' biases,
    which softmax ignores.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named, eps=1e-3)

    def step(self, *arguments, **named):
        if not self.path.exists():
            torch.save(
                distributed.whole_tensors([p.grad for group in self.param_groups for p in group["params"]]), self.path
            )
        return super().step(*arguments, **named)


def run(config, folder, *overrides):
    RecordingAdamW.path = folder / f"gradients_{os.environ['RANK']}.pth"
    torch.optim.AdamW = RecordingAdamW
    dat("detect", "train", config, *PLAIN, f"output={folder}/run", *overrides)


def train_split(config, folder, processes, *overrides):
    """Gradients of the first step, metrics, losses, weights, and images and scores of the detections of a run."""
    folder.mkdir()
    codes, errors, _ = run_processes(processes, run, folder, config, folder, *overrides)
    assert codes == [0] * processes, errors
    gradients = torch.load(folder / "gradients_0.pth", weights_only=True)
    metrics = json.loads((folder / "run/metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    results = json.loads((folder / "run/detections.json").read_text())
    results = sorted((result["image_id"], -result["score"]) for result in results)
    return gradients, {key: metrics[key] for key in ("AP", "AP50")}, losses, weights(folder / "run"), results


def test_the_split_of_a_step_changes_nothing(one_size, tmp_path):
    """Gradients, weights, losses, AP and detections are those of one process that takes all images at once."""
    gradients, metrics, losses, whole, results = train_split(one_size, tmp_path / "whole", 1, "train.batch_size=4")
    assert len(losses) == 4
    assert len(results) == 3 * 20
    for processes, batch_size, accumulate in ((1, 1, 4), (2, 2, 1), (2, 1, 2)):
        overrides = [f"train.batch_size={batch_size}", f"train.accumulate={accumulate}"]
        folder = tmp_path / f"{processes}_{batch_size}"
        others, other_metrics, other_losses, other, found = train_split(one_size, folder, processes, *overrides)
        for gradient, other_gradient in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-6)
        assert losses == pytest.approx(other_losses, rel=1e-4)
        assert largest_difference(whole, other) < 1e-5
        assert metrics == other_metrics
        assert [image for image, _ in results] == [image for image, _ in found]
        assert [score for _, score in results] == pytest.approx([score for _, score in found], abs=1e-4)


def write_normalizers(folder):
    group = distributed.setup_distributed("cpu")
    criterion = SetCriterion(3, HungarianMatcher(), no_object_weight=0.0)
    targets = [{"labels": torch.zeros(int(group.rank == 0), dtype=torch.long)}]
    found = criterion.normalizers(targets, 5, group.device)
    (folder / f"{group.rank}.json").write_text(json.dumps([float(number) for number in found]))


def test_a_step_with_fewer_objects_than_processes_weighs_as_much_as_in_one(tmp_path):
    """Gradients are averaged over the processes, and one object in three of them counts as one."""
    codes, errors, _ = run_processes(3, write_normalizers, tmp_path, tmp_path)
    assert codes == [0] * 3, errors
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx([1 / 3] * 2)


def test_more_processes_than_images_to_evaluate(one_size, tmp_path):
    codes, errors, _ = run_processes(
        4, run, tmp_path, one_size, tmp_path, "train.batch_size=1", "train.epochs=1", "train.eval_batch_size=2"
    )
    assert codes == [0] * 4, errors
    results = json.loads((tmp_path / "run/detections.json").read_text())
    assert len({result["image_id"] for result in results}) == 3


def train_and_evaluate(config, folder):
    detector = Detector.from_config(config, output=folder / "run", epochs=1, pictures=0, worst=0)
    trained = detector.train()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([trained, detector.evaluate()]))


def test_the_python_class_trains_and_evaluates_in_several_processes(one_size, tmp_path):
    codes, errors, _ = run_processes(2, train_and_evaluate, tmp_path, one_size, tmp_path)
    assert codes == [0, 0], errors
    trained, evaluated = json.loads((tmp_path / "0.json").read_text())
    assert trained["AP"] == evaluated["AP"]
    assert json.loads((tmp_path / "1.json").read_text()) == [{}, {}]


def run_sharded(config, folder, *overrides):
    # the layers of the tiny model too
    distributed.SHARD_PARAMETERS = 1000
    run(config, folder, "train.fsdp=true", *overrides)


def test_shared_weights_train_as_copies_do_and_go_on_from_each_others_checkpoints(one_size, tmp_path):
    found = []
    for name, stages in (("copies", [(run, 5)]), ("mixed", [(run, 1), (run_sharded, 3), (run, 5)])):
        (tmp_path / name).mkdir()
        for function, steps in stages:
            overrides = [
                "train.epochs=0",
                f"train.steps={steps}",
                "train.batch_size=2",
                "train.eval_epochs=9",
                "train.schedule=step",
            ]
            arguments = (one_size, tmp_path / name, *overrides, "train.resume=true")
            codes, errors, _ = run_processes(2, function, tmp_path, *arguments)
            assert codes == [0, 0], errors
        metrics = json.loads((tmp_path / name / "run/metrics.json").read_text())
        found.append((load_checkpoint(tmp_path / name / "run/last.pth"), {key: metrics[key] for key in ("AP", "AP50")}))
    (whole, metrics), (mixed, other_metrics) = found
    assert mixed["step"] == whole["step"] == 5
    for key in ("state_dict", "state_dict_ema"):
        assert largest_difference(whole[key], mixed[key]) < 1e-5
    # of a model that has learnt nothing, whose order of scores is one of rounding
    assert metrics == pytest.approx(other_metrics, abs=0.03)


def test_one_process_has_nothing_to_share(one_size):
    with pytest.raises(ConfigError, match=r"train.fsdp is true, but there is only one process"):
        dat("detect", "train", one_size, "train.fsdp=true")
