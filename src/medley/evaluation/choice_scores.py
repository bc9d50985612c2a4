"""The field `choices` of an answer file: the probability of each choice of a question.

    "choices": [{"text": "normal", "logprob": -2.1, "probability": 0.12}, ...]

`logprob` is the natural logarithm of a choice's likelihood, on any common scale; `probability` is
normalized over the choices. One of the two is enough; `probability` wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medley.errors import UserError
from medley.evaluation.predictions import Prediction

_TOLERANCE = 1e-3  # of the sum of probabilities, which files round


def normalize_choice(text: str) -> str:
    """Two choices are the same if these texts are equal."""
    return " ".join(text.split()).casefold()


def choice_texts(prediction: Prediction) -> list[str] | None:
    """The texts of the choices in a row; None for a row without them.

    Raises UserError unless they are two or more different texts.
    """
    if prediction.choices is None:
        return None
    where = f"{prediction.where}: choices"
    rows = prediction.choices
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where} must be a list of objects with text, logprob and probability.")
    texts = [row.get("text") for row in rows]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: Each choice needs a text (got {text!r}).")
    if len(texts) < 2 or len(set(map(normalize_choice, texts))) < len(texts):
        raise UserError(f"{where} must be two or more different texts (got {texts}).")
    return texts


def probabilities_of(prediction: Prediction, classes: Sequence[str]) -> NDArray[np.float64] | None:
    """The probability of each class (K,), in their order; None for a row without choices.

    Raises UserError if the choices are not the classes, and for values that are not probabilities
    or logarithms.
    """
    texts = choice_texts(prediction)
    if texts is None:
        return None
    positions = {normalize_choice(text): index for index, text in enumerate(texts)}
    wanted = [normalize_choice(name) for name in classes]
    where = f"{prediction.where}: choices"
    if positions.keys() != set(wanted):
        raise UserError(
            f"{where} are not those of the question (got {', '.join(texts)}, expected "
            f"{', '.join(classes)})."
        )
    rows = [prediction.choices[positions[name]] for name in wanted]
    if all("probability" in row for row in rows):
        return _check_probabilities(where, [_number(where, row, "probability") for row in rows])
    if not all("logprob" in row for row in rows):
        raise UserError(f"{where}: Each choice needs a logprob or a probability.")
    logarithms = np.array([_number(where, row, "logprob") for row in rows])
    weights = np.exp(logarithms - logarithms.max())
    return np.asarray(weights / weights.sum(), np.float64)


def _number(where: str, row: dict[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} of {row['text']!r} must be a number (got {value!r}).")
    return float(value)


def _check_probabilities(where: str, values: Sequence[float]) -> NDArray[np.float64]:
    if min(values) < 0 or abs(sum(values) - 1) > _TOLERANCE:
        raise UserError(
            f"{where}: The probabilities must be 0 or more and sum to 1 (got "
            f"{', '.join(f'{value:.6g}' for value in values)})."
        )
    return np.array(values) / sum(values)
