"""`medley chat`: a streaming conversation in the terminal, with text and images.

`@FILE` adds an image to the prompt: `@scan.png What is this?`, `@"my scan.png"`. Generated images
are saved to files. /reset starts a new conversation, /quit exits.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from medley.commands.model_options import ModelOptions
from medley.data.document import ImagePart
from medley.errors import UserError
from medley.inference.chat_session import ChatSession
from medley.inference.prompts import parse_typed_prompt
from medley.inference.response import Response, StreamEvent

PROGRESS_STEPS = 8  # progress messages for one image


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Chats in the terminal.

    Args:
        output: folder of the generated images
    """

    output: Path = field(default=Path("chat"))


def chat(options: ChatOptions) -> None:
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: This is a file. Name a folder.")
    model = options.load()
    generation = options.generation(model)
    session = ChatSession(model, generation)
    terminal = _Terminal(options.output, is_interactive=sys.stdin.isatty())
    print("Research only, not for clinical decisions. @FILE adds an image, /reset, /quit.")
    for line in terminal.lines():
        if line == "/quit":
            break
        if line == "/reset":
            session = ChatSession(model, generation)
            print("(new conversation)")
            continue
        try:
            terminal.respond(session, parse_typed_prompt(line))
        except KeyboardInterrupt:  # ends this response and keeps the conversation before it
            print("\n(interrupted)")
        except UserError as error:
            print(f"({error})")


class _Terminal:
    """Reads lines from stdin and prints responses."""

    def __init__(self, output: Path, is_interactive: bool) -> None:
        self.output, self.is_interactive = output, is_interactive
        self._next_image = 0

    def lines(self) -> Iterator[str]:
        """Typed lines that are not blank, until the end of the input or Ctrl-C."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        while True:
            if self.is_interactive:
                _write("> ")
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                line = ""
            if not line:
                print()
                return
            if line.strip():
                yield line.strip()

    def respond(self, session: ChatSession, parts: list[str | ImagePart]) -> None:
        """Prints a response while it is generated."""
        codes_per_image = session.model.image_tokenizer.codes_per_image
        with closing(session.send(*parts)) as events:
            for event in events:
                self._print(event, codes_per_image)
        print(flush=True)

    def _print(self, event: StreamEvent, codes_per_image: int) -> None:
        if event.text is not None:
            _write(event.text)
        elif event.progress is not None and self.is_interactive:
            codes = round(event.progress * codes_per_image)
            if codes % max(codes_per_image // PROGRESS_STEPS, 1) == 0:
                _write(f"\r[generating image: {event.progress:.0%}] ")
        elif event.image is not None:
            self._save(event.image)
        elif event.response is not None:
            note = _note(event.response)
            print(f"\n({note})" if note else "", end="")

    def _save(self, image: Image.Image) -> None:
        """Saves an image under the next unused number."""
        self.output.mkdir(parents=True, exist_ok=True)
        while (path := self.output / f"{self._next_image:04d}.png").exists():
            self._next_image += 1
        image.save(path)
        print(f"\r[image saved as {path}]")


def _note(response: Response) -> str | None:
    if response.note is None and response.finish_reason == "length":
        return "truncated: the response reached its maximum length"
    return response.note


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
