"""Normalization of answers as in the VQA challenge and in LLaVA-Med's scorers."""

from __future__ import annotations

import re
from collections import Counter

# Contractions of the VQA challenge (Antol et al. 2015). A word is expanded to a contraction if
# exactly one apostrophe is missing.
_CONTRACTED_FORMS = [
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
    "somebody'd've",  # alias
    "somebody'll",  # alias
    "somebody's",  # alias
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
    form[:position] + form[position + 1 :]: form
    for form in _CONTRACTED_FORMS
    for position, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # a typo in the challenge's own table  # alias

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PUBLISHED_PERIODS = 32  # The published code passes a regex flag (32) as the replacement count.


def normalize_text(text: str, as_published: bool = False) -> str:
    """A text in lower case without articles and most punctuation, number words as digits.

    `as_published` removes only the first 32 periods, which is a bug in the published scorers.
    """
    original, has_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for character in _PUNCTUATION:
        beside_space = f"{character} " in original or f" {character}" in original
        text = text.replace(character, "" if has_number or beside_space else " ")
    text = _PERIOD.sub("", text, count=_PUBLISHED_PERIODS if as_published else 0)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    words = (CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
    return " ".join(words).replace(",", "")


def count_words(text: str) -> Counter[str]:
    return Counter(text.split())
