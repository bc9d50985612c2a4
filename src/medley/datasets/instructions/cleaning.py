"""Cleans generated conversations: splits replies into turns, removes references to the caption."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medley.data.vocabulary import IMAGE
from medley.datasets.base import RecordError
from medley.datasets.llava import CONVERSATION_KEYS
from medley.errors import UserError

Turns = list[dict[str, str]]
_YES_NO = re.compile(r"(?:yes|no), ", re.IGNORECASE)


@dataclass(frozen=True)
class CleaningRules:
    """Regular expressions that an answer is checked against, in this order.

    Attributes:
        refusals: drop the answer and its question; case-insensitive
        lead_ins: removed from the beginning of an answer; case-insensitive
        phrases: removed from an answer without a lead-in; case-sensitive
        forbidden: drop the answer and its question if still present; case-sensitive
    """

    refusals: tuple[re.Pattern[str], ...]
    lead_ins: tuple[re.Pattern[str], ...]
    phrases: tuple[re.Pattern[str], ...]
    forbidden: tuple[re.Pattern[str], ...]

    @classmethod
    def read(cls, path: Path) -> CleaningRules:
        """Reads a YAML file with a list of expressions for each attribute."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(
                _compile(content["refusals"], re.IGNORECASE),
                _compile(content["lead_ins"], re.IGNORECASE),
                _compile(content["phrases"]),
                _compile(content["forbidden"]),
            )
        except FileNotFoundError as error:
            raise UserError(f"{path}: File not found.") from error
        except (yaml.YAMLError, KeyError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{path}: Invalid file of cleaning rules ({error}).") from error

    def clean(self, answer: str) -> str | None:
        """An answer without references to its source, or None if it has to be dropped."""
        if any(rule.search(answer) for rule in self.refusals):
            return None
        for rule in self.lead_ins:
            if match := rule.match(answer):
                rest = answer[match.end() :]
                yes_no = _YES_NO.match(match[0])  # kept: it is the answer
                answer = yes_no[0] + rest if yes_no else rest[:1].upper() + rest[1:]
                break
        else:
            for rule in self.phrases:
                answer = rule.sub("", answer)
        return None if any(rule.search(answer) for rule in self.forbidden) else answer


def _compile(rules: Any, flags: int = 0) -> tuple[re.Pattern[str], ...]:
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise TypeError(f"expected a list of expressions, got {rules!r}")
    return tuple(re.compile(rule, flags) for rule in rules)


def parse_reply(reply: str) -> tuple[Turns, int]:
    """A model's reply -> turns, and the number of questions without exactly one answer.

    Those questions are dropped. Raises RecordError for a reply without any valid turn.
    """
    turns: Turns = []
    invalid = 0
    for section in reply.split("User:")[1:]:
        texts = section.split("Assistant:")
        if len(texts) != 2:
            invalid += 1
            continue
        question, answer = (_without_image_token(text) for text in texts)
        if not question or not answer:
            invalid += 1
            continue
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    if not turns:
        raise RecordError("The reply contains no question with an answer.")
    return turns, invalid


def place_image_token(turns: Turns, image_last: bool) -> Turns:
    """Adds the image token to the first turn, before or (`image_last`) after its text."""
    text = turns[0]["value"]
    value = f"{text}\n{IMAGE}" if image_last else f"{IMAGE}\n{text}"
    return [{"from": "human", "value": value if text else IMAGE}, *turns[1:]]


def clean_turns(turns: Turns, rules: CleaningRules) -> tuple[Turns, Turns]:
    """The turns to keep and the dropped ones.

    The image token moves to the first turn that is kept.
    """
    kept: Turns = []
    dropped: Turns = []
    image_last = turns[0]["value"].rstrip().endswith(IMAGE) and turns[0]["value"].strip() != IMAGE
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        clean_question = {**question, "value": _without_image_token(question["value"])}
        clean_answer = rules.clean(answer["value"].replace(IMAGE, ""))
        if clean_answer is None:
            dropped += [clean_question, answer]
        else:
            kept += [clean_question, {"from": "gpt", "value": clean_answer}]
    has_image = any(IMAGE in turn["value"] for turn in turns)
    return place_image_token(kept, image_last) if kept and has_image else kept, dropped


def _without_image_token(text: str) -> str:
    return text.replace(IMAGE, "").strip()


def choose_image_last(position: str, seed: int, name: Any) -> bool:
    """Whether the image follows the first question.

    `position` is first, last or mixed; mixed depends on the seed and the record's name.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return position == "last" or (position == "mixed" and digest[0] % 2 == 1)


def to_llava_record(source: dict[str, Any], image_last: bool) -> tuple[dict[str, Any], int]:
    """A figure with the model's `result` -> LLaVA's record, and the number of invalid questions."""
    result = source.get("result")
    if not isinstance(result, str) or not isinstance(source.get("pair_id"), str):
        raise RecordError("pair_id and result must be strings.")
    turns, invalid = parse_reply(result)
    name = source["pair_id"]
    record = {
        "id": name, "image": f"{name}.jpg", "domain": source.get("domain"),
        "conversations": place_image_token(turns, image_last),
    }  # fmt: skip
    return record, invalid


@dataclass(frozen=True)
class CleanedRecord:
    """A LLaVA record after cleaning.

    Attributes:
        record: the record with the turns that were kept, possibly none
        dropped: turns that the rules dropped
        invalid: number of questions without exactly one answer
    """

    record: dict[str, Any]
    dropped: Turns
    invalid: int


def clean_record(
    source: Any, rules: CleaningRules, image_position: str, seed: int
) -> CleanedRecord:
    """Cleans a figure with the model's `result`, or a record of LLaVA-Med's instruction file.

    Raises RecordError for an invalid record.
    """
    if not isinstance(source, dict):
        raise RecordError("Expected an object.")
    key = next((name for name in CONVERSATION_KEYS if name in source), None)
    if key is None:
        image_last = choose_image_last(image_position, seed, source.get("pair_id"))
        record, invalid = to_llava_record(source, image_last)
    else:
        record, invalid = _check_turns(source, key), 0
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"The record contains an unpaired surrogate ({error}).") from error
    turns, dropped = clean_turns(record["conversations"], rules)
    return CleanedRecord({**record, "conversations": turns}, dropped, invalid)


def _check_turns(source: dict[str, Any], key: str) -> dict[str, Any]:
    turns = source[key] if isinstance(source[key], list) else []
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise RecordError("The turns do not alternate between human and gpt.")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise RecordError("The value of a turn is not a string.")
    return {**{name: v for name, v in source.items() if name != key}, "conversations": turns}
