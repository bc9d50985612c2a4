"""Rules of answer extraction: an example each, real styles of answers, and their document."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from conftest import ROOT

from medley.evaluation.answer_extraction import SECTIONS, render_rules
from medley.evaluation.answer_rules import AnswerText, Rule, changed_text, first_decision
from medley.evaluation.answer_text import prepare
from medley.evaluation.choice_letters import LETTER_RULES, find_letter, listed_choices
from medley.evaluation.examples import Example
from medley.evaluation.medmax_scores import is_choice_correct
from medley.evaluation.vqa import is_correct, score_example
from medley.evaluation.yes_no import YES_NO

STYLES = [
    json.loads(line)
    for line in (ROOT / "tests" / "answer_styles.jsonl").read_text(encoding="utf-8").splitlines()
]
RULES = [(heading, rule) for heading, (_, rules) in SECTIONS.items() for rule in rules]


@pytest.mark.parametrize(("heading", "rule"), RULES, ids=lambda x: getattr(x, "name", x))
def test_each_rule_has_an_example_that_it_decides(heading: str, rule: Rule) -> None:
    rules = SECTIONS[heading][1]
    if rules in (LETTER_RULES, YES_NO):
        answer = AnswerText(prepare(rule.example), rule.choices)
        assert first_decision(rules, answer) == (rule, rule.result)
        return
    before = changed_text(rules[: rules.index(rule)], rule.example)
    assert rule.apply(AnswerText(before)) == rule.result
    if heading == "Preparation":
        later = rules[rules.index(rule) :]
        assert changed_text(later, before) == changed_text(later, rule.result)


@pytest.mark.parametrize("row", STYLES, ids=lambda row: f"{row['style']}: {row['answer'][:40]!r}")
def test_answer_styles_are_scored_as_a_reader_would(row: dict[str, Any]) -> None:
    example = Example(0, row["question"], row["gold"], row["answer"], row["kind"])
    assert is_correct(example) is row["correct"]


def test_there_are_enough_answer_styles() -> None:
    wrong = sum(not row["correct"] for row in STYLES)
    assert len(STYLES) >= 200
    assert 0.3 < wrong / len(STYLES) < 0.5
    keys = {(row["kind"], row["question"], row["gold"], row["answer"]) for row in STYLES}
    assert len(keys) == len(STYLES)


def test_the_document_has_the_rules_of_the_code() -> None:
    document = (ROOT / "docs" / "evaluation-rules.md").read_text(encoding="utf-8")
    assert document == render_rules(), "run python -m medley.evaluation.answer_extraction"
    names = [rule.name for _, rule in RULES]
    assert len(names) == len(set(names))


def test_choices_of_a_record_count_before_those_in_the_question() -> None:
    fields = {"choices": ["left lung", "right lung", "left upper lung"]}
    for answer, correct in (("The right lung.", True), ("B", True), ("Not the right lung", False),
                            ("left lung or right lung", False)):  # fmt: skip
        assert is_correct(Example(0, "Where?", "B", answer, "CLOSED", None, fields)) is correct
    assert find_letter("It is in the left upper lung.", ["upper lung", "left upper lung"]) == "B"
    assert listed_choices("Which? (A) CT (B) MR of the head (C) PET") == (
        "CT", "MR of the head", "PET",
    )  # fmt: skip
    assert listed_choices("A. thaliana is a plant?") == ()


def test_medmax_letters_are_read_from_the_text_of_a_choice() -> None:
    question = "Which?\nA: CT\nB: MR"
    assert is_choice_correct("B", "MR", False, question)
    assert not is_choice_correct("B", "CT", False, question)
    assert not is_choice_correct("B", "B) MR", True, question)  # as published


def test_any_text_has_a_score() -> None:
    parts = ("A", "B", " ", "answer", "is", "(", ")", "{", "}", "[", "]", "<answer>", "</think>",
             "<think>", "\\boxed{", "yes", "no", "n't", "不", "正常", ",", ".", ":", "\n", "'",
             '"', "1,000", "-", "5", "or", "Answer:", "\0", "\ud83d", "ﬁ", "$", "#", "*", "²", "½",
             "{'a': [1, 2]}", "[[[[", "١٢")  # fmt: skip
    choose = random.Random(22)
    for _ in range(1500):
        answer = "".join(choose.choices(parts, k=choose.randint(0, 30)))
        gold = choose.choice(("yes", "A", "正常", "包含", "left", "", "5", "the"))
        question, kind = choose.choice(("", "A: CT\nB: MR")), choose.choice(("OPEN", "CLOSED"))
        scores = score_example(Example(0, question, gold, answer, kind)).scores
        assert all(0 <= value <= 1 for value in scores.values()), answer
