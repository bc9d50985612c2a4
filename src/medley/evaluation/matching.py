"""Word-level comparison of answers for our own scores, in English and Chinese.

The normalizer of the published scorers (`vqa_normalize.py`) joins words at missing spaces and
keeps characters that it does not know. Our own scores do not use it.
"""

from __future__ import annotations

import re
import unicodedata

_HAN = "\u3400-\u9fff"
# A word is a Chinese character, a number with its decimals, or a run of letters and digits.
_WORD = re.compile(rf"[{_HAN}]|\d+\.\d+|[^\W_{_HAN}]+(?:['\u2019][^\W_{_HAN}]+)*")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

_YES, _NO = "yes", "no"
_CLAUSE = re.compile(r"[\s,.;:!?\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001]+")
# Beginnings of a Chinese answer; the longest one that matches decides.
_BEGINNINGS = {
    "是": _YES, "是的": _YES, "有": _YES, "存在": _YES,
    "否": _NO, "不是": _NO, "没": _NO, "没有": _NO, "无": _NO, "不存在": _NO, "未见": _NO,
    "是否": None, "有无": None, "有没有": None, "是不是": None, "无法": None,
}  # fmt: skip
# Chinese clauses that mean yes or no only if nothing else follows.
_COMPLETE_CLAUSES = {
    "对": _YES, "对的": _YES, "正确": _YES, "能": _YES, "可以": _YES,
    "不": _NO, "不对": _NO, "错误": _NO, "不能": _NO, "不可以": _NO,
}  # fmt: skip


def split_words(text: str) -> list[str]:
    """The words in lower case, number words as digits, without articles.

    A text that has only articles keeps them.
    """
    normalized = unicodedata.normalize("NFKC", text).lower()
    words = [_NUMBERS.get(word, word) for word in _WORD.findall(normalized)]
    return [word for word in words if word not in _ARTICLES] or words


def same_answer(answer: str, gold: str) -> bool:
    """Whether both have the same words. A gold answer without words is compared verbatim."""
    gold_words = split_words(gold)
    if not gold_words:
        return bool(answer.strip()) and gold.strip() == answer.strip()
    return gold_words == split_words(answer)


def contains_words(answer: str, gold: str) -> bool:
    """Whether the gold words occur in the answer as a contiguous sequence."""
    gold_words, words = split_words(gold), split_words(answer)
    size = len(gold_words)
    starts = range(len(words) - size + 1)
    return bool(gold_words) and any(words[i : i + size] == gold_words for i in starts)


def find_yes_no(text: str) -> str | None:
    """`yes` or `no` in an answer; None if it has neither or both.

    In English they are whole words. In Chinese the beginning of the answer decides.
    """
    found = {word for word in split_words(text) if word in (_YES, _NO)}
    clauses = [clause for clause in _CLAUSE.split(text.strip()) if clause]
    if clauses and re.search(f"[{_HAN}]", clauses[0]) and (value := _chinese_yes_no(clauses[0])):
        found.add(value)
    return found.pop() if len(found) == 1 else None


def _chinese_yes_no(clause: str) -> str | None:
    if clause in _COMPLETE_CLAUSES:
        return _COMPLETE_CLAUSES[clause]
    matches = [start for start in _BEGINNINGS if clause.startswith(start)]
    return _BEGINNINGS[max(matches, key=len)] if matches else None


def gold_yes_no(gold: str) -> str | None:
    """`yes` or `no` if the gold answer is exactly that, in either language; else None."""
    text = _CLAUSE.sub("", gold.strip()).lower()
    if text in (_YES, _NO):
        return text
    values = {**{k: v for k, v in _BEGINNINGS.items() if v}, **_COMPLETE_CLAUSES}
    return values.get(text)
