"""Phantoms: rendering, measurement, questions, texts and documents agree."""

from __future__ import annotations

import numpy as np
import pytest

from medley.data.document import ImagePart
from medley.phantoms import (
    ALL_MODALITIES,
    KINDS,
    Finding,
    Phantom,
    appearances_of,
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
)
from medley.phantoms.captions import conversation


@pytest.fixture(scope="module")
def scans() -> list[Phantom]:
    rng = np.random.default_rng(5)
    return [Phantom.random(rng, ALL_MODALITIES) for _ in range(100)]


def test_measurement_matches_the_rendered_scan(scans: list[Phantom]) -> None:
    for scan in scans:
        found = measure(scan.render(64))
        assert (found.modality, found.organ) == (scan.modality, scan.organ)
        assert set(found.findings) == set(scan.findings)
        assert found.residual < 0.05


def test_measurement_distinguishes_all_findings() -> None:
    for modality in ALL_MODALITIES:
        for kind in KINDS:
            for size in ("small", "large"):
                for brightness in ("marked", "faint"):
                    finding = Finding(kind, size, "left", "lower", brightness)
                    scan = Phantom(modality, organs_of(modality)[0], (finding,), 7)
                    assert measure(scan.render(64)).findings == (finding,)


def test_modalities_permute_appearances_and_sides() -> None:
    distinct = set()
    for modality in ("CT", "ultrasound", "MR-CT"):
        appearances = appearances_of(modality)
        assert len({appearances.of(kind) for kind in KINDS}) == len(KINDS)
        distinct |= {(kind, appearances.of(kind)) for kind in KINDS}
        clean = Phantom(modality, "head", (), 7).render(64)[..., 0].astype(int)
        for kind in KINDS:
            finding = Finding(kind, "large", "left", "upper")
            rendered = Phantom(modality, "head", (finding,), 7).render(64)[..., 0].astype(int)
            rows, columns = np.nonzero(abs(rendered - clean) > 60)
            assert rows.mean() < 32
            assert (columns.mean() > 32) == (modality == "ultrasound") == appearances.mirrored
            middle = rendered[int(rows.mean()), int(columns.mean())]
            appearance = appearances.of(kind)
            bright = appearance.outer if appearance.core is None else appearance.core
            assert (middle > 200) if bright else (middle < 30)
    assert len(distinct) == 2 * len(KINDS)


def test_flat_image_has_a_large_residual() -> None:
    found = measure(np.full((64, 64), 128, np.uint8))
    assert found.residual > 0.1
    with pytest.raises(ValueError, match="square image of up to 256"):
        measure(np.zeros((64, 32), np.uint8))


def test_local_artifact_has_a_large_residual(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    for scan in scans[:20]:
        image = scan.render(64)
        image[24:40, 24:40] = rng.integers(0, 256, (16, 16, 3))
        assert measure(image).residual > 0.1


def test_rendering_is_deterministic(scans: list[Phantom]) -> None:
    assert np.array_equal(scans[0].render(64), scans[0].render(64))
    assert scans[0].render(96).shape == (96, 96, 3)
    colors = {scan.modality: np.ptp(scan.render(64).astype(int), axis=-1).max() for scan in scans}
    assert colors["histology"] > 60
    assert all(spread == 0 for name, spread in colors.items() if name != "histology")


def test_answers_match_the_scan(scans: list[Phantom]) -> None:
    for scan in scans:
        answers = dict(questions(scan))
        assert answers["What modality is this?"] == scan.modality
        assert answers["How many findings are there?"] == str(len(scan.findings))
        kinds = {finding.kind: finding for finding in scan.findings}
        assert (answers["Is there a cyst?"] == "yes") == ("cyst" in kinds)
        assert (answers["Is the picture normal?"] == "yes") == (not scan.findings)  # alias
        assert all(finding.name in caption(scan) for finding in scan.findings)
        for kind, finding in kinds.items():
            assert answers[f"Where is the {kind}?"] == finding.location
            assert answers[f"What is in the {finding.location}?"] == f"a {finding.name}"
            assert dict(follow_up_questions(finding))["On which side?"] == finding.side
    closed = [answer for scan in scans for _, answer in questions(scan) if answer in ("yes", "no")]
    assert 0.3 < closed.count("yes") / len(closed) < 0.7


def test_texts_contain_all_facts(scans: list[Phantom]) -> None:
    for scan in scans:
        expected = facts(scan.modality, scan.organ, scan.findings)
        assert len(expected) == 2 + 3 * len(scan.findings)
        for text in (caption(scan), prompt_for(scan), report(scan)):
            assert facts_in(text) == expected


def test_progression_changes_at_most_one_finding(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for scan in scans:
        later, change = scan.progression(rng)
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
        assert len(document.images) == 2
        assert document.turns[1].parts == (change_text(change),)
        if change.finding is not None:
            assert change.finding.location in change_text(change)
    assert kinds == {"none", "gone", "new", "grown", "shrunk"}


def test_documents_contain_the_image_once(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    for scan in scans[:10]:
        for document in documents(scan, ImagePart(codes=(1,)), rng):
            assert len(document.images) == 1


def test_conversation_has_one_description_usually_last(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    last = 0
    for scan in scans:
        turns = [turn.parts[-1] for turn in conversation(scan, ImagePart(codes=(1,)), rng).turns]
        assert 16 <= len(turns) <= 40
        asked, answers = turns[::2], turns[1::2]
        described = [n for n, a in enumerate(answers) if a in (caption(scan), report(scan))]
        assert len(described) == 1
        last += described[0] == len(answers) - 1
        known = dict(questions(scan)) | {
            "Describe the picture.": caption(scan),  # alias
            "Write a report.": report(scan),
        }
        kind = ""
        for question, answer in zip(asked, answers, strict=True):
            assert isinstance(question, str)
            if question in known:
                assert known[question] == answer
                kind = next((k for k in KINDS if f" {k}?" in question), "")
            else:  # a follow-up of the previous question
                found = next(f for f in scan.findings if f.kind == kind)
                assert dict(follow_up_questions(found))[question] == answer
    assert 0.65 < last / len(scans) < 0.9
