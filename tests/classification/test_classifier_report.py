"""The command that writes the report of a run anew, whole or interrupted."""

import json

import numpy as np
import pytest
from commands import dat

from dat.classification import trainer
from dat.classification.config import ClassificationConfig
from dat.classification.results import Results
from dat.classification.train import train
from dat.engine.checkpoint import save_checkpoint
from dat.engine.command import main_guard
from dat.engine.config import from_dict, save_config


def write(folder, *overrides):
    main_guard(lambda: dat("classify", "report", folder, *overrides))
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def interrupted(settings, tmp_path):
    """The folder of a run that was stopped after its first epoch, or what it would have left."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(from_dict(ClassificationConfig, settings, "test"), folder / "config.yaml")
    lines = [{"kind": "train", "step": 4, "epoch": 1.0, "loss": 3.0, "lr": 1e-3}]
    lines.append({"kind": "val", "step": 4, "epoch": 1, "top1": 50.0, "top5": 100.0, "loss": 2.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind"')
    save_checkpoint(folder / "best.pth", {"kind": "classification", "class_names": ["blue", "green", "<b>red"]})
    n = 6
    labels, top = np.array([0, 0, 1, 1, 2, 2]), np.array([[0], [0], [1], [1], [2], [1]])
    scores, losses = np.full((n, 1), 0.9, np.float32), np.ones(n)
    Results(np.arange(n), labels, top, scores, losses).save(folder / "results.npz")
    return folder


def test_the_report_of_an_interrupted_run(interrupted, pictures):
    # the folder of the class has that name too
    for split in ("train", "val"):
        (pictures / split / "red").rename(pictures / split / "<b>red")
    page = write(interrupted)
    assert "test_convnext, top-1 83.33%" in page
    for heading in ("Figures", "Training", "Confusions", "Worst mistakes", "Configuration"):
        assert f">{heading}</h2>" in page
    assert "&lt;b&gt;red" in page
    assert "<b>" not in page
    # what the trainer told beside the metrics stays, the metrics are new
    (interrupted / "metrics.json").write_text(json.dumps({"top1": 1.0, "seconds": 77, "per_class": []}))
    again = write(interrupted)
    assert ">77<" in again
    assert "top-1 83.33%" in again


@pytest.mark.parametrize("lacking", ["results", "half of them", "checkpoint", "pictures"])
def test_what_there_is_is_reported(interrupted, lacking, capsys):
    results, overrides = interrupted / "results.npz", []
    said = "was not evaluated yet"
    if lacking == "results":
        results.unlink()
    elif lacking == "half of them":
        results.write_bytes(results.read_bytes()[:99])
        said = "results.npz: cannot be read"
    elif lacking == "checkpoint":
        (interrupted / "best.pth").unlink()
        said = "no such checkpoint file"
    else:
        overrides, said = ["data.root=nowhere"], "does not exist"
    page = write(interrupted, *overrides)
    assert said in capsys.readouterr().err
    assert said in page
    assert ">Training</h2>" in page
    assert (">Confusions</h2>" in page) is (lacking == "pictures")
    assert ">Worst mistakes</h2>" not in page


def test_a_run_survives_its_report(settings, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a defect")

    monkeypatch.setattr(trainer, "write_report", fail)
    settings["train"]["epochs"] = 1
    train(from_dict(ClassificationConfig, settings, "test"))
    run = tmp_path / "run"
    assert "top1" in json.loads((run / "metrics.json").read_text())
    log = (run / "train.log").read_text()
    assert "RuntimeError: a defect" in log
    assert f"dat classify report {run}" in log
    assert log.splitlines()[-1] == f"results are in {run}"
