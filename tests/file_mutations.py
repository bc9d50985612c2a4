"""Mutations of files: JSON, YAML, pickles of tensors, safetensors, and any bytes. Seeded.

A mutation is a label and the bytes of the mutated file.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from torch import Tensor

Mutation = tuple[str, bytes]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**9, 10**30, -(10**30), 0.5, 1e30, -1e-30, float("nan"),
    float("inf"), "", "x", "\ud800", "../../x", "a" * 10_000, "(", [], [[]], {}, [1, 2], ["x"],
    [None], {"x": 1}, {"": []}, [10**30], [-1], [[0, 10**9]], "true", "none", "0",
)  # fmt: skip
WHOLE_FILES = (
    b"", b"null", b"[]", b"{}", b"0", b'"x"', b"\xff\xfe", b"\0" * 64, b"[" * 100_000,
    b'{"a":' * 50_000, b"a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]\n", b"9" * 5000, b"- " * 20_000,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", b"{", b"\x80\x04.",
    b'{"__proto__": 1}', b"PK\x03\x04", b"!!python/object/apply:os.getcwd []", b"2001-99-99",
)  # fmt: skip


def mutations(kind: str, data: bytes, rng: random.Random) -> Iterator[Mutation]:
    """Endless mutations of a file of a kind: json, yaml, pickle, safetensors, or bytes."""
    structured: dict[str, Callable[[bytes, random.Random], Mutation]] = {
        "json": _json_value, "yaml": _yaml_value, "pickle": _pickle, "safetensors": _safetensors,
    }  # fmt: skip
    while True:
        if kind in structured and rng.random() < 0.75:
            yield structured[kind](data, rng)
        else:
            yield _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> Mutation:
    size = len(data)
    # The ends of a file are where most formats have their tables.
    start = rng.choice([rng.randrange(size), rng.randrange(min(size, 512)), -rng.randrange(1, 512)])
    start %= size
    end = min(size, start + rng.choice([1, 4, 64]))
    choice = rng.randrange(9)
    if choice == 0:
        return f"first {start} bytes", data[:start]
    if choice == 1:
        number = rng.randrange(len(WHOLE_FILES))
        return f"whole file {number}", WHOLE_FILES[number]
    if choice == 2:
        return f"without bytes {start} to {end}", data[:start] + data[end:]
    if choice == 3:
        return f"bytes {start} to {end} twice", data[:end] + data[start:]
    if choice == 4:
        return "in UTF-16", data.decode("latin-1").encode("utf-16")
    if choice == 5:
        return "garbage behind the end", data + rng.randbytes(40)
    filler = rng.choice([b"\0", b"\xff", b"\x7f"])
    changed = filler * (end - start) if choice == 6 else rng.randbytes(end - start)
    return f"bytes {start} to {end} are {changed[:4]!r}", data[:start] + changed + data[end:]


# --- JSON and YAML ----------------------------------------------------------------------------


def _change_value(content: Any, rng: random.Random) -> tuple[str, Any]:
    """Replaces, removes or adds one value of a tree."""
    content = copy.deepcopy(content)
    parent, path = content, ""
    while True:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = rng.choice(keys)
        path += f".{key}"
        child = parent[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.15:
            break
        parent = child
    operation = rng.randrange(10)
    if operation == 0:
        del parent[key]
        return f"without {path}", content
    if operation == 1 and isinstance(parent, dict):
        parent["unknown field"] = rng.choice(VALUES)
        return f"an unknown field beside {path}", content
    if operation == 2 and isinstance(child, int) and not isinstance(child, bool):
        parent[key] = child + rng.choice([-1, 1, 32])
    elif operation == 3:
        parent[key] = [child]
    elif operation == 4:
        parent[key] = str(child)
    else:
        parent[key] = rng.choice(VALUES)
    return f"{path} = {str(parent[key])[:40]!a}", content


def _json_value(data: bytes, rng: random.Random) -> Mutation:
    content = json.loads(data)
    if rng.random() < 0.05 and isinstance(content, dict) and content:
        name, value = rng.choice(list(content)), json.dumps(rng.choice(VALUES))
        return f"{name} twice", b"{" + f"{json.dumps(name)}: {value}, ".encode() + data.lstrip()[1:]
    label, content = _change_value(content, rng)
    return label, json.dumps(content).encode()


def _yaml_value(data: bytes, rng: random.Random) -> Mutation:
    label, content = _change_value(yaml.safe_load(data), rng)
    return label, yaml.safe_dump(content).encode("utf-8", "replace")


# --- weights ----------------------------------------------------------------------------------


def _damaged(tensor: Tensor, rng: random.Random) -> tuple[str, Any]:
    """Another object in place of a tensor."""
    if rng.random() < 0.4:
        dtype = rng.choice([torch.int8, torch.int64, torch.bool, torch.complex64,
                            torch.float8_e4m3fn, torch.float64, torch.float16])  # fmt: skip
        return f"of {dtype}", tensor.to(dtype)
    full = tensor.float()
    options: list[tuple[str, Callable[[], Any]]] = [
        ("transposed", lambda: tensor.t().contiguous() if tensor.ndim == 2 else tensor[:-1]),
        ("flat", lambda: tensor.reshape(-1)),
        ("with one dimension more", lambda: tensor[None]),
        ("without dimensions", lambda: tensor.reshape(-1)[0].clone()),
        ("empty", lambda: torch.empty(0)),
        ("empty rows", lambda: tensor[:0]),
        ("longer", lambda: torch.cat([tensor, tensor])),
        ("shorter", lambda: tensor[: max(1, len(tensor) // 2)].clone()),
        ("NaN", lambda: torch.full_like(full, float("nan"))),
        ("infinite", lambda: torch.full_like(full, float("inf"))),
        ("one number for a terabyte", lambda: torch.zeros(1).expand(10**6, 10**6)),
        ("one number for its shape", lambda: torch.zeros(1).expand(tensor.shape)),
        ("a number", lambda: 3),
        ("None", lambda: None),
        ("a text", lambda: "x"),
        ("a list", lambda: [1.0]),
        ("sparse", lambda: full.to_sparse()),
        ("on the meta device", lambda: tensor.to("meta")),
    ]
    label, make = rng.choice(options)
    return label, make()


def _pickle(data: bytes, rng: random.Random) -> Mutation:
    content = torch.load(io.BytesIO(data), weights_only=True)
    nested = "state_dict" in content
    state = dict(content["state_dict"] if nested else content)
    name = rng.choice(sorted(state))
    choice = rng.randrange(9)
    label = name
    if choice == 0:
        del state[name]
        label = f"without {name}"
    elif choice == 1:
        state["another.weight"] = torch.zeros(2)
        label = "with another tensor"
    elif choice == 2:
        state[3] = state.pop(name)  # type: ignore[index]
        label = f"a number as the name of {name}"
    else:
        what, state[name] = _damaged(state[name], rng)
        label = f"{name} {what}"
    saved: Any = {"state_dict": state} if nested else state
    if choice == 8:
        label, saved = rng.choice(
            [("a list", [1]), ("no tensors", {}), ("a tensor", torch.zeros(3)),
             ("state_dict is a list", {"state_dict": [1]}),
             ("nested", {"state_dict": {"a": state}})]
        )  # fmt: skip
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return label, buffer.getvalue()


def _safetensors(data: bytes, rng: random.Random) -> Mutation:
    """Changes the header: names, types, shapes, offsets, its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.15:
        false = rng.choice([0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1])
        return f"header of {false} bytes", struct.pack("<Q", false) + data[8:]
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    choice = rng.randrange(8)
    if choice == 0:
        del header[name]
        label = f"without {name}"
    elif choice == 1:
        header[f"{name}.more"] = header.pop(name)
        label = f"{name} renamed"
    elif choice == 2:
        entry["dtype"] = rng.choice(
            ["F32", "F16", "I64", "BOOL", "F8_E4M3", "C64", "X", None, "F4"]
        )
        label = f"{name} of {entry['dtype']}"
    elif choice == 3:
        shape = entry["shape"]
        entry["shape"] = rng.choice([[], [0], [-1], [10**9, 10**9], [2**63, 2], shape[::-1],
                                     [*shape, 1], "x"])  # fmt: skip
        label = f"{name} of shape {entry['shape']}"
    elif choice == 4:
        first, last = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[last, first], [first, last + 4], [0, 2**60], [first],
                                            [-1, 4], [first, first], [0, len(body)]])  # fmt: skip
        label = f"{name} at {entry['data_offsets']}"
    elif choice == 5:
        body = body[: -rng.randrange(1, 64)]
        label = "shorter data"
    elif choice == 6:  # the values of one tensor
        first, last = entry["data_offsets"]
        body = body[:first] + b"\xff" * (last - first) + body[last:]
        label = f"{name} is NaN"
    else:
        other, header[name] = _change_value(entry, rng)
        label = f"{name}{other}"
    text = json.dumps(header).encode()
    return label, struct.pack("<Q", len(text)) + text + body
