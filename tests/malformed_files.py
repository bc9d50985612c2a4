"""Reads mutations of kinds of files in this process, and prints one JSON line for each.

    python tests/malformed_files.py SEED COUNT FOLDER KIND ...

It is a program of its own because a damaged file could end the process (tests/
test_malformed_files.py). Each kind has an intact example, the file that is mutated, and what
reads it. `exact` kinds must either be refused or have the result of the intact file, except for
the fields in `free`, which may have any valid value.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from file_mutations import mutations
from malformed_kinds import KINDS, Kind

from medley.errors import UserError

SECONDS = 120  # of one mutation; the process ends with a traceback after it
MEGABYTES = 1500  # that one mutation may add to the process's memory
_NO_MEMORY = ("alloc", "memory", "bad_alloc")


def environment() -> dict[str, str]:
    """The environment of this program as a subprocess."""
    here = Path(__file__).resolve().parent
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}


def main(seed: int, count: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        run(name, seed, count, folder / name.replace(" ", "-"))


def run(name: str, seed: int, count: int, folder: Path) -> None:
    """Prints `{"kind", "label", "outcome", ...}` before and after each mutation of a kind."""
    kind = KINDS[name]
    intact = folder / "intact"
    intact.mkdir(parents=True)
    kind.make(intact)
    data = (intact / kind.file).read_bytes()
    expected = kind.read(intact)
    rng = random.Random(f"{name} {seed}")
    for label, mutated in itertools.islice(mutations(kind.form, data, rng), count):
        line = {"kind": name, "label": label}
        print(json.dumps({**line, "outcome": "ends the process"}), flush=True)
        copy = folder / "copy"
        shutil.copytree(intact, copy, copy_function=_link)
        (copy / kind.file).unlink()
        (copy / kind.file).write_bytes(mutated)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = _outcome(kind, copy, expected, label)
        faulthandler.cancel_dump_traceback_later()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        if grown > MEGABYTES:
            result = {"outcome": "memory", "message": f"{grown} MB"}
        print(json.dumps({**line, **result}), flush=True)
        shutil.rmtree(copy)
    shutil.rmtree(folder)


def _link(source: str, target: str) -> None:
    """A link instead of a copy; the file keeps its time, by which caches recognize it."""
    Path(target).hardlink_to(source)


def _outcome(kind: Kind, folder: Path, expected: Any, label: str) -> dict[str, str]:
    try:
        found = kind.read(folder)
    except (UserError, OSError) as error:
        message = str(error)
        if "\n" in message.strip() or len(message) > 1500:
            return {"outcome": "several lines", "message": message[:3000]}
        if str(folder) not in message:
            return {"outcome": "no file named", "message": message}
        if any(word in message for word in _NO_MEMORY):
            return {"outcome": "memory", "message": message}
        return {"outcome": "refused", "message": message.replace(str(folder), "F")}
    except BaseException:
        return {"outcome": "traceback", "message": traceback.format_exc()[-3000:]}
    if found == expected:
        return {"outcome": "equal", "message": ""}
    is_free = any(
        f".{name} " in f"{label.split(' = ')[0]} ".replace(".", " .") for name in kind.free
    )
    if kind.exact and not is_free:
        return {"outcome": "another result", "message": f"{str(found)[:200]} {str(expected)[:200]}"}
    return {"outcome": "other", "message": ""}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
