"""`medley chat`: a talk in the terminal, in words and pictures, streaming.

Pictures are given by their path behind an @ (`@scan.png What is this?`, `@"my scan.png"`) and those
that the model draws are saved to files. /reset begins anew, /quit ends.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from medley.commands.model_options import ModelOptions
from medley.data.document import ImagePart
from medley.errors import UserError
from medley.inference.model import ChatSession, StreamEvent

_PICTURE = re.compile(r'(?:(?<=\s)|^)@(?:"([^"]+)"|(\S+))')
PREVIEWS = 8  # of a picture, while it is drawn


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Talks in the terminal.

    Args:
        output: folder of the pictures that the model draws
    """

    output: Path = field(default=Path("chat"))


def parts_of(line: str) -> list[str | ImagePart]:
    """A typed line -> its words and the pictures that it names, in their order."""
    parts: list[str | ImagePart] = []
    end = 0
    for match in _PICTURE.finditer(line):
        text = line[end : match.start()].strip()
        parts += [text] if text else []
        parts.append(ImagePart(path=match[1] or match[2]))
        end = match.end()
    text = line[end:].strip()
    return [*parts, text] if text else parts


def chat(options: ChatOptions) -> None:
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: a file; name a folder")
    model = options.load()
    chosen = options.generation(model)
    talk = ChatSession(model, chosen)
    interactive = sys.stdin.isatty()
    print("Research only, not for clinical decisions. @FILE shows a picture, /reset, /quit.")
    drawn = 0
    for line in _lines(interactive):
        if line == "/quit":
            break
        if line == "/reset":
            talk = ChatSession(model, chosen)
            print("(a new talk)")
            continue
        try:
            drawn = _answer(talk, parts_of(line), options.output, drawn, interactive)
        except KeyboardInterrupt:  # ends this answer; the talk goes on as before it
            print("\n(stopped)")
        except UserError as error:
            print(f"({error})")


def _lines(interactive: bool) -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            print()
            return
        if line.strip():
            yield line.strip()


def _answer(
    talk: ChatSession, parts: list[str | ImagePart], output: Path, drawn: int, interactive: bool
) -> int:
    """Prints an answer as it comes; gives the number of pictures saved so far."""
    every = talk.model.image_tokenizer.codes_per_image // PREVIEWS
    with closing(talk.send(*parts)) as events:
        for event in events:
            if event.text is not None:
                sys.stdout.write(event.text)
                sys.stdout.flush()
            elif event.progress is not None and interactive:
                codes = round(event.progress * talk.model.image_tokenizer.codes_per_image)
                if codes % max(every, 1) == 0:
                    sys.stdout.write(f"\r[drawing {event.progress:.0%}] ")
                    sys.stdout.flush()
            elif event.image is not None:
                drawn = _save(event, output, drawn)
            elif event.answer is not None:
                cut = event.answer.finish_reason == "length"
                note = event.answer.note or ("cut off: its length has a limit" if cut else None)
                print(f"\n({note})" if note else "", end="")
    print(flush=True)
    return drawn


def _save(event: StreamEvent, output: Path, drawn: int) -> int:
    assert event.image is not None
    output.mkdir(parents=True, exist_ok=True)
    while (output / f"{drawn:04d}.png").exists():
        drawn += 1
    path = output / f"{drawn:04d}.png"
    event.image.save(path)
    print(f"\r[picture saved as {path}]")
    return drawn + 1
