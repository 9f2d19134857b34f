import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dat
from dat.ops import MISSING, _library, deform_sample
from dat.ops import __main__ as report

OPS = {name: getattr(dat.ops, name) for name in report.OPS}


def test_report_says_what_is_here_and_tests_every_op_dtype_and_device(tmp_path, capsys):
    assert report.main(["--json", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    for part in (dat.__version__, torch.__version__, "instruction set", "threads", "_C_cpu", "_C_cuda", "GPUs"):
        assert part in text
    rows = json.loads((tmp_path / "report.json").read_text())["self-test"]
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    dtypes = ("float64", "float32", "bfloat16", "float16")
    tested = [(row["device"], row["op"], row["dtype"]) for row in rows]
    assert sorted(tested) == sorted((device, op, dtype) for device in devices for op in OPS for dtype in dtypes)
    assert all(row["passed"] and 0 <= row["forward"] < row["limit"] and row["backward"] > 0 for row in rows)
    assert {row["kernel"] for row in rows if row["device"] == "cpu"} == {"library"}
    assert f"all {len(rows)} passed" in text


def scaled_output(function):
    return lambda *inputs, **options: function(*inputs, **options) * 1.02


def scaled_gradient(function):
    def wrong(*inputs, **options):
        out = function(*inputs, **options)
        return out.detach() + (out - out.detach()) * 1.02

    return wrong


def one_nan(function):
    def wrong(value, *inputs, **options):
        out = function(value, *inputs, **options)
        if value.shape[-1] == 32 and "sample" in function.__name__:
            return out
        return out + torch.where(torch.arange(out.numel(), device=out.device).view_as(out) == 7, torch.nan, 0.0).to(out)

    return wrong


def raising(function):
    def wrong(*inputs, **options):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    return wrong


@pytest.mark.parametrize("spoil", [scaled_output, scaled_gradient, one_nan, raising])
@pytest.mark.parametrize("op", OPS)
def test_wrong_op_fails_the_self_test(op, spoil, monkeypatch, capsys):
    monkeypatch.setattr(report, op, spoil(OPS[op]))
    assert report.main([]) == 1
    text = capsys.readouterr().out
    rows = re.findall(r"^  (?:cpu|cuda:\d+) +(\w+) .*? (passed|FAILED.*)$", text, re.MULTILINE)
    assert {name for name, verdict in rows if verdict != "passed"} == {op}
    assert {name for name, verdict in rows if verdict == "passed"} == set(OPS) - {op}
    assert f"{len(rows) // len(OPS)} of {len(rows)} FAILED" in text
    assert (spoil is raising) == ("FAILED CUDA error: no kernel image is available\n" in text)


# runpy tells that the module was imported before.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
def test_failure_is_the_exit_code_of_the_command(monkeypatch):
    monkeypatch.setattr(dat.ops, "deform_sample", scaled_output(deform_sample))
    monkeypatch.setattr(sys, "argv", ["dat.ops"])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_module("dat.ops", run_name="__main__")


def test_package_without_libraries_says_so_and_runs_on_pytorch(tmp_path):
    source = Path(dat.__file__).parent
    shutil.copytree(source, tmp_path / "dat", ignore=shutil.ignore_patterns("*.so", "csrc", "__pycache__"))
    bare = subprocess.run(
        [sys.executable, "-m", "dat.ops", "--json", "report.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert bare.returncode == 0, bare.stderr
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["libraries"]["_C_cpu"] == "not in use: dat/_C_cpu.so was not built"
    assert written["libraries"]["_C_cpu"] in bare.stdout
    assert "architectures" not in written["libraries"]
    assert {row["kernel"] for row in written["self-test"]} == {"PyTorch"}


def test_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "dat").mkdir()
    (tmp_path / "dat" / "_C_cpu.abi3.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "dat" / "ops" / "_library.py"))
    assert re.search(r"dat/_C_cpu\.abi3\.so does not load: .*file too short", _library.load("_C_cpu"))


def test_library_in_use_is_named_by_its_path_and_the_reason_else(monkeypatch):
    assert Path(report.libraries()["_C_cpu"]).is_file()
    monkeypatch.setitem(MISSING, "_C_cuda", "this torch has no CUDA")
    assert report.libraries()["_C_cuda"] == "not in use: this torch has no CUDA"


def test_inputs_are_the_same_in_every_dtype_and_off_the_edges_of_cells():
    exact = report.sampling_cases(torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case, same in zip(report.sampling_cases(dtype), exact, strict=True):
            if case.op == "ms_deform_attn":
                for tensor, wide in zip(case.tensors[1:3], same.tensors[1:3], strict=True):
                    assert torch.equal(tensor.double(), wide)
            else:
                assert torch.equal(case.tensors[1].double(), same.tensors[1])
    sizes = torch.tensor([[w, h] for h, w in report.SHAPES])[:, None]
    pixels = exact[0].tensors[1] * sizes - 0.5
    assert (pixels - pixels.round()).abs().min() >= 0.125
    assert pixels.min() < -1
    assert (pixels > sizes).any()


@pytest.mark.parametrize("built", ["9.0", "8.0;9.0+PTX", "8.0 9.0a 12.0f"])
def test_architectures_are_read_from_the_library(built, tmp_path):
    library = tmp_path / "_C_cuda.abi3.so"
    library.write_bytes(b"\x7fELF\0 has code for \0" + built.encode() + b"\0; needs \0" + b"1.2.3\0")
    assert report.architectures(library) == built
    library.write_bytes(b"\x7fELF\0 has code for \0")
    assert report.architectures(library) is None


@pytest.mark.skipif(MISSING["_C_cuda"] is not None, reason=f"CUDA library: {MISSING['_C_cuda']}")
def test_architectures_of_the_built_library_are_known():
    assert re.match(r"\d+\.\d", report.libraries()["architectures"])


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0;9.0", (8, 0), True),
        ("8.0;9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True),
        ("8.0+PTX;9.0", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
    ],
)
def test_covers_follows_the_compatibility_of_machine_code_and_ptx(built, capability, runs):
    assert report.covers(built, capability) is runs


def test_gpus_are_listed_with_what_serves_them(monkeypatch):
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(report, "architectures", lambda library: "8.0;9.0")
    monkeypatch.setattr(report, "find", lambda name: Path(name))
    monkeypatch.setitem(MISSING, "_C_cuda", None)
    found = report.gpus()
    assert found["cuda:0"] == "H100, compute capability 9.0, covered by the library"
    assert found["cuda:1"] == "H100, compute capability 7.5, NOT covered by the library: 8.0;9.0"
    monkeypatch.setitem(MISSING, "_C_cuda", "dat/_C_cuda.so was not built")
    assert report.gpus()["cuda:0"].endswith("on the PyTorch reference, no library")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_gpu_says_why():
    assert set(report.gpus()) == {"none"}
    assert re.search(r"driver|not compiled|CUDA", report.gpus()["none"])
