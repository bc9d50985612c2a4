"""Shared fixtures and helpers: recorded cases, the embedded model, commands in subprocesses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from model_server import Server, running_server
from training_runs import write_tokens

import medley
from medley.data.vocabulary import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = ("chameleon_7b_layout", "chameleon_30b_layout")
TIMEOUT = 600  # seconds for a subprocess

# Runs a module like `python -m`, with Python's own handling of SIGINT. A shell starts background
# jobs with SIGINT ignored, and their children inherit that.
INTERRUPTIBLE = (
    "import runpy, signal, sys; "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


# DeepSpeed's extension, for the tests alone: a training run that a test kills may be building it,
# and the lock that it leaves must neither stop a later test nor a user's own runs.
VERSIONS = f"torch-{version('torch')}-deepspeed-{version('deepspeed')}"
EXTENSIONS = ROOT / "build" / "torch_extensions" / VERSIONS
BUILD_EXTENSION = (
    "from deepspeed.accelerator import get_accelerator as accelerator; "
    "accelerator().create_op_builder('ShareMemCommBuilder').load()"
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Builds DeepSpeed's extension once per checkout (half a minute), before any worker starts."""
    is_worker = hasattr(session.config, "workerinput")
    is_quick = "not slow" in session.config.getoption("markexpr")
    if is_worker or is_quick or list(EXTENSIONS.glob("*/*.so")):
        return
    shutil.rmtree(EXTENSIONS, ignore_errors=True)  # what a build that was killed has left
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", BUILD_EXTENSION], env=environment, check=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hostile", action="store_true",
        help="run the fuzz, mutation and kill tests only, in their long form",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
    config.addinivalue_line(
        "markers",
        "hostile(repeat=1): fuzz, mutations and kills; --hostile runs only these, and repeats them",
    )
    hostile.set_long(config.getoption("--hostile"))
    # A busy machine must not fail a test.
    checks = [HealthCheck.too_slow] if hostile.is_long() else []
    settings.register_profile(
        "untimed", max_examples=hostile.scaled(100), deadline=None, suppress_health_check=checks
    )
    settings.load_profile("untimed")


@pytest.fixture
def repetition(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("hostile")
    count = mark.kwargs.get("repeat", 1) if mark is not None and hostile.is_long() else 1
    if count > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(count), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_hypothesis_test(getattr(item, "function", None)):
            item.add_marker(pytest.mark.hostile)
    if hostile.is_long():
        others = [item for item in items if item.get_closest_marker("hostile") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("hostile") is not None]


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def interruptible_command(module: str, *flags: object) -> list[str]:
    """The command `python -m MODULE FLAGS`, for a child that the test sends a SIGINT."""
    return [sys.executable, "-c", INTERRUPTIBLE, module, *map(str, flags)]


def torchrun_command(module: str, *flags: object, ranks: int = 2) -> list[str]:
    """The command `torchrun -m MODULE FLAGS` on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", "-m", module, *map(str, flags)]


@pytest.fixture(scope="session")
def exceptions() -> dict[str, dict[str, str]]:
    """Recorded cases, by file and name, that contain a fault which Medley reports as an error."""
    cases: dict[str, dict[str, str]] = json.loads(
        (ROOT / "tests" / "golden_exceptions.json").read_text()
    )
    return cases


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """A small tokenizer in Chameleon's layout."""
    folder = GOLDEN / "tiny_chameleon_tokenizer"
    return TextTokenizer.from_file(folder / "text_tokenizer_modified.json")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Path:
    """The folder of a recorded checkpoint, with one shard or four."""
    return GOLDEN / "checkpoints" / str(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> medley.Model:
    """The embedded model on the CPU. Tests must not change it."""
    return medley.load("tiny", device="cpu")


@pytest.fixture(scope="session")
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a module in a subprocess, from the repository's root, and checks its exit status."""

    def run(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mock server of a chat model."""
    with running_server(monkeypatch) as state:
        yield state


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and val.jsonl, tokens files for the embedded model."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder / "train.jsonl", 24)
    write_tokens(folder / "val.jsonl", 6, seed=1)
    return folder


@pytest.fixture(scope="session")
def sequences(tokenizer: Any) -> list[Any]:
    """Recorded token sequences; ids beyond the recorded models' vocabulary are replaced."""
    cases = golden("medmax_tokenization.json")["cases"]
    recorded = [np.array(case["expected"]["tokens"]) for case in cases[:5]]
    return [np.minimum(ids, 8799) for ids in recorded]
