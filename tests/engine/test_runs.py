"""`dat detect runs` and `dat classify runs` list runs by metric, with what differs in their configurations."""

import csv
import json
import shutil

import pytest
import yaml
from commands import dat

from dat.classification.config import ClassificationConfig
from dat.detection.config import DetectionConfig
from dat.engine.config import save_config
from dat.utils.errors import DataError


def write_run(folder, scores, metric="AP", finished=True, **train):
    """A run's files, with an evaluation of each score."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"output": str(folder), "train": train}))
    lines = [
        {"kind": "val", "step": 10 * epoch, "epoch": epoch, metric: score, "AP50": 2 * score, "top5": score + 1}
        for epoch, score in enumerate(scores, 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    if finished:
        (folder / "metrics.json").write_text(json.dumps({"steps": 10 * len(scores), "seconds": 3700.0}))


def cells(text):
    head, *rows = (line.split() for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_runs_are_ranked_and_show_their_differences(tmp_path, capsys):
    write_run(tmp_path / "a", [0.1, 0.3, 0.2], lr=1e-3)
    write_run(tmp_path / "deep/b", [0.4], lr=1e-4, finished=False)
    write_run(tmp_path / "none", [], lr=1e-3, finished=False)
    dat("detect", "runs", tmp_path, "--csv", tmp_path / "runs.csv")
    printed = capsys.readouterr()
    assert not printed.err
    rows = cells(printed.out)
    common = {"AP50": "0.6", "epoch": "2", "epochs": "3", "time": "1:01:40", "state": "finished"}
    assert rows[1] == {"run": "a", "AP": "0.3", **common, "train.lr": "0.001"}
    assert [row["run"] for row in rows] == ["deep/b", "a", "none"]
    assert (rows[0]["state"], rows[0]["time"], rows[0]["train.lr"]) == ("unfinished", "-", "0.0001")
    assert rows[2]["AP"] == "-"
    with (tmp_path / "runs.csv").open() as file:
        assert [row["AP"] for row in csv.DictReader(file)] == ["0.4", "0.3", ""]


def test_a_finished_run_that_goes_on_is_unfinished(tmp_path, capsys):
    write_run(tmp_path / "a", [50.0, 60.0], metric="top1")
    (tmp_path / "a/metrics.json").write_text(json.dumps({"steps": 10, "seconds": 1.0}))
    dat("classify", "runs", tmp_path)
    assert cells(capsys.readouterr().out) == [
        {"run": "a", "top1": "60", "top5": "61", "epoch": "2", "epochs": "2", "time": "-", "state": "unfinished"}
    ]


def test_broken_folders_are_named(tmp_path, capsys):
    write_run(tmp_path / "good", [0.5])
    for name, files in {
        "bad": {"config.yaml": "train: [1"},
        "typo": {"config.yaml": "trian: 1"},
        "lost": {"log.jsonl": ""},
        "odd": {"config.yaml": "seed: 1", "log.jsonl": '{"step": 1}\n[3]\n', "metrics.json": "{"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    dat("detect", "runs", tmp_path)
    printed = capsys.readouterr()
    assert [row["run"] for row in cells(printed.out)] == ["good"]
    warnings = printed.err.splitlines()
    assert [line.split(":")[1].strip() for line in warnings] == [
        str(tmp_path / name) for name in ("bad", "lost", "odd", "typo")
    ]
    assert "not valid YAML" in warnings[0]
    assert "cannot read the configuration" in warnings[1]
    assert "trian" in warnings[3]


def test_runs_of_the_other_task_are_counted(tmp_path, capsys):
    configs = {"detection": DetectionConfig(), "classification": ClassificationConfig()}
    for task, config in configs.items():
        (tmp_path / task).mkdir()
        save_config(config, tmp_path / task / "config.yaml")
    for command, task, other in (("detect", *configs), ("classify", *reversed(configs))):
        dat(command, "runs", tmp_path)
        printed = capsys.readouterr()
        assert [row["run"] for row in cells(printed.out)] == [task]
        assert printed.err == f"1 runs of {other} are not shown\n"
    shutil.rmtree(tmp_path / "classification")
    dat("classify", "runs", tmp_path)
    assert capsys.readouterr() == ("", "1 runs of detection are not shown\n")


def test_no_runs(tmp_path):
    with pytest.raises(DataError, match=r"holds no runs, which have config.yaml"):
        dat("detect", "runs", tmp_path)
