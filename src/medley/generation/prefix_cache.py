"""Prefix cache: keys and values of earlier contexts.

The next turn of a conversation begins with all earlier turns, and a second prompt often begins with
the images of the first one.
"""

from __future__ import annotations

from collections.abc import Sequence

from medley.generation.kv_cache import CachedPrefix

MIN_PREFIX = 16  # tokens; shorter prefixes are prefilled faster than copied


def shared_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


class PrefixCache:
    """The most recently used prefixes, up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._prefixes: list[CachedPrefix] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, prefix: CachedPrefix) -> None:
        """Adds a prefix, replaces those that it begins with, and evicts the oldest."""
        self._prefixes = [p for p in self._prefixes if prefix.ids[: len(p.ids)] != p.ids]
        self._prefixes.append(prefix)
        while self.nbytes > self.max_bytes:
            self.evict_oldest()

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._prefixes)

    def evict_oldest(self) -> bool:
        """Removes the least recently used prefix; False if the cache is empty."""
        if not self._prefixes:
            return False
        del self._prefixes[0]
        return True

    def find(self, ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The prefix that shares the most leading tokens with `ids`, and their number.

        At least one token is left to prefill, because its logits are needed.
        """
        best: tuple[CachedPrefix, int] | None = None
        for prefix in self._prefixes:
            length = min(shared_prefix_length(prefix.ids, ids), len(ids) - 1)
            if length >= MIN_PREFIX and (best is None or length > best[1]):
                best = (prefix, length)
        if best is not None:
            self._prefixes.remove(best[0])
            self._prefixes.append(best[0])
        return best
