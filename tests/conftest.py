"""Paths of recorded cases, and small things that several tests use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from model_server import Server, running_server
from training_runs import write_tokens

from medley.data.vocabulary import TextTokenizer

settings.register_profile("untimed", deadline=None)  # no test measures time
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = ("chameleon_7b_layout", "chameleon_30b_layout")


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def exceptions() -> dict[str, dict[str, str]]:
    """Recorded cases that record a fault which we refuse, by file and case."""
    found: dict[str, dict[str, str]] = json.loads(
        (ROOT / "tests" / "golden_exceptions.json").read_text()
    )
    return found


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    folder = GOLDEN / "tiny_chameleon_tokenizer"
    return TextTokenizer.from_file(folder / "text_tokenizer_modified.json")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Path:
    """The folder of a recorded checkpoint, one shard or four."""
    return GOLDEN / "checkpoints" / str(request.param)


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of a stage as a user would, from the repository's root."""

    def run(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A chat model's server."""
    with running_server(monkeypatch) as state:
        yield state


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens to train on and to validate with."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder / "train.jsonl", 24)
    write_tokens(folder / "val.jsonl", 6, 1)
    return folder


@pytest.fixture(scope="session")
def sequences(tokenizer: Any) -> list[Any]:
    """Recorded token sequences, as far as the recorded models know their ids."""
    cases = golden("medmax_tokenization.json")["cases"]
    chosen = [np.array(c["expected"]["tokens"]) for c in cases[:5]]
    return [np.minimum(ids, 8799) for ids in chosen]  # the recorded model ends at 8,799
