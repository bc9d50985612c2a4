"""Admission by memory: which sequences the key-value cache has room for.

The cache is a rectangle of branches x positions, so its worst case is the number of all branches
times the longest possible sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from medley.data.vocabulary import Vocabulary
from medley.errors import UserError
from medley.generation.kv_cache import round_up_length
from medley.generation.prefix_cache import PrefixCache
from medley.generation.sequence import CacheDemand, Request


def cache_demand(
    request: Request, vocabulary: Vocabulary, codes_per_image: int, max_seq_len: int
) -> CacheDemand:
    """The worst case of a request: it generates as many tokens and images as it may."""
    options = request.options
    tokens = min(options.max_new_tokens, max_seq_len - len(request.prompt))
    images = 0 if options.mode == "text" else tokens // (codes_per_image + 2)
    if options.max_images is not None:
        images = min(images, options.max_images)
    branches = 1
    if images and options.uses_cfg:
        # The image-conditional branch exists only if the context contains an image.
        branches = 3 if images > 1 or vocabulary.end_image in request.prompt else 2
    return CacheDemand(branches, len(request.prompt) + tokens)


class CacheBudget:
    """The bytes that the key-value cache and the cached prefixes may take; None for no limit."""

    def __init__(self, bytes_per_token: int, prefixes: PrefixCache) -> None:
        self.bytes_per_token, self.prefixes = bytes_per_token, prefixes
        self.max_bytes: int | None = None

    @property
    def cache_bytes(self) -> int | None:
        """What the cached prefixes leave for the key-value cache."""
        return None if self.max_bytes is None else self.max_bytes - self.prefixes.nbytes

    def needed(self, demands: Sequence[CacheDemand]) -> int:
        """Bytes of the cache if every one of the sequences reaches its worst case."""
        length = max((demand.length for demand in demands), default=0)
        branches = sum(demand.branches for demand in demands)
        return branches * round_up_length(length) * self.bytes_per_token

    def fits(self, demands: Sequence[CacheDemand], more: int = 0) -> bool:
        """Whether sequences, and `more` bytes, fit together. Evicts cached prefixes for them."""
        if self.max_bytes is None:
            return True
        needed = self.needed(demands) + more
        while needed + self.prefixes.nbytes > self.max_bytes and self.prefixes.evict_oldest():
            pass
        return needed + self.prefixes.nbytes <= self.max_bytes

    def check(self, demand: CacheDemand) -> None:
        """Raises UserError for a sequence that does not fit even if it runs alone."""
        needed = self.needed([demand])
        if self.max_bytes is None or needed <= self.max_bytes:
            return
        branches = "1 branch" if demand.branches == 1 else f"{demand.branches} guidance branches"
        advice = "" if demand.branches == 1 else ", set both guidance scales to 1"
        raise UserError(
            f"The request does not fit into memory: the keys and values of {branches} of "
            f"{demand.length} tokens need {_gigabytes(needed)} (limit "
            f"{_gigabytes(self.max_bytes)}). Use a smaller max_new_tokens or a shorter "
            f"prompt{advice}, or raise --kv_cache_gb or --gpu_memory_utilization."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
