"""Damages files in many ways, each decided by a random generator: blindly, or within their formats."""

import copy
import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml

HUGE = (0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def damage(data: bytes, random: random.Random) -> bytes:
    """A file cut, or with bytes changed, as accidents and attackers do."""
    return random.choice([_cut, _flip, _zero, _swap, _huge, _flip_text, _repeat])(bytearray(data), random)


def _cut(data: bytearray, random: random.Random) -> bytes:
    # heads are short
    return bytes(data[: random.choice([random.randrange(len(data)), random.randrange(min(len(data), 200))])])


def _places(data: bytearray, random: random.Random, count: int) -> Iterator[int]:
    """Half of them where heads and directories are."""
    for _ in range(count):
        near = random.randrange(min(len(data), 600))
        yield random.choice([random.randrange(len(data)), near, len(data) - 1 - near])


def _flip(data: bytearray, random: random.Random) -> bytes:
    for place in _places(data, random, random.choice([1, 2, 10, 100])):
        data[place] ^= 1 << random.randrange(8)
    return bytes(data)


def _flip_text(data: bytearray, random: random.Random) -> bytes:
    for place in _places(data, random, random.choice([1, 3])):
        data[place] = random.randrange(256)
    return bytes(data)


def _zero(data: bytearray, random: random.Random) -> bytes:
    for place in _places(data, random, 1):
        length = min(random.choice([1, 8, 64, 1000]), len(data) - place)
        data[place : place + length] = bytes(length)
    return bytes(data)


def _swap(data: bytearray, random: random.Random) -> bytes:
    size = random.choice([4, 16, 256])
    first, second = (random.randrange(max(1, len(data) - size)) for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size], data[first : first + size],
    )  # fmt: skip
    return bytes(data)


def _huge(data: bytearray, random: random.Random) -> bytes:
    for place in _places(data, random, 1):
        number, order = random.choice(HUGE), random.choice("<>")
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}[(number.bit_length() + 7) // 8]
        packed = struct.pack(order + code, number)
        data[place : place + len(packed)] = packed
    return bytes(data)


def _repeat(data: bytearray, random: random.Random) -> bytes:
    place = random.randrange(len(data))
    return bytes(data[:place] + data[place : place + random.choice([1, 100])] * random.choice([2, 50]) + data[place:])


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 10**12, 10**30, 1e-300, 1e300, math.nan, math.inf, "", "x", "../../x",
    "0" * 90_000, [], [1], [[[]]], {}, {"name": 1}, b"x", (), [10**9] * 3, 1 << 20_000,
)  # fmt: skip


def doctor(content: Any, random: random.Random) -> Any:
    """A dictionary as a checkpoint or metadata hold it with one to three values replaced."""
    content = copy.deepcopy(content)
    for _ in range(random.choice([1, 1, 2, 3])):
        # the only value may have been deleted before
        if not content:
            break
        place = content
        while True:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or random.random() < 0.15:
                break
            place = place[key]
        value = place[key]
        if isinstance(value, torch.Tensor):
            # Most changes fail on a tensor that has become sparse or of terabytes.
            if value.layout is torch.strided and value.numel() < 10**9:
                place[key] = _doctor_tensor(value, random)
        elif isinstance(place, dict) and random.random() < 0.15:
            del place[key]
        else:
            place[key] = random.choice(VALUES)
    return content


def _doctor_tensor(tensor: torch.Tensor, random: random.Random) -> Any:
    shape = [*tensor.shape, 1]
    return random.choice([
        lambda: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor - 10**9,
        lambda: tensor * 1e38,
        lambda: tensor.long(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.half(),
        lambda: tensor[None],
        lambda: torch.zeros(()).expand(10**6, 10**6),
        lambda: torch.zeros(1).expand(shape),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: tensor.tolist(),
        lambda: random.choice(VALUES),
    ])()  # fmt: skip


def save(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def change_checkpoint(data: bytes, random: random.Random) -> bytes:
    return save(doctor(torch.load(io.BytesIO(data), weights_only=True), random))


def change_json(data: bytes, random: random.Random) -> bytes:
    return _json(doctor(json.loads(data), random)).encode()


def change_yaml(data: bytes, random: random.Random) -> bytes:
    content = doctor(yaml.safe_load(data), random)
    try:
        return yaml.safe_dump(content).encode()
    # Python writes no numbers of so many digits.
    except ValueError:
        return data.replace(b": 2\n", b": " + b"9" * 20_000 + b"\n")


def change_onnx(data: bytes, random: random.Random) -> bytes:
    """One field of the graph or its metadata."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    if random.random() < 0.5:
        metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        onnx.helper.set_model_props(model, {name: _json(value) for name, value in doctor(metadata, random).items()})
        return model.SerializeToString()
    graph = model.graph
    place = random.choice([graph.node, graph.initializer, graph.input, graph.output])
    item = random.choice(place)
    if place is graph.initializer:
        item.dims[:] = [random.choice([0, -1, 1, 7, 10**6, 10**12]) for _ in item.dims]
    elif place is not graph.node:
        for axis in item.type.tensor_type.shape.dim:
            axis.dim_value = random.choice([0, 1, 5, 10**9])
        item.type.tensor_type.elem_type = random.randrange(20)
    elif item.attribute and random.random() < 0.5:
        attribute = random.choice(item.attribute)
        attribute.i = random.choice([0, -1, 5, 10**9, -(2**62)])
        attribute.ints[:] = [random.choice([0, -1, 5, 10**9]) for _ in attribute.ints]
    elif random.random() < 0.5:
        item.op_type = random.choice(["Add", "Loop", "Resize", "Expand", "Tile", "NoSuchOp", "Reshape"])
    else:
        random.shuffle(item.input)
    return model.SerializeToString()


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return "1" * 20_000


def change_zip(data: bytes, random: random.Random) -> bytes:
    """One member damaged inside a sound archive, or packed, or declared larger than it is."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copied:
        chosen = random.choice(archive.namelist())
        for name in archive.namelist():
            content = archive.read(name)
            if name == chosen and random.random() < 0.8:
                content = damage(content or b"\0", random)
            elif name == chosen:
                copied.writestr(name, bytes(200 * 2**20), zipfile.ZIP_DEFLATED)
                continue
            copied.writestr(name, content)
    return out.getvalue()


def change_either(first: Callable[..., bytes], second: Callable[..., bytes]) -> Callable[..., bytes]:
    return lambda data, random: random.choice([first, second])(data, random)


def change_safetensors(data: bytes, random: random.Random) -> bytes:
    """Its head, which says where tensors are."""
    (length,) = struct.unpack("<Q", data[:8])
    head = doctor(json.loads(data[8 : 8 + length]), random)
    try:
        text = json.dumps(head).encode()
    except (TypeError, ValueError):
        text = b"{" * 100_000
    size = random.choice([len(text), len(text), len(text), 2**40, 2**63])
    return struct.pack("<Q", size) + text + data[8 + length :]
