"""Stop strings: strings that end a response, found in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringFilter:
    """Removes the first stop string and all text after it.

    Each call takes a piece of text and returns the text that can be sent. It withholds the end of
    the text while that may be the beginning of a stop string. `found` is set once a stop string
    occurred.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings, self.found = stop_strings, False
        self._withheld = ""

    def __call__(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._withheld + piece
        positions = [at for string in self.stop_strings if (at := text.find(string)) >= 0]
        if positions:
            self.found, self._withheld = True, ""
            return text[: min(positions)]
        overlap = max((self._overlap(text, string) for string in self.stop_strings), default=0)
        self._withheld = text[len(text) - overlap :]
        return text[: len(text) - overlap]

    def flush(self) -> str:
        """The withheld text, once the response has ended."""
        text, self._withheld = self._withheld, ""
        return text

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest proper prefix of `string` that `text` ends with."""
        longest = min(len(text), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
