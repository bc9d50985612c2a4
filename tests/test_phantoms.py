"""Phantoms: what is drawn is read back, told, asked and changed as it is."""

from __future__ import annotations

import numpy as np
import pytest

from medley.data.document import ImagePart
from medley.phantoms import (
    ALL_MODALITIES,
    KINDS,
    Finding,
    Phantom,
    caption,
    change_document,
    change_text,
    documents,
    facts,
    facts_in,
    follow_up_questions,
    measure,
    organs_of,
    prompt_for,
    questions,
    report,
    signs_of,
)
from medley.phantoms.texts import conversation


@pytest.fixture(scope="module")
def scans() -> list[Phantom]:
    rng = np.random.default_rng(5)
    return [Phantom.random(rng, ALL_MODALITIES) for _ in range(100)]


def test_the_reader_finds_what_was_drawn(scans: list[Phantom]) -> None:
    for scan in scans:
        found = measure(scan.draw(64))
        assert (found.modality, found.organ) == (scan.modality, scan.organ)
        assert set(found.findings) == set(scan.findings)
        assert found.residual < 0.05


def test_every_finding_is_told_from_every_other() -> None:
    for modality in ALL_MODALITIES:
        for kind in KINDS:
            for size in ("small", "large"):
                for brightness in ("marked", "faint"):
                    finding = Finding(kind, size, "left", "lower", brightness)
                    scan = Phantom(modality, organs_of(modality)[0], (finding,), 7)
                    assert measure(scan.draw(64)).findings == (finding,)


def test_some_modalities_show_kinds_and_sides_in_their_own_way() -> None:
    looks = set()
    for modality in ("CT", "ultrasound", "MR-CT"):
        signs = signs_of(modality)
        assert len({signs.of(kind) for kind in KINDS}) == len(KINDS)
        looks |= {(kind, signs.of(kind)) for kind in KINDS}
        clean = Phantom(modality, "head", (), 7).draw(64)[..., 0].astype(int)
        for kind in KINDS:
            finding = Finding(kind, "large", "left", "upper")
            drawn = Phantom(modality, "head", (finding,), 7).draw(64)[..., 0].astype(int)
            rows, columns = np.nonzero(abs(drawn - clean) > 60)
            assert rows.mean() < 32
            assert (columns.mean() > 32) == (modality == "ultrasound") == signs.mirrored
            middle = drawn[int(rows.mean()), int(columns.mean())]
            sign = signs.of(kind)
            bright = sign.outer if sign.heart is None else sign.heart
            assert (middle > 200) if bright else (middle < 30)
    assert len(looks) == 2 * len(KINDS)


def test_the_reader_is_not_fooled_by_a_flat_picture() -> None:
    found = measure(np.full((64, 64), 128, np.uint8))
    assert found.residual > 0.1
    with pytest.raises(ValueError, match="a square up to 256"):
        measure(np.zeros((64, 32), np.uint8))


def test_the_reader_sees_what_is_torn(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    for scan in scans[:20]:
        torn = scan.draw(64)
        torn[24:40, 24:40] = rng.integers(0, 256, (16, 16, 3))
        assert measure(torn).residual > 0.1


def test_drawing_is_the_seeds(scans: list[Phantom]) -> None:
    assert np.array_equal(scans[0].draw(64), scans[0].draw(64))
    assert scans[0].draw(96).shape == (96, 96, 3)
    colours = {scan.modality: np.ptp(scan.draw(64).astype(int), axis=-1).max() for scan in scans}
    assert colours["histology"] > 60
    assert all(spread == 0 for name, spread in colours.items() if name != "histology")


def test_answers_are_true_of_the_scan(scans: list[Phantom]) -> None:
    for scan in scans:
        answers = dict(questions(scan))
        assert answers["What modality is this?"] == scan.modality
        assert answers["How many findings are there?"] == str(len(scan.findings))
        kinds = {finding.kind: finding for finding in scan.findings}
        assert (answers["Is there a cyst?"] == "yes") == ("cyst" in kinds)
        assert (answers["Is the picture normal?"] == "yes") == (not scan.findings)
        assert all(finding.name in caption(scan) for finding in scan.findings)
        for kind, finding in kinds.items():
            assert answers[f"Where is the {kind}?"] == finding.place
            assert answers[f"What is in the {finding.place}?"] == f"a {finding.name}"
            assert dict(follow_up_questions(finding))["On which side?"] == finding.side
    closed = [answer for scan in scans for _, answer in questions(scan) if answer in ("yes", "no")]
    assert 0.3 < closed.count("yes") / len(closed) < 0.7


def test_what_is_told_holds_the_facts(scans: list[Phantom]) -> None:
    for scan in scans:
        known = facts(scan.modality, scan.organ, scan.findings)
        assert len(known) == 2 + 3 * len(scan.findings)
        for text in (caption(scan), prompt_for(scan), report(scan)):
            assert facts_in(text) == known


def test_changes_are_of_one_finding(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for scan in scans:
        later, change = scan.later(rng)
        kinds.add(change.kind)
        gone, new = (
            set(scan.findings) - set(later.findings),
            set(later.findings) - set(scan.findings),
        )
        expected = {
            "none": (0, 0),
            "gone": (1, 0),
            "new": (0, 1),
            "grown": (1, 1),
            "shrunk": (1, 1),
        }
        assert (len(gone), len(new)) == expected[change.kind]
        assert (later.modality, later.organ) == (scan.modality, scan.organ)
        document = change_document(ImagePart(codes=(1,)), ImagePart(codes=(2,)), change)
        assert len(document.pictures) == 2
        assert document.turns[1].parts == (change_text(change),)
        if change.finding is not None:
            assert change.finding.place in change_text(change)
    assert kinds == {"none", "gone", "new", "grown", "shrunk"}


def test_documents_hold_the_picture(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    for scan in scans[:10]:
        for document in documents(scan, ImagePart(codes=(1,)), rng):
            assert len(document.pictures) == 1


def test_a_talk_tells_once_and_most_often_last(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    last = 0
    for scan in scans:
        turns = [turn.parts[-1] for turn in conversation(scan, ImagePart(codes=(1,)), rng).turns]
        assert 16 <= len(turns) <= 40
        asked, said = turns[::2], turns[1::2]
        told = [n for n, answer in enumerate(said) if answer in (caption(scan), report(scan))]
        assert len(told) == 1
        last += told[0] == len(said) - 1
        ways = dict(questions(scan)) | {
            "Describe the picture.": caption(scan),
            "Write a report.": report(scan),
        }
        kind = ""
        for question, answer in zip(asked, said, strict=True):
            assert isinstance(question, str)
            if question in ways:
                assert ways[question] == answer
                kind = next((k for k in KINDS if f" {k}?" in question), "")
            else:  # it goes on from the question before it
                found = next(f for f in scan.findings if f.kind == kind)
                assert dict(follow_up_questions(found))[question] == answer
    assert 0.65 < last / len(scans) < 0.9
