"""One line of a documents file -> its token sequence, with an error for every kind of bad line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medley.data.document import DocumentError, ImagePart, shorten
from medley.data.document_json import is_empty_answer, read_document
from medley.data.image_token_store import ImageTokenStore
from medley.data.medmax_compat import encode_medmax
from medley.data.token_dataset import UNTRAINED_TURNS
from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.utils.image_names import image_name_hint, is_data_url

MAX_LINE_BYTES = 32 << 20  # a document of 4,096 tokens has less than 100,000
Overflow = Literal["error", "drop", "trim_text"]
Compat = Literal["none", "medmax"]
_EMBEDDED = (
    "It is embedded in the line. Save it as a file with `medley convert --from documents "
    "--image_folder FOLDER`."
)


class MissingImageCodes(DocumentError):
    """An image without codes in its line and in the image token store."""


class DocumentTooLong(DocumentError):
    """A document with more tokens than allowed."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A line with its ids.

    Attributes:
        row: the parsed line
        ids: its token sequence
        images: number of images
        image_tokens: number of ids that are image tokens, or begin or end tokens of an image
        images_with_inline_codes: images whose codes are in the line itself
        truncated_tokens: text tokens that were removed
        untrained_turns: numbers of the turns of weight 0, which training leaves out
        turns: number of turns
        answers: number of assistant turns
        empty_answers: those without text and images
        remarks: notes on how the line was read
    """

    row: dict[str, Any]
    ids: list[int]
    images: int
    image_tokens: int
    images_with_inline_codes: int
    truncated_tokens: int = 0
    untrained_turns: tuple[int, ...] = ()
    turns: int = 1
    answers: int = 1
    empty_answers: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def is_untrained(self) -> bool:
        """Whether no assistant turn is trained on."""
        answers = {0} if self.answers and self.turns == 1 else set(range(1, self.turns, 2))
        return answers <= set(self.untrained_turns)

    def output_row(self) -> dict[str, Any]:
        """The row of a token file."""
        own = {name: value for name, value in self.row.items() if name != UNTRAINED_TURNS}
        untrained = {UNTRAINED_TURNS: list(self.untrained_turns)} if self.untrained_turns else {}
        return {**own, "tokens": self.ids, **untrained}


class DocumentTokenizer:
    """Converts lines to token sequences. Raises UserError if one of its own files is invalid."""

    def __init__(
        self,
        tokenizer_file: Path,
        image_codes: Path | None = None,
        max_length: int | None = None,
        overflow: Overflow = "error",
        compat: Compat = "none",
    ) -> None:
        self.tokenizer = TextTokenizer.from_file(tokenizer_file)
        self.store = None if image_codes is None else ImageTokenStore(image_codes)
        self.max_length, self.overflow, self.compat = max_length, overflow, compat

    def __call__(self, line: bytes) -> TokenizedDocument | None:
        """A line -> its sequence, or None if the document is too long and dropped.

        Raises UserError that describes the error in the line.
        """
        return self.tokenize(parse_line(line))

    def tokenize(self, row: Any) -> TokenizedDocument | None:
        """The same for a parsed line."""
        tokenized = (
            self._tokenize_as_medmax(row) if self.compat == "medmax" else self._tokenize(row)
        )
        if self.max_length is None or len(tokenized.ids) <= self.max_length:
            return tokenized
        if self.overflow == "drop":
            return None
        if self.overflow == "trim_text":
            short = truncate_text(tokenized.ids, self.max_length, self.tokenizer.vocabulary)
            return replace(tokenized, ids=short, truncated_tokens=len(tokenized.ids) - len(short))
        raise DocumentTooLong(
            f"The document has {len(tokenized.ids)} tokens (--max_length is {self.max_length}). "
            "Increase --max_length, or use --overflow drop or --overflow trim_text."
        )

    def _tokenize(self, row: Any) -> TokenizedDocument:
        read = read_document(row)
        document = read.document
        if [turn.role for turn in document.turns] == ["user"]:
            raise DocumentError("The document has no assistant turn, so there is nothing to learn.")
        inline = sum(image.codes is not None for image in document.images)
        document = document.map_images(self._with_codes)
        lengths = [len(image.codes or ()) + 2 for image in document.images]
        return TokenizedDocument(
            row, document.to_ids(self.tokenizer), len(lengths), sum(lengths), inline,
            untrained_turns=document.untrained_turns,
            turns=len(document.turns),
            answers=sum(turn.role == "assistant" for turn in document.turns),
            empty_answers=sum(map(is_empty_answer, document.turns)),
            remarks=read.remarks,
        )  # fmt: skip

    def _tokenize_as_medmax(self, row: Any) -> TokenizedDocument:
        ids = encode_medmax(row, self.tokenizer)
        vocabulary = self.tokenizer.vocabulary
        of_images = {*vocabulary.image_codes, vocabulary.begin_image, vocabulary.end_image}
        images = ids.count(vocabulary.begin_image)
        return TokenizedDocument(row, ids, images, sum(i in of_images for i in ids), images)

    def _with_codes(self, image: ImagePart) -> ImagePart:
        """Adds the codes from the store, by path, to an image without codes."""
        store = self.store
        if image.codes is not None:
            if store is not None and len(image.codes) != store.codes_per_image:
                raise DocumentError(
                    f"An image has {len(image.codes)} codes (expected {store.codes_per_image}, as "
                    f"in {store.folder})."
                )
            return image
        name = str(image.path)
        if store is None:
            raise MissingImageCodes(
                f"The image {shorten(image.path)} has no codes in the line. "
                + (_EMBEDDED if is_data_url(name) else "Pass their folder as --image_codes.")
            )
        codes = store.get(name)
        if codes is None:
            hint = f"Tokenize it with `medley tokenize-images`.{image_name_hint(name)}"
            hint = _EMBEDDED if is_data_url(name) else hint
            raise MissingImageCodes(
                f"The image {shorten(name)} has no codes in {store.folder}. {hint}"
            )
        return replace(image, codes=tuple(codes.tolist()))


def parse_line(line: bytes) -> Any:
    """Parses one line. Raises DocumentError if it is too long or not UTF-8 JSON."""
    check_line_length(len(line))
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # an unpaired surrogate cannot be encoded
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeDecodeError as error:
        raise DocumentError(f"The line is not UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DocumentError(f"Invalid JSON ({error.msg} at column {error.colno}).") from error
    except UnicodeEncodeError as error:
        raise DocumentError(
            "A string contains an unpaired surrogate (\\ud800 to \\udfff)."
        ) from error
    except ValueError as error:  # an integer of more than 4,300 digits
        raise DocumentError(f"Unsupported JSON ({error}).") from error
    except RecursionError as error:
        raise DocumentError("The JSON is nested too deeply.") from error


def check_line_length(num_bytes: int) -> None:
    if num_bytes > MAX_LINE_BYTES:
        raise DocumentError(
            f"The line is too long (got {num_bytes} bytes, expected at most {MAX_LINE_BYTES})."
        )


def truncate_text(ids: list[int], limit: int, vocabulary: Vocabulary) -> list[int]:
    """Removes text tokens until a document fits; images and special tokens are kept.

    The user turns lose tokens first, from their beginning, because the question is usually at the
    end. Then the assistant turns lose tokens from their end. An assistant turn that has content
    keeps at least its first text token or image. Raises DocumentTooLong if that is not enough.
    """
    user_positions: list[int] = []
    assistant_positions: list[int] = []  # without the first text token of a turn of text only
    turn = 0 if vocabulary.end_turn in ids else 1  # a single turn is the assistant's
    has_content = False
    for position, token in enumerate(ids):
        if token == vocabulary.end_turn:
            turn, has_content = turn + 1, False
        elif token in vocabulary.text_tokens:
            if turn % 2 == 0:
                user_positions.append(position)
            elif has_content:
                assistant_positions.append(position)
            has_content = True
        elif token == vocabulary.begin_image:
            has_content = True
    excess = len(ids) - limit
    removed = set([*user_positions, *reversed(assistant_positions)][:excess])
    if len(removed) < excess:
        required = len(ids) - len(user_positions) - len(assistant_positions)
        raise DocumentTooLong(
            f"The document has {len(ids)} tokens, and {required} of them cannot be truncated: "
            "image tokens, special tokens and the first token of each answer (--max_length is "
            f"{limit}). Increase --max_length or use --overflow drop."
        )
    return [token for position, token in enumerate(ids) if position not in removed]
