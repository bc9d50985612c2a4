"""Yes and no in an answer, and the Chinese gold answers that mean them."""

from __future__ import annotations

import re
import unicodedata

from medley.evaluation.answer_rules import NO_ANSWER, AnswerText, Rule, first_decision
from medley.evaluation.answer_text import prepare
from medley.evaluation.matching import HAN

YES, NO = "yes", "no"
NORMAL, ABNORMAL = "正常", "异常"

_WORDS = {
    YES: "yes|yeah|yep|yup", NO: "no|nope|nah",
}  # fmt: skip
# Alone, or as the first clause.
_PHRASES = {
    YES: "y|true|correct|affirmative|indeed|absolutely|certainly|definitely|of course|sure"
    "|that's right|that is right|that's correct|that is correct",
    NO: "n|false|incorrect|negative|wrong|not at all|absolutely not|certainly not|definitely not"
    "|of course not|not true|not correct",
}
_STATED = {YES: f"{_WORDS[YES]}|true|correct", NO: f"{_WORDS[NO]}|false|incorrect"}
_VALUES = {
    word: value for table in (_WORDS, _PHRASES, _STATED) for value, words in table.items()
    for word in words.split("|")
}  # fmt: skip
_WORD = re.compile(rf"(?<![\w'])({_WORDS[YES]}|{_WORDS[NO]})(?![\w'])")
_OPTIONS = re.compile(r"['\"(\[]?\byes['\"]?\s*(?:/|\bor\b)\s*['\"]?no\b['\")\]]?"
                      r"|\btrue\s*(?:/|\bor\b)\s*false\b")  # fmt: skip
_IDIOMS = re.compile(
    r"\b(?:there is |there's )?no (?:doubt|question|wonder|problem)(?: (?:that|about it))?\b"
    r"|\bno\.\s*(?=\d)|\b(?:without|beyond) (?:a )?doubt\b"
)
_INTERJECTION = re.compile(
    r"(?:(?:well|oh|hmm|so|actually|wait|sorry|i think|i would say)[\s,.]+)+"
)
_FIRST = re.compile(rf"({_WORDS[YES]}|{_WORDS[NO]})(?![\w'])(?!\s+(?:and|or)\s+(?:yes|no)\b)")
_BOUNDARY = re.compile(r"[\s,.;:!?/\u3002\u3001\n()\[\]\"'-]*(?:[,.;:!?/\u3002\u3001\n]|$)")
_CLAUSE = re.compile(r"[,.;:!?/\u3002\u3001\n()]+")
_ANSWER_IS = re.compile(
    r"\banswer(?:\s+to\s+[^.?!:\n]{1,60}?)?\s*(?:is|would be|should be|=|:)\s*:?\s*['\"(]?"
    rf"(?:(?:a|probably|most likely|definitely|clearly)\s+)*({_STATED[YES]}|{_STATED[NO]})(?![\w'])"
)
_THAT_IS = re.compile(
    r"(?:it|this|that|(?:the|this|that) (?:statement|claim|finding|description))\s*"
    r"(?:is|'s|isn't|is not|'s not)\s+(?:not\s+)?(?:true|false|correct|incorrect)(?!\s*\w)"
)
_ELLIPSIS = re.compile(
    r"(?:it|there|this|that|they|he|she) (?:is|are|does|do|has|was|were|can)( not|n't)?[.!]?"
)
_REFUSAL = re.compile(
    r"\b(?:i|we)(?:'m| am| are)?\s+(?:\w+\s+){0,2}?(?:cannot|can't|can not|could not|couldn't"
    r"|unable|not able|not sure|do not know|don't know|unsure)\b"
    r"|\b(?:cannot|can't|can not|impossible to|not possible to|unable to|no way to|hard to"
    r"|difficult to)\s+(?:be\s+)?(?:tell|determin\w*|say|said|answer\w*|decide\w*|judge\w*"
    r"|confirm\w*|assess\w*)"
    r"|\bno (?:idea|clue|way to|information|answer)\b|\bnot (?:sure|clear|certain)\b"
    r"|\b(?:unclear|uncertain)\b"
    r"|无法|不清楚|不确定|不知道|不一定|难以|没有办法|没有信息|没有答案"
)
_SORRY = re.compile(r"^(?:i'm |i am )?sorry\b|\bas an ai\b|^抱歉|^对不起")
_DIRECT_NEGATION = re.compile(
    r"(?:\b(?:not|never|cannot|neither|without|whether|if)|n't)\s+(?:[\w']+\s+){0,2}['\"]?$"
)

# Beginnings of a Chinese answer; the longest one that matches decides.
_BEGINNINGS = {
    "是": YES, "是的": YES, "有": YES, "有的": YES, "存在": YES, "包含": YES, "包括": YES,
    "含有": YES, "会": YES, "会的": YES, "没错": YES, "确实": YES, "当然": YES,
    "否": NO, "不是": NO, "没": NO, "没有": NO, "无": NO, "不存在": NO, "未见": NO, "未发现": NO,
    "不包含": NO, "不包括": NO, "不含": NO, "不会": NO, "并不": NO, "并非": NO, "并没有": NO,
    "当然不": NO, "确实没有": NO, "确实不": NO, "未包含": NO, "没包含": NO,
    "是否": None, "有无": None, "有没有": None, "是不是": None, "无法": None, "会不会": None,
    "没问题": None, "没有办法": None, "没办法": None, "没法": None, "没有信息": None,
    "没有答案": None, "没有把握": None,
    "看不到": NO, "看不见": NO, "没看到": NO, "没见": NO,
    "会厌": None, "会阴": None, "是或否": None, "有或没有": None, "无名": None,
    "有或无": None, "无论": None, "包含不包含": None, "无异常": None, "未见异常": None,
    "没有异常": None, "无明显异常": None, "未见明显异常": None, "没有明显异常": None,
}  # fmt: skip
# Chinese clauses that mean yes or no only if nothing else follows.
_COMPLETE_CLAUSES = {
    "对": YES, "对的": YES, "正确": YES, "能": YES, "可以": YES, "真": YES,
    "不": NO, "不对": NO, "错误": NO, "不能": NO, "不可以": NO, "假": NO, "不正确": NO, "错": NO,
    "不会的": NO, "不是的": NO, "没有的": NO, "无异常": NO, "未见异常": NO, "没有异常": NO,
    "不可能": NO, "不行": NO,
}  # fmt: skip
_GOLDS = {**{key: value for key, value in _BEGINNINGS.items() if value}, **_COMPLETE_CLAUSES}
_NEGATING_CHARACTER = re.compile(r"(?:并?没有|并?不|并?未|并?非|没|无)(?:有|能|曾)?$")
_COMPOUNDS = {
    "有": "所有|只有|有关|有限", "是": "但是|可是|于是|还是|是否|若是|只是",
    "会": "会厌|会阴|社会|机会",
}  # fmt: skip


def _lower(answer: AnswerText) -> str:
    return _IDIOMS.sub(" ", _OPTIONS.sub(" ", answer.text.lower())).strip(" \n\"'()[]:,-?")


def _answer_is(answer: AnswerText) -> str | None:
    values = {_VALUES[word] for word in _ANSWER_IS.findall(_lower(answer))}
    if not values:
        return None
    return values.pop() if len(values) == 1 else NO_ANSWER


def _phrase(answer: AnswerText) -> str | None:
    text = _INTERJECTION.sub("", _lower(answer), count=1)
    first = _CLAUSE.split(text)[0].strip(" \"'")
    whole = next((v for v, words in _PHRASES.items() if first in words.split("|")), None)
    if whole is None and (match := _ELLIPSIS.fullmatch(text)) is not None:
        return NO if match[1] else YES
    if whole is not None and len(first) == 1 and first != text.strip(" .!"):
        return None  # "N. vagus"
    return _unless_contradicted(whole, text) if whole is not None else None


def _beginning(answer: AnswerText) -> str | None:
    text = _INTERJECTION.sub("", _lower(answer), count=1)
    text = re.sub(r"^(?:definitely|certainly|absolutely|probably|likely)\s+(?=yes|no\b)", "", text)
    match = _FIRST.match(text)
    if match is None or _SORRY.search(text):
        return None
    if not _BOUNDARY.match(text[match.end() :]) and _REFUSAL.match(text):
        return NO_ANSWER
    return _unless_contradicted(_VALUES[match[1]], text)


def _unless_contradicted(value: str, text: str) -> str:
    """The value, unless another clause is the other one: "Yes. Wait, no."."""
    clauses = (_INTERJECTION.sub("", part.strip() + " ", count=1) for part in _CLAUSE.split(text))
    exact = {_VALUES.get(re.sub(r"^(?:and|or|but)\s+", "", clause).strip(" \"'-"))
             for clause in clauses}  # fmt: skip
    other = NO if value == YES else YES
    return NO_ANSWER if other in exact else value


def _refusal(answer: AnswerText) -> str | None:
    text = answer.text.lower()
    return NO_ANSWER if _REFUSAL.search(text) or _SORRY.search(text) else None


def _that_is(answer: AnswerText) -> str | None:
    match = _THAT_IS.match(_lower(answer))
    if match is None:
        return None
    is_true = match[0].rsplit(None, 1)[-1] in ("true", "correct")
    is_negated = "not" in match[0].split() or "n't" in match[0]
    return YES if is_true != is_negated else NO


def _chinese_beginning(answer: AnswerText) -> str | None:
    clauses = [clause.strip() for clause in _CLAUSE.split(answer.text) if clause.strip()]
    if not clauses or re.search(f"[{HAN}]", clauses[0]) is None:
        return None
    value = _chinese_clause(clauses[0])
    others = {_COMPLETE_CLAUSES.get(c, {"是的": YES, "否": NO}.get(c)) for c in clauses[1:]}
    contradicted = value is not None and (NO if value == YES else YES) in others
    english = {_VALUES[word] for word in _WORD.findall(_lower(answer))} - {value}
    return NO_ANSWER if contradicted or (value and english) else value


def _chinese_clause(clause: str) -> str | None:
    if clause in _COMPLETE_CLAUSES:
        return _COMPLETE_CLAUSES[clause]
    matches = [start for start in _BEGINNINGS if clause.startswith(start)]
    return _BEGINNINGS[max(matches, key=len)] if matches else None


def _only_word(answer: AnswerText) -> str | None:
    text = _lower(answer)
    found = list(_WORD.finditer(text))
    values = {_VALUES[match[1]] for match in found}
    if len(values) != 1 or any(
        _DIRECT_NEGATION.search(text[max(0, m.start() - 60) : m.start()]) for m in found
    ):
        return NO_ANSWER if found else None
    return values.pop()


YES_NO = (
    Rule("answer is yes", 'The word after "the answer is"; different words are no answer.',
         _answer_is, "No fracture on the right. The answer is yes.", "yes"),
    Rule("phrase for yes",
         "A whole answer or first clause such as true, correct, absolutely not, there is.",
         _phrase, "False.", "no"),
    Rule("first word",
         "The first word is yes, yeah, yep, no, nope, ..., unless another clause is the opposite "
         "word alone.",
         _beginning, "Yes. There is no pleural effusion on the other side.", "yes"),
    Rule("Chinese beginning", "The longest beginning of a Chinese answer that is in the table.",
         _chinese_beginning, "不包含，图中只有肝脏", "no"),
    Rule("refusal", "A refusal is no answer, whatever words it contains.",
         _refusal, "I have no idea.", NO_ANSWER),
    Rule("that is true", "A statement about truth, with its negation.",
         _that_is, "That is not true.", "no"),
    Rule("only word", "The only one of yes and no in the text, if it is not negated.",
         _only_word, "It has no eyes", "no"),
)  # fmt: skip


def find_yes_no(text: str) -> str | None:
    """`yes` or `no` in an answer; None if it has neither or both."""
    return first_decision(YES_NO, AnswerText(prepare(text)))[1] or None


def _gold_text(gold: str) -> str:
    text = unicodedata.normalize("NFKC", gold)
    return re.sub(r"[\s,.;:!?\u3002\u3001]+", "", text).lower()


def gold_yes_no(gold: str) -> str | None:
    """`yes` or `no` if the gold answer is exactly that, in either language; else None."""
    text = _gold_text(gold)
    if text in ("true", "false"):
        return YES if text == "true" else NO
    return text if text in (YES, NO) else _GOLDS.get(text)


def gold_normality(gold: str) -> str | None:
    """正常 or 异常 if the gold answer is exactly normal or abnormal in Chinese; else None."""
    return {"正常": NORMAL, "正常的": NORMAL, "异常": ABNORMAL, "异常的": ABNORMAL,
            "不正常": ABNORMAL, "不正常的": ABNORMAL}.get(_gold_text(gold))  # fmt: skip


_ABNORMAL = re.compile(
    "(?:不|非|没有?|未见?)(?:太|是|很|大|完全)?正常|异常|abnormal|not (?:entirely |quite )?normal",
    re.IGNORECASE,
)
_NOT_ABNORMAL = re.compile(
    r"(?:并?没有|不|无|未见|未发现|没)(?:任何|什么|明显|显著|是|存在|见|发现|到)*"
    r"(?:异常|abnormal)", re.IGNORECASE,
)  # fmt: skip
_NORMAL = re.compile(r"(?<![不非])正常|(?<!ab)(?<!not )\bnormal", re.IGNORECASE)


def _normality_words(text: str) -> set[str]:
    rest = _NOT_ABNORMAL.sub(" 正常 ", text)
    found = {ABNORMAL} if _ABNORMAL.search(rest) else set()
    return found | ({NORMAL} if _NORMAL.search(_ABNORMAL.sub(" ", rest)) else set())


def find_normality(text: str, question: str) -> str | None:
    """正常 or 异常 in an answer; None if it has neither or both.

    Yes and no are understood if the question asks for only one of them.
    """
    prepared = prepare(text)
    found = _normality_words(re.sub("正常还是异常|是否正常|是否异常", "", prepared))
    if found:
        return found.pop() if len(found) == 1 else None
    asked = {ABNORMAL} if _ABNORMAL.search(question) else set()
    asked |= {NORMAL} if _NORMAL.search(_ABNORMAL.sub(" ", question)) else set()
    value = find_yes_no(prepared)
    if len(asked) != 1 or value is None:
        return None
    other = {NORMAL: ABNORMAL, ABNORMAL: NORMAL}
    (one,) = asked
    return one if value == YES else other[one]


def find_gold_verb(text: str, gold: str) -> str | None:
    """`yes` or `no` by the gold answer's verb in a Chinese sentence, such as 图中不包含.

    None if the verb does not occur, or occurs both with and without a negation.
    """
    stem = re.sub("^(?:没(?=有)|不|未|并不)", "", _gold_text(gold))
    if not re.fullmatch(f"[{HAN}]+", stem) or _GOLDS.get(stem) != YES:
        return None
    prepared = prepare(text)
    if _REFUSAL.search(prepared):
        return None
    rest = re.sub(_COMPOUNDS.get(stem, "(?!)"), " ", prepared)
    rest = re.sub("是不是|有没有|会不会|包不包含|是否包含|是否有|是否会|是否", " ", rest)
    values = {
        NO if _NEGATING_CHARACTER.search(rest[: match.start()]) else YES
        for match in re.finditer(stem, rest)
    }
    return values.pop() if len(values) == 1 else None
