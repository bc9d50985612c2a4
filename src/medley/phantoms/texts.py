"""What is asked and told about phantoms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.phantoms.world import (
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

Pair = tuple[str, str]
_TURNS = (8, 18)  # of a talk: the fewest questions and the most, but for one that goes on
CHANGED = "What has changed?"


def questions(scan: Phantom) -> list[Pair]:
    """Every question about a scan with its answer, closed and open, each to be asked alone."""
    count = len(scan.findings)
    by_kind = {f.kind: f for f in scan.findings}
    by_place = {f.place: f for f in scan.findings}
    pairs = [(f"Is there {article(kind)} {kind}?", _yes(kind in by_kind)) for kind in KINDS]
    pairs += [
        (f"Is there a finding on the {side}?", _yes(any(f.side == side for f in scan.findings)))
        for side in SIDES
    ]
    pairs += [
        ("Is the picture normal?", _yes(not count)),
        ("Is there more than one finding?", _yes(count > 1)),
        ("What modality is this?", scan.modality),
        ("Which organ is shown?", scan.organ),
        ("How many findings are there?", str(count)),
    ]
    for level in LEVELS:
        for side in SIDES:
            place = f"{level} {side}"
            there = by_place.get(place)
            pairs.append((f"What is in the {place}?", f"a {there.name}" if there else "nothing"))
    for kind, found in by_kind.items():
        pairs += [
            (f"Where is the {kind}?", found.place),
            (f"Is the {kind} large?", _yes(found.size == "large")),
            (f"Is the {kind} faint?", _yes(found.brightness == "faint")),
            (f"How large is the {kind}?", found.size),
            (f"How bright is the {kind}?", found.brightness),
        ]
    return pairs


def follow_up_questions(finding: Finding) -> list[Pair]:
    """Questions that make sense only behind one about this finding."""
    return [
        ("Where is it?", finding.place),
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
    return f"Show me {scan.description}."


def change_text(change: Change) -> str:
    """`The cyst in the upper left has grown.`"""
    if change.finding is None:
        return "Nothing has changed."
    found = change.finding
    if change.kind == "new":
        return f"There is a new {found.name} in the {found.place}."
    what = {"grown": "has grown", "shrunk": "has shrunk", "gone": "is gone"}[change.kind]
    return f"The {found.kind} in the {found.place} {what}."


# --- facts ------------------------------------------------------------------------------------

_TOLD = re.compile(
    f"({'|'.join(SIZES)}) ({'|'.join(BRIGHTNESSES)}) ({'|'.join(KINDS)}) in the "
    f"({'|'.join(LEVELS)}) ({'|'.join(SIDES)})"
)
_SUBJECT = re.compile(r"\b(\S+) (?:scan|slide) of the (\w+)|Technique: (\S+)\. Region: (\w+)\.")


def facts(modality: str, organ: str, findings: Iterable[Finding]) -> frozenset[str]:
    """All that can be right or wrong about a scan, each by itself; a finding's are told by its
    place."""
    found = {f"modality {modality}", f"organ {organ}"}
    for f in findings:
        found |= {f"{f.place}: {value}" for value in (f.kind, f.size, f.brightness)}
    return frozenset(found)


def facts_in(text: str) -> frozenset[str]:
    """The facts of a caption, a request or a report: the inverse of what tells them."""
    subject = _SUBJECT.search(text)
    modality, organ = [g for g in subject.groups() if g] if subject else ("", "")
    found = [
        Finding(kind, size, side, level, brightness)
        for size, brightness, kind, level, side in _TOLD.findall(text)
    ]
    return facts(modality, organ, found)


# --- documents --------------------------------------------------------------------------------


def documents(scan: Phantom, picture: ImagePart, rng: np.random.Generator) -> Iterator[Document]:
    """Documents about one scan: a talk, and a picture from text; with half of the scans a question
    alone, and with half of them a report, interleaved: words, the picture, words.

    One in eight also stands alone, since guidance needs a model that knows pictures without words.
    """
    yield conversation(scan, picture, rng)
    if rng.random() < 0.5:
        yield alone(scan, picture, rng)
    yield Document((Turn("user", (prompt_for(scan),)), Turn("assistant", (picture,))))
    if rng.random() < 0.5:
        yield illustrated_report(scan, picture)
    if rng.random() < 0.125:
        yield Document((Turn("assistant", (picture,)),))


def conversation(scan: Phantom, picture: ImagePart, rng: np.random.Generator) -> Document:
    """The picture, eight to nineteen questions, some of which go on from the one before, and a
    caption or a report.

    That is told last in three talks of four: whatever is asked behind it can be copied from it, and
    a model that learns from such answers learns little of how to look.
    """
    pairs = questions(scan)
    count = int(rng.integers(_TURNS[0], _TURNS[1] + 1))
    picked: list[list[Pair]] = []  # what goes on from a question stands in its list
    by_kind = {f.kind: f for f in scan.findings}
    for i in rng.permutation(len(pairs)):
        picked.append([pairs[i]])
        named = [kind for kind in by_kind if f" {kind}?" in pairs[i][0]]
        if named and rng.random() < 0.5:
            more = follow_up_questions(by_kind[named[0]])
            picked[-1].append(more[rng.integers(len(more))])
        if sum(map(len, picked)) >= count:
            break
    told = _conversations(scan)
    place = len(picked) if rng.random() < 0.75 else int(rng.integers(len(picked)))
    picked.insert(place, [told[rng.integers(len(told))]])
    turns = []
    for number, (question, answer) in enumerate(chain.from_iterable(picked)):
        asked: tuple[ContentPart, ...] = (picture, question) if number == 0 else (question,)
        turns += [Turn("user", asked), Turn("assistant", (answer,))]
    return Document(tuple(turns))


def alone(scan: Phantom, picture: ImagePart, rng: np.random.Generator) -> Document:
    """One question, as a test asks it."""
    pairs = questions(scan) + _conversations(scan)
    question, answer = pairs[rng.integers(len(pairs))]
    return Document((Turn("user", (picture, question)), Turn("assistant", (answer,))))


def _conversations(scan: Phantom) -> list[Pair]:
    return [("Describe the picture.", caption(scan)), ("Write a report.", report(scan))]


def illustrated_report(scan: Phantom, picture: ImagePart) -> Document:
    asked = f"Write an illustrated report of {scan.description}."
    before = f"Technique: {scan.modality}. Region: {scan.organ}."
    after = f"Seen: {scan.finding_text}."
    return Document((Turn("user", (asked,)), Turn("assistant", (before, picture, after))))


def change_document(before: ImagePart, after: ImagePart, change: Change) -> Document:
    """Two pictures and what is different in the second."""
    asked = ("Before: ", before, " After: ", after, f" {CHANGED}")
    return Document((Turn("user", asked), Turn("assistant", (change_text(change),))))
