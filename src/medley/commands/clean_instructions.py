"""Replies of conversion.generate_instructions to LLaVA-Med's instruction file.

    medley clean-instructions --input raw.jsonl --output instruct.json

Questions without exactly one answer, refusals, and answers that speak of their caption are dropped,
and kept in OUTPUT.dropped.jsonl with the reason; the rules are a file (--rules). An instruction
file in LLaVA-Med's own form is cleaned, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from medley.datasets.base import RecordError
from medley.datasets.instructions.captions import PROMPTS
from medley.datasets.instructions.cleaning import CleaningRules, cleaned, record_of
from medley.datasets.llava import TURNS
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file
from medley.utils.manifest import write_manifest

RULES = PROMPTS / "cleaning.yaml"


@dataclass(frozen=True)
class CleanInstructionsOptions:
    """Makes clean instructions of a model's replies.

    Args:
        input: records with the model's result, or an instruction file
        output: instruction file, a JSON list
        rules: YAML file of refusals, lead-ins, phrases and forbidden words
        image_place: where the picture stands in the first question; mixed, by its id
        seed: seed of the mixture
    """

    input: Path
    output: Path
    rules: Path = RULES
    image_place: Literal["mixed", "first", "last"] = "mixed"
    seed: int = 0

    def last(self, name: Any) -> bool:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return self.image_place == "last" or (self.image_place == "mixed" and digest[0] % 2 == 1)


def clean_instructions(options: CleanInstructionsOptions) -> None:
    rules = CleaningRules.read(options.rules)
    counts: Counter[str] = Counter()
    dropped = options.output.with_name(f"{options.output.name}.dropped.jsonl")
    with atomic_file(options.output) as good, atomic_file(dropped) as bad:
        with open(good, "w", encoding="utf-8") as kept, open(bad, "w", encoding="utf-8") as lost:

            def drop(place: str, reason: str, what: Any) -> None:
                row = {"place": place, "error": reason, "record": what}
                lost.write(json.dumps(row) + "\n")

            kept.write("[")
            for place, _, source in tqdm(records_of(options.input), unit=" records"):
                counts["records"] += 1
                try:
                    if isinstance(source, RecordError):
                        raise source
                    record, torn = one(source, options)
                    json.dumps(record, ensure_ascii=False).encode()
                except (RecordError, UnicodeEncodeError) as error:
                    counts["records without a turn"] += 1
                    drop(place, str(error), source if isinstance(source, dict) else None)
                    continue
                turns, out = cleaned(record["conversations"], rules)
                counts["turns"] += (len(turns) + len(out)) // 2 + torn
                counts["turns dropped"] += len(out) // 2
                counts["questions without exactly one answer"] += torn
                if torn:
                    drop(place, f"{torn} questions without exactly one answer", source["result"])
                if out:
                    drop(place, "refused, or speaks of its source", out)
                if turns:
                    text = json.dumps({**record, "conversations": turns}, ensure_ascii=False)
                    kept.write(("," if counts["written"] else "") + "\n" + text)
                    counts["written"] += 1
                else:
                    counts["records without a turn"] += 1
            kept.write("\n]\n")
        if not counts["written"]:
            raise UserError(f"{options.input}: no record came through ({counts['records']} read)")
    write_manifest(options.output, resolved(options), [options.input], None, counts=dict(counts))
    print(f"{options.output}: {dict(counts)}; what was dropped is in {dropped}")


def one(source: Any, options: CleanInstructionsOptions) -> tuple[dict[str, Any], int]:
    """LLaVA's record, and how many questions of the reply had not exactly one answer."""
    if not isinstance(source, dict):
        raise RecordError("expected an object")
    key = next((name for name in TURNS if name in source), None)
    if key is None:
        return record_of(source, options.last(source.get("pair_id")))
    turns = source[key] if isinstance(source[key], list) else []
    names = [t.get("from") if isinstance(t, dict) else None for t in turns]
    if not names or names != ["human", "gpt"] * (len(names) // 2):
        raise RecordError("its turns are not of human and gpt, in turn")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise RecordError("a turn's value is no text")
    return {**{n: v for n, v in source.items() if n != key}, "conversations": turns}, 0
