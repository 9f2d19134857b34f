"""The benchmarks that train detectors, run as their commands are on a few tiny scenes, and what they make of curves."""

import json

import pytest
from PIL import Image

from benchmarks import backbones, convergence, curves, detector_runs
from benchmarks.detector_runs import Sizes
from benchmarks.timing import machine

TINY = Sizes(train=8, val=2, scene=64, crops=(40, 10), crop=32, shown=32)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Options of a benchmark whose scenes, runs and results lie in a temporary folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(detector_runs, "Sizes", lambda: TINY)
    out = tmp_path / "results" / "rows.json"
    return ["--runs", str(tmp_path / "runs"), "--scenes", str(tmp_path / "scenes"), "--out", str(out)], out


def test_convergence_trains_goes_on_and_draws(folders, capsys):
    arguments, out = folders
    arguments = [
        *arguments,
        "--variants",
        "detr,two_stage",
        "--seeds",
        "3",
        "--epochs",
        "2",
        "--pretrain",
        "1",
        "model.embed_dim=32",
    ]
    convergence.main(arguments)
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["detr", "two_stage"]
    for row in rows:
        (run,) = row["runs"]
        assert run["seed"] == 3
        assert run["finished"]
        assert run["epoch"] == [1, 2]
        assert all(0 <= ap <= 1 for ap in run["AP"])
        assert row["ms_per_step"] > 0
        assert row["mflops"] > row["backbone_mflops"] > 0
        assert row["steps_per_epoch"] == 2
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    assert "DETR" in capsys.readouterr().out
    log = out.parents[1] / "runs" / "two_stage_3" / "log.jsonl"
    before = log.stat().st_mtime_ns
    convergence.main(arguments)
    assert log.stat().st_mtime_ns == before
