"""Images with labels -> questions: what the formats medmnist, image_folder and labels_csv share.

A format yields one raw record for each question (`LabeledImage.to_records`), and `read` makes a
document of it by the question templates. Its fields have the label and the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from medley.data.document import ImagePart
from medley.datasets.base import ConversionConfig, Sample
from medley.datasets.embedded_images import require_images
from medley.datasets.pairs import from_qa
from medley.datasets.placement import refuse_placeholder
from medley.datasets.question_templates import Kind, QuestionTemplate, read_template
from medley.errors import UserError

POSITIVE, NEGATIVE, UNCERTAIN = "positive", "negative", "uncertain"
TASK = "Classification"


@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset.

    Attributes:
        dataset: name of the dataset, which may have templates of its own
        source: name of the format
        kind: kind of its questions
        classes: classes in their order, as the files name them
        has_uncertain: whether uncertain is an answer
    """

    dataset: str
    source: str
    kind: Kind
    classes: tuple[str, ...]
    has_uncertain: bool = False


@dataclass(frozen=True)
class LabeledImage:
    """An image with its labels.

    Attributes:
        identifier: id of the image
        image: path of the image, or the bytes of its file
        labels: class -> positive, negative or uncertain; for one_label and ordinal one class
        patient: id of the patient, if it is known
        fields: other fields
    """

    identifier: str
    image: str | dict[str, Any]
    labels: dict[str, str]
    patient: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def to_records(self, labels: LabelSet) -> Iterator[dict[str, Any]]:
        """One raw record for each question about the image."""
        for label, value in self.labels.items():
            asks_each = labels.kind == "each_label"
            yield {
                "id": f"{self.identifier}-{label}" if asks_each else self.identifier,
                "image_id": self.identifier, "image": self.image, "asked": label, "value": value,
                "patient": self.patient, "fields": self.fields, "labels": labels,
            }  # fmt: skip


def read(record: Any, config: ConversionConfig) -> Sample:
    """A question about an image, and its answer. `label` and `choices` are among its fields."""
    remarks: list[str] = []
    labels: LabelSet = record["labels"]
    template = read_template(config.question_templates, labels.kind, labels.dataset)
    question, answer, choices = _ask(template, labels, record["asked"], record["value"])
    for text in (question, *choices):
        refuse_placeholder(text)
    if isinstance(record["image"], str):
        images = [ImagePart(path=record["image"])]  # the format has resolved it
    else:
        images = require_images(record, ("image",), record["image_id"], config, remarks)
    name = template.name(record["asked"])
    fields = {
        "id": record["id"], "source": labels.source, "task": TASK, "answer_type": "CLOSED",
        "choices": list(choices),
    }  # fmt: skip
    if labels.kind == "each_label":
        fields |= {"finding": name, "label": answer}
    else:
        fields |= {"label": name, "label_index": labels.classes.index(record["asked"])}
    if record["patient"] is not None:
        fields["patient_id"] = record["patient"]
    others = {f"csv_{k}" if k in fields else k: v for k, v in record["fields"].items()}
    document = from_qa(images, question, answer, record)
    return Sample(document, {**fields, **others}, tuple(remarks))


def _ask(
    template: QuestionTemplate, labels: LabelSet, label: str, value: str
) -> tuple[str, str, tuple[str, ...]]:
    """The question, the answer, and all choices. Raises UserError for choices that are equal."""
    if labels.kind == "each_label":
        values = (NEGATIVE, POSITIVE, UNCERTAIN) if labels.has_uncertain else (NEGATIVE, POSITIVE)
        answers = {one: template.fill(one, label) for one in values}
        answer = answers[value]
    else:
        answers = {one: template.fill("answer", one) for one in labels.classes}
        answer = answers[label]
    choices = tuple(answers.values())
    if len({choice.strip().lower() for choice in choices}) < len(choices):
        raise UserError(
            f"{labels.dataset}: Two answers are equal (got {', '.join(map(repr, choices))}). Give "
            "the classes different names in the question templates."
        )
    return template.fill("question", label, choices), answer, choices


def check_classes(where: str, classes: Sequence[str], fix: str = "") -> None:
    """Raises UserError, which ends with `fix`, for fewer than two classes."""
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise UserError(f"{where}: Too few classes (got {found}, expected 2 or more).{fix}")
