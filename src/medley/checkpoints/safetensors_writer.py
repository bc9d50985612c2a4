"""Writes safetensors files one tensor at a time. At most one tensor is in memory.

The format: the length of a JSON header, the header padded with spaces, and the bytes of all
tensors. The writer reserves space for the header and writes the header at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER_BYTES = 1 << 18  # space for about 1,500 names
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SafetensorsWriter:
    """A file that grows with `add`. `close` completes it, `abandon` leaves it incomplete."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  # closed by close()
        self._file.write(bytes(8 + HEADER_BYTES))
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_size = 100
        self.size = 0  # bytes of all tensors

    @property
    def names(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def has_room_for(self, name: str) -> bool:
        return self._header_size + len(name) + 150 < HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        end = self.size + tensor.nbytes
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, end],
        }
        self._header_size += len(name) + 150
        if tensor.nbytes:
            self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.size = end

    def close(self) -> None:
        header = json.dumps(self._header).encode()
        assert len(header) <= HEADER_BYTES
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
        self._file.close()

    def abandon(self) -> None:
        self._file.close()
