"""The benchmark of the attentions, run as its command is, on maps of a few cells."""

import json
import platform
import resource
import statistics
import sys

import pytest
import torch

from benchmarks import attention, deform_attn, natten_peer, neighborhood_attn, timing

# What NATTEN 0.14's functions do, for a Python that does not have it.
STAND_IN = """
from dat.ops.reference import neighbors


def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
    size = query.shape[2:4]
    cell, displacement = neighbors(size, kernel_size, dilation, query.device)
    scores = (query.flatten(2, 3).unsqueeze(-2) * key.flatten(2, 3)[:, :, cell]).sum(-1)
    return (scores + rpb.flatten(1)[:, displacement]).unflatten(2, size)


def natten2dav(attn, value, kernel_size, dilation):
    size = value.shape[2:4]
    cell, _ = neighbors(size, kernel_size, dilation, value.device)
    return (attn.flatten(2, 3).unsqueeze(-1) * value.flatten(2, 3)[:, :, cell]).sum(-2).unflatten(2, size)
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    works = {"own": deform_attn.Work(1, 2, 1, (6, 5), (3, 2)), "other": deform_attn.Work(1, 2, 1, (6, 5), (3, 2), 4)}
    monkeypatch.setattr(deform_attn, "WORKS", works)
    monkeypatch.setattr(deform_attn, "MEMORY_WORKS", {"large": deform_attn.Work(1, 1, 1, (64, 64), (48, 48))})
    small, large = neighborhood_attn.Work(1, 2, (7, 9)), neighborhood_attn.Work(1, 1, (8, 9))
    monkeypatch.setattr(neighborhood_attn, "WORKS", {"small": small, "large": large})
    monkeypatch.setattr(neighborhood_attn, "DENSE_CELLS", 7 * 9)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)


@pytest.fixture
def natten(tmp_path, monkeypatch):
    """A folder on PYTHONPATH with a package that stands in for NATTEN."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.14.0'\nprint('not an answer')\n")
    (package / "functional.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return package


def rows_of(tmp_path, *argv):
    out = tmp_path / "rows.json"
    attention.main(["--device", "cpu", "--out", str(out), *argv])
    return {f"{row['op']}: {row['work']}": row for row in json.loads(out.read_text())["rows"]}


def test_rows_of_all_works(tmp_path, capsys):
    rows = rows_of(tmp_path)
    printed = capsys.readouterr().out
    assert list(rows) == [line for line in printed.splitlines() if not line.startswith(" ")]
    memory = rows.pop("deform_attn: memory, large")
    peers = {
        "deform_attn: own": {"official"},
        "deform_attn: other": {"official"},
        "neighborhood_attn: small": {"unfold", "dense"},
        "neighborhood_attn: large": {"unfold"},
    }
    assert rows.keys() == peers.keys()
    for name, row in rows.items():
        assert row["error"].keys() == peers[name] | {"ours"}
        assert max(row["error"].values()) < 1e-5, row
        for key in timing.PASSES:
            assert all(row[key][f"{form}_ms"] > 0 for form in {*peers[name], "ours", "ours_bfloat16"})
            for form in peers[name]:
                ratio = row[key][f"{form}_ms"] / row[key]["ours_ms"]
                assert row[key][f"over_{form}"] == pytest.approx(ratio, rel=0.05, abs=0.01)
    if memory["forward"]:
        # Scores alone take 36 MB.
        assert memory["forward"]["official_mb"] > 36
        assert memory["forward"]["ours_mb"] < 8


def test_natten_in_another_process(tmp_path, natten, capsys):
    (row,) = rows_of(tmp_path, "--natten", sys.executable, "--only", "neighborhood_attn: small").values()
    assert row["natten_versions"] == {"natten": "0.14.0", "torch": torch.__version__}
    assert row["error"]["natten"] < 1e-5
    assert 0 < row["natten_cores"] <= 2 * torch.get_num_threads()
    for key in timing.PASSES:
        ratio = row[key]["natten_ms"] / row[key]["ours_ms"]
        assert row[key]["over_natten"] == pytest.approx(ratio, rel=0.05, abs=0.01)
    assert "over_natten" in capsys.readouterr().out


def test_what_natten_gets_and_gives(natten):
    """Another scale than the benchmark's, and tensors in the layout that they have here."""
    work = neighborhood_attn.Work(2, 3, (8, 7))
    tensors = neighborhood_attn.inputs(work, torch.device("cpu"))
    options = neighborhood_attn.options(work) | {"scale": 0.5}
    check = "    assert key.stride(-2) == 3 * 3 * 32\n"
    (natten / "functional.py").write_text(STAND_IN.replace("    size = query", f"{check}    size = query"))
    with natten_peer.Natten(sys.executable, 1) as peer:
        peer.load(tensors, **options)
        expected = neighborhood_attn.neighborhood_attn(*tensors, **options)
        torch.testing.assert_close(peer.output(), expected, atol=1e-5, rtol=1e-5)
        assert 0 < peer.seconds("forward", 1) < 10
        with pytest.raises(RuntimeError, match="natten_peer 1 ended with exit status 1"):
            peer.seconds("sideways", 1)
    assert peer._process.returncode == 1


def test_a_python_without_natten_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "natten.py").write_text("raise ImportError('none here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for argv, message in (
        (["--natten", sys.executable], "natten_peer 1 ended with exit status 1"),
        (["--natten", str(tmp_path / "python")], "No such file or directory"),
        (["--natten", sys.executable, "--device", "meta"], "on a CPU only, got --device meta"),
        (["--device", "cuda:99"], "argument --device: cuda:99 cannot be used"),
        (["--only", "neighbourhood"], "got neighbourhood"),
    ):
        with pytest.raises(SystemExit):
            attention.main(["--device", "cpu", *argv])
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library is told to keep memory")
def test_memory_is_kept_while_runs_are_timed(monkeypatch):
    """So that no run pays for pages that another one gave back, and only until then."""
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    faults = []

    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(100 << 20, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    timing.medians({"large": run}, torch.device("cpu"), repeats=9)
    run()
    # A small allocation between two calls may take the start of the kept memory, so that one call needs more.
    assert statistics.median(faults[:-1]) < faults[-1] / 4, faults


def test_turns_of_another_process():
    """Are as many, and as long, as those of a run here."""
    asked = []

    def elsewhere(calls):
        asked.append(calls)
        return timing.TURN_SECONDS / 4

    seconds = timing.medians({}, torch.device("cpu"), repeats=3, elsewhere={"there": elsewhere})
    assert seconds == {"there": timing.TURN_SECONDS / 4}
    # Two to find how many calls a turn takes; then each turn after a first call.
    assert asked == [1, 1, 1, 4, 1, 4, 1, 4]
