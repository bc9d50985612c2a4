"""Speculative decoding of image codes: several places of an image in one forward pass, exactly.

The sampler draws the token of place t as choose(p_t, u_t): p_t is the distribution behind all
tokens before t, and the uniform number u_t depends only on seed, sequence and place. A pass over
drafts computes p_t for several places at once, each behind the drafts before it. The token drawn at
a place is the one of sequential decoding if all drafts before it are: so draws are accepted up to
and including the first one that differs from its draft. There is no other test, and any draft is
allowed: better ones only save passes. The draws behind a rejected draft are the next drafts
(Jacobi decoding); see docs/speculation.md.

Shapes: T tokens to draw in a pass.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Literal

from medley.errors import UserError
from medley.generation.prefix_cache import shared_prefix_length
from medley.generation.sequence import SequenceState, Window

Speculation = Literal["auto", "off"] | int
"""Draws of a sequence in one pass: a number, `off` (1), or `auto`: as many as save time."""

_WIDTHS = (1, 2, 4, 8, 16, 32)  # that `auto` measures
_SAMPLES = 3  # passes of a width before its time counts
_RECENT = 9  # passes whose median time counts
_DECAY = 0.98  # of the weight of earlier passes in the share of accepted drafts
# The first codes of an image have bad drafts: they must not decide alone.
_PRIOR, _PRIOR_WEIGHT = 0.7, 20.0  # assumed share of accepted drafts, and how many drafts it counts
_TRY_WIDER = 64  # passes after which one of the next width is measured again


class Speculator:
    """Chooses the drafts of each pass.

    `codes_per_image` is the number of places of an image; a square number is a square grid.
    `auto` speculates only with `can_measure`: in float32 on a CPU. Its widths follow measured
    times, and passes of other widths round differently. In half precision that would change images
    from run to run; on a GPU, a width that pays has not been measured.
    """

    def __init__(self, codes_per_image: int, can_measure: bool) -> None:
        self.codes_per_image, self._can_measure = codes_per_image, can_measure
        side = math.isqrt(codes_per_image)
        self._row = side if side * side == codes_per_image else 1
        self._policy = _WindowPolicy(codes_per_image)
        self.setting: Speculation = "auto"

    def set(self, setting: Speculation) -> None:
        """Raises UserError for a number below 1 or above the codes of an image."""
        check_speculation(setting, self.codes_per_image)
        self.setting = setting

    @property
    def is_on(self) -> bool:
        """Whether passes may draw more than one token."""
        return self._can_measure if self.setting == "auto" else self.setting not in ("off", 1)

    def windows(self, sequences: Sequence[SequenceState]) -> list[Window]:
        """The input tokens of each sequence in the next pass."""
        width = self._width(sequences)
        return [self._window(sequence, width) for sequence in sequences]

    def _width(self, sequences: Sequence[SequenceState]) -> int:
        if not self.is_on or not any(sequence.grammar.in_image for sequence in sequences):
            return 1
        return self._policy.choose(sequences) if self.setting == "auto" else int(self.setting)

    def _window(self, sequence: SequenceState, width: int) -> Window:
        emitted, pending = sequence.grammar.codes_emitted, sequence.pending
        if emitted is None:
            return Window(sequence, pending, 1)
        num_draws = min(width, self.codes_per_image - emitted)
        tokens = [*pending, *sequence.drafts[: num_draws - 1]]
        codes = [
            *sequence.output.ids[len(sequence.output.ids) - emitted :],
            *tokens[len(pending) :],
        ]
        while len(tokens) < len(pending) + num_draws - 1:
            # The code above, else the one on the left, else the begin-of-image token: a rejection.
            above = len(codes) - self._row
            draft = codes[above] if above >= 0 else (codes or pending)[-1]
            tokens.append(draft)
            codes.append(draft)
        return Window(sequence, tokens, num_draws)

    def accept(
        self, windows: Sequence[Window], drawn: Sequence[Sequence[int]], seconds: float
    ) -> list[list[int]]:
        """The draws (T,) of each window that sequential decoding makes; keeps the rest as drafts.

        `seconds` is the processor time of the pass.
        """
        accepted = []
        for window, tokens in zip(windows, drawn, strict=True):
            count = 1 + shared_prefix_length(window.drafts, tokens)
            window.sequence.drafts = list(tokens[count:])
            accepted.append(list(tokens[:count]))
        was_chosen = any(window.sequence.grammar.in_image for window in windows)
        if self.setting == "auto" and self.is_on and was_chosen:
            self._policy.record(windows, accepted, seconds)
        return accepted


def check_speculation(
    setting: Speculation, codes_per_image: int | None = None, has_images: bool = True
) -> None:
    """Raises UserError for a number that no image can use."""
    if setting in ("auto", "off"):
        return
    if not has_images:
        raise UserError(f"--speculate {setting}: Only images are speculated. Leave it out.")
    if int(setting) < 1 or (codes_per_image is not None and int(setting) > codes_per_image):
        limit = (
            "or more" if codes_per_image is None else f"to {codes_per_image}, the codes of an image"
        )
        raise UserError(f"--speculate {setting}: Out of range (expected 1 {limit}, auto or off).")


class _WindowPolicy:
    """Finds the window width with the most tokens per second, for each number of branches.

    Times and shares of accepted drafts are those of this machine's own passes. Widths are tried
    from 1 up, as long as wider ones save time, so that a full batch hardly tries any.
    """

    def __init__(self, max_width: int = _WIDTHS[-1]) -> None:
        self._widths = [width for width in _WIDTHS if width <= max_width]
        self._passes = 0
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_RECENT)
        )
        # By number of a draft: how often all before it were accepted, and how often it was too.
        self._tried = [0.0] * _WIDTHS[-1]
        self._accepted = [0.0] * _WIDTHS[-1]

    def choose(self, sequences: Sequence[SequenceState]) -> int:
        branches = sum(len(sequence.branches) for sequence in sequences)
        in_image = sum(sequence.grammar.in_image for sequence in sequences)
        best, best_rate = 1, 0.0
        self._passes += 1
        for width in self._widths:
            if width > 2 * best:
                break
            seconds = self._seconds[branches, width]
            if len(seconds) < _SAMPLES:
                return width
            tokens = len(sequences) - in_image + in_image * self._expected(width)
            rate = tokens / statistics.median(seconds)
            if rate > best_rate:
                best, best_rate = width, rate
        is_trial = self._passes % _TRY_WIDER == 0 and 2 * best in self._widths
        return 2 * best if is_trial else best

    def _expected(self, width: int) -> float:
        """Expected tokens of a sequence in a pass of a width.

        Drafts that no pass has tried so far are accepted as often as all others.
        """
        tried = _PRIOR_WEIGHT + sum(self._tried)
        mean = (_PRIOR_WEIGHT * _PRIOR + sum(self._accepted)) / tried
        expected = share = 1.0
        for number in range(1, width):
            weight = _PRIOR_WEIGHT / 4
            share *= (weight * mean + self._accepted[number]) / (weight + self._tried[number])
            expected += share
        return expected

    def record(
        self, windows: Sequence[Window], accepted: Sequence[Sequence[int]], seconds: float
    ) -> None:
        width = max(window.num_draws for window in windows)
        branches = sum(len(window.sequence.branches) for window in windows)
        if width in self._widths:
            self._seconds[branches, width].append(seconds)
        for window, tokens in zip(windows, accepted, strict=True):
            for number in range(1, min(len(tokens) + 1, window.num_draws)):
                self._tried[number] = _DECAY * self._tried[number] + 1
                self._accepted[number] *= _DECAY
                self._accepted[number] += len(tokens) > number
