from __future__ import annotations

import numpy as np
import pytest

from medley.document import Picture
from medley.phantoms import ALL_MODALITIES, Phantom, caption, documents, measure, questions


@pytest.fixture(scope="module")
def scans() -> list[Phantom]:
    rng = np.random.default_rng(5)
    return [Phantom.random(rng, ALL_MODALITIES) for _ in range(60)]


def test_the_reader_finds_what_was_drawn(scans: list[Phantom]) -> None:
    for scan in scans:
        found = measure(scan.draw(64))
        assert (found.modality, found.organ) == (scan.modality, scan.organ)
        assert set(found.findings) == set(scan.findings)


def test_the_reader_is_not_fooled_by_a_flat_picture() -> None:
    found = measure(np.full((64, 64), 128, np.uint8))
    assert found.residual > 0.1


def test_drawing_is_the_seeds(scans: list[Phantom]) -> None:
    assert np.array_equal(scans[0].draw(64), scans[0].draw(64))
    assert scans[0].draw(96).shape == (96, 96)


def test_answers_are_true_of_the_scan(scans: list[Phantom]) -> None:
    for scan in scans:
        answers = dict(questions(scan))
        assert answers["What modality is this?"] == scan.modality
        assert answers["How many findings are there?"] == str(len(scan.findings))
        kinds = {finding.kind for finding in scan.findings}
        assert (answers["Is there a cyst?"] == "yes") == ("cyst" in kinds)
        assert all(finding.name in caption(scan) for finding in scan.findings)


def test_documents_hold_the_picture(scans: list[Phantom]) -> None:
    rng = np.random.default_rng(0)
    for scan in scans[:10]:
        for document in documents(scan, Picture(codes=(1,)), rng):
            assert len(document.pictures) == 1
