"""What `medley evaluate medmax` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medley.commands.model_options import BatchOptions
from medley.datasets.base import resolve_image_path
from medley.errors import UserError
from medley.evaluation import medmax_suite as suite
from medley.evaluation.judge import (
    PROMPTS,
    JudgeOptions,
)
from medley.evaluation.medmax_suite import GENERATION, MIXED, Processor, Row
from medley.evaluation.similarity import require_folder
from medley.generation import GenerationOptions
from medley.inference.model import Model
from medley.utils.cli_options import resolved
from medley.utils.files import partial_hash

Task = Literal[
    "all", "vqa", "closed", "open", "mcq", "image_captioning", "image_generation", "mm_out",
    "visual_chat",
]  # fmt: skip
_TOKENS = {"closed": 16, "mcq": 16, "open": 60, MIXED: 1024}  # of the others: --max_new_tokens
_TAKEN = ("", ".", "..", "manifest", "answers", "replies", "pictures", "results", "logs")
_PUBLISHED_TOKENS = 1  # of a closed or multiple choice answer in MedMax's program
_PUBLISHED_PENALTY = 1.2


@dataclass(frozen=True, kw_only=True)
class MedmaxOptions(BatchOptions, JudgeOptions):
    """Answers and scores MedMax's suite.

    Args:
        eval_data: MedMax's evaluation lines
        output: folder of answers, results and pages
        image_folder: folder that the lines' pictures are named from; the data's own unless given
        save_name: name of the result files; the checkpoint's unless given
        tasks: the tasks to run; vqa for closed, open and mcq
        prompt_processor: sft ends the turn behind a question, chameleon asks in Chameleon's words,
            default gives picture and question
        limit: rows of each task, the first ones
        similarity_model: folder of a model with towers for pictures and words (BiomedCLIP, CLIP)
        sentence_model: folder of a model of sentences, which compares open answers without a judge
        rule: file of what the judge is told of visual chats
        judge_prompts: YAML file of what the judge is told of open and mixed answers
        compat: medmax for one-token answers, its repetition penalty, and its reading of answers and
            replies
    """

    eval_data: Path
    output: Path
    image_folder: Path | None = None
    save_name: str | None = None
    tasks: list[Task] | None = None
    prompt_processor: Processor = "sft"
    limit: int | None = None
    similarity_model: Path | None = None
    sentence_model: Path | None = None
    rule: Path | None = None
    judge_prompts: Path = PROMPTS / "medmax.yaml"
    compat: Literal["none", "medmax"] = "none"
    text_greedy: bool = True
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.check_batch()
        self.check_judge()
        self.generation()
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}, expected 1 or more")
        if self.name in _TAKEN or Path(self.name).name != self.name:
            raise UserError(
                f"--save_name {self.name!r}: expected a plain name, none of {', '.join(_TAKEN)}"
            )
        require_folder(self.similarity_model)
        require_folder(self.sentence_model)

    @property
    def name(self) -> str:
        return self.save_name or Path(self.ckpt).name

    @property
    def as_published(self) -> bool:
        return self.compat == "medmax"

    def wanted(self) -> set[str]:
        found: set[str] = set()
        for task in self.tasks or ["all"]:
            found |= {"all": set(suite.TASKS), "vqa": set(suite.TASKS[:3])}.get(task, {task})
        return found

    def generation_of(self, row: Row, model: Model | None) -> GenerationOptions:
        """A row's mode and longest answer; the rest as it was asked for."""
        mode = {GENERATION: "image", MIXED: "any"}.get(row.task, "text")
        chosen = replace(self, mode=mode).generation(model)  # type: ignore[arg-type]  # a Mode
        longest = min(chosen.max_new_tokens, _TOKENS.get(row.group, chosen.max_new_tokens))
        if self.as_published:
            longest = _PUBLISHED_TOKENS if row.group in ("closed", "mcq") else longest
            chosen = replace(chosen, repetition_penalty=_PUBLISHED_PENALTY)
        return replace(chosen, max_new_tokens=longest)

    def identity(self) -> dict[str, Any]:
        """What the answers depend on."""
        names = {*BatchOptions.__dataclass_fields__, "image_folder", "prompt_processor", "compat"}
        names -= {"batch_size", "deterministic", "device"}
        kept = {name: value for name, value in resolved(self).items() if name in names}
        return kept | {"eval_data_hash": partial_hash(self.eval_data)}


def image_path(options: MedmaxOptions, row: Row) -> str:
    assert row.image is not None
    return resolve_image_path(row.image, options.image_folder or options.eval_data.parent)
