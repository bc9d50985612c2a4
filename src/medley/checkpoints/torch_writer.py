"""Writes `.pth` files one tensor at a time, so that none but that one is in memory.

`torch.save` lays the file out without the tensors' bytes, which are then written into their places.
The format is a zip archive: each tensor has a record, stored as it is, and a checksum of it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, at its end
_DESCRIPTOR = b"PK\x07\x08"  # followed by the checksum, after a record's bytes
_DIRECTORY_ENTRY = struct.Struct("<4s24xHHH12x")  # mark, lengths of the three fields after it
_CHECKSUM = 16  # its place in such an entry


class TorchWriter:
    """A file of tensors by name; `meta` gives their shapes and dtypes, `put` fills each once."""

    def __init__(self, path: Path, meta: Mapping[str, Tensor]) -> None:
        with FakeTensorMode():
            empty = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in meta.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True), open(path, "wb") as file:
            torch.save(empty, file)  # to a handle: the archive is not named after the file
        self._meta = {n: (t.shape, t.dtype) for n, t in meta.items()}
        with zipfile.ZipFile(path) as archive:
            self._directory = archive.start_dir
            records = {
                Path(i.filename).name: i for i in archive.infolist() if "/data/" in i.filename
            }
            self._headers = {n: records[str(k)].header_offset for k, n in enumerate(meta)}
        self._checksums: dict[int, int] = {}  # by the place of a record's header
        self._file = open(path, "rb+")  # noqa: SIM115  # closed by close()

    def put(self, name: str, tensor: Tensor) -> None:
        assert (tensor.shape, tensor.dtype) == self._meta[name], name
        header = self._headers[name]
        self._file.seek(header)
        lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(sum(lengths), 1)
        self._file.write(content)
        self._checksums[header] = checksum = zlib.crc32(content)
        place = self._file.tell()
        if self._file.read(4) == _DESCRIPTOR:
            self._file.seek(place + 4)
            self._file.write(struct.pack("<I", checksum))

    def close(self) -> None:
        """Enters the checksums in the archive's directory."""
        assert len(self._checksums) == len(self._meta), "a tensor was not written"
        with zipfile.ZipFile(self._file) as archive:
            infos = archive.infolist()
        place = self._directory
        for info in infos:
            self._file.seek(place)
            mark, *lengths = _DIRECTORY_ENTRY.unpack(self._file.read(_DIRECTORY_ENTRY.size))
            assert mark == b"PK\x01\x02"
            if info.header_offset in self._checksums:
                self._file.seek(place + _CHECKSUM)
                self._file.write(struct.pack("<I", self._checksums[info.header_offset]))
            place += _DIRECTORY_ENTRY.size + sum(lengths)
        self._file.close()

    def abandon(self) -> None:
        self._file.close()
