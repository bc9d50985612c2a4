"""The words of an answer, as the VQA challenge normalises them and LLaVA-Med's scorers do."""

from __future__ import annotations

import re
from collections import Counter

# Contractions of the VQA challenge (Antol et al. 2015). One is expanded where exactly one of its
# apostrophes is missing.
_CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTED
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the challenge's own slip

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PUBLISHED_PERIODS = 32  # the published code passes a flag where a count belongs


def normalise(text: str, as_published: bool = False) -> str:
    """A text without most punctuation, in lower case, numbers as digits, articles left out.

    `as_published` deletes the first 32 periods alone, as the published scorers do by mistake.
    """
    given, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_a_blank = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if number or beside_a_blank else " ")
    text = _PERIOD.sub("", text, count=_PUBLISHED_PERIODS if as_published else 0)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    kept = (CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
    return " ".join(kept).replace(",", "")


def counted(text: str) -> Counter[str]:
    return Counter(text.split())
