"""What a rule of answer extraction is: a name, an example, and a function that may decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NO_ANSWER = ""  # a rule's decision that a text answers nothing: a refusal, or two answers at once


@dataclass(frozen=True)
class AnswerText:
    """A model's answer as the rules see it.

    Attributes:
        text: the answer, prepared by the rules of `answer_text.py`
        choices: the texts of the question's choices in their order; empty if they are not known
    """

    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A rule of an ordered list.

    Attributes:
        name: the rule's name in the table of docs/evaluation-rules.md
        meaning: what the rule does, for that table
        apply: the decision or the changed text; None if the rule does not apply
        example: an answer that this rule, and no earlier one, decides or changes
        result: the result of the example
        choices: the choices that the example needs
    """

    name: str
    meaning: str
    apply: Callable[[AnswerText], str | None]
    example: str
    result: str
    choices: tuple[str, ...] = ()


def first_decision(rules: Sequence[Rule], answer: AnswerText) -> tuple[Rule | None, str]:
    """The first rule that decides, and its decision; (None, NO_ANSWER) if none does."""
    for rule in rules:
        decision = rule.apply(answer)
        if decision is not None:
            return rule, decision
    return None, NO_ANSWER


def changed_text(rules: Sequence[Rule], text: str) -> str:
    """A text after all rules that change it, one after another."""
    for rule in rules:
        changed = rule.apply(AnswerText(text))
        text = text if changed is None else changed
    return text
