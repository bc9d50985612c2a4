"""How our own scores read an answer: as words, in English and Chinese.

The published scorers' normaliser (`words.py`) glues words together where a blank is missing, and
keeps marks it does not know; nothing here goes through it.
"""

from __future__ import annotations

import re
import unicodedata

_HAN = "\u3400-\u9fff"
# A Chinese character is a word; so is a number, with its decimals, and a run of letters and digits.
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
# What a Chinese answer begins with; the longest that fits decides.
_BEGINNINGS = {
    "是": _YES, "是的": _YES, "有": _YES, "存在": _YES,
    "否": _NO, "不是": _NO, "没": _NO, "没有": _NO, "无": _NO, "不存在": _NO, "未见": _NO,
    "是否": None, "有无": None, "有没有": None, "是不是": None, "无法": None,
}  # fmt: skip
# What says yes or no only alone.
_ALONE = {
    "对": _YES, "对的": _YES, "正确": _YES, "能": _YES, "可以": _YES,
    "不": _NO, "不对": _NO, "错误": _NO, "不能": _NO, "不可以": _NO,
}  # fmt: skip


def words_of(text: str) -> list[str]:
    """Words in lower case, number words as digits, without articles (unless there is nothing
    else)."""
    found = [_NUMBERS.get(w, w) for w in _WORD.findall(unicodedata.normalize("NFKC", text).lower())]
    kept = [word for word in found if word not in _ARTICLES]
    return kept or found


def same_answer(answer: str, gold: str) -> bool:
    """Whether the words are the same ones; marks count where there are no words at all."""
    wanted, given = words_of(gold), words_of(answer)
    if not wanted:
        return bool(answer.strip()) and gold.strip() == answer.strip()
    return wanted == given


def contains_words(answer: str, gold: str) -> bool:
    """Whether the gold words stand, in their order, among the given ones."""
    wanted, given = words_of(gold), words_of(answer)
    size = len(wanted)
    starts = range(len(given) - size + 1)
    return bool(wanted) and any(given[i : i + size] == wanted for i in starts)


def yes_or_no(text: str) -> str | None:
    """`yes` or `no`, as whole words; in Chinese by what the answer begins with. None for neither or
    both."""
    said = {word for word in words_of(text) if word in (_YES, _NO)}
    clauses = [clause for clause in _CLAUSE.split(text.strip()) if clause]
    if clauses and re.search(f"[{_HAN}]", clauses[0]) and (found := _chinese(clauses[0])):
        said.add(found)
    return said.pop() if len(said) == 1 else None


def _chinese(clause: str) -> str | None:
    if clause in _ALONE:
        return _ALONE[clause]
    fitting = [start for start in _BEGINNINGS if clause.startswith(start)]
    return _BEGINNINGS[max(fitting, key=len)] if fitting else None


def is_yes_or_no(gold: str) -> str | None:
    """`yes` or `no` of a right answer that is nothing else; None for any other."""
    bare = _CLAUSE.sub("", gold.strip()).lower()
    if bare in (_YES, _NO):
        return bare
    both = {**{k: v for k, v in _BEGINNINGS.items() if v}, **_ALONE}
    return both.get(bare)
