"""Contexts that were read before: a talk's next turn begins with all that was said, and a second
prompt often with the first one's pictures."""

from __future__ import annotations

from collections.abc import Sequence

from medley.generation.kv_cache import CachedPrefix

MIN_PREFIX = 16  # shorter beginnings are read again faster than found


def shared_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two sequences have in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


class PrefixCache:
    """Keeps the latest prefixes within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[CachedPrefix] = []  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, prefix: CachedPrefix) -> None:
        """Takes one in, in place of those that it begins with, and lets go of the oldest."""
        self._kept = [p for p in self._kept if prefix.ids[: len(p.ids)] != p.ids]
        self._kept.append(prefix)
        while self._kept and sum(p.nbytes for p in self._kept) > self.limit:
            del self._kept[0]

    def find(self, ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The prefix that shares the longest beginning with `ids`, and its length.

        One token is always left to read: the logits behind it are wanted.
        """
        best: tuple[CachedPrefix, int] | None = None
        for prefix in self._kept:
            length = min(shared_prefix_length(prefix.ids, ids), len(ids) - 1)
            if length >= MIN_PREFIX and (best is None or length > best[1]):
                best = (prefix, length)
        if best is not None:
            self._kept.remove(best[0])
            self._kept.append(best[0])
        return best
