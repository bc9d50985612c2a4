"""Preparation of a model's answer: reasoning, tags, boxes, JSON and labels around it."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from typing import Any

from medley.evaluation.answer_rules import AnswerText, Rule, changed_text

_SPELLINGS = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2032": "'", "\u00b4": "'", "`": "'",
        "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-",
        "\u200b": None, "\u200c": None, "\u200d": None, "\u2060": None, "\ufeff": None,
        "\u00ad": None,
    }
)  # fmt: skip
_FENCE = re.compile(r"```[a-zA-Z]*\n?|`")
_REASONING = r"(?:think|thinking|thought|reasoning|reflection)"
_OPENING = re.compile(rf"<{_REASONING}>|\[THINK\]|\u25c1think\u25b7", re.IGNORECASE)
_CLOSING = re.compile(rf"</{_REASONING}>|\[/THINK\]|\u25c1/think\u25b7", re.IGNORECASE)
_TAG = re.compile(
    r"[<\[](answer|final[ _]?answer|ans|choice|option)[>\]](.*?)(?:[<\[]/\1[>\]]|\Z)"
    r"|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mbox)\s*\{([^{}]*)\}")
_LATEX_LIMITS = re.compile(r"\\[()\[\]]|\\[,;!]")
_OBJECT = re.compile(r"\{[^{}]{1,2000}\}")
_ANSWER_KEYS = (
    "finalanswer", "choice", "answerchoice", "correctanswer", "correctchoice", "answer", "option",
    "letter", "prediction", "response", "output", "result", "label", "ans", "答案",
)  # fmt: skip
_LABEL = re.compile(
    r"^[\s#>]*(?:(?:the|my)\s+)?(?:(?:final|correct|best|right|short)\s+)*(?:answer|solution|ans|答案|回答)"
    r"\s*(?::(?!\s*:)|(?<=ans)\.|\s-\s)\s*(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_STATED_BELOW = re.compile(r"\b(?:the|my|correct|final|best) answer\b|答案", re.IGNORECASE)
_EXPLANATION = re.compile(
    r"\b(?:explanation|reason|reasoning|rationale|justification)\s{0,3}:"
    r"|(?:解释|理由|原因|解析|说明)\s{0,3}:",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"[*_`]+|^[ \t]*#+[ \t]*", re.MULTILINE)
_SEVERAL = " or "  # joins different answers, which the rules after these refuse


def _one_spelling(answer: AnswerText) -> str:
    return _FENCE.sub("", unicodedata.normalize("NFKC", answer.text).translate(
        {key: value for key, value in _SPELLINGS.items() if key != ord("`")}
    )).strip()  # fmt: skip


def _without_reasoning(answer: AnswerText) -> str | None:
    kept, rest, found = "", answer.text, False
    while (closing := _CLOSING.search(rest)) is not None:
        found = True
        opening = _OPENING.search(rest, 0, closing.start())
        # Some templates write only the closing tag: everything before it is reasoning.
        kept = kept + rest[: opening.start()] if opening is not None else ""
        rest = rest[closing.end() :]
    if (opening := _OPENING.search(rest)) is not None:  # The reasoning was truncated.
        found, rest = True, rest[: opening.start()]
    if not found:
        return None
    return rest.strip() or kept.strip()


def _joined(contents: list[str]) -> str | None:
    different = list(dict.fromkeys(content.strip() for content in contents))
    return _SEVERAL.join(different) if different else None


def _inside_tags(answer: AnswerText) -> str | None:
    return _joined([match[2] or match[3] or "" for match in _TAG.finditer(answer.text)])


def _inside_box(answer: AnswerText) -> str | None:
    return _joined([_BOX.sub(r"\1", match[1]) for match in _BOX.finditer(answer.text)])


def _without_latex(answer: AnswerText) -> str:
    text = _LATEX_LIMITS.sub("", _LATEX.sub(r"\1", answer.text))
    return text.strip("$ \n") if text.startswith("$") and text.count("$") % 2 == 0 else text


def _parse_object(text: str) -> dict[Any, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _value_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        texts = [_value_text(item) for item in value]
        return _joined([text for text in texts if text is not None]) if None not in texts else None
    return str(value) if isinstance(value, str | int | float) else None


def _json_value(answer: AnswerText) -> str | None:
    found = [_parse_object(match[0]) for match in _OBJECT.finditer(answer.text)]
    values = []
    for content in found:
        if not content:
            continue
        keys = {re.sub(r"[\W_]", "", str(key)).lower(): value for key, value in content.items()}
        name = next((key for key in _ANSWER_KEYS if key in keys), None)
        if name is None and len(keys) == 1:
            (name,) = keys
        if name is not None and (text := _value_text(keys[name])) is not None:
            values.append(text)
    return _joined(values)


def _after_label(answer: AnswerText) -> str | None:
    labels = list(_LABEL.finditer(answer.text))
    contents = {match[1].strip() for match in labels}
    # A worked solution has a label as well, and gives its answer below.
    if len(contents) != 1 or _STATED_BELOW.search(answer.text, labels[-1].end()):
        return None
    return contents.pop()


def _before_explanation(answer: AnswerText) -> str | None:
    match = _EXPLANATION.search(answer.text)
    before = "" if match is None else answer.text[: match.start()].rstrip(" \t\n/,;([-")
    return before or None


def _without_emphasis(answer: AnswerText) -> str:
    return _EMPHASIS.sub("", answer.text).strip()


PREPARATION = (
    Rule("spelling",
         "Full-width characters, curly quotes and invisible characters become plain ones; code "
         "fences are removed.",
         _one_spelling, "Ｃｒｏｈｎ’ｓ disease", "Crohn's disease"),
    Rule("reasoning",
         "A block of reasoning is removed. Text before a lone closing tag is reasoning; text after "
         "a lone opening tag is reasoning that was truncated.",
         _without_reasoning, "<think>A is bone, so B.</think>\nB", "B"),
    Rule("answer tag",
         "The content of a tag named answer; different contents are several answers.",
         _inside_tags, "<ANSWER> C </ANSWER>", "C"),
    Rule("box",
         "The content of LaTeX's \\boxed; different contents are several answers.",
         _inside_box, "Thus $\\boxed{\\text{B}}$.", "\\text{B}"),
    Rule("LaTeX", "LaTeX's text commands and limits of formulas are removed.",
         _without_latex, "\\text{B}", "B"),
    Rule("JSON",
         "The value of an object's key answer, choice, ...; true and false are yes and no.",
         _json_value, '{"choice": "B"}', "B"),
    Rule("emphasis", "Markdown's emphasis and headings are removed.",
         _without_emphasis, "**B) MR**", "B) MR"),
    Rule("answer label",
         'The line after "Answer:", if all such lines agree.',
         _after_label, "The liver is dark.\nFinal answer: no", "no"),
    Rule("explanation",
         'Text from "Explanation:", "Reason:", ... is not part of the answer.',
         _before_explanation, "No / Explanation: Yes would be wrong", "No"),
)  # fmt: skip


def prepare(text: str) -> str:
    """A model's answer without what surrounds it, with plain spelling."""
    return changed_text(PREPARATION, text).strip()
