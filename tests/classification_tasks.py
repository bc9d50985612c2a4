"""Random classification tasks of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from medley.evaluation.classification import Task

BINARY = ("normal", "pneumonia")


def make_task(gold: Any, probabilities: Any, positive: int | None = None) -> Task:
    gold, values = np.array(gold), np.array(probabilities, float)
    if values.ndim == 1:
        values = np.stack([1 - values, values], 1)
    classes = tuple(f"c{index}" for index in range(values.shape[1]))
    predicted = np.where(np.isnan(values[:, 0]), -1, np.nan_to_num(values).argmax(1))
    return Task("", classes, positive, (), gold, predicted, values, np.arange(len(gold)))


def random_task(classes: int, count: int, seed: int, ties: bool = False) -> Task:
    random = np.random.default_rng(seed)
    gold = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes)) + 1.2 * np.eye(classes)[gold]
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if ties:
        values = np.round(values, 1)
        values[:, 0] += 1 - values.sum(1)
        values = np.clip(values, 0, 1) / np.clip(values, 0, 1).sum(1, keepdims=True)
    return make_task(gold, values, 1 if classes == 2 else None)
