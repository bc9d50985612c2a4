"""Stored responses of `/v1/responses`, bounded by bytes and separated by user."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from fastapi import Request

STORE_BYTES = 256 << 20
_ENTRY_BYTES = 500  # of the keys and the containers of one entry


def owner_of(request: Request) -> str:
    """Who may see a stored response: the requests with the same API key, or all without one."""
    key = request.headers.get("authorization", "").strip()
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


class StoredResponse:
    """A response as it was returned, and the conversation for the next request.

    Attributes:
        ids: token ids of the prompt without its instructions, and of the response
        token_space: fingerprint and vocabulary size of the model, without which `ids` mean nothing
    """

    def __init__(
        self, response: dict[str, Any], ids: Sequence[int], token_space: tuple[str, int]
    ) -> None:
        # One string: a parsed object would take several times the memory.
        self._json = json.dumps(response).encode()
        self.id: str = response["id"]
        self.ids, self.token_space = array("i", ids), token_space

    @property
    def size(self) -> int:
        return len(self._json) + len(self.ids) * self.ids.itemsize + _ENTRY_BYTES

    @property
    def response(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._json)
        return value


class ResponseStore:
    """The responses of all users. Used only in the event loop's thread.

    If they exceed `max_bytes`, the oldest response of the user who stores most is dropped, so that
    one user cannot displace the responses of all others.
    """

    def __init__(self, max_bytes: int = STORE_BYTES) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self._owners: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._owners.values()))

    def add(self, owner: str, stored: StoredResponse) -> None:
        self._owners.setdefault(owner, OrderedDict())[stored.id] = stored
        self._sizes[owner] = self._sizes.get(owner, 0) + stored.size
        self.size += stored.size
        while self.size > self.max_bytes:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            self.delete(largest, next(iter(self._owners[largest])))

    def get(self, owner: str, name: str) -> StoredResponse | None:
        return self._owners.get(owner, OrderedDict()).get(name)

    def delete(self, owner: str, name: str) -> bool:
        """Whether there was such a response."""
        stored = self._owners.get(owner, OrderedDict()).pop(name, None)
        if stored is None:
            return False
        self.size -= stored.size
        self._sizes[owner] -= stored.size
        if not self._owners[owner]:
            del self._owners[owner], self._sizes[owner]
        return True
