"""Configurations: defaults, YAML, overrides and the messages of what is wrong."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dat.engine.config import apply_overrides, check_range, from_dict, load_config, rename_keys, save_config, to_dict
from dat.utils.errors import ConfigError


@dataclass
class Train:
    lr: float = 1e-3
    epochs: int = 10
    steps: int = 0
    least_steps: int = 0
    min_lr_scale: float = 0.0
    resume: bool = False
    amp: Literal["none", "bf16"] = "none"
    sizes: list[int] = field(default_factory=lambda: [32])
    scale: tuple[float, float] = (0.5, 1.0)
    policy: str | None = "rand"


@dataclass
class Model:
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "dat_tiny"})


@dataclass
class Config:
    output: str = "runs/x"
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_yaml_lies_over_the_defaults_and_overrides_over_both(tmp_path):
    path = write(tmp_path, "output: a\ntrain:\n  lr: 1e-4\n  epochs: 3\n")
    config = load_config(Config, path, ["train.epochs=7", "train.scale=[0.1, 1]", "train.policy=null"])
    assert (config.output, config.train.lr, config.train.epochs) == ("a", 1e-4, 7)
    assert config.train.scale == (0.1, 1.0)
    assert config.train.policy is None
    assert config.train.sizes == [32]
    assert config.model.backbone == {"name": "dat_tiny"}


def test_exponents_are_numbers_everywhere(tmp_path):
    config = load_config(Config, write(tmp_path, ""), ["train.lr=5e-5", "model.backbone.drop_path_rate=1e-1"])
    assert config.train.lr == 5e-5
    assert config.model.backbone == {"name": "dat_tiny", "drop_path_rate": 0.1}


@pytest.mark.parametrize("text", ["0001", "2024-06-01", "2024-13-01", "yes", "a: b", "[", ""])
def test_text_on_the_command_line_is_taken_as_it_stands(tmp_path, text):
    assert load_config(Config, write(tmp_path, ""), [f"output={text}"]).output == text


def test_numbers_out_of_range_are_named():
    config = Config()
    check_range(config, ("train.lr", "train.scale", "train.sizes"), 0, 32)
    check_range(config, ("train.epochs",), 10)
    config.train.lr, config.train.epochs, config.train.scale = float("nan"), 0, (0.0, float("inf"))
    for keys, limits, message in [
        (["train.sizes", "train.epochs"], {"low": 1}, "train.epochs is 0, should be at least 1"),
        (["train.lr"], {"low": 0, "exclusive": True}, "train.lr is nan, should be more than 0"),
        (["train.scale"], {"low": 0}, r"train.scale is \(0.0, inf\), should be at least 0"),
        (["train.scale"], {"low": 0, "high": 1, "exclusive": True}, "should be more than 0 and at most 1"),
        (["train.sizes"], {"low": 0, "high": 31}, r"train.sizes is \[32\], should be 0 to 31"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_range(config, keys, **limits)


def test_a_free_form_section_is_replaced_by_the_file_and_extended_by_overrides(tmp_path):
    path = write(tmp_path, "model:\n  backbone: {name: resnet18, out_indices: [1, 2]}\ntrain:\n")
    config = load_config(Config, path, ["model.backbone.in_chans=1"])
    assert config.model.backbone == {"name": "resnet18", "out_indices": [1, 2], "in_chans": 1}


def test_a_base_is_read_first_and_its_sections_are_merged(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "output: a\ntrain: {lr: 1e-4, epochs: 3, sizes: [1, 2]}\nmodel: {backbone: {name: a, in_chans: 1}}")
    (tmp_path / "middle.yaml").write_text("base: config.yaml\ntrain: {epochs: 5, sizes: [3]}\n")
    leaf = tmp_path / "deep/leaf.yaml"
    leaf.write_text("base: ../middle.yaml\noutput: b\ntrain:\nmodel: {backbone: {name: b}}\n")
    config = load_config(Config, leaf, ["train.amp=bf16"])
    assert (config.output, config.train.lr, config.train.epochs, config.train.amp) == ("b", 1e-4, 5, "bf16")
    assert config.train.sizes == [3]
    assert config.model.backbone == {"name": "b"}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("leaf.yaml", r"leaf.yaml: base leads back to a file that it is read for: .*leaf.yaml -> .*leaf.yaml"),
        (
            "config.yaml",
            r"config.yaml: base leads back to a file that it is read for: .*leaf.yaml -> .*config.yaml",
        ),
        ("none.yaml", r"none.yaml: cannot read the configuration: No such file"),
        ("/etc/hosts", r"base is '/etc/hosts', should be the path of a YAML file, relative to this one"),
        ("[a]", r"base is \['a'\], should be the path of a YAML file"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path, base, message):
    write(tmp_path, "base: ./leaf.yaml\n")
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Config, leaf)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_a_base_is_found(tmp_path):
    write(tmp_path, "train: {lrr: 1}")
    (tmp_path / "leaf.yaml").write_text("base: config.yaml\ntrain: {epochs: 2}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'train.lrr'; did you mean 'train.lr'\?"):
        load_config(Config, tmp_path / "leaf.yaml")


@pytest.mark.parametrize(
    ("base", "text", "overrides", "epochs", "steps"),
    [
        ("", "", [], 10, 0),
        ("", "{steps: 100}", [], 0, 100),
        ("", "{steps: 100}", ["train.epochs=2"], 2, 0),
        ("", "{epochs: 3}", ["train.steps=7"], 0, 7),
        ("", "{steps: 100}", ["train.lr=1"], 0, 100),
        ("", "", ["train.steps=7"], 0, 7),
        ("{epochs: 3}", "{steps: 100}", [], 0, 100),
        ("{steps: 100}", "{epochs: 3}", [], 3, 0),
        ("{steps: 100}", "{lr: 1}", [], 0, 100),
    ],
)
def test_the_length_that_the_user_gives_counts(tmp_path, base, text, overrides, epochs, steps):
    (tmp_path / "base.yaml").write_text(f"train: {base}")
    config = load_config(Config, write(tmp_path, f"base: base.yaml\ntrain: {text}"), overrides)
    assert (config.train.epochs, config.train.steps) == (epochs, steps)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config
    assert apply_overrides(config, ["train.epochs=4"]).train.steps == 0


@pytest.mark.parametrize(("given", "least"), [("train.epochs=3", 0), ("train.steps=7", 0), ("train.lr=1", 100)])
def test_a_length_that_the_user_gives_may_be_below_the_least(tmp_path, given, least):
    path = write(tmp_path, "train: {epochs: 5, least_steps: 100}")
    assert load_config(Config, path, [given]).train.least_steps == least
    assert load_config(Config, path, [given, "train.least_steps=50"]).train.least_steps == 50


@pytest.mark.parametrize(
    ("text", "overrides"),
    [("{steps: 100, epochs: 3}", []), ("", ["train.epochs=3", "train.steps=100"])],
)
def test_two_lengths_in_one_place_are_refused(tmp_path, text, overrides):
    message = r"config.yaml: train.epochs is 3 and train.steps is 100, should be only one of them"
    with pytest.raises(ConfigError, match=message):
        load_config(Config, write(tmp_path, f"train: {text}"), overrides)


def test_keys_of_earlier_versions_are_renamed(tmp_path):
    config = load_config(Config, write(tmp_path, "train: {lr: 2e-3, min_lr: 1e-4}"))
    assert config.train.min_lr_scale == 0.05
    # Runs wrote all keys, of which the steps counted.
    saved = rename_keys({"train": {"epochs": 50, "steps": 4000, "min_lr": 1e-5}}, saved=True)
    assert saved["train"] == {"epochs": 0, "steps": 4000, "min_lr_scale": 0.01}


def test_saved_configuration_reads_back_equal(tmp_path):
    config = load_config(Config, write(tmp_path, ""), ["train.scale=[0.2, 0.3]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config
    assert from_dict(Config, to_dict(config), "test") == config


def test_overriding_a_configuration_leaves_it_alone():
    config = Config()
    changed = apply_overrides(config, ["model.backbone.name=dat_nano", "train.resume=true"])
    assert changed.model.backbone["name"] == "dat_nano"
    assert changed.train.resume is True
    assert config == Config()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {lrr: 1}", [], r"config.yaml: unknown key 'train.lrr'; did you mean 'train.lr'\?"),
        ("lr: 1", [], r"config.yaml: unknown key 'lr'; did you mean 'train.lr'\?"),
        ("", ["train.epoch=3"], r"unknown key 'train.epoch'; did you mean 'train.epochs'\?"),
        ("", ["zzz=3"], r"unknown key 'zzz'$"),
        ("train: {epochs: 2.5}", [], r"train.epochs is 2.5, should be an integer"),
        ("train: {epochs: true}", [], r"train.epochs is True, should be an integer"),
        ("train: {lr: fast}", [], r"train.lr is 'fast', should be a number"),
        ("train: {resume: 1}", [], r"train.resume is 1, should be true or false"),
        ("train: {amp: fp8}", [], r"train.amp is 'fp8', should be one of none, bf16"),
        ("train: {sizes: 3}", [], r"train.sizes is 3, should be a list, each an integer"),
        ("train: {scale: [1]}", [], r"train.scale is \[1\], should be a list \[a number, a number\]"),
        ("train: {policy: [1]}", [], r"train.policy is \[1\], should be text or null"),
        ('output: "\\0"', [], r"output is '\\x00', should be text without NUL characters"),
        ("train: 3", [], r"train is 3, should hold keys and values"),
        ("train: 3", ["train.lr=1"], r"train holds a value, it has no keys"),
        ("[1, 2]", [], r"config.yaml: should hold keys and values, holds a list"),
        ("a: [", [], r"config.yaml: not valid YAML"),
        ("output: 2024-13-01", [], r"config.yaml: not valid YAML: month must be in 1..12"),
        ("", ["train.lr=2024-13-01"], r"the value is not valid YAML"),
        ("", ["train.lr"], r"'train.lr': an override should read key.path=value"),
        ("", ["train.lr=["], r"the value is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Config, write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot read the configuration: No such file"):
        load_config(Config, tmp_path / "none.yaml")


def test_a_required_field_is_asked_for():
    @dataclass
    class Required:
        root: str

    with pytest.raises(ConfigError, match="root is required"):
        from_dict(Required, {}, "test")


def test_aliases_inside_their_own_value_are_refused_on_one_line(tmp_path):
    path = write(tmp_path, "")
    for override in ("train.lr=&a [*a]", "model.backbone=&a {b: *a}"):
        with pytest.raises(ConfigError, match=r"not valid YAML: the alias a stands inside its own value"):
            load_config(Config, path, [override])
    with pytest.raises(ConfigError, match=r"config.yaml: not valid YAML: the key 'lr' is used twice"):
        load_config(Config, write(tmp_path, "train:\n  lr: 1\n  lr: 2\n"))
