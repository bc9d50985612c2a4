"""Cleans generated conversations into LLaVA-Med's instruction file.

    medley clean-instructions --input raw.jsonl --output instruct.json

In: the output of `medley generate-instructions`, or an instruction file in LLaVA-Med's format. Out:
an instruction file (JSON list), and OUTPUT.dropped.jsonl with the dropped turns and the reasons.
Drops questions without exactly one answer, refusals, and answers that refer to their caption; the
regular expressions are in a file (--cleaning_rules).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from medley.datasets import llava
from medley.datasets.base import ConversionConfig, RecordError
from medley.datasets.instructions.captions import PROMPTS
from medley.datasets.instructions.cleaning import CleaningRules, clean_record
from medley.datasets.readers import open_writer, records_of
from medley.errors import UserError
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import atomic_file
from medley.utils.manifest import write_manifest


@dataclass(frozen=True)
class CleanInstructionsOptions:
    """Cleans generated conversations.

    Args:
        input: records with the model's result, or an instruction file
        output: instruction file, a JSON list
        cleaning_rules: YAML file of refusals, lead-ins, phrases and forbidden words
        image_position: position of the image in the first question; mixed depends on the id
        seed: seed of the mixed position
    """

    aliases: ClassVar = {"rules": Alias("cleaning_rules"), "image_place": Alias("image_position")}
    input: Path
    output: Path
    cleaning_rules: Path = PROMPTS / "cleaning.yaml"
    image_position: Literal["mixed", "first", "last"] = "mixed"
    seed: int = 0


def clean_instructions(options: CleanInstructionsOptions) -> None:
    rules = CleaningRules.read(options.cleaning_rules)
    counts: Counter[str] = Counter()
    dropped_file = options.output.with_name(f"{options.output.name}.dropped.jsonl")
    with (
        atomic_file(options.output) as temporary,
        atomic_file(dropped_file) as temporary_dropped,
        open_writer(temporary, llava.FORMAT, ConversionConfig(options.output)) as add,
        open(temporary_dropped, "w", encoding="ascii") as dropped,
    ):

        def drop(where: str, reason: str, content: Any) -> None:
            # ASCII, since invalid records may contain unpaired surrogates.
            row = {"where": where, "error": reason, "record": content}
            dropped.write(json.dumps(row) + "\n")

        for where, _, source in tqdm(records_of(options.input), unit=" records"):
            counts["records"] += 1
            try:
                if isinstance(source, RecordError):
                    raise source
                cleaned = clean_record(source, rules, options.image_position, options.seed)
            except RecordError as error:
                counts["records without a turn"] += 1
                drop(where, str(error), source if isinstance(source, dict) else None)
                continue
            turns = cleaned.record["conversations"]
            counts["turns"] += (len(turns) + len(cleaned.dropped)) // 2 + cleaned.invalid
            counts["turns dropped"] += len(cleaned.dropped) // 2
            counts["questions without exactly one answer"] += cleaned.invalid
            if cleaned.invalid:
                reason = f"{cleaned.invalid} questions without exactly one answer"
                drop(where, reason, source["result"])
            if cleaned.dropped:
                drop(where, "refusal, or reference to the caption", cleaned.dropped)
            if turns:
                add(cleaned.record)
                counts["written"] += 1
            else:
                counts["records without a turn"] += 1
        if not counts["written"]:
            raise UserError(
                f"{options.input}: None of {counts['records']} records has a valid turn."
            )
    write_manifest(options.output, resolved(options), [options.input], None, counts=dict(counts))
    print(f"{options.output}: {dict(counts)}; dropped turns are in {dropped_file}")
