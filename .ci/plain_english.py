"""Lists words and phrases that this project replaces by the field's terms (docs/glossary.md).

    python .ci/plain_english.py [FILES...]

Without FILES it reads every tracked text of the project, except the changelog, the experiment log,
recorded cases and this file. A line that must keep such a word, since it is a deprecated alias or
another project's own name, ends with `# alias` or `<!-- alias -->`. The exit status is 1 if
anything is found. A text without findings can still be unclear: this list is no substitute for
reading it aloud.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPLACEMENTS = {
    "image": r"(?i)pictures?(?![a-z])",
    "conversation or chat": r"(?i)\btalks?\b",
    "special token": r"(?i)\b(end-of-turn|begin|end|turn) marks?\b|\bmarks\b",
    "the person or thing by name": r"(?i)\b(some|no|every|any)body\b|\bwhoever\b",
    "present-day English": r"(?i)\b(lest|for ever|thereof|wherein|whence|beside what)\b",
    "invalid, missing or not a ...": (
        r"\b(is|are|that is) none\b|\b(that is|is) no (text|number|image|checkpoint|adapter|code)\b"
    ),
    "NaN or infinite": r"(?i)\bno numbers?\b",
    "resume or continue": r"(?i)\b(go|goes|going|gone) on\b",
    "is (of texts and files)": (
        r"(?i)\b(stands?|standing) (in|at|there|here|behind|before|beside|twice|alone|for)\b"
    ),
    "incomplete or truncated": r"(?i)\btorn\b",
    "contains or reports": (
        r"(?i)\b(files?|manifest|models?|page|server|checkpoint|rows?) "
        r"(says?|tells?|speaks?|knows?)\b"
    ),
    "image-blind": r"(?i)\b(without looking|do(es)? not look)\b",
    "generate": r"(?i)\b(draws?|drawn|drawing) (images?|an image|codes?|scans?)\b",
    "a percentage without a space": r"\d %",
    "similarity, nearest, majority": r"(?i)\b(likeness|likeliest|commonest)\b",
    "trained on": r"(?i)\b(what (it|the model) (learns|will learn)|(is|are) learned)\b",
    "nothing": r"(?i)\bof the field\b",
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".html", ".js", ".sh", ".toml"}
SKIPPED = ("docs/log.md", "CHANGELOG.md", "tests/golden/", ".ci/plain_english.py")
ALIAS = re.compile(r"(# alias|<!-- alias -->)\s*$")


def findings(path: Path) -> list[str]:
    """One line for each phrase of a file that has a replacement."""
    found = []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").split("\n"), 1):
        if ALIAS.search(line):
            continue
        for replacement, pattern in REPLACEMENTS.items():
            found += [
                f"{path}:{number}: {match[0]!r}: use {replacement}"
                for match in re.finditer(pattern, line)
            ]
    return found


def main(argv: list[str]) -> int:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    names = argv or listed.stdout.splitlines()
    found = [
        line
        for name in names
        if Path(name).suffix in SUFFIXES and not name.startswith(SKIPPED) and Path(name).is_file()
        for line in findings(Path(name))
    ]
    print("\n".join([*found, f"{len(found)} findings"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
