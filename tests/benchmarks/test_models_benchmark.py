"""The benchmark of whole models, run as its command is, and the official formulation that it compares with."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch

from benchmarks import models, timm_backbones
from benchmarks.model_process import MeasuredBackbone, plain
from benchmarks.official_form import OfficialForm
from benchmarks.process import Process, ProcessEnded, peaks


@pytest.mark.parametrize("name", ["dat_nano", "dat_pp_nano"])
def test_official_form_is_the_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval().double()
    # Fresh tables are next to nothing.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    form = OfficialForm(models.describe(model), model.state_dict(), plain).double()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images))


class Here:
    """A process's model and answers, here."""

    def __init__(self, module, arguments, python):
        assert (module, python) == ("benchmarks.model_process", sys.executable)
        (path,) = arguments
        self.answers = MeasuredBackbone(json.loads(Path(path).read_text())).answers()

    def ask(self, name, *arguments):
        return json.loads(json.dumps(self.answers[name](*arguments)))

    def seconds(self, name, calls):
        return self.ask("seconds", name, calls)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "Process", Here)
    # It lasts until a process ends.
    monkeypatch.setattr("benchmarks.process.memory_kept", contextlib.nullcontext)
    out = tmp_path / "rows.json"
    arguments = ["--models", "dat_pp_nano", "--sizes", "33x60", "--batches", "2", "--peers", "", "--repeats", "1"]
    models.main([*arguments, "--device", "cpu", "--out", str(out)])
    difference, forward = json.loads(out.read_text())["rows"]
    assert difference["relative"] < 1e-5
    assert forward["size"] == [33, 60]
    for name in ("ours", "official"):
        assert forward[name]["images_per_second"] == pytest.approx(2e3 / forward[name]["ms"], rel=0.05)
    assert forward["official"]["ratio"] == pytest.approx(forward["official"]["ms"] / forward["ours"]["ms"], abs=0.02)
    assert "dat_pp_nano" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (models, ["--models", "nothing"], "argument --models: must be of dat_base, .*, got nothing"),
        (models, ["--peers", "nothing"], "--peers must be models of timm, got nothing"),
        (models, ["--sizes", "big"], "argument --sizes: invalid sizes value: 'big'"),
        (models, ["--sizes", "224"], "--batches needs one number for each of the 1 sizes"),
        (models, ["--device", "cuda:99"], "argument --device: cuda:99 cannot be used"),
        (timm_backbones, ["nothing"], "FILE must be of .*resnet.*, got nothing"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, command, argv, message):
    with pytest.raises(SystemExit, match="2"):
        command.main(argv)
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


class Stand(Process):
    """A process that answers, or is killed over the question."""

    def __init__(self, answer):
        self.answer = answer

    def ask(self, name, *arguments):
        if self.answer is None:
            raise ProcessEnded("was killed by signal 9")
        return self.answer

    def __exit__(self, *exception):
        pass


def test_peak_of_what_runs_out_of_memory():
    answers = {"ours": 10.0, "theirs": 25.0, "large": None}
    assert peaks(lambda name: Stand(answers[name]), list(answers), "peak", "step") == {
        "ours": {"mb": 10.0, "ratio": 1.0},
        "theirs": {"mb": 25.0, "ratio": 2.5},
        "large": {"mb": None, "why": "was killed by signal 9"},
    }


def test_a_process_that_ends_says_how(tmp_path, monkeypatch):
    (tmp_path / "ending.py").write_text(
        "import os, signal, sys, time\nfrom benchmarks.process import serve\n"
        "def wait():\n    print('not an answer')\n    return 1\n"
        "serve({'wait': wait, 'die': lambda code: sys.exit(code), "
        "'kill': lambda: os.kill(os.getpid(), signal.SIGKILL)})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    with Process("ending") as process:
        assert process.ask("wait") == 1
        with pytest.raises(ProcessEnded, match="ending ended with exit status 3"):
            process.ask("die", 3)
    with Process("ending") as process, pytest.raises(ProcessEnded, match=f"was killed by signal {signal.SIGKILL:d}"):
        process.ask("kill")
