"""Texts about phantoms: questions with answers, captions, reports, and documents of them.

The embedded model is trained on these exact texts, so they must not change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.phantoms.scenes import (
    BRIGHTNESSES,
    KINDS,
    LEVELS,
    SIDES,
    SIZES,
    Change,
    Finding,
    Phantom,
    article,
)

Pair = tuple[str, str]  # question and answer
_MIN_QUESTIONS, _MAX_QUESTIONS = 8, 18  # of a conversation; a last follow-up may exceed the maximum
CHANGE_QUESTION = "What has changed?"


def questions(scan: Phantom) -> list[Pair]:
    """All questions about a scan with their answers, closed and open; each is self-contained."""
    count = len(scan.findings)
    by_kind = {f.kind: f for f in scan.findings}
    by_location = {f.location: f for f in scan.findings}
    pairs = [(f"Is there {article(kind)} {kind}?", _yes(kind in by_kind)) for kind in KINDS]
    pairs += [
        (f"Is there a finding on the {side}?", _yes(any(f.side == side for f in scan.findings)))
        for side in SIDES
    ]
    pairs += [
        ("Is the picture normal?", _yes(not count)),  # alias
        ("Is there more than one finding?", _yes(count > 1)),
        ("What modality is this?", scan.modality),
        ("Which organ is shown?", scan.organ),
        ("How many findings are there?", str(count)),
    ]
    for level in LEVELS:
        for side in SIDES:
            location = f"{level} {side}"
            finding = by_location.get(location)
            answer = f"a {finding.name}" if finding else "nothing"
            pairs.append((f"What is in the {location}?", answer))
    for kind, finding in by_kind.items():
        pairs += [
            (f"Where is the {kind}?", finding.location),
            (f"Is the {kind} large?", _yes(finding.size == "large")),
            (f"Is the {kind} faint?", _yes(finding.brightness == "faint")),
            (f"How large is the {kind}?", finding.size),
            (f"How bright is the {kind}?", finding.brightness),
        ]
    return pairs


def follow_up_questions(finding: Finding) -> list[Pair]:
    """Questions that refer to the finding of the preceding question."""
    return [
        ("Where is it?", finding.location),
        ("Is it large?", _yes(finding.size == "large")),
        ("Is it faint?", _yes(finding.brightness == "faint")),
        ("On which side?", finding.side),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def caption(scan: Phantom) -> str:
    return f"This is {scan.description}."


def report(scan: Phantom) -> str:
    impression = "Normal." if not scan.findings else f"Findings: {len(scan.findings)}."
    return (
        f"Technique: {scan.modality}. Region: {scan.organ}. Seen: {scan.finding_text}. {impression}"
    )


def prompt_for(scan: Phantom) -> str:
    """The prompt that requests an image of this scan."""
    return f"Show me {scan.description}."


def change_text(change: Change) -> str:
    """`The cyst in the upper left has grown.`"""
    finding = change.finding
    if finding is None:
        return "Nothing has changed."
    if change.kind == "new":
        return f"There is a new {finding.name} in the {finding.location}."
    predicate = {"grown": "has grown", "shrunk": "has shrunk", "gone": "is gone"}[change.kind]
    return f"The {finding.kind} in the {finding.location} {predicate}."


# --- facts ------------------------------------------------------------------------------------

_FINDING = re.compile(
    f"({'|'.join(SIZES)}) ({'|'.join(BRIGHTNESSES)}) ({'|'.join(KINDS)}) in the "
    f"({'|'.join(LEVELS)}) ({'|'.join(SIDES)})"
)
_SUBJECT = re.compile(r"\b(\S+) (?:scan|slide) of the (\w+)|Technique: (\S+)\. Region: (\w+)\.")


def facts(modality: str, organ: str, findings: Iterable[Finding]) -> frozenset[str]:
    """The separate facts about a scan; the location identifies a finding."""
    result = {f"modality {modality}", f"organ {organ}"}
    for f in findings:
        result |= {f"{f.location}: {value}" for value in (f.kind, f.size, f.brightness)}
    return frozenset(result)


def facts_in(text: str) -> frozenset[str]:
    """The facts in a caption, a prompt or a report: the inverse of those functions."""
    subject = _SUBJECT.search(text)
    modality, organ = [g for g in subject.groups() if g] if subject else ("", "")
    findings = [
        Finding(kind, size, side, level, brightness)
        for size, brightness, kind, level, side in _FINDING.findall(text)
    ]
    return facts(modality, organ, findings)


# --- documents --------------------------------------------------------------------------------


def documents(scan: Phantom, image: ImagePart, rng: np.random.Generator) -> Iterator[Document]:
    """The training documents of one scan.

    A conversation; a single question (for half of the scans); a prompt with the image as response;
    an interleaved report of text, image, text (for half of the scans); the image alone (for one
    scan in eight), since classifier-free guidance needs a model of images without text.
    """
    yield conversation(scan, image, rng)
    if rng.random() < 0.5:
        yield single_question(scan, image, rng)
    yield Document((Turn("user", (prompt_for(scan),)), Turn("assistant", (image,))))
    if rng.random() < 0.5:
        yield illustrated_report(scan, image)
    if rng.random() < 0.125:
        yield Document((Turn("assistant", (image,)),))


def conversation(scan: Phantom, image: ImagePart, rng: np.random.Generator) -> Document:
    """The image, 8 to 19 questions (some are follow-ups), and a caption or a report.

    The caption or report comes last in three of four conversations: later answers can be copied
    from it, and such answers train little visual understanding.
    """
    pairs = questions(scan)
    count = int(rng.integers(_MIN_QUESTIONS, _MAX_QUESTIONS + 1))
    groups: list[list[Pair]] = []  # a question and its follow-up
    by_kind = {f.kind: f for f in scan.findings}
    for i in rng.permutation(len(pairs)):
        groups.append([pairs[i]])
        named = [kind for kind in by_kind if f" {kind}?" in pairs[i][0]]
        if named and rng.random() < 0.5:
            more = follow_up_questions(by_kind[named[0]])
            groups[-1].append(more[rng.integers(len(more))])
        if sum(map(len, groups)) >= count:
            break
    descriptions = _descriptions(scan)
    position = len(groups) if rng.random() < 0.75 else int(rng.integers(len(groups)))
    groups.insert(position, [descriptions[rng.integers(len(descriptions))]])
    turns = []
    for number, (question, answer) in enumerate(chain.from_iterable(groups)):
        parts: tuple[ContentPart, ...] = (image, question) if number == 0 else (question,)
        turns += [Turn("user", parts), Turn("assistant", (answer,))]
    return Document(tuple(turns))


def single_question(scan: Phantom, image: ImagePart, rng: np.random.Generator) -> Document:
    """One question, in the form of the test set."""
    pairs = questions(scan) + _descriptions(scan)
    question, answer = pairs[rng.integers(len(pairs))]
    return Document((Turn("user", (image, question)), Turn("assistant", (answer,))))


def _descriptions(scan: Phantom) -> list[Pair]:
    return [
        ("Describe the picture.", caption(scan)),  # alias
        ("Write a report.", report(scan)),
    ]


def illustrated_report(scan: Phantom, image: ImagePart) -> Document:
    request = f"Write an illustrated report of {scan.description}."
    before = f"Technique: {scan.modality}. Region: {scan.organ}."
    after = f"Seen: {scan.finding_text}."
    return Document((Turn("user", (request,)), Turn("assistant", (before, image, after))))


def change_document(before: ImagePart, after: ImagePart, change: Change) -> Document:
    """Two images, and the difference between them as the answer."""
    parts = ("Before: ", before, " After: ", after, f" {CHANGE_QUESTION}")
    return Document((Turn("user", parts), Turn("assistant", (change_text(change),))))
