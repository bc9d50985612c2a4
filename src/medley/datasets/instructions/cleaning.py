"""Replies of a model to LLaVA-Med's records: cut into turns, and rid of talk about captions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medley.data.vocabulary import IMAGE
from medley.datasets.base import RecordError
from medley.errors import UserError

Turns = list[dict[str, str]]
_YES_NO = re.compile(r"(?:yes|no), ", re.IGNORECASE)


@dataclass(frozen=True)
class CleaningRules:
    """Regular expressions: of refusals (they drop a turn), of lead-ins (cut off), of phrases inside
    of an answer (deleted), and of what may not be left in one (it drops the turn).

    Refusals and lead-ins are found in any case, the others as they are written.
    """

    refusals: tuple[re.Pattern[str], ...]
    lead_ins: tuple[re.Pattern[str], ...]
    phrases: tuple[re.Pattern[str], ...]
    forbidden: tuple[re.Pattern[str], ...]

    @classmethod
    def read(cls, path: Path) -> CleaningRules:
        """A YAML file with a list of expressions for each. Raises UserError for a broken one."""
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(
                _compiled(found["refusals"], re.IGNORECASE),
                _compiled(found["lead_ins"], re.IGNORECASE),
                _compiled(found["phrases"]),
                _compiled(found["forbidden"]),
            )
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file") from error
        except (yaml.YAMLError, KeyError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{path}: not a file of rules ({error})") from error

    def clean(self, answer: str) -> str | None:
        """An answer without what gives its source away; None for one that cannot be saved."""
        if any(rule.search(answer) for rule in self.refusals):
            return None
        for rule in self.lead_ins:
            if found := rule.match(answer):
                rest = answer[found.end() :]
                said = _YES_NO.match(found[0])  # stays: it is the answer
                answer = said[0] + rest if said else rest[:1].upper() + rest[1:]
                break
        else:
            for rule in self.phrases:
                answer = rule.sub("", answer)
        return None if any(rule.search(answer) for rule in self.forbidden) else answer


def _compiled(rules: Any, flags: int = 0) -> tuple[re.Pattern[str], ...]:
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise TypeError(f"{rules!r} is no list of expressions")
    return tuple(re.compile(rule, flags) for rule in rules)


def turns_of(reply: str) -> tuple[Turns, int]:
    """A model's reply -> turns, and how many questions had not exactly one answer and were dropped.

    Raises RecordError for a reply without a single turn.
    """
    turns: Turns = []
    dropped = 0
    for piece in reply.split("User:")[1:]:
        said = piece.split("Assistant:")
        if len(said) != 2:
            dropped += 1
            continue
        asked, answered = (_bare(text) for text in said)
        if not asked or not answered:
            dropped += 1
            continue
        turns.append({"from": "human", "value": asked})
        turns.append({"from": "gpt", "value": answered})
    if not turns:
        raise RecordError("no question with an answer in the reply")
    return turns, dropped


def placed(turns: Turns, last: bool) -> Turns:
    """The turns with the picture's mark in the first one, behind or before its words."""
    first = turns[0]["value"]
    marked = f"{first}\n{IMAGE}" if last else f"{IMAGE}\n{first}"
    marked = marked if first else IMAGE
    return [{"from": "human", "value": marked}, *turns[1:]]


def cleaned(turns: Turns, rules: CleaningRules) -> tuple[Turns, Turns]:
    """Turns that are kept, and those that are dropped; the picture's mark moves to the first that
    is kept."""
    kept: Turns = []
    dropped: Turns = []
    last = turns[0]["value"].rstrip().endswith(IMAGE) and turns[0]["value"].strip() != IMAGE
    for question, answered in zip(turns[::2], turns[1::2], strict=True):
        asked = {**question, "value": _bare(question["value"])}
        answer = rules.clean(answered["value"].replace(IMAGE, ""))
        if answer is None:
            dropped += [asked, answered]
        else:
            kept += [asked, {"from": "gpt", "value": answer}]
    has_picture = any(IMAGE in turn["value"] for turn in turns)
    return placed(kept, last) if kept and has_picture else kept, dropped


def _bare(text: str) -> str:
    """A text without the picture's marks, its own or typed ones."""
    return text.replace(IMAGE, "").strip()


def record_of(source: dict[str, Any], last: bool) -> tuple[dict[str, Any], int]:
    """A figure with the model's `result` -> LLaVA's record, and the number of dropped questions."""
    result = source.get("result")
    if not isinstance(result, str) or not isinstance(source.get("pair_id"), str):
        raise RecordError("expected pair_id and result, both text")
    turns, dropped = turns_of(result)
    name = source["pair_id"]
    record = {
        "id": name, "image": f"{name}.jpg", "domain": source.get("domain"),
        "conversations": placed(turns, last),
    }  # fmt: skip
    return record, dropped
