"""Options of `medley evaluate medmax`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from medley.commands.model_options import RUNTIME_OPTIONS, BatchOptions
from medley.errors import UserError
from medley.evaluation import medmax_suite as suite
from medley.evaluation.judge import PROMPTS, JudgeOptions
from medley.evaluation.medmax_suite import GENERATION, MIXED, MedmaxRecord, Processor
from medley.evaluation.similarity import require_model_folder
from medley.generation import GenerationOptions
from medley.inference.model import Model
from medley.utils.cli_options import Alias
from medley.utils.run_identity import run_identity

Task = Literal[
    "all", "vqa", "closed", "open", "mcq", "image_captioning", "image_generation", "mm_out",
    "visual_chat",
]  # fmt: skip
_MAX_TOKENS = {"closed": 16, "mcq": 16, "open": 60, MIXED: 1024}  # of other tasks: --max_new_tokens
# Names of other files and folders in --output.
_RESERVED = ("", ".", "..", "manifest", "answers", "replies", "images", "results", "logs")
_PUBLISHED_TOKENS = 1  # MedMax's limit for closed and multiple-choice answers
_PUBLISHED_PENALTY = 1.2


@dataclass(frozen=True, kw_only=True)
class MedmaxOptions(BatchOptions, JudgeOptions):
    """Answers and scores MedMax's suite.

    Args:
        eval_data: MedMax's evaluation data
        output: folder of answers, results and HTML reports
        image_folder: folder that image paths are relative to; default: the data's folder
        save_name: name of the result files; default: the checkpoint's name
        tasks: tasks to run; vqa means closed, open and mcq
        prompt_processor: sft ends the prompt with an end-of-turn token, chameleon adds MedMax's
            instructions for Chameleon, default has only image and question
        limit: number of records of each task, from the start
        clip_model: folder of an image-text similarity model (CLIP, BiomedCLIP)
        sentence_model: folder of a sentence-embedding model that scores open answers without a
            judge
        chat_judge_prompts: file of the judge's prompts about visual chats
        judge_prompts: YAML file of the judge's prompts about open and mixed answers
        compat: medmax reproduces one-token answers, the repetition penalty, and the parsers of
            answers and replies
    """

    aliases: ClassVar = {
        "similarity_model": Alias("clip_model"),
        "rule": Alias("chat_judge_prompts"),
    }
    eval_data: Path
    output: Path
    image_folder: Path | None = None
    save_name: str | None = None
    tasks: list[Task] | None = None
    prompt_processor: Processor = "sft"
    limit: int | None = None
    clip_model: Path | None = None
    sentence_model: Path | None = None
    chat_judge_prompts: Path | None = None
    judge_prompts: Path = PROMPTS / "medmax.yaml"
    compat: Literal["none", "medmax"] = "none"
    text_greedy: bool = True
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.check_batch_size()
        self.check_judge()
        self.generation()
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: Expected 1 or more.")
        if self.name in _RESERVED or Path(self.name).name != self.name:
            raise UserError(
                f"--save_name {self.name!r}: Expected a file name other than "
                f"{', '.join(_RESERVED[3:])}."
            )
        require_model_folder(self.clip_model)
        require_model_folder(self.sentence_model)

    @property
    def name(self) -> str:
        return self.save_name or Path(self.ckpt).name

    @property
    def as_published(self) -> bool:
        return self.compat == "medmax"

    def groups(self) -> set[str]:
        """The tasks of --tasks, with `all` and `vqa` resolved."""
        combined = {"all": set(suite.GROUPS), "vqa": set(suite.VQA_GROUPS)}
        groups: set[str] = set()
        for task in self.tasks or ["all"]:
            groups |= combined.get(task, {task})
        return groups

    def generation_of(self, record: MedmaxRecord, model: Model | None) -> GenerationOptions:
        """The options with the mode and the maximum length of a record's task."""
        mode = {GENERATION: "image", MIXED: "any"}.get(record.task, "text")
        chosen = replace(self, mode=mode).generation(model)  # type: ignore[arg-type]  # a Mode
        limit = min(chosen.max_new_tokens, _MAX_TOKENS.get(record.group, chosen.max_new_tokens))
        if self.as_published:
            limit = _PUBLISHED_TOKENS if record.group in ("closed", "mcq") else limit
            chosen = replace(chosen, repetition_penalty=_PUBLISHED_PENALTY)
        return replace(chosen, max_new_tokens=limit)

    def identity(self) -> dict[str, Any]:
        """The options and data that the answers depend on."""
        relevant = {field.name for field in fields(BatchOptions)} - set(RUNTIME_OPTIONS)
        relevant |= {"image_folder", "prompt_processor", "compat"}
        ignored = {field.name for field in fields(self)} - relevant
        return run_identity(self, ignored, eval_data=self.eval_data)
