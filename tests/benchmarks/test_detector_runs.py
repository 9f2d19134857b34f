"""The benchmarks that train detectors, run as their command is on a few tiny scenes, and what they make of curves."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from coco_scenes import write_scenes
from PIL import Image
from processes import run_command

from benchmarks import backbones, convergence, curves, detector_runs, recipes, trainings
from benchmarks.detector_runs import Comparison, Sizes
from benchmarks.timing import machine
from benchmarks.trainings import finished, last_entries, train
from dat.detection.config import DetectionConfig
from dat.detection.models.backbone import build_backbone
from dat.engine.config import load_config

TINY = Sizes(train=8, val=2, scene=64, crops=(40, 10), crop=32, shown=32)


def row(name, epochs, *runs, seeds=(0, 1), **more):
    """A row of results whose runs are (finished, epochs, AP, AP of small objects)."""
    keys = ("finished", "epoch", "AP", "APs")
    runs = [dict(zip(keys, run, strict=True)) for run in runs]
    return {"model": name, "label": name.upper(), "epochs": epochs, "runs": runs, "seeds": list(seeds), **more}


def test_convergence_trains_goes_on_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(detector_runs, "Sizes", lambda: TINY)
    monkeypatch.setattr(trainings, "subprocess", SimpleNamespace(run=run_command))
    write_scenes(tmp_path / "data", "train", 8)
    write_scenes(tmp_path / "data", "val", 2, seed=1)
    out, runs = tmp_path / "results" / "rows.json", tmp_path / "runs"
    plot = tmp_path / "plots" / "curves.png"
    folders = ["--runs", str(runs), "--scenes", str(tmp_path / "scenes")]
    arguments = [*folders, "--variants", "two_stage", "--seeds", "3", "--epochs", "2", "--pretrain", "1"]
    arguments += ["--data", str(tmp_path / "data"), "model.embed_dim=32"]
    convergence.main(["--out", str(out), "--plot", str(plot), *arguments])
    (found,) = json.loads(out.read_text())["rows"]
    (run,) = found["runs"]
    assert run["finished"]
    assert (run["seed"], run["epoch"]) == (3, [1, 2])
    assert len(run["AP"]) == len(run["APs"]) == 2
    assert found["steps_per_epoch"] == 2
    assert found["mflops"] > found["backbone_mflops"] > 0
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"
    assert "1 of 1 seeds" in capsys.readouterr().out
    state = torch.load(runs / "two_stage_3" / "last.pth", weights_only=True)
    config = state["config"]
    assert config["model"]["backbone"]["checkpoint_path"] == str(runs / "pretrain_detr" / "best.pth")
    assert config["data"]["root"] == str(tmp_path / "data")
    assert (config["model"]["embed_dim"], config["seed"], config["train"]["decay_epochs"]) == (32, 3, [1])
    # again: nothing is left to do, and results and plot lie beside the runs unless told otherwise
    monkeypatch.setattr(trainings, "subprocess", None)
    convergence.main(arguments)
    (again,) = json.loads((runs / "results.json").read_text())["rows"]
    assert again["runs"] == found["runs"]
    assert (runs / "curves.png").exists()


def test_scenes_have_objects_of_both_sizes(tmp_path):
    """By COCO's measure, so that AP of small objects is another than AP."""
    options = detector_runs.parser("Doc.", convergence.VARIANTS, "convergence").parse_args([])
    options.scenes = tmp_path
    Comparison(convergence.VARIANTS, options, replace(Sizes(), train=4, val=20, crops=(10, 10))).make_data()
    areas = [box["area"] for box in json.loads((tmp_path / "data" / "val.json").read_text())["annotations"]]
    assert 0.3 < sum(area < 32**2 for area in areas) / len(areas) < 0.7
    assert len(list((tmp_path / "crops" / "train").rglob("*.png"))) == 10


def test_every_row_of_recipes_adds_to_the_one_above():
    variants = list(recipes.variants().values())
    for variant in variants:
        load_config(DetectionConfig, detector_runs.CONFIG, trainings.arguments(variant.keys))
    for above, variant in itertools.pairwise(variants[:-1]):
        # The last has another average of the weights too.
        assert above.keys.keys() < variant.keys.keys()


def test_backbones_take_equal_flops_and_vary_in_nothing_else(tmp_path):
    options = detector_runs.parser("Doc.", backbones.VARIANTS, "backbones").parse_args([])
    options.data = tmp_path
    comparison = Comparison(backbones.VARIANTS, options, TINY)
    overrides = [comparison.overrides(name) for name in comparison.names]
    flops = []
    for keys in overrides:
        arguments = keys.pop("model.backbone")
        del arguments["checkpoint_path"]
        backbone = build_backbone(arguments)
        assert backbone.feature_info.reduction() == [8, 16, 32]
        flops.append(detector_runs.mflops(backbone, torch.zeros(1, 3, backbones.SIDE, backbones.SIDE)))
    assert max(flops) < 1.01 * min(flops)
    assert all(keys == overrides[0] for keys in overrides)


@pytest.mark.parametrize(
    ("command", "variants"),
    [(convergence, convergence.VARIANTS), (backbones, backbones.VARIANTS), (recipes, recipes.variants())],
)
def test_an_unknown_variant_is_named(capsys, command, variants):
    with pytest.raises(SystemExit):
        command.main(["--variants", f"{next(iter(variants))},nothing"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("got nothing")


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    log = tmp_path / "run.log"
    with pytest.raises(RuntimeError, match=r"exit status 1, see .*run\.log"):
        train("benchmarks.absent", tmp_path / "some.yaml", tmp_path / "run", 3, {"train.lr": 1e-4}, log)
    assert "No module named benchmarks.absent" in log.read_text()


def test_only_whole_lines_of_a_log_count(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "val", "epoch": 1}\n{"kind": "val", "epoch": 2}\n{"kind": "va')
    assert last_entries(tmp_path) == {"val": {"kind": "val", "epoch": 2}}
    assert finished(tmp_path, 2)
    assert not finished(tmp_path, 3)
    assert not finished(tmp_path / "absent", 2)


def test_curve_is_of_the_finished_seeds():
    runs = [(True, [1, 2], [0.1, 0.3], [None, 0.1]), (True, [1, 2], [0.2, 0.5], [0.1, 0.2]), (False, [1], [0.9], [0.9])]
    assert curves.curve(row("a", 2, *runs), "AP") == [
        (1, pytest.approx(0.15), 0.1, 0.2),
        (2, pytest.approx(0.4), 0.3, 0.5),
    ]
    assert curves.curve(row("a", 2, *runs), "APs")[0] == (1, 0.05, 0.0, 0.1)
    assert curves.curve(row("a", 2, runs[2]), "AP") == [(1, 0.9, 0.9, 0.9)]
    assert curves.curve(row("a", 2), "AP") == []


def test_epochs_to_the_level_of_the_reference():
    rows = [
        row("slow", 10, (True, [5, 10], [0.1, 0.4], [0.0, 0.2]), ms_per_step=10.0),
        row("fast", 2, (True, [1, 2], [0.2, 0.4], [0.1, 0.1]), ms_per_step=20.0),
        row("none", 2, ms_per_step=20.0),
    ]
    curves.summarise(rows, "slow")
    assert [r["epochs_to_AP_of_slow"] for r in rows] == [10, 2, None]
    assert [r["epochs_to_APs_of_slow"] for r in rows] == [10, None, None]
    assert rows[1]["last_AP"] == {"epoch": 2, "mean": 0.4, "lowest": 0.4, "highest": 0.4}
    assert "last_AP" not in rows[2]
    slow, fast, none = curves.table(rows).splitlines()
    assert "1 of 2 seeds, AP 0.400 (0.400 to 0.400), APs 0.200" in slow
    assert "AP_of_slow: epoch 2, APs_of_slow: epoch None" in fast
    assert "0 of 2 seeds" in none


def test_the_plot_shows_the_rows(tmp_path):
    more = {"steps_per_epoch": 100, "ms_per_step": 50.0}
    rows = [row("slow", 10, (True, [5, 10], [0.1, 0.4], [0.0, 0.2]), **more), row("none", 1, **more)]
    curves.draw(rows, machine(), tmp_path / "one.png", "title")
    rows[1]["runs"] = [{"finished": True, "epoch": [1], "AP": [0.3], "APs": [0.3]}]
    curves.draw(rows, machine(), tmp_path / "two.png", "title")
    plots = [Image.open(tmp_path / name).tobytes() for name in ("one.png", "two.png")]
    assert plots[0] != plots[1]
