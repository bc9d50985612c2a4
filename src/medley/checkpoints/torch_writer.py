"""Writes `.pth` files one tensor at a time. At most one tensor is in memory.

`torch.save` creates the file without the tensors' bytes. The writer then fills in the bytes. The
format is a zip archive with an uncompressed record and a checksum for each tensor.
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

_LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of name and extra field
_DESCRIPTOR = b"PK\x07\x08"  # follows a record's bytes and precedes the checksum
_DIRECTORY_ENTRY = struct.Struct("<4s24xHHH12x")  # signature, lengths of three fields
_ENTRY_SIGNATURE = b"PK\x01\x02"
_CHECKSUM_OFFSET = 16  # in a directory entry


class TorchWriter:
    """A file of tensors by name. `put` must be called once for each tensor.

    `meta` contains a tensor of the right shape and dtype for each name, in the order of the file.
    """

    def __init__(self, path: Path, meta: Mapping[str, Tensor]) -> None:
        with FakeTensorMode():
            empty = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in meta.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True), open(path, "wb") as file:
            torch.save(
                empty, file
            )  # an open file: otherwise the archive would contain the file's name
        self._meta = {n: (t.shape, t.dtype) for n, t in meta.items()}
        with zipfile.ZipFile(path) as archive:
            self._directory = archive.start_dir
            records = {
                Path(i.filename).name: i for i in archive.infolist() if "/data/" in i.filename
            }
            self._headers = {n: records[str(k)].header_offset for k, n in enumerate(meta)}
        self._checksums: dict[int, int] = {}  # header offset of a record -> its checksum
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
        end = self._file.tell()
        if self._file.read(4) == _DESCRIPTOR:
            self._file.seek(end + 4)
            self._file.write(struct.pack("<I", checksum))

    def close(self) -> None:
        """Writes the checksums to the archive's directory."""
        assert len(self._checksums) == len(self._meta), "a tensor was not written"
        with zipfile.ZipFile(self._file) as archive:
            infos = archive.infolist()
        offset = self._directory
        for info in infos:
            self._file.seek(offset)
            signature, *lengths = _DIRECTORY_ENTRY.unpack(self._file.read(_DIRECTORY_ENTRY.size))
            assert signature == _ENTRY_SIGNATURE
            if info.header_offset in self._checksums:
                self._file.seek(offset + _CHECKSUM_OFFSET)
                self._file.write(struct.pack("<I", self._checksums[info.header_offset]))
            offset += _DIRECTORY_ENTRY.size + sum(lengths)
        self._file.close()

    def abandon(self) -> None:
        self._file.close()
