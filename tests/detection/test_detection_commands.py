"""Train, evaluate and predict as a person runs them: files, exit codes, one line for a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from coco_scenes import write_json
from commands import dat
from PIL import Image
from processes import run_processes
from torchvision.ops import box_convert, box_iou

from dat.detection import SetCriterion
from dat.engine import trainer
from dat.engine.checkpoint import load_checkpoint, save_checkpoint
from dat.engine.command import main_guard
from dat.engine.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(module_config):
    """The folder of a run that has learnt its four training images by heart, and is evaluated on them."""
    plain = ["data.train.sizes=[64]", "data.train.crop=0", "data.train.photometric=0", "data.train.horizontal_flip=0"]
    steps = ["train.epochs=60", "train.eval_epochs=30", "train.log_steps=50", "train.workers=1"]
    rates = ["train.lr=4e-3", "train.backbone_lr_scale=1", "train.sampling_lr_scale=1", "train.clip_grad=1"]
    overrides = ["data.val.annotations=train.json", "data.val.size=64", "model.drop_rate=0", *plain, *steps, *rates]
    dat("detect", "train", module_config, *overrides)
    return module_config.parent / "run"


def xyxy(boxes):
    return box_convert(torch.tensor(boxes, dtype=torch.float32), "xywh", "xyxy")


def fails(capsys, command, *arguments):
    """Runs a command that must fail; returns the one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main_guard(lambda: dat("detect", command, *arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 1
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_its_results(trained):
    files = {
        "config.yaml",
        "last.pth",
        "best.pth",
        "train.log",
        "log.jsonl",
        "metrics.json",
        "curve.png",
        "precision_recall.png",
        "confusion.png",
        "box_sizes.png",
        "report.html",
        "tensorboard",
    }
    assert files <= {path.name for path in trained.iterdir()}
    assert len(list((trained / "predictions").glob("*.png"))) == 2
    assert Image.open(trained / "curve.png").width > 500
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"AP", "AP50", "seconds", "images_per_second", "epoch"} <= set(metrics)
    assert set(metrics["per_class"]) == {"blue", "red"}
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    # at the end of every epoch, here of two steps
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, 121, 2))
    assert [line["step"] for line in lines if line["kind"] == "val"] == [60, 120]


def test_a_detector_learns(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["AP50"] > 0.9
    assert all(of_class["AP50"] > 0.9 for of_class in metrics["per_class"].values())


def test_a_checkpoint_carries_its_classes_and_configuration(trained):
    state = load_checkpoint(trained / "best.pth", kind="detection")
    assert state["class_names"] == ["blue", "red"]
    assert state["category_ids"] == [3, 11]
    assert state["config"]["model"]["num_queries"] == 10


def test_evaluation_repeats_the_ap_of_training_at_any_batch_size(trained, tmp_path, capsys):
    wanted = json.loads((trained / "metrics.json").read_text())
    capsys.readouterr()
    for batch_size in (1, 3):
        arguments = [str(trained / "best.pth"), f"train.eval_batch_size={batch_size}", "--out", str(tmp_path)]
        dat("detect", "evaluate", *arguments, "--device", "cpu")
        found = json.loads((tmp_path / "metrics.json").read_text())
        assert found["AP"] == pytest.approx(wanted["AP"], abs=1e-3)
        assert found["AP50"] == wanted["AP50"]
        assert set(found["per_class"]) == {"blue", "red"}
    assert "red" in capsys.readouterr().out
    assert {result["category_id"] for result in json.loads((tmp_path / "detections.json").read_text())} == {3, 11}


def test_prediction_draws_and_writes_coco_results(trained, tmp_path, module_config):
    images = module_config.parent / "scenes/images"
    dat("detect", "predict", trained / "best.pth", images, "--out", tmp_path, "--threshold", "0", "--device", "cpu")
    assert {path.stem for path in tmp_path.glob("*.png")} == {path.stem for path in images.iterdir()}
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {result["image_id"] for result in results} == set(range(1, 9))
    for result in results:
        width, height = Image.open(images / result["file_name"]).size
        x, y, w, h = result["bbox"]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
        assert result["category_id"] in (3, 11)
        assert 0 <= result["score"] <= 1
    best = {}
    for result in sorted(results, key=lambda result: result["score"]):
        best[result["file_name"]] = result
    truth = json.loads((module_config.parent / "scenes/train.json").read_text())
    for image in truth["images"]:
        found = best[image["file_name"]]
        boxes = [
            a["bbox"]
            for a in truth["annotations"]
            if a["image_id"] == image["id"] and a["category_id"] == found["category_id"]
        ]
        assert box_iou(xyxy([found["bbox"]]), xyxy(boxes)).max() > 0.5


def test_prediction_of_one_image(trained, tmp_path, module_config):
    image = module_config.parent / "scenes/images/val_0.jpg"
    dat("detect", "predict", trained / "best.pth", image, "--out", tmp_path / "out", "--device", "cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "detections.csv",
        "detections.json",
        "val_0.png",
    ]


def test_prediction_never_replaces_its_input(trained, tmp_path, capsys):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    line = fails(capsys, "predict", trained / "best.pth", tmp_path, "--out", tmp_path)
    assert "a.png is one of the images to search" in line
    assert Image.open(tmp_path / "a.png").size == (30, 30)


def test_prediction_leaves_out_what_it_cannot_read(trained, tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("a/1.jpg", "b/1.jpg"):
        (folder / name).parent.mkdir(parents=True)
        Image.effect_noise((60, 60), 50).convert("RGB").save(folder / name)
    (folder / "b/2.jpg").write_bytes((folder / "b/1.jpg").read_bytes()[:-300])
    (folder / "a/._1.jpg").write_bytes(b"resource fork")
    (folder / "paper.pdf").write_bytes(b"%PDF")
    # twice: the second time its own pictures are there
    for _ in range(2):
        dat("detect", "predict", trained / "best.pth", folder, "--out", folder / "out", "--device", "cpu")
        line = capsys.readouterr().out.splitlines()[-1]
        assert (
            "2 images, 2 left out: 1 of no image format: paper.pdf; 1 that cannot be read: b/2.jpg (image file" in line
        )
        results = json.loads((folder / "out/detections.json").read_text())
        assert {(result["image_id"], result["file_name"]) for result in results} == {(1, "a/1.jpg"), (2, "b/1.jpg")}
        assert sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*.png")) == [
            "a/1.png",
            "b/1.png",
        ]
    line = fails(capsys, "predict", trained / "best.pth", folder / "b/2.jpg", "--out", tmp_path / "out")
    assert "2.jpg: cannot be read as an image" in line
    assert not (tmp_path / "out").exists()


def test_prediction_sees_what_evaluation_sees(trained, tmp_path, module_config):
    """Images padded to a multiple of 32 pixels."""
    state = load_checkpoint(trained / "best.pth")
    state["config"]["data"]["pad_multiple"] = 32
    save_checkpoint(tmp_path / "padded.pth", state)
    arguments = [str(tmp_path / "padded.pth"), "--device", "cpu", "--out"]
    dat("detect", "evaluate", *arguments, tmp_path / "evaluated", "train.eval_batch_size=1")
    images = module_config.parent / "scenes/images"
    dat("detect", "predict", *arguments, tmp_path / "predicted", images)
    evaluated, predicted = (
        json.loads((tmp_path / name / "detections.json").read_text()) for name in ("evaluated", "predicted")
    )
    for image in json.loads((module_config.parent / "scenes/train.json").read_text())["images"]:
        wanted = [result["score"] for result in evaluated if result["image_id"] == image["id"]]
        found = [result["score"] for result in predicted if result["file_name"] == image["file_name"]]
        assert found == pytest.approx(wanted, abs=1e-4)


def test_prediction_keeps_at_least_one_detection(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        dat("detect", "predict", trained / "best.pth", tmp_path, "--out", tmp_path / "out", "--top-k", "-1")
    assert "argument --top-k: is -1, should be an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["train.epochs=0"], "train.epochs is 0, should be at least 1"),
        (["train.amp=fp8"], "train.amp is 'fp8', should be one of none, bf16"),
        (["data.train.annotations=no.json"], "no.json: no such annotation file"),
        (["data.val.images=nowhere"], "nowhere: no such folder of images"),
        (["model.backbone.name=dat_nan"], "no timm model 'dat_nan'"),
        (["model.backbone.num_headz=3"], "model.backbone"),
        (["model.num_heads=3"], "embed_dim=16 should be a multiple of 4 and of num_heads=3"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(config_file, tmp_path, capsys, overrides, message):
    assert message in fails(capsys, "train", config_file, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_validation_file_of_other_classes_is_refused(config_file, scenes, tmp_path, capsys):
    data = json.loads((scenes / "val.json").read_text())
    data["categories"].append({"id": 12, "name": "green"})
    write_json(scenes / "val.json", data)
    assert "12 green; they should be those of training" in fails(capsys, "train", config_file)
    assert not (tmp_path / "run").exists()


def test_a_truncated_image_stops_training_in_one_line(config_file, scenes, capsys):
    path = scenes / "images/train_1.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    line = fails(capsys, "train", config_file, "train.workers=1")
    assert f"{path}: cannot be read as an image" in line


def test_a_finished_run_is_not_overwritten(trained, module_config, capsys):
    before = (trained / "last.pth").read_bytes()
    assert "holds a run; go on with train.resume=true" in fails(capsys, "train", module_config)
    assert (trained / "last.pth").read_bytes() == before


def test_checkpoints_that_do_not_fit_are_refused(trained, module_config, tmp_path, capsys):
    line = fails(capsys, "train", module_config, "train.resume=true", "model.embed_dim=32")
    assert "last.pth: model.embed_dim was 16, is now 32" in line
    state = load_checkpoint(trained / "best.pth")
    state["state_dict"].pop("level_embed")
    save_checkpoint(tmp_path / "less.pth", state)
    assert "less.pth: of another architecture: it lacks level_embed" in fails(capsys, "evaluate", tmp_path / "less.pth")
    (tmp_path / "cut.pth").write_bytes((trained / "best.pth").read_bytes()[:5000])
    for command, *more in (("evaluate",), ("predict", trained, "--out", tmp_path / "out")):
        assert "cut.pth: not a checkpoint, or a truncated one" in fails(capsys, command, tmp_path / "cut.pth", *more)
    line = fails(
        capsys,
        "train",
        module_config,
        f"output={tmp_path}/new",
        f"model.backbone.checkpoint_path={trained}/best.pth",
    )
    assert "is of a detector" in line
    assert not (tmp_path / "new").exists()
    assert "should not be overridden" in fails(capsys, "evaluate", trained / "best.pth", "model.num_queries=3")


def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_checkpoint(config_file, tmp_path, capsys):
    main_guard(lambda: dat("detect", "train", config_file, "train.epochs=1"))
    last = tmp_path / "run/last.pth"
    state = load_checkpoint(last)
    # the weights are finite, but their products are not
    state["state_dict"]["input_proj.0.0.weight"].view(-1)[0] = 3e38
    save_checkpoint(last, state)
    before = last.read_bytes()
    line = fails(capsys, "train", config_file, "train.resume=true")
    assert "step 3, images [10" in line
    assert "first non-finite tensor is output of input_proj.0.0" in line
    assert last.read_bytes() == before


def test_options_for_memory_and_rates(config_file, tmp_path):
    options = ["train.grad_checkpointing=true", "data.cache=memory", "data.train.max_pixels=5000", "train.steps=3"]
    options += ["train.lr=1e-3", "train.lr_batch_size=8", "train.layer_decay=0.5", "train.backbone_lr_scale=1"]
    dat("detect", "train", config_file, *options)
    run = tmp_path / "run"
    assert "2 images a step (2 x 1 accumulated x 1 processes), learning rate 0.0005, 0.001 for 8 images" in (
        (run / "train.log").read_text()
    )
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["kind"] == "train"] == [5e-4] * 3
    # it ends in the midst of its second epoch, and is evaluated there
    assert [line["step"] for line in lines if line["kind"] == "val"] == [2, 3]
    assert (run / "worst.png").exists()
    # then on data with one class more
    for split in ("train", "val"):
        data = json.loads((tmp_path / f"scenes/{split}.json").read_text())
        data["categories"].append({"id": 50, "name": "green"})
        write_json(tmp_path / f"scenes/{split}.json", data)
    dat(
        "detect",
        "train",
        config_file,
        "train.steps=1",
        f"model.checkpoint_path={run}/best.pth",
        f"output={tmp_path}/new",
    )
    assert f"starts from {run}/best.pth\n" in (tmp_path / "new/train.log").read_text()
    assert load_checkpoint(tmp_path / "new/last.pth")["class_names"] == ["blue", "red", "green"]


def test_bfloat16_without_averaged_weights(config_file, tmp_path):
    dat("detect", "train", config_file, "train.amp=bf16", "train.epochs=1", "train.ema_decay=0")
    assert "state_dict_ema" not in load_checkpoint(tmp_path / "run/last.pth")


def test_detr_trains_and_is_evaluated_by_its_own_scores(config_file, scenes, tmp_path):
    options = ["model.kind=detr", "model.box_refine=false", "model.two_stage=false", "model.backbone.out_indices=[3]"]
    options += ["train.pictures=0", "train.worst=0"]
    dat("detect", "train", config_file, *options, "train.epochs=1")
    checkpoint = load_checkpoint(tmp_path / "run/best.pth")
    # "no object" has a logit too
    assert len(checkpoint["state_dict"]["class_embed.bias"]) == len(checkpoint["class_names"]) + 1
    found = json.loads((tmp_path / "run/detections.json").read_text())
    per_image = Counter(result["image_id"] for result in found)
    # one detection a query, where sigmoid scores would give one a query and class
    assert set(per_image.values()) == {10}
    dat("detect", "evaluate", tmp_path / "run/best.pth", "--out", tmp_path, "--device", "cpu", "data.val.top_k=3")
    found = json.loads((tmp_path / "detections.json").read_text())
    assert set(Counter(result["image_id"] for result in found).values()) == {3}
    out = tmp_path / "pictures"
    dat("detect", "predict", tmp_path / "run/best.pth", scenes / "images", "--out", out, "--device", "cpu")
    found = json.loads((out / "detections.json").read_text())
    assert set(Counter(result["image_id"] for result in found).values()) == {10}


def test_torchrun_runs_the_recipe(config_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "detection.train", str(config_file), "train.steps=1", "train.pictures=0", "train.worst=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "(2 x 1 accumulated x 2 processes)" in (tmp_path / "run/train.log").read_text()


def test_a_non_finite_loss_of_finite_outputs_is_traced_without_the_other_processes(config_file, capsys, monkeypatch):
    calls = []
    forward = SetCriterion.forward
    monkeypatch.setattr(SetCriterion, "forward", lambda *a: calls.append(1) or forward(*a))
    line = fails(capsys, "train", config_file, "train.loss.weight_class=3e38")
    assert "step 1, images [10" in line
    # that of the step: the criterion waits for the other processes, which may have nothing to trace
    assert len(calls) == 1


def test_a_run_with_denoising_resumes_to_the_same_weights(config_file, tmp_path, monkeypatch):
    dino = ["model.kind=dino", "model.box_refine=false", "model.two_stage=false", "model.one_to_many_queries=5"]
    dino += ["train.loss.class_loss=matchability", "train.epochs=2", "train.checkpoint_steps=1"]
    arguments = [config_file, *dino, "train.grad_checkpointing=true", "train.amp=bf16"]
    seen, forward = [], SetCriterion.forward

    def spy(self, outputs, *others):
        seen.append(outputs.keys())
        return forward(self, outputs, *others)

    class StoppedError(Exception):
        pass

    def save_and_stop(path, state, keep):
        save_checkpoint(path, state, keep)
        raise StoppedError

    monkeypatch.setattr(SetCriterion, "forward", spy)
    dat("detect", "train", *arguments, f"output={tmp_path}/whole")
    assert seen
    assert all({"dn_outputs", "one_to_many_outputs"} <= keys for keys in seen)
    with monkeypatch.context() as patched:
        patched.setattr("dat.engine.trainer.save_checkpoint", save_and_stop)
        with pytest.raises(StoppedError):
            dat("detect", "train", *arguments)
    dat("detect", "train", *arguments, "train.resume=true")
    whole, resumed = (load_checkpoint(tmp_path / run / "last.pth")["state_dict"] for run in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def train_until_killed(arguments, threads):
    """Kills itself with SIGKILL right after a checkpoint."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    torch.set_num_threads(threads)

    def save_and_die(path, state, keep):
        save_checkpoint(path, state, keep)
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_checkpoint = save_and_die
    dat("detect", "train", *arguments, "train.resume=true")


def test_a_killed_run_resumes_to_the_same_weights(config_file, tmp_path):
    arguments = [str(config_file), "train.epochs=3", "train.checkpoint_steps=1", "train.worst=0", "train.pictures=0"]
    # steps of two batches each
    arguments += ["train.batch_size=1", "train.accumulate=2"]
    dat("detect", "train", *arguments, f"output={tmp_path}/whole")
    whole = load_checkpoint(tmp_path / "whole/last.pth")
    # in the middle of the first epoch, before its evaluation, between best.pth and last.pth after it
    for _ in range(3):
        codes, errors, _ = run_processes(1, train_until_killed, tmp_path, arguments, torch.get_num_threads())
        assert codes == [-signal.SIGKILL], errors
    dat("detect", "train", *arguments, "train.resume=true")
    resumed = load_checkpoint(tmp_path / "run/last.pth")
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())
    assert [resumed[key] for key in ("step", "epoch", "best")] == [whole[key] for key in ("step", "epoch", "best")]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_fails_loses_no_training(config_file, scenes, tmp_path, capsys, monkeypatch):
    path = scenes / "images/val_1.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    assert "val_1.jpg: cannot be read as an image" in fails(capsys, "train", config_file, "train.epochs=1")
    trained = load_checkpoint(tmp_path / "run/last.pth")
    assert [trained[key] for key in ("step", "epoch", "step_in_epoch")] == [2, 0, 2]
    path.write_bytes(content)
    # all that is left to do is the evaluation
    monkeypatch.setattr(Trainer, "train_step", None)
    dat("detect", "train", config_file, "train.epochs=1", "train.resume=true")
    assert load_checkpoint(tmp_path / "run/last.pth")["epoch"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("val", 2)]
    assert f"epoch 1/1: loss {lines[1]['loss']:.3f}" in (tmp_path / "run/train.log").read_text()


def test_a_run_resumes_without_the_file_that_its_backbone_started_from(config_file, tmp_path):
    weights = tmp_path / "classifier.pth"
    save_checkpoint(weights, {"kind": "classification", "state_dict": timm.create_model("test_resnet").state_dict()})
    arguments = [str(config_file), f"model.backbone.checkpoint_path={weights}"]
    dat("detect", "train", *arguments, "train.epochs=1")
    weights.unlink()
    dat("detect", "train", *arguments, "train.resume=true")
    assert load_checkpoint(tmp_path / "run/last.pth")["epoch"] == 2


def test_a_run_resumes_as_it_began_or_not_at_all(trained, module_config, tmp_path, capsys):
    changes = {
        "train.batch_size=1": "a step took 2 images, it is now 1 (1 x 1 accumulated x 1 processes)",
        "train.backbone_lr_scale=0.5": "train.backbone_lr_scale was 1.0, is now 0.5",
        "model.num_points=2": "model.num_points was 4, is now 2",
        "seed=1": "seed was 0, is now 1",
    }
    resume = ["train.resume=true", "model.drop_rate=0", "train.backbone_lr_scale=1", "train.sampling_lr_scale=1"]
    for change, message in changes.items():
        assert message in fails(capsys, "train", module_config, *resume, change)
    output = tmp_path / "run"
    output.mkdir()
    (output / "last.pth").write_bytes((trained / "best.pth").read_bytes())
    assert "last.pth: has no optimizer state" in fails(capsys, "train", module_config, *resume, f"output={output}")
    state = load_checkpoint(trained / "last.pth")
    state |= {"step": 7, "closed": 0}
    save_checkpoint(output / "last.pth", state)
    assert "resuming needs the same" in fails(capsys, "train", module_config, *resume, f"output={output}")


def test_warnings_about_the_data_reach_the_log_of_the_run(config_file, scenes, tmp_path):
    data = json.loads((scenes / "train.json").read_text())
    data["annotations"][0]["bbox"] = [1, 1, 0, 5]
    write_json(scenes / "train.json", data)
    dat("detect", "train", config_file, "train.epochs=1")
    assert (tmp_path / "run/train.log").read_text().count("warning: ") == 1
    assert "train.json: empty box, dropped (1)" in (tmp_path / "run/train.log").read_text()


def test_sigterm_to_the_whole_group_saves_and_resumes(config_file, tmp_path):
    """As `timeout` and job schedulers send it: to the loader's workers too."""
    command = [sys.executable, "-m", "detection.train", str(config_file), "train.epochs=500", "train.workers=2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            lines = tmp_path / "run/log.jsonl"
            deadline = time.monotonic() + 120
            while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGTERM)
            errors = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run/last.pth")["step"] > 0


def test_a_checkpoint_without_an_entry_is_not_resumed(module_config, trained, tmp_path, capsys):
    state = torch.load(trained / "last.pth", weights_only=True)
    output = tmp_path / "run"
    output.mkdir()
    resume = ("train.epochs=3", "train.resume=true", f"output={output}")
    for change in ({"category_ids": None}, {"epoch": "x"}):
        torch.save({name: value for name, value in (state | change).items() if value is not None}, output / "last.pth")
        line = fails(capsys, "train", module_config, *resume)
        (name,) = change
        assert f"last.pth: {'has no category_ids' if name == 'category_ids' else 'epoch is '}" in line
