"""The letter of a choice in an answer, and the choices that a question lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from string import ascii_uppercase

from medley.evaluation.answer_rules import NO_ANSWER, AnswerText, Rule, first_decision
from medley.evaluation.answer_text import prepare
from medley.evaluation.matching import contains_words, is_negated, same_answer, split_words

_CLAUSE_LENGTH = 300  # characters before a letter that are searched for a negation
MIN_LETTERS = 5  # A to E count as letters for any number of choices
_SAY = "(?:is|was|would be|should be|must be|=)"
_FILLERS = r"(?:(?:most likely|probably|definitely|clearly|indeed|option|choice|letter)\s+)*"
_REFUSAL = re.compile(
    r"^(?:i'm |i am )?sorry\b|\bas an ai\b|无法|不知道|不清楚|不确定|抱歉"
    r"|\bi(?:'m| am)?\s+(?:\w+\s+)?(?:cannot|can't|can not|could not|couldn't|unable|not able"
    r"|not sure|do not know|don't know|have no idea)\b", re.IGNORECASE,
)  # fmt: skip
# A letter that a word follows is an article ("A tumor"), except before these.
_NO_ARTICLE = (
    r"(?!\s+(?!(?:because|since|as|for|due|and|or|but|which|given|is|in|on|with|when|where|so|to|at"
    r"|from|of|by|here|if|not|rather|instead)\b)[a-z])"
)
_DENIED = re.compile(
    r"[)\].]*\s*(?:is|was|are|would be|seems|cannot|can't)?\s*(?:not\b|n't|isn't|wasn't|incorrect"
    r"|wrong|false|ruled out|be\b|excluded|不)"
)


@cache
def _patterns(letters: str) -> dict[str, re.Pattern[str]]:
    capital, small = f"[{letters}]", f"[{letters.lower()}]"
    one = rf"\(?\[?(?:(?P<capital>{capital})(?![\w'+]){_NO_ARTICLE}|(?P<small>{small})\)?[.!]?\s*$)"
    return {
        "alone": re.compile(
            rf"(?i:(?:so|hence|thus|therefore),?\s+(?:it is\s+)?)?[\s\"'(\[{{<$\\]*"
            rf"({capital}|{small})[\s\"')\]}}>$\\.,:!\u3002\u3001]*"
        ),
        "answer": re.compile(
            r"(?i:\banswer(?:\s+(?:to|for|of)\s+[^.?!:\n]{1,80}?)?"
            rf"\s*(?:{_SAY}\s*:?|:)?\s*{_FILLERS})['\"]?{one}"
            rf"|(?:答案|正确选项)(?:应该|应)?[是为选]*\s*:?\s*{one.replace('<', '<cn_')}"
        ),
        "correct": re.compile(
            rf"(?<![\w'-])\(?(?P<capital>{capital})\)?[.:]?\s+(?:is|would be|seems)\s+(?:the\s+)?"
            r"(?:most likely\s+)?(?:correct|right|best|answer|true)|"
            rf"(?P<small>(?!))"
        ),
        "option": re.compile(
            r"(?i:\b(?:option|choice|(?:correct|right|best) letter)"
            rf"\s*(?:{_SAY}\s*:?|:)?\s*)['\"]?{one}"
        ),
        "choose": re.compile(
            r"(?i:\b(?:choose|chose|pick|select|go with|it is|it's|this is|that is|must be|select"
            rf"ed)\s+(?:option\s+|choice\s+|letter\s+)?)\(?\[?(?P<capital>{capital})[)\]]?"
            rf"\s*(?:[.!,:]|$)|(?:选择?)\s*:?\s*\(?(?P<cn_capital>{capital})(?![\w'])"
            r"|(?P<small>(?!))"
        ),
        "leading": re.compile(
            rf"[\"']?(?:\(({capital})\)|\[({capital})\]|({capital})(?=[.,:!)\]\n\u3002\u3001]|\s[-=]"
            rf"\s))(?:[.,:!)\]\n\u3002\u3001\s].*|\w.*|-.*)?",
            re.DOTALL,
        ),
        "several": re.compile(
            rf"[)\]]?\s*(?:,\s*)?(?:/|&|\bor\b|\band\b)\s*(?:(?i:option|choice)\s+)?\(?{capital}"
            rf"(?![\w'])|[)\]]?\s*,\s*\(?{capital}\)?\s*(?:$|[,.]|and\b|or\b)"
        ),
        "listed": re.compile(rf"(?:^|\s)\(?({capital})[).:]\s"),
    }


def valid_letters(choices: Sequence[str]) -> str:
    """The letters of that many choices, at least A to E."""
    return ascii_uppercase[: max(MIN_LETTERS, len(choices))]


def _letters(answer: AnswerText) -> str:
    return valid_letters(answer.choices)


def _named(name: str, answer: AnswerText) -> str | None:
    """The letter that a pattern names; no answer if it names several, or hedges."""
    patterns = _patterns(_letters(answer))
    found: set[str] = set()
    for match in patterns[name].finditer(answer.text):
        groups = match.groupdict()
        letter = next(value for value in groups.values() if value)
        if _DENIED.match(answer.text[match.end() :]) or is_negated(
            answer.text[max(0, match.start() - _CLAUSE_LENGTH) : match.start()]
        ):
            continue
        if patterns["several"].match(answer.text[match.end() :]):
            return NO_ANSWER
        found.add(letter.upper())
    if not found:
        return None
    return found.pop() if len(found) == 1 else NO_ANSWER


def _alone(answer: AnswerText) -> str | None:
    match = _patterns(_letters(answer))["alone"].fullmatch(answer.text)
    return match[1].upper() if match is not None else None


def _choice_alone(answer: AnswerText) -> str | None:
    same = [
        letter for letter, choice in zip(ascii_uppercase, answer.choices, strict=False)
        if same_answer(answer.text, choice)
    ]  # fmt: skip
    return same[0] if len(same) == 1 else None


def _answer_is(answer: AnswerText) -> str | None:
    return _named("answer", answer)


def _is_correct(answer: AnswerText) -> str | None:
    return _named("correct", answer)


def _option(answer: AnswerText) -> str | None:
    return _named("option", answer)


def _refusal(answer: AnswerText) -> str | None:
    return NO_ANSWER if _REFUSAL.search(answer.text) else None


def _echo(answer: AnswerText) -> str | None:
    listed = _patterns(_letters(answer))["listed"].findall(answer.text)
    return NO_ANSWER if listed[:2] == ["A", "B"] else None


def _choose(answer: AnswerText) -> str | None:
    return _named("choose", answer)


def _leading(answer: AnswerText) -> str | None:
    patterns = _patterns(_letters(answer))
    match = patterns["leading"].fullmatch(answer.text)
    if match is None:
        return None
    index = match.lastindex or 1
    rest = answer.text[match.end(index) :]
    if patterns["several"].match(rest) or _DENIED.match(rest):
        return NO_ANSWER
    return str(match[index])


def _choice_inside(answer: AnswerText) -> str | None:
    inside = {
        letter: tuple(split_words(choice))
        for letter, choice in zip(ascii_uppercase, answer.choices, strict=False)
        if contains_words(answer.text, choice)
    }
    # "left lung" is inside of "upper left lung": the longer choice counts.
    longest = [
        letter for letter, words in inside.items()
        if not any(words != other and _within(words, other) for other in inside.values())
    ]  # fmt: skip
    return longest[0] if len(longest) == 1 else None


def _within(words: tuple[str, ...], other: tuple[str, ...]) -> bool:
    size = len(words)
    return any(other[i : i + size] == words for i in range(len(other) - size + 1))


def _last_line(answer: AnswerText) -> str | None:
    lines = [line for line in answer.text.splitlines() if line.strip()]
    return _alone(AnswerText(lines[-1], answer.choices)) if len(lines) > 1 else None


LETTER_RULES = (
    Rule("letter alone", "The whole answer is a letter, in any brackets or quotes.",
         _alone, "(b).", "B"),
    Rule("text of a choice", "The whole answer has the words of exactly one choice.",
         _choice_alone, "The MR.", "B", ("CT", "MR")),
    Rule("answer is letter",
         'The letter after "answer", "the answer is", "the answer to the question is"; different '
         "letters, and a letter beside \"or\", are no answer.",
         _answer_is, "The correct answer to the question is (A) There are three nodules.", "A"),
    Rule("letter is correct", 'The letter before "is correct", "is the best answer", ...',
         _is_correct, "Only B is correct; option A is another vessel.", "B"),
    Rule("refusal to choose", "A refusal is no answer, whatever letters it contains.",
         _refusal, "A: I cannot say.", NO_ANSWER),
    Rule("option", 'The letter after "option" or "choice", unless it is denied.',
         _option, "Option A is wrong, so option C", "C"),
    Rule("repeated choices", "A text that begins the list of choices is no answer.",
         _echo, "A. CT\nB. MR", NO_ANSWER),
    Rule("letter first",
         "A letter before a period, a bracket, a colon, a comma or a line end, with any text after "
         'it. "A toy" begins with an article.',
         _leading, "B) MR", "B"),
    Rule("chosen letter", 'The letter after "I choose", "it is", ... at the end of a clause.',
         _choose, "Since it is bright, I choose B.", "B"),
    Rule("only choice named",
         "The only choice whose words occur in the answer without a negation before them.",
         _choice_inside, "It is not a CT but an MR image.", "B", ("CT", "MR")),
    Rule("last line", "The last line is a letter.", _last_line, "The vessel is dark.\nB", "B"),
)  # fmt: skip


def find_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that an answer gives; None without one, or with several."""
    return first_decision(LETTER_RULES, AnswerText(prepare(text), tuple(choices)))[1] or None


_LISTED_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_LISTED_INLINE = re.compile(r"(?:^|\s)\(([A-Z])\)\s*(\S.*?)(?=\s+\([A-Z]\)\s|\s*$)", re.DOTALL)


def listed_choices(question: str) -> tuple[str, ...]:
    """The choices that a question lists after A, B, ...; empty if there are not at least two."""
    for pattern in (_LISTED_LINE, _LISTED_INLINE):
        found = pattern.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and ascii_uppercase.startswith(letters):
            return tuple(text.strip() for _, text in found)
    return ()
