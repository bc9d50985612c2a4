"""Runs the test suites and example data of others against Medley. `make test-peers`.

python tests/peers/run.py [SUITE ...] [--peers DIR] [--record] [--decoder stock]

The result of each test is compared with `recorded.json`. A test that fails and is not recorded as
failing runs again, first with Medley's decoder, then with the stock class: if that fails as well,
the suite or the machine is the cause. Exit status: 0 as recorded or better, 1 worse, 2 a suite
could not be fetched or run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer_plugin import HUB_NAME
from sources import Unavailable, fetch_archive, fetch_parts, fetch_wheel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "peers"
RECORD = HERE / "recorded.json"
MODEL = BUILD / "tiny_model"
TIME_LIMIT = 900  # seconds of one suite
Outcomes = dict[str, str]
Local = Path | None


@dataclass(frozen=True)
class Suite:
    """A suite of tests.

    Attributes:
        fetch: repositories on this machine -> the folder to run in, and the versions of the suite
        files: test files in that folder
        only: regular expression of the tests that apply
        has_stock: whether the tests can run with the stock class as well
    """

    fetch: Callable[[Local], tuple[Path, str]]
    files: tuple[str, ...]
    only: str = ""
    has_stock: bool = True


def _transformers(local: Local) -> tuple[Path, str]:
    """The archive of PyPI, with the tests of single models from the repository."""
    folder = fetch_archive("transformers", BUILD)
    parts, commit = fetch_parts("transformers", BUILD, local)
    for path in sorted(parts.rglob("*")):
        target = folder / path.relative_to(parts)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    fetch_wheel("parameterized", BUILD)
    return folder, f"{folder.name}, models' tests of {commit}"


def _peft(_: Local) -> tuple[Path, str]:
    folder = fetch_archive("peft", BUILD)
    (folder / "tests" / "__init__.py").touch()  # the archive lacks it, the tests import relatively
    return folder, folder.name


def _data(local: Local) -> tuple[Path, str]:
    names = ("anole", "chameleon", "LLaVA", "LLaMA-Factory")
    return ROOT, ", ".join(f"{name} {fetch_parts(name, BUILD, local)[1]}" for name in names)


_CHAMELEON = "tests/models/chameleon/"
SUITES = {
    "transformers_decoder": Suite(_transformers, (f"{_CHAMELEON}test_modeling_chameleon.py",)),
    "transformers_processor": Suite(_transformers, (f"{_CHAMELEON}test_processing_chameleon.py",)),
    "peft_decoder": Suite(
        _peft, ("tests/test_decoder_models.py",), r"(?=.*\bLoraConfig\b).*LlamaForCausalLM"
    ),
    "peft_tokens": Suite(_peft, ("tests/test_trainable_tokens.py",)),
    "merges": Suite(lambda _: (ROOT, ""), ("tests/peers/merges.py",), has_stock=False),
    "example_data": Suite(_data, ("tests/peers/example_data.py",), has_stock=False),
}


def run(name: str, folder: Path, decoder: str, tests: Sequence[str]) -> Outcomes:
    """The outcome of each test, by its name without the file."""
    file = BUILD / f"{name}.outcomes.json"
    file.unlink(missing_ok=True)
    settings = BUILD / "pytest.ini"
    settings.write_text("[pytest]\n")  # in place of the suite's own, which asks for plugins
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", "2", "-c", str(settings),
        "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "peer_plugin", "-W", "ignore",
        "--decoder", decoder, "--tiny_model", str(MODEL), "--outcomes", str(file),
        "--only", SUITES[name].only, *tests,
    ]  # fmt: skip
    places = [str(HERE), str(ROOT / "tests"), str(BUILD / "packages")]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(places), "MEDLEY_PEERS": str(BUILD),
    }  # fmt: skip
    with open(BUILD / f"{name}.log", "a") as log:
        try:
            subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"no result within {TIME_LIMIT} s, see {log.name}") from error
    if not file.is_file() or not (found := json.loads(file.read_text())):
        raise Unavailable(f"no test ran, see {log.name}")
    return {_short(test): outcome for test, outcome in found.items()}


def _short(test: str) -> str:
    """A test's name without the file and without the name of a model on the hub."""
    return test.partition("::")[2].replace(f"-{HUB_NAME}", "")


def compare(name: str, folder: Path, found: Outcomes, recorded: Outcomes) -> set[str]:
    """The tests that are worse than recorded. Prints them and the better ones."""
    worse = {
        test for test, outcome in found.items() if outcome == "failed" != recorded.get(test)
    }  # fmt: skip
    if worse:
        again = run(name, folder, "medley", SUITES[name].files)
        worse = {test for test in worse if again.get(test) == "failed"}
    has_stock = SUITES[name].has_stock
    stock = run(name, folder, "stock", SUITES[name].files) if worse and has_stock else {}
    for test in sorted(test for test in worse if stock.get(test) == "failed"):
        print(f"  fails with the stock class, too: {test}")
    worse = {test for test in worse if stock.get(test) != "failed"}
    lost = {test for test, was in recorded.items() if was == "passed" != found.get(test)}
    worse |= lost - {test for test in found if found[test] == "failed"}
    better = [t for t, was in recorded.items() if was == "failed" and found.get(t) == "passed"]
    for label, tests in (("worse", sorted(worse)), ("better", better)):
        for test in tests:
            print(f"  {label}: {test} ({recorded.get(test, 'new')} -> {found.get(test, 'absent')})")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=list(SUITES), metavar="SUITE")
    parser.add_argument("--peers", type=Path, help="folder of repositories, instead of GitHub")
    parser.add_argument("--record", action="store_true", help="write the results to recorded.json")
    parser.add_argument("--decoder", choices=("medley", "stock"), default="medley")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if not MODEL.is_dir():
        subprocess.run([sys.executable, str(HERE / "tiny_model.py"), str(MODEL)], check=True)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    status = 0
    for name in options.suites:
        start = time.monotonic()
        (BUILD / f"{name}.log").unlink(missing_ok=True)
        try:
            folder, versions = SUITES[name].fetch(options.peers and options.peers.resolve())
            found = run(name, folder, options.decoder, SUITES[name].files)
        except Unavailable as error:
            print(f"{name}: not run: {error}")
            status = 2
            continue
        counts = ", ".join(
            f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items())
        )
        print(f"{name}: {counts} ({time.monotonic() - start:.0f} s; {versions})", flush=True)
        known = record.get(name, {"versions": "nothing"})
        if options.record:
            record[name] = {"versions": versions, **_by_outcome(found)}
        elif options.decoder == "medley":
            if known["versions"] != versions:
                print(f"  recorded with {known['versions']}")
            recorded = {t: o for o in ("passed", "failed", "skipped") for t in known.get(o, [])}
            worse = compare(name, folder, found, recorded)
            status = max(status, 1) if worse else status
    if options.record:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return status


def _by_outcome(found: Outcomes) -> dict[str, list[str]]:
    return {
        outcome: sorted(test for test, value in found.items() if value == outcome)
        for outcome in ("passed", "failed", "skipped")
    }


if __name__ == "__main__":
    sys.exit(main())
