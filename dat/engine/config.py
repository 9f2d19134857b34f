"""Configurations: nested dataclasses filled from a YAML file and "key.path=value" overrides."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from dat.utils.errors import ConfigError, shown
from dat.utils.files import atomic_write, real_path
from dat.utils.safe_yaml import parse_yaml, read_yaml

T = TypeVar("T")

# Sides of images as models get them, in pixels, and processes that read images.
LARGEST_SIDE, MOST_WORKERS = 4096, 256

# An installed package contains configs/; in a checkout the folder is beside the package.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

# The key of a file's base, which is not in the schema.
_BASE = "base"

# Pairs of keys of which one replaces the other; 0 stands for "not given".
_ALTERNATIVES = (("train.epochs", "train.steps"), ("train.warmup_epochs", "train.warmup_steps"))
# Keys, and what raises their values; a schema may have more of them in `raised_by`.
_RAISED_BY = (("train.epochs", "train.least_steps"), ("train.steps", "train.least_steps"))
# Keys that tell nothing about how a run is trained.
IGNORED = ("output", "train.resume")

# YAML 1.1 reads 1e-4 as text because it has no decimal point.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def find_config(name: str | Path, folder: str = "") -> Path:
    """The file of a configuration: a path, or the name of one that is installed, such as "finetune".

    Args:
        name: path of a YAML file, or the path below configs/ without its ending ("detection/finetune"); the folder may
            be left out where only one file has the name.
        folder: of configs/, the only one whose files are taken; "": all.

    Raises:
        ConfigError: no such file or name, or a name of several; lists the nearest names.
    """
    if Path(name).is_file() or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    paths = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}
    named = [key for key in paths if str(name) in (key, key.rpartition("/")[2])]
    found = [key for key in named if key.startswith(folder)]
    if len(found) == 1:
        return paths[found[0]]
    if found:
        raise ConfigError(f"{name}: several configurations have this name: {', '.join(found)}")
    if named:
        raise ConfigError(f"{name}: is a configuration of {named[0].partition('/')[0]}, should be one of {folder}")
    leaves = [key.rpartition("/")[2] for key in paths if key.startswith(folder)]
    near = difflib.get_close_matches(Path(name).name, leaves, n=3) or leaves
    raise ConfigError(f"{name}: no such file, nor a configuration of this name; there are {', '.join(near)}")


def load_config(schema: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Reads a YAML file over the defaults of a dataclass, then applies overrides.

    A file may name another one, `base: other.yaml` relative to its own folder, and is then read over that file:
    sections are merged, while a list or a free-form dictionary is replaced. An override of steps replaces the epochs of
    the file, and the other way round; so does a file those of its base.

    Args:
        schema: dataclass of nested dataclasses; a field typed dict[str, Any] takes any keys. A dataclass with a class
            attribute `variants`, {kind: dataclass}, is read as the one that its key `kind` names. A class attribute
            `folder` is passed on to find_config.
        path: YAML file, or a name as for find_config.
        overrides: "key.path=value", the value read as YAML.
    Raises:
        ConfigError: missing file, invalid YAML, unknown key (with the nearest known one), a value of another type,
            both steps and epochs in one place, or files that are each other's base.
    """
    data = rename_keys(_read_with_base(schema, find_config(path, getattr(schema, "folder", "")), []))
    _apply_overrides(schema, overrides, data)
    return from_dict(schema, data, str(path))


def from_dict(schema: type[T], data: dict[str, Any], source: str) -> T:
    """Builds `schema` from plain nested dictionaries; `source` heads the error messages. Raises ConfigError."""
    known = list(_known_keys(schema))
    data = _resolve_alternatives(data, known, source)
    return _build(schema, data, source, "", known)


def rename_keys(data: dict[str, Any], saved: bool = False) -> dict[str, Any]:
    """A copy of plain `data` with the names that keys of earlier versions have now.

    `saved`: as a run wrote it, with every key: earlier versions wrote both steps and epochs, and the steps counted.
    """
    data = {**data}
    if isinstance(data.get("train"), dict):
        train = data["train"] = {**data["train"]}
        # The lowest learning rate of classifiers was absolute, with a default rate of 1e-3.
        low, lr = train.get("min_lr"), train.get("lr", 1e-3)
        if _is_number(_floats(low)) and _is_number(_floats(lr)) and _floats(lr):
            train.setdefault("min_lr_scale", _floats(train.pop("min_lr")) / _floats(lr))
        if saved and train.get("steps") and train.get("epochs"):
            train["epochs"] = 0
    return data


def apply_overrides(config: T, overrides: Iterable[str]) -> T:
    """A copy of a configuration, such as a checkpoint's, with "key.path=value" overrides. Raises ConfigError."""
    data = to_dict(config)
    _apply_overrides(type(config), overrides, data)
    return from_dict(type(config), data, "command line")


def keyword_overrides(schema: type, values: dict[str, Any]) -> list[str]:
    """Keyword arguments of Python as overrides: epochs=5 is "train.epochs=5", data__img_size=96 "data.img_size=96".

    Names may have dots too, as in **{"data.img_size": 96}; one that is no section or key of the schema is of `train`.
    """
    overrides = []
    for name, value in values.items():
        key = name.replace("__", ".")
        if "." not in key and key not in typing.get_type_hints(schema):
            key = f"train.{key}"
        overrides.append(f"{key}={value if isinstance(value, (str, Path)) else json.dumps(value)}")
    return overrides


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and values."""
    return _plain(dataclasses.asdict(config))


def save_config(config: Any, path: str | Path) -> None:
    """Writes a configuration as YAML that load_config reads back."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def get_value(config: Any, key: str) -> Any:
    """The value, or section, at "key.path" of a configuration: a dataclass or plain dictionaries."""
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """{"key.path": value} of nested plain dictionaries; `key` is the path of `value` itself."""
    if not isinstance(value, dict):
        return {key: value}
    parts = (flatten(item, f"{key}.{part}" if key else part) for part, item in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def check_range(
    config: Any, keys: Iterable[str], low: float, high: float = math.inf, *, exclusive: bool = False
) -> None:
    """Raises ConfigError naming the first key whose number, or one of whose list, is not finite and in low .. high.

    `exclusive`: low itself is refused too.
    """
    for key in keys:
        value = get_value(config, key)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not math.isfinite(number) or not low <= number <= high or (exclusive and number == low):
                raise ConfigError(f"{key} is {value}, should be {_range(low, high, exclusive)}")


def _range(low: float, high: float, exclusive: bool) -> str:
    if high == math.inf:
        return f"more than {low}" if exclusive else f"at least {low}"
    return f"more than {low} and at most {high}" if exclusive else f"{low} to {high}"


def _read_with_base(schema: type, path: Path, above: list[Path]) -> dict[str, Any]:
    """The file's content over that of its base; `above`: the files that lead to it."""
    data = _read_yaml(path)
    if _BASE not in data:
        return data
    base = data.pop(_BASE)
    if not isinstance(base, str) or not base or Path(base).is_absolute():
        raise ConfigError(f"{path}: {_BASE} is {base!r}, should be the path of a YAML file, relative to this one")
    target = path.parent / base
    above = [*above, path]
    if real_path(target) in map(real_path, above):
        chain = " -> ".join(str(file) for file in [*above, target])
        raise ConfigError(f"{path}: {_BASE} leads back to a file that it is read for: {chain}")
    below = _read_with_base(schema, target, above)
    _clear_alternatives(schema, below, data)
    return _lay_over(schema, below, data)


def _clear_alternatives(schema: type, below: dict[str, Any], data: dict[str, Any]) -> None:
    """Sets a number of epochs in `below` to 0 where `data` gives steps, and the other way round.

    Values that the user gives stay as they are, so that what raises them in `below` is switched off too.
    """
    pairs = [pair for a, b in _ALTERNATIVES for pair in ((a, b), (b, a))]
    for given, other in (*pairs, *_RAISED_BY, *getattr(schema, "raised_by", ())):
        section, name = other.split(".")
        if _get(data, given) and isinstance(below.get(section), dict) and name in below[section]:
            below[section] = {**below[section], name: 0}


def _resolve_alternatives(data: dict[str, Any], known: list[str], source: str) -> dict[str, Any]:
    """`data` with 0 for the key whose alternative is given, in place of its default. Raises ConfigError for both."""
    for pair in _ALTERNATIVES:
        first, second = (_get(data, key) for key in pair)
        if first and second:
            a, b = (f"{key} is {shown(value)}" for key, value in zip(pair, (first, second), strict=True))
            raise ConfigError(f"{source}: {a} and {b}, should be only one of them")
        other = pair[1] if first else pair[0]
        if (first or second) and other in known:
            section, name = other.split(".")
            data = {**data, section: {**data[section], name: 0}}
    return data


def _get(data: Any, key: str) -> Any:
    """The value at "key.path" of plain dictionaries, None if there is none."""
    for name in key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _lay_over(schema: Any, below: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data` over `below`: sections that are dataclasses are merged, everything else is replaced."""
    hints = _hints(schema)
    merged = dict(below)
    for name, value in data.items():
        nested, under = _nested(hints.get(name)), merged.get(name)
        if nested is not None and isinstance(under, dict) and isinstance(value, (dict, type(None))):
            # a section with every line commented out reads as null
            value = _lay_over(nested, under, value or {})
        merged[name] = value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: should hold keys and values, holds a {type(data).__name__}")
    return data


def _apply_overrides(schema: type, overrides: Iterable[str], data: dict[str, Any]) -> None:
    """Writes "key.path=value" overrides into `data`."""
    given: dict[str, Any] = {}
    overrides = list(overrides)
    # Applied to an empty configuration first, to see which of two alternatives the overrides themselves give.
    for override in overrides:
        _apply_override(schema, override, given)
    _clear_alternatives(schema, data, given)
    for override in overrides:
        _apply_override(schema, override, data)


def _apply_override(schema: type, override: str, data: dict[str, Any]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override should read key.path=value")
    kind = _check_key(schema, key, list(_known_keys(schema)))
    # Text is taken verbatim: YAML would read 0001 as 1.
    value = text if kind is str else _read_value(override, text)
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents):
        if data.get(name) is None:
            data[name] = _default(schema, parents[: depth + 1])
        if not isinstance(data[name], dict):
            raise ConfigError(f"{override!r}: {'.'.join(parents[: depth + 1])} holds a value, it has no keys")
        data = data[name]
    data[leaf] = value


def _read_value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{shown(override)}: the value is not valid YAML: {error}") from error


def _default(schema: type, keys: list[str]) -> Any:
    """Default of a free-form dictionary, so that an override adds to it; an empty one for a nested dataclass."""
    for name in keys[:-1]:
        schema = _nested(_hints(schema).get(name))
        if schema is None:
            return {}
    for field in dataclasses.fields(schema):
        if field.name == keys[-1] and _nested(_hints(schema)[field.name]) is None:
            return _field_default(field)
    return {}


def _check_key(schema: type, key: str, known: list[str]) -> Any:
    """Type of the value at `key`; None inside a free-form dictionary, where every key is allowed."""
    kind: Any = schema
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        hints = _hints(kind)
        if name not in hints:
            raise ConfigError(f"command line: {_unknown(key, known)}")
        kind = hints[name]
    return kind


def _build(schema: Any, data: Any, source: str, prefix: str, known: list[str]) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: {prefix[:-1]} is {shown(data)}, should hold keys and values")
    variants = getattr(schema, "variants", {})
    if variants:
        schema = _variant(schema, data, source, prefix)
    hints, fields = typing.get_type_hints(schema), _fields(schema)
    values = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in fields:
            if variants and _belongs_to_another(schema, name, value, f"{source}: {prefix}"):
                continue
            raise ConfigError(f"{source}: {_unknown(key, known)}")
        nested = _nested(hints[name])
        if nested is not None:
            # a section with every line commented out reads as null
            values[name] = _build(nested, {} if value is None else value, source, f"{key}.", known)
            continue
        try:
            values[name] = _convert(hints[name], value)
        except ValueError as error:
            raise ConfigError(f"{source}: {key} is {shown(value)}, should be {error}") from None
    missing = [name for name, field in fields.items() if _required(field) and name not in values]
    if missing:
        raise ConfigError(f"{source}: {prefix}{missing[0]} is required")
    return schema(**values)


def _variant(schema: Any, data: dict[str, Any], source: str, prefix: str) -> Any:
    """The dataclass among `variants` that the key `kind` names, or the default does."""
    kind = data.get("kind", schema.kind)
    if not isinstance(kind, str) or kind not in schema.variants:
        raise ConfigError(f"{source}: {prefix}kind is {shown(kind)}, should be one of {', '.join(schema.variants)}")
    return schema.variants[kind]


def _belongs_to_another(schema: Any, name: str, value: Any, where: str) -> bool:
    """Whether other variants have a key, at its default: such a key says nothing, and older files hold it for all.

    Raises ConfigError for another value of it.
    """
    owners = {kind: _fields(variant)[name] for kind, variant in schema.variants.items() if name in _fields(variant)}
    if owners and value not in [_field_default(field) for field in owners.values()]:
        needed = " or ".join(owners)
        raise ConfigError(f"{where}{name} is {shown(value).lower()}, which needs kind={needed}; it is {schema.kind}")
    return bool(owners)


def _convert(kind: Any, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError whose message describes the expected value."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _floats(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and _is_number(value) and float(value).is_integer():
        return int(value)
    if kind is float and _is_number(_floats(value)):
        return float(value)
    if kind is str and (isinstance(value, str) or _is_number(value)):
        if "\0" in str(value):
            raise ValueError("text without NUL characters")
        return str(value)
    if kind is type(None) and value is None:
        return value
    if origin is Literal and any(value == option and type(value) is type(option) for option in arguments):
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value)
            except ValueError:
                continue
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(arguments[1], item) for name, item in value.items()}
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item) for item in value]
    if origin is tuple and isinstance(value, (list, tuple)) and len(arguments) == len(value):
        return tuple(_convert(item_kind, item) for item_kind, item in zip(arguments, value, strict=True))
    raise ValueError(_describe(kind))


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is dict:
        return "keys and values"
    if origin is tuple:
        return "a list [" + ", ".join(_describe(item) for item in arguments) + "]"
    if origin is list:
        return f"a list, each {_describe(arguments[0])}"
    return str(kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _nested(kind: Any) -> Any:
    """The dataclass that a type is, or None."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _hints(schema: Any) -> dict[str, Any]:
    """Types of a dataclass's fields, and of all of its variants'."""
    found: dict[str, Any] = {}
    for variant in [schema, *getattr(schema, "variants", {}).values()]:
        hints = typing.get_type_hints(variant)
        found |= {name: hints[name] for name in _fields(variant)}
    return found


def _fields(schema: Any) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(schema)}


def _field_default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in _hints(schema).items():
        yield f"{prefix}{name}"
        if _nested(kind) is not None:
            yield from _known_keys(kind, f"{prefix}{name}.")


def _unknown(key: str, known: list[str]) -> str:
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1)]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
