"""Words that end an answer, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Called with pieces of text, gives what may be shown: without a stop word, and without what
    may yet become one. `found` says that the answer has ended."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.found = words, False
        self._held = ""

    def __call__(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        places = [place for word in self.words if (place := text.find(word)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((self._overlap(text, word) for word in self.words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """How much of a word's beginning the text ends with."""
        longest = min(len(text), len(word) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
