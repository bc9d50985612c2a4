"""Cached byte-level BPE encoding: the ids of `tokenizers`, several times faster.

A byte-level BPE tokenizer first splits a text into words and then encodes each word on its own, so
the ids of a word can be cached. This module reproduces Chameleon's split rule for ASCII. Non-ASCII
text goes to `tokenizers`, split only at positions where that rule always splits. A tokenizer file
with another rule is not accelerated.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

MAX_CACHED_WORDS = 200_000  # about 50 MB
_LONG_TEXT = 10_000  # characters
_MAX_WORD_LENGTH = 64  # characters; longer words are not cached

# Chameleon's pre-tokenizer: each digit is a word, and GPT-2's rule splits the text between digits.
_CHAMELEON_RULE = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]
# The same rule as one expression. A digit ends the word before it, as the end of the text does.
_WORDS = re.compile(
    r"[0-9]|'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+", re.ASCII
)
# The rule always splits before a space between a visible ASCII character and a letter.
_SAFE_SPLIT = re.compile(r"(?<=[!-~])(?= [A-Za-z])")

# Words whose bytes are their own symbols in the model's alphabet, except for the space.
_VISIBLE = re.compile(r" ?[!-~]+")
_SPACE = "\u0120"


class CachedBPE:
    """Encodes text with a tokenizer that does not parse special tokens."""

    def __init__(self, tokenizer: Tokenizer, parsed: dict[str, Any]) -> None:
        rule = parsed.get("pre_tokenizer") or {}
        same_rule = rule.get("type") == "Sequence" and rule.get("pretokenizers") == _CHAMELEON_RULE
        deterministic = parsed.get("normalizer") is None and not parsed["model"].get("dropout")
        self._can_cache = same_rule and deterministic
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, equal to `tokenizer.encode(text, add_special_tokens=False).ids`."""
        if not self._can_cache:
            return _encode(self._tokenizer, text)
        if text.isascii():
            words = _WORDS.findall(text)
        else:
            words = []
            for segment in _SAFE_SPLIT.split(text):
                words += _WORDS.findall(segment) if segment.isascii() else [segment]
        cache = self._cache
        try:  # nearly always, every word is cached, and this line runs in C
            return list(chain.from_iterable(map(cache.__getitem__, words)))
        except KeyError:
            new = {word: self._encode_word(word) for word in set(words) if word not in cache}
            if len(cache) < MAX_CACHED_WORDS:
                cache.update((w, ids) for w, ids in new.items() if len(w) <= _MAX_WORD_LENGTH)
            return list(chain.from_iterable(new[w] if w in new else cache[w] for w in words))

    def _encode_word(self, word: str) -> list[int]:
        if _VISIBLE.fullmatch(word):  # calling the BPE model directly takes half of the time
            return [token.id for token in self._model.tokenize(word.replace(" ", _SPACE))]
        return _encode(self._tokenizer, word)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if len(text) < _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=False).ids
    # `encode` holds the GIL, half a second for 200 kB; `encode_batch` lets other threads run.
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
