"""The runner of tests/peers: where it keeps what it fetches, and what it calls worse."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "peers"))
    return importlib.import_module("sources")


def _git(folder: Path, *words: str) -> str:
    user = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    command = ["git", "-C", str(folder), *user, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _commit(folder: Path, text: str) -> str:
    (folder / "data.txt").write_text(text)
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "--message", text)
    return _git(folder, "rev-parse", "HEAD")


def test_fetched_parts_are_those_of_the_ref(
    sources: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, build = tmp_path / "local" / "data", tmp_path / "build"
    origin.mkdir(parents=True)
    build.mkdir()
    _git(origin, "init", "--quiet")
    refs = [_commit(origin, text) for text in ("first", "second", "third")]
    _git(tmp_path, "clone", "--quiet", "--bare", str(origin), str(build / "data.git"))

    def fetch(ref: str, local: Path | None = None) -> tuple[str, str]:
        repository = sources.Repository("x/data", ref, ("data.txt",))
        monkeypatch.setitem(sources.REPOSITORIES, "data", repository)
        folder, commit = sources.fetch_parts("data", build, local)
        assert folder == sources.parts_folder("data", build)
        return (folder / "data.txt").read_text(), commit

    assert fetch(refs[0]) == ("first", refs[0][:10])
    assert fetch(refs[1]) == ("second", refs[1][:10])
    assert fetch(refs[0], tmp_path / "local") == ("third", refs[2][:10])
    assert fetch(refs[0]) == ("first", refs[0][:10])
    monkeypatch.setattr(sources, "_fetch", pytest.fail)  # both are there already
    assert fetch(refs[0]) == ("first", refs[0][:10])
    assert fetch(refs[1]) == ("second", refs[1][:10])


def test_tests_that_fail_anew_or_are_gone_are_worse(
    sources: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = importlib.import_module("run")
    found = {"kept": "passed", "new": "failed", "known": "failed", "mended": "passed",
             "chance": "failed", "stock": "failed"}  # fmt: skip
    recorded = {"kept": "passed", "known": "failed", "mended": "failed", "gone": "passed",
                "new": "passed", "chance": "passed", "stock": "passed"}  # fmt: skip
    again = {"medley": {**found, "chance": "passed"}, "stock": {"new": "passed", "stock": "failed"}}
    monkeypatch.setattr(runner, "run", lambda name, folder, decoder, tests: again[decoder])
    assert runner.compare("peft_tokens", tmp_path, found, recorded) == {"new", "gone"}
