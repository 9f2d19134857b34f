"""The benchmark of the ops, run as its command is, on work of a few cells."""

import json
import sys
import types

import pytest
import torch

from benchmarks import ops, ops_cuda_peers, ops_measure, ops_peers, ops_table, ops_work, timing
from dat.ops import compat

PEERS = {"grid_sample", "transformers"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, size in {
        "SIZES": ((32, 48), (40, 33)),
        "QUERIES": 3,
        "DAT_SIZES": ((32, 32, 2),),
        "DAT_STAGES": (("stage", 16, 3, 8, 1), ("strided", 4, 1, 4, 8)),
        "DCN_MAP": (5, 7),
        "DCN_CHANNELS": 8,
    }.items():
        monkeypatch.setattr(ops_work, name, size)
    monkeypatch.setattr(ops_measure, "GROWTH_QUERIES", (64, 128))
    monkeypatch.setattr(ops_measure, "GROWTH_SIZE", (32, 48))
    monkeypatch.setattr(ops_measure, "GROWTH_BATCHES", (1, 2))
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)


def run(*argv):
    ops.main(["--device", "cpu", *map(str, argv)])


def test_table_and_results(tmp_path, capsys):
    sections = "encoder,decoder,dat,dcn,growth,threads"
    run("--quick", "--only", sections, "--out", tmp_path)
    table = capsys.readouterr().out
    assert "encoder: attention, encoder 32x48, batch 1" in table
    assert "not measured: original: runs on a GPU only" in table
    written = json.loads((tmp_path / "ops_cpu.json").read_text())
    assert written["machine"] == timing.machine()
    assert list(dict.fromkeys(r["section"] for r in written["rows"])) == sections.split(",")
    attention = [r for r in written["rows"] if r["section"] == "decoder" and r["op"] == "attention"]
    single = {r["implementation"] for r in attention if r["dtype"] == "float32"}
    assert single >= PEERS | {"ms_deform_attn", "deform_sample"}
    for row in written["rows"]:
        assert min(row["ms"] if "ms" in row else (row["forward_ms"], row["forward_backward_ms"])) > 0


def test_every_implementation_does_the_work():
    device = torch.device("cpu")
    attention = ops_work.attention("", ops_work.levels((40, 33)), None, device, batch=2)
    peers, _ = ops_peers.sampling_peers(device)
    for work, implementations in (
        (attention, list(map(ops_peers.whole_path, peers))),
        (ops_work.sampling(attention), peers),
        (ops_work.dat(*ops_work.DAT_STAGES[1], (32, 40, 2), device), []),
        (ops_work.dcn(device), []),
    ):
        rows = ops_measure.measure("", work, [*implementations, ops_peers.OURS[work.op]], device, 0.0)
        assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
        for row in rows:
            tolerance = 1e-5 if row["dtype"] == "float32" else 2e-2
            assert row["error"] < tolerance, row
            assert row["gradient_error"] < tolerance, row


def test_rows_of_other_sections_stay_when_one_is_measured_again(tmp_path, capsys):
    out = tmp_path / "results.json"
    run("--only", "dat,dcn", "--out", out)
    before = json.loads(out.read_text())["rows"]
    run("--only", "dcn", "--out", out)
    after = json.loads(out.read_text())["rows"]
    assert [r["section"] for r in after] == [r["section"] for r in before]
    assert [r for r in after if r["section"] == "dat"] == [r for r in before if r["section"] == "dat"]
    assert [r for r in after if r["section"] == "dcn"] != [r for r in before if r["section"] == "dcn"]
    written = json.loads(out.read_text())
    written["machine"]["cpu"] = "another"
    out.write_text(json.dumps(written))
    run("--only", "dcn", "--out", out)
    assert {r["section"] for r in json.loads(out.read_text())["rows"]} == {"dcn"}
    assert "another machine" in capsys.readouterr().out


def test_unknown_section_is_an_error(capsys):
    with pytest.raises(SystemExit):
        run("--only", "encoder,decodr")
    assert "got decodr" in capsys.readouterr().err


def test_memory_is_shown_in_units_of_two_to_the_twenty():
    """As the other benchmarks report it."""
    row = {"section": "growth", "op": "", "variable": "Q", "pass": "forward", "sizes": [1], "ms": [1.0]}
    row |= {"peak_bytes": [3 << 20], "time_exponent": 1.0, "memory_exponent": None}
    assert "  3.0  " in ops_table.table([row]).splitlines()[-1]


def test_original_op_of_a_folder(tmp_path, monkeypatch):
    """With this package's function of the extension's signature in the folder."""
    (tmp_path / "MultiScaleDeformableAttention.py").write_text(
        "from dat.ops.compat import ms_deform_attn_backward, ms_deform_attn_forward\n"
    )
    monkeypatch.delitem(sys.modules, "MultiScaleDeformableAttention", raising=False)
    implementation = ops_peers.whole_path(ops_cuda_peers.original(tmp_path))
    assert isinstance(sys.modules.pop("MultiScaleDeformableAttention"), types.ModuleType)
    assert str(tmp_path) not in sys.path
    device = torch.device("cpu")
    work = ops_work.attention("", ops_work.levels((32, 48)), 5, device)
    row, _ = ops_measure.measure("", work, [implementation, ops_peers.OURS["attention"].only(torch.float32)], device, 0)
    assert max(row["error"], row["gradient_error"]) < 1e-5
    assert compat.ms_deform_attn_forward.__module__ == "dat.ops.compat"


def test_peak_bytes_counts_what_a_call_holds_at_once():
    # More than the C library keeps to use again.
    size = 3 << 24

    def run():
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        return torch.ones(size, dtype=torch.uint8) + second[:1]

    # An earlier peak, which must not count.
    torch.ones(8 * size, dtype=torch.uint8)
    peak = timing.peak_bytes(run, torch.device("cpu"))
    assert peak is None or abs(peak / size - 3) < 0.2


def test_exponent():
    assert timing.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert timing.exponent([1, 10], [1, 100]) == pytest.approx(2)
