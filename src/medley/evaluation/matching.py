"""Word-level comparison of answers for our own scores, in English and Chinese.

The normalizer of the published scorers (`vqa_normalize.py`) joins words at missing spaces and
keeps characters that it does not know. Our own scores do not use it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from medley.evaluation.answer_rules import AnswerText, Rule, changed_text
from medley.evaluation.answer_text import prepare

HAN = "\u3400-\u9fff"
# A word is a Chinese character, a number with its comparison, sign and decimals, or a run of
# letters and digits. Other tokens end a clause.
_TOKEN = re.compile(
    rf"[{HAN}]|(?:[<>\u2264\u2265\u00b1]\s*)?(?<![\w)\]])-(?=\d)\d+(?:\.\d+)?(?![^\W_{HAN}])"
    rf"|[<>\u2264\u2265\u00b1]\s*\d+(?:\.\d+)?|\d+\.\d+"
    rf"|[^\W_{HAN}]+(?:'[^\W_{HAN}]+)*|[.;!?,:\u3002\u3001\n]"
)
_PUNCTUATION = frozenset(".;!?,:\u3002\u3001\n")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_COMPARISONS = (
    (re.compile(r"\b(?:less|fewer|smaller|lower) than (?=\d)|\b(?:below|under) (?=\d)|小于"), "<"),
    (re.compile(r"\b(?:more|greater|larger|higher) than (?=\d)|\bover (?=\d)|大于"), ">"),
    (re.compile(r"\bat least (?=\d)|>=|不小于|至少"), "\u2265"),
    (re.compile(r"\bat most (?=\d)|<=|不大于|至多"), "\u2264"),
    (re.compile(r"\b(?:minus|negative) (?=\d)"), "-"),
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NO_LEADING_DIGIT = re.compile(r"(?<![\w.])\.(?=\d)")
_TRAILING_ZEROS = re.compile(r"(?<![\w.])(\d+)(?:\.0+|(\.\d*?[1-9])0+)(?![\d.]*\d)")
_UNIT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(mm|cm|ml|cc|mg|kg|hu)\b")
_XRAY = re.compile(r"\bx[\s-]?ray(s?)\b")
_HYPHEN = re.compile(rf"(?<=[^\W_{HAN}])-(?=[^\W\d_{HAN}])")
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the|my)\s+(?:(?:final|correct|best|right)\s+)*answer"
    r"(?:\s+(?:to|for)\s+(?:the|this|your)\s+question)?\s+(?:is|would be)\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)
_BRACKETS = re.compile(r"([^()]+?)\s*\(([^()]+)\)\s*[.!]?")


def _lower(answer: AnswerText) -> str:
    return unicodedata.normalize("NFKC", answer.text).lower()


def _apostrophe(answer: AnswerText) -> str:
    return re.sub("[\u2018\u2019\u02bc\u2032\u00b4`]", "'", answer.text)


def _minus(answer: AnswerText) -> str:
    return re.sub("[\u2212\u2010\u2011\u2013]", "-", answer.text)


def _comparison(answer: AnswerText) -> str:
    text = answer.text
    for pattern, sign in _COMPARISONS:
        text = pattern.sub(sign, text)
    return text


def _thousands(answer: AnswerText) -> str:
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer.text)


def _decimals(answer: AnswerText) -> str:
    text = _NO_LEADING_DIGIT.sub("0.", answer.text)
    return _TRAILING_ZEROS.sub(lambda match: match[1] + (match[2] or ""), text)


def _unit(answer: AnswerText) -> str:
    return _UNIT.sub(r"\1 \2", answer.text)


def _xray(answer: AnswerText) -> str:
    return _XRAY.sub(r"xray\1", answer.text)


COMPARISON = (
    Rule("case and form", "Lower case and Unicode's NFKC form.", _lower, "Ｔ2", "t2"),
    Rule("apostrophe", "All apostrophes are one character.",
         _apostrophe, "crohn’s disease", "crohn's disease"),
    Rule("minus sign", "All minus signs and hyphens are one character.",
         _minus, "−5", "-5"),
    Rule("thousands", "A comma between groups of three digits is removed.",
         _thousands, "1,000", "1000"),
    Rule("decimals", "A missing zero before the point is added, zeros at the end are removed.",
         _decimals, ".50", "0.5"),
    Rule("comparison", "Comparisons and signs in words become characters of the number.",
         _comparison, "less than 5", "<5"),
    Rule("unit", "A unit is a word of its own.", _unit, "5cm", "5 cm"),
    Rule("X-ray", "One spelling.", _xray, "x ray", "xray"),
)  # fmt: skip


def _tokens(text: str) -> list[str]:
    """Words without articles, and the punctuation between them."""
    found = _TOKEN.findall(changed_text(COMPARISON, text))
    tokens = [re.sub(r"\s+", "", token) if token != "\n" else "." for token in found]
    return [_NUMBERS.get(token, token) for token in tokens if token not in _ARTICLES]


def split_words(text: str) -> list[str]:
    """The words in lower case, numbers in one spelling, without articles.

    A text that has only articles keeps them.
    """
    words = [token for token in _tokens(text) if token not in _PUNCTUATION]
    return words or re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


# --- negation ---------------------------------------------------------------------------------

_CLAUSE_LENGTH = 100  # tokens before a match that are searched for a negation
_NEGATIONS = frozenset((
    "no", "not", "cannot", "never", "neither", "nor", "none", "non", "without", "absence",
    "absent", "hardly", "rarely", "seldom", "lack", "lacks", "except", "excluding", "unlikely",
    "isnt", "doesnt", "dont", "cant", "wasnt", "arent", "不", "没", "未", "无", "非", "否",
))  # fmt: skip
_NEGATING_PAIRS = (("rather", "than"), ("instead", "of"), ("other", "than"), ("ruled", "out"),
                   ("rule", "out"), ("rules", "out"), ("anything", "but"), ("everything", "but"),
                   ("all", "but"))  # fmt: skip
_POSITIVE_PAIRS = (("not", "only"), ("not", "just"), ("不", "仅"), ("不", "但"), ("不", "只"),
                   ("不", "同"), ("非", "常"), ("无", "名"))  # fmt: skip
_SCOPE_ENDS = frozenset((".", ";", "!", "?", ":", "\u3002", "but", "however", "但", "so", "thus",
                         "therefore", "hence"))  # fmt: skip
_RESTARTS = frozenset(("it", "it's", "its", "this", "that", "that's", "they", "there", "是", "而",
                       "应", "为", "在"))  # fmt: skip


def _is_negated(before: Sequence[str]) -> bool:
    """Whether a negation precedes the end of these tokens in the same clause."""
    start = 0
    for i, token in enumerate(before):
        following = before[i + 1] if i + 1 < len(before) else ""
        if token == ",":
            ends = following in _RESTARTS or list(before[start:i]) in (["no"], ["not"])
        elif token in ("instead", "rather"):
            ends = (token, following) not in _NEGATING_PAIRS
        elif token == "but" and (before[i - 1 : i] or [""])[0] in ("anything", "everything", "all"):
            ends = False
        else:
            ends = token in _SCOPE_ENDS or (token, following) == ("而", "是")
        start = i + 1 if ends else start
    scope = before[start:]
    following_tokens = [*scope[1:], ""][: len(scope)]
    return any(
        (first in _NEGATIONS or first.endswith("n't") or (first, second) in _NEGATING_PAIRS)
        and (first, second) not in _POSITIVE_PAIRS
        for first, second in zip(scope, following_tokens, strict=True)
    )


def is_negated(before: str) -> bool:
    """Whether what follows this text is negated by it."""
    return _is_negated(_tokens(before))


# Three words after a match, joined.
_DENIED = re.compile(r"(?:is|was)?(?:incorrect|wrong)|(?:is|was)(?:false|not(?:correct|answer))")


def contains_words(answer: str, gold: str) -> bool:
    """Whether the gold words occur in the answer in sequence, without a negation before them.

    Words beside "or" are one of several possibilities, and words that "is wrong" follows are
    denied: they do not count either.
    """
    text = prepare(answer)
    texts = (text, _HYPHEN.sub("", text))
    golds = {tuple(split_words(text)) for text in (gold, _HYPHEN.sub("", gold))}
    return any(_occurs(_tokens(text), words) for text in texts for words in golds)


def _occurs(tokens: Sequence[str], gold: tuple[str, ...]) -> bool:
    if not gold:
        return False
    places = [i for i, token in enumerate(tokens) if token not in _PUNCTUATION]
    words = [tokens[i] for i in places]
    for start in range(len(words) - len(gold) + 1):
        end = start + len(gold)
        if tuple(words[start:end]) != gold or _is_negated(
            tokens[max(0, places[start] - _CLAUSE_LENGTH) : places[start]]
        ):
            continue
        beside = (words[start - 1 : start] or [""])[0], (words[end : end + 1] or [""])[0]
        after = "".join(words[end : end + 3])
        if "or" not in beside and not _DENIED.match(after):
            return True
    return False


# --- equality ---------------------------------------------------------------------------------


def _without_lead_in(answer: AnswerText) -> str | None:
    lead_in = _LEAD_IN.match(answer.text)
    return None if lead_in is None else answer.text[lead_in.end() :]


def _abbreviated(answer: AnswerText) -> str | None:
    match = _BRACKETS.fullmatch(_ARTICLE.sub("", answer.text.strip()))
    if match is None:
        return None
    if _abbreviates(match[1], match[2]):
        return match[1]
    return match[2] if _abbreviates(match[2], match[1]) else None


def _joined_hyphen(answer: AnswerText) -> str | None:
    joined = _HYPHEN.sub("", answer.text)
    return joined if joined != answer.text else None


WORD_RULES = (
    Rule("lead-in", '"The answer is" at the beginning is left out.',
         _without_lead_in, "The correct answer is left lung", "left lung"),
    Rule("abbreviation", "An abbreviation and its text in brackets are the same answer.",
         _abbreviated, "CT (computed tomography)", "CT"),
    Rule("hyphen", "Words joined by a hyphen may be one word or several.",
         _joined_hyphen, "non-contrast", "noncontrast"),
)  # fmt: skip


def answer_text(answer: str) -> str:
    """A model's answer as it is compared: prepared, and without "The answer is"."""
    return changed_text(WORD_RULES[:1], prepare(answer))


def same_answer(answer: str, gold: str) -> bool:
    """Whether both have the same words. A gold answer without words is compared verbatim.

    Words joined by a hyphen may be one word, and "CT (computed tomography)" is the same as either.
    """
    if not re.search(r"[^\W_]", gold):
        return bool(answer.strip()) and gold.strip() == answer.strip()
    return bool(_forms(gold) & _forms(answer_text(answer)))


def _forms(text: str) -> set[tuple[str, ...]]:
    texts = [text, _HYPHEN.sub("", text)]
    match = _BRACKETS.fullmatch(_ARTICLE.sub("", text.strip()))
    if match is not None and _abbreviated(AnswerText(text)) is not None:
        texts += [match[1], match[2]]
    return {words for form in texts if (words := tuple(split_words(form)))}


def _abbreviates(short: str, long: str) -> bool:
    """Whether the letters of a short word begin the words of a long text."""
    short, words = short.strip().lower(), re.findall(r"[^\W_]+", long.lower())
    words = [word for word in words if word not in ("of", "and", "the", "in")]
    if not 2 <= len(short) <= 6 or not short.isalpha() or not words:
        return False
    if len(words) > 1:
        return short == "".join(word[0] for word in words)
    rest = iter(words[0])
    return len(words[0]) > len(short) + 2 and words[0][0] == short[0] and all(
        letter in rest for letter in short
    )  # fmt: skip
