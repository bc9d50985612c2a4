"""Fetches the test suites and the example data of others into build/peers. Nothing is committed.

Source archives come from PyPI, at the installed versions. transformers' archive lacks the tests of
single models; these and the example data are parts of repositories on GitHub. `local` names a
folder of repositories that are on this machine already, by the names of `REPOSITORIES`.
"""

from __future__ import annotations

import importlib.metadata
import io
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Repository:
    """Parts of a repository at a tag or commit."""

    address: str
    ref: str
    paths: tuple[str, ...]


def _version(package: str) -> str:
    return importlib.metadata.version(package)


REPOSITORIES = {
    "transformers": Repository(
        "huggingface/transformers",
        f"v{_version('transformers')}",
        ("utils", "tests/__init__.py", "tests/utils", "tests/generation", "tests/exporters",
         "tests/models/__init__.py", "tests/models/chameleon",
         "tests/fixtures/test_sentencepiece.model"),
    ),
    "anole": Repository(
        "GAIR-NLP/anole",
        "af563fa13ddc9d86503d91e6183a05ba60546c14",
        ("input.json", "facilitating_image_generation/dataset_raw.jsonl"),
    ),
    "chameleon": Repository(
        "facebookresearch/chameleon",
        "dbbe47fdbc7a3cc4982ae931fea75e227262e70a",
        ("data/prompts_for_human_evaluations.jsonl",),
    ),
    "LLaVA": Repository(
        "haotian-liu/LLaVA",
        "c121f0432da27facab705978f83c4ada465e46fd",
        ("llava/eval/table", "playground/data"),
    ),
    "LLaMA-Factory": Repository(
        "hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30", ("data",)
    ),
}  # fmt: skip


class Unavailable(Exception):
    """A source that cannot be fetched; says why."""


def fetch_archive(package: str, build: Path) -> Path:
    """The source archive of an installed package, unpacked."""
    version = _version(package)
    target = build / f"{package}-{version}"
    if not target.is_dir():
        _run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package,
            "--no-build-isolation", "--dest", str(build), f"{package}=={version}",
        )  # fmt: skip
        with tarfile.open(build / f"{package}-{version}.tar.gz") as archive:
            archive.extractall(build, filter="data")
    return target


def fetch_wheel(package: str, build: Path) -> Path:
    """A package without dependencies that a suite imports, in a folder of its own."""
    target = build / "packages"
    if not (target / package).exists():
        _run(
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target),
            package,
        )  # fmt: skip
    return target


def parts_folder(name: str, build: Path) -> Path:
    """The folder of a repository's parts, of its tag or commit."""
    return build / f"{name}-{REPOSITORIES[name].ref}"


def fetch_parts(name: str, build: Path, local: Path | None) -> tuple[Path, str]:
    """The parts of a repository in a folder, and the commit that they are of.

    Parts from GitHub are fetched once. Those of a local repository are of its HEAD, every time.
    """
    repository, target = REPOSITORIES[name], parts_folder(name, build)
    record = build / f"{target.name}.commit"
    git, ref = local and local / name, "HEAD"
    is_local = git is not None and git.exists()
    if not is_local and record.is_file() and target.is_dir():
        return target, record.read_text()
    record.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    if git is None or not is_local:
        git, ref = build / f"{name}.git", "FETCH_HEAD"
        _fetch(git, repository)
    data = _run("git", "-C", str(git), "archive", ref, *repository.paths)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(target, filter="data")
    commit = _run("git", "-C", str(git), "rev-parse", "--short=10", ref).decode().strip()
    if not is_local:
        record.write_text(commit)
    return target, commit


def _fetch(git: Path, repository: Repository) -> None:
    """Fetches one commit without its files; `git archive` then fetches those of the paths."""
    if not git.exists():
        _run("git", "init", "--quiet", "--bare", str(git))
        address = f"https://github.com/{repository.address}"
        _run("git", "-C", str(git), "remote", "add", "origin", address)
    _run(
        "git", "-C", str(git), "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin",
        repository.ref,
    )  # fmt: skip


def _run(*words: str) -> bytes:
    try:
        return subprocess.run(words, check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"{words[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{' '.join(words[:4])}: {lines[-1] if lines else error}") from error
