"""One line of a documents file -> its token sequence, with all the ways a line can be wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medley.data.document import Document, DocumentError, ImagePart
from medley.data.image_token_store import ImageTokenStore
from medley.data.medmax_compat import encode_medmax
from medley.data.vocabulary import TextTokenizer, Vocabulary

LARGEST_LINE = 32 << 20  # bytes; a document of 4,096 tokens has less than 100,000
Overflow = Literal["error", "drop", "trim_text"]


class MissingCodes(DocumentError):
    """A picture whose codes stand neither in its line nor in the shards."""


class DocumentTooLong(DocumentError):
    """A document longer than it may be."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A line with its ids."""

    row: dict[str, Any]
    ids: list[int]
    pictures: int
    image_tokens: int  # codes and marks of pictures among the ids
    own_codes: int  # pictures whose codes stood in the line itself
    trimmed: int = 0  # text tokens that were cut


class DocumentTokenizer:
    """Lines -> sequences. Raises UserError for files that cannot serve at all."""

    def __init__(
        self,
        tokenizer_file: Path,
        image_codes: Path | None = None,
        max_length: int | None = None,
        overflow: Overflow = "error",
        compat: str = "none",
    ) -> None:
        self.tokenizer = TextTokenizer.from_file(tokenizer_file)
        self.shards = None if image_codes is None else ImageTokenStore(image_codes)
        self.max_length, self.overflow, self.compat = max_length, overflow, compat

    def __call__(self, line: bytes) -> TokenizedDocument | None:
        """A line -> its sequence, None where it is dropped as too long.

        Raises UserError that says what is wrong with the line.
        """
        return self.tokenize(parse_line(line))

    def tokenize(self, row: Any) -> TokenizedDocument | None:
        if self.compat == "medmax":
            done = self._as_medmax(row)
        else:
            document = Document.from_json(row)
            own_codes = sum(picture.codes is not None for picture in document.pictures)
            document = document.map_images(self._with_codes)
            ids = document.to_ids(self.tokenizer)
            lengths = [len(picture.codes or ()) + 2 for picture in document.pictures]
            done = TokenizedDocument(row, ids, len(lengths), sum(lengths), own_codes)
        if self.max_length is None or len(done.ids) <= self.max_length:
            return done
        if self.overflow == "drop":
            return None
        if self.overflow == "trim_text":
            short = truncate_text(done.ids, self.max_length, self.tokenizer.vocabulary)
            return replace(done, ids=short, trimmed=len(done.ids) - len(short))
        raise DocumentTooLong(
            f"{len(done.ids)} tokens, --max_length is {self.max_length}; raise it, or use "
            "--overflow drop or trim_text"
        )

    def _as_medmax(self, row: Any) -> TokenizedDocument:
        ids = encode_medmax(row, self.tokenizer)
        marks = self.tokenizer.vocabulary
        of_pictures = {*marks.image_codes, marks.begin_image, marks.end_image}
        pictures = ids.count(marks.begin_image)
        return TokenizedDocument(row, ids, pictures, sum(i in of_pictures for i in ids), pictures)

    def _with_codes(self, picture: ImagePart) -> ImagePart:
        """The picture with codes, from its line or from the shards by its path."""
        shards = self.shards
        if picture.codes is not None:
            if shards is not None and len(picture.codes) != shards.codes_per_image:
                raise DocumentError(
                    f"a picture with {len(picture.codes)} codes, those of {shards.folder} have "
                    f"{shards.codes_per_image}"
                )
            return picture
        if shards is None:
            raise MissingCodes(
                f"the picture {picture.path} has no codes in the line; name their folder with "
                "--image_codes"
            )
        codes = shards.get(str(picture.path))
        if codes is None:
            raise MissingCodes(
                f"no codes of {picture.path} in {shards.folder}; tokenize it with "
                "tokenizer.image_tokenization"
            )
        return replace(picture, codes=tuple(codes.tolist()))


def parse_line(line: bytes) -> Any:
    """Raises DocumentError for what is no line of UTF-8 JSON of bearable length."""
    if len(line) > LARGEST_LINE:
        raise DocumentError(f"a line of {len(line)} bytes, the limit is {LARGEST_LINE}")
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a pair of surrogates is no character
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeEncodeError as error:
        raise DocumentError("half of a surrogate pair (\\ud800 to \\udfff) in a string") from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise DocumentError(f"not JSON that can be read ({error})") from error
    except RecursionError as error:
        raise DocumentError("JSON nested too deeply") from error


def truncate_text(ids: list[int], limit: int, vocabulary: Vocabulary) -> list[int]:
    """Cuts words until a document's ids fit; pictures and marks stay whole.

    The user's words go first, from their beginning on, since questions stand at the end; then
    the answers', from their end. No answer that had something loses all of it. Raises TooLong
    where that does not fit.
    """
    users: list[int] = []
    answers: list[int] = []  # but for what keeps an answer from being empty
    turn = 0 if vocabulary.end_turn in ids else 1  # a document of one turn is an answer
    answered = False
    for place, token in enumerate(ids):
        if token == vocabulary.end_turn:
            turn, answered = turn + 1, False
        elif token in vocabulary.text_tokens:
            if turn % 2 == 0:
                users.append(place)
            elif answered:
                answers.append(place)
            answered = True
        elif token == vocabulary.begin_image:
            answered = True
    excess = len(ids) - limit
    cut = set([*users, *reversed(answers)][:excess])
    if len(cut) < excess:
        raise DocumentTooLong(
            f"{len(ids)} tokens, of which {len(ids) - len(users) - len(answers)} are pictures, "
            f"marks and the least of answers: --max_length {limit} has no room for them"
        )
    return [token for place, token in enumerate(ids) if place not in cut]
