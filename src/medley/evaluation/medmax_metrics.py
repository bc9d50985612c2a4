"""Scores of MedMax's suite that need another model: an LLM judge, CLIP or a sentence model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from medley.datasets.instructions.captions import figure_context
from medley.evaluation.judge import JudgeOptions, JudgeStats, ask_judge, fill_template
from medley.evaluation.judge_prompts import JudgeItem, JudgePrompts
from medley.evaluation.medmax_scores import IMAGE_SIMILARITY, JUDGED, MedmaxScores
from medley.evaluation.medmax_suite import (
    CAPTIONING,
    CHAT,
    GENERATION,
    MIXED,
    MedmaxRecord,
    chat_question,
    chat_reference,
    gold_text,
)
from medley.evaluation.similarity import ImageSimilarity, SentenceSimilarity
from medley.images.preprocess import ImageError, open_image
from medley.utils.chat_client import Message


def score_with_judge(
    options: JudgeOptions,
    scores: MedmaxScores,
    templates: dict[str, str],
    chat_prompts: JudgePrompts,
    cache_file: Path,
) -> JudgeStats | None:
    """Adds a judge's scores of open, mixed and chat answers; returns None without such answers.

    Raises DryRun if `options` asks only for the estimate.
    """
    records = scores.answered(*JUDGED)
    if not records:
        return None
    requests = {r.number: judge_messages(scores, r, templates, chat_prompts) for r in records}
    replies = ask_judge(options, requests, cache_file, scores.is_parsable)
    is_parsed = {number: scores.add_reply(number, reply) for number, reply in replies.items()}
    return JudgeStats.from_replies(replies, is_parsed)


def judge_messages(
    scores: MedmaxScores,
    record: MedmaxRecord,
    templates: dict[str, str],
    chat_prompts: JudgePrompts,
) -> list[Message]:
    """The request about one answer."""
    answer = scores.answers[record.number].text
    if record.task == CHAT:
        reference = chat_reference(record.answer)
        return chat_prompts.messages(
            JudgeItem(
                record.number, record.kind, chat_question(record), reference["gpt4_answer"],
                answer, figure_context(reference, True),
            )
        )  # fmt: skip
    template = templates["mixed" if record.task == MIXED else "open"]
    values = {"question": record.prompt, "gold": str(record.answer), "answer": answer}
    text = fill_template(template, values)
    return [{"role": "system", "content": templates["system"]}, {"role": "user", "content": text}]


def score_text_similarity(scores: MedmaxScores, folder: Path) -> None:
    """Adds the similarity of open, mixed and chat answers to the gold texts."""
    records = scores.answered(*JUDGED)
    if not records:
        return
    answers = [scores.answers[record.number].text for record in records]
    values = SentenceSimilarity(folder).compare(answers, [gold_text(r) for r in records])
    metric = f"text similarity ({folder.name}; not a judge's score)"
    for record, value in zip(records, values, strict=True):
        scores.by_number[record.number][metric] = value


def score_image_similarity(scores: MedmaxScores, folder: Path, batch_size: int) -> None:
    """Adds the similarities of captions, generated images and mixed answers.

    Captions are compared with their images, generated images with their prompts, and the images of
    mixed answers with the gold image.
    """
    records = scores.with_images()
    if not records:
        return
    model = ImageSimilarity(folder)
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        images: dict[int, list[Image.Image]] = {}
        for record in batch:
            try:
                images[record.number] = [open_image(p) for p in compared_images(scores, record)]
            except (ImageError, OSError) as error:
                scores.notes[record.number] = f"An image cannot be read: {error}"
        for task in (CAPTIONING, GENERATION, MIXED):
            own = [r for r in batch if r.number in images and r.task == task]
            if own:
                values = _similarities(model, scores, own, images)
                for record, value in zip(own, values, strict=True):
                    scores.by_number[record.number][f"{IMAGE_SIMILARITY} ({model.name})"] = value


def compared_images(scores: MedmaxScores, record: MedmaxRecord) -> list[str]:
    """The image files that a record's similarity is computed from."""
    if record.task == CAPTIONING:
        return [str(record.image_path)]
    generated = str(scores.answers[record.number].image)
    return [generated, str(record.image_path)] if record.task == MIXED else [generated]


def _similarities(
    model: ImageSimilarity,
    scores: MedmaxScores,
    records: Sequence[MedmaxRecord],
    images: dict[int, list[Image.Image]],
) -> list[float]:
    """The similarities of records of one task."""
    first = [images[record.number][0] for record in records]
    if records[0].task == MIXED:
        return model.compare(first, [images[record.number][1] for record in records])
    if records[0].task == CAPTIONING:
        texts = [scores.answers[record.number].text for record in records]
    else:
        texts = [record.prompt for record in records]
    return model.compare_with_texts(first, texts)
