"""The command `dat` answers without torch, finds configurations by name, and ends a mistake with one line."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from commands import dat as run

from dat.cli import COMMANDS, TASKS, main, parse, split_overrides
from dat.cli import run as run_guarded
from dat.engine.config import find_config
from dat.utils.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAIRS = [[task, name] for task in TASKS for name in COMMANDS[task]]
ALL = [[], *([task] for task in TASKS), *PAIRS, ["flops"], ["ops"]]
RECIPES = [f"{TASKS[task]}.{name}" for task, name in PAIRS]


def test_help_of_every_command_does_not_wait_for_torch():
    code = f"""
import contextlib, sys
from dat.cli import main
for words in {ALL!r}:
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
heavy = {{"torch", "timm", "torchvision", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    shown = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for words in ALL:
        assert f"usage: {' '.join(['dat', *words])} [-h]" in shown


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_take_the_arguments_of_the_command(recipe):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_module('{recipe}', run_name='__main__')"
    code = f"try:\n    {code}\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {recipe} [-h]")


@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_recipes_run_the_function_of_the_command(task, name, monkeypatch):
    called = []
    monkeypatch.setattr("dat.cli.parse_command", lambda *arguments: "options")
    monkeypatch.setattr(f"dat.{TASKS[task]}.commands.{name}", called.append)
    runpy.run_module(f"{TASKS[task]}.{name}", run_name="__main__")
    assert called == ["options"]


@pytest.mark.parametrize("task", TASKS)
def test_every_command_has_its_function(task):
    commands = importlib.import_module(f"dat.{TASKS[task]}.commands")
    assert all(callable(getattr(commands, name)) for name in COMMANDS[task])


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["detect", "evaluate", str(tmp_path / "none.pth"), "--device", "cpu"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/none.pth: no such checkpoint file\n"


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SystemExit):
        run_guarded(lambda options: importlib.import_module("scipy"), None)
    assert capsys.readouterr().err == 'error: this needs scipy: pip install "dat-vision[train]"\n'


def test_a_module_that_this_system_lacks_is_no_package_to_install(capsys):
    def needs(options):
        raise ModuleNotFoundError("No module named 'fcntl'", name="fcntl")

    with pytest.raises(SystemExit):
        run_guarded(needs, None)
    assert "this needs Python's fcntl, which this system lacks; on Windows" in capsys.readouterr().err


def test_names_in_any_script_are_printed_in_any_encoding():
    code = "from dat.cli import run; from dat.utils.text import echo; run(lambda options: echo('\u732b'), None)"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u732b\n")


def test_sources_and_overrides_may_be_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").touch()
    assert split_overrides(["x.jpg", "data.val.size=64", "a=b"]) == (["data.val.size=64"], ["x.jpg", "a=b"])
    with pytest.raises(SystemExit):
        parse(["classify", "predict", "best.pth", "data.img_size=3", "--out", "folder"])
    _, options = parse(["detect", "evaluate", "best.pth", "--out", "folder", "data.root=x"])
    assert (options.checkpoint, options.overrides) == ("best.pth", ["data.root=x"])


def test_configurations_are_found_by_name():
    for name in ("finetune", "detection/finetune", "configs/detection/finetune.yaml"):
        assert find_config(name).samefile(ROOT / "configs/detection/finetune.yaml")
    assert find_config("small_pictures").parent.name == "classification"
    with pytest.raises(ConfigError, match=r"finetun: no such file, nor a configuration of this name; .* finetune"):
        find_config("finetun")
    with pytest.raises(ConfigError, match="demo: several configurations have this name: classification/demo, "):
        find_config("demo")
    for task in ("classification", "detection"):
        assert find_config("demo", task).parent.name == task
    with pytest.raises(ConfigError, match="finetune: is a configuration of detection, should be one of classification"):
        find_config("finetune", "classification")
    with pytest.raises(ConfigError, match=r"there are (?!.*_imagenet)"):
        find_config("nosuch", "detection")


@pytest.mark.parametrize("name", ["dat_nano", "deformable_detr_dat_nano"])
def test_flops_of_a_backbone_and_of_a_detector(name, capsys):
    pytest.importorskip("fvcore", reason="the extra 'flops'")
    run("flops", name, "--size", 64, 96)
    table = capsys.readouterr().out
    assert "#parameters" in table
    assert "stages" in table
