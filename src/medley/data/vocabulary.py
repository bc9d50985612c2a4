"""The unified vocabulary: words, image codes and marks in one range of token ids.

Everything is read from `text_tokenizer.json` by name. A mark that is missing, or a gap among
the image codes, is an error at load: a model whose marks are guessed trains on nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from medley.data.bpe_cache import CachedBPE
from medley.errors import UserError

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
END_TURN = "<reserved08706>"
IMAGE = "<image>"
IMAGE_IN_UNMODIFIED_FILE = "<reserved08707>"
_CODE_PREFIX, _CODE_SUFFIX = "IMGIMG", "Z"
_DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


class VocabularyError(UserError):
    """A tokenizer file that cannot serve as a unified vocabulary."""


def code_name(code: int) -> str:
    """`code_name(10)` is `IMGIMGBAZ`: the code's digits with A for 0 to J for 9."""
    return _CODE_PREFIX + str(code).translate(_DIGITS) + _CODE_SUFFIX


def _code_of(name: str) -> int | None:
    digits = name[len(_CODE_PREFIX) : -len(_CODE_SUFFIX)]
    if not (name.startswith(_CODE_PREFIX) and name.endswith(_CODE_SUFFIX) and digits):
        return None
    digits = digits.translate(_LETTERS)
    return int(digits) if digits.isdecimal() else None


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of the marks and the range of image codes.

    `image_codes` is the range of token ids of the codes 0, 1, 2, …; `size` is one more than
    the largest id of the tokenizer; `text_tokens` holds the ids that are words or parts of
    words, and nothing else.
    """

    bos: int
    pad: int
    eos: int
    unk: int
    begin_image: int
    end_image: int
    end_turn: int
    image: int
    image_codes: range
    size: int
    text_tokens: frozenset[int]

    @classmethod
    def from_file(cls, path: str | Path) -> Vocabulary:
        return cls.from_json(_read_json(path), str(path))

    @classmethod
    def from_json(cls, parsed: Any, where: str) -> Vocabulary:
        """Reads the parsed content of `text_tokenizer.json`.

        Raises VocabularyError that names the token that is missing or out of its range.
        """
        try:
            ids: dict[str, int] = dict(parsed["model"]["vocab"])
            added: dict[str, int] = {t["content"]: t["id"] for t in parsed["added_tokens"]}
        except (KeyError, TypeError) as error:
            raise VocabularyError(
                f"{where}: not a tokenizer file with a BPE model, {error} is missing"
            ) from error
        ids.update(added)

        def mark(name: str) -> int:
            if name not in ids:
                raise VocabularyError(
                    f"{where}: the token {name!r} is missing; a unified vocabulary needs it"
                )
            return ids[name]

        codes = {c: i for name, i in ids.items() if (c := _code_of(name)) is not None}
        return cls(
            bos=mark(BOS),
            pad=mark(PAD),
            eos=mark(EOS),
            unk=mark(UNK),
            begin_image=mark(BEGIN_IMAGE),
            end_image=mark(END_IMAGE),
            end_turn=mark(END_TURN),
            image=ids[IMAGE] if IMAGE in ids else mark(IMAGE_IN_UNMODIFIED_FILE),
            image_codes=_code_range(codes, where),
            size=max(ids.values()) + 1,
            text_tokens=frozenset(ids.values()) - set(added.values()) - set(codes.values()),
        )

    def image_code_to_token(self, code: int) -> int:
        """Image code -> token id. Raises UserError for a code that does not exist."""
        if not 0 <= code < len(self.image_codes):
            raise UserError(f"image code {code} is out of range: 0 to {len(self.image_codes) - 1}")
        return self.image_codes[code]

    def token_to_image_code(self, token: int) -> int:
        """Token id -> image code. Raises UserError for an id that is no image code."""
        if token not in self.image_codes:
            raise UserError(f"token id {token} is no image code: {self.image_codes}")
        return token - self.image_codes.start

    def image_token_ids(self, codes: Iterable[int]) -> list[int]:
        """Codes of one picture in raster order -> begin mark, their ids, end mark."""
        codes = tuple(codes)
        if len(codes) < 2 or min(codes) < 0:  # rare, and told one by one
            return [self.begin_image, *map(self.image_code_to_token, codes), self.end_image]
        try:
            return [self.begin_image, *itemgetter(*codes)(self.image_codes), self.end_image]
        except IndexError:
            return [self.begin_image, *map(self.image_code_to_token, codes), self.end_image]


def _code_range(codes: dict[int, int], where: str) -> range:
    if not codes:
        raise VocabularyError(f"{where}: no image codes ({code_name(0)} and so on)")
    first = codes.get(0)
    for code in range(max(codes) + 1):
        if code not in codes:
            raise VocabularyError(
                f"{where}: a gap in the image codes, {code_name(code)} is missing"
            )
        if first is None or codes[code] != first + code:
            raise VocabularyError(
                f"{where}: {code_name(code)} has id {codes[code]}, expected {(first or 0) + code}: "
                "image codes must stand in one run"
            )
    assert first is not None
    return range(first, first + len(codes))


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise VocabularyError(f"{path}: no such tokenizer file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{path}: not JSON ({error})") from error


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer file opened twice: once where marks are parsed, once where they are text.

    `plain` knows no marks: what a person types is text and stays text. `marked` is the file
    as it is, in which `<reserved08706>` typed in a text becomes the mark (MedMax's way).
    """

    vocabulary: Vocabulary
    plain: Tokenizer
    words: CachedBPE
    parsed: dict[str, Any]  # the content of the file

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        parsed = _read_json(path)
        vocabulary = Vocabulary.from_json(parsed, str(path))
        # Without its list of added tokens the same model sees plain text only: the names of
        # the marks stay in its table, but no merge leads to them.
        bare = {**parsed, "added_tokens": []}
        plain = Tokenizer.from_str(json.dumps(bare))
        return cls(vocabulary, plain, CachedBPE(plain, bare), parsed)

    @cached_property
    def marked(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(self.parsed))

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest text piece, and so the most characters that a token can be."""
        names = self.parsed["model"]["vocab"].items()
        return max(len(name) for name, id_ in names if id_ in self.vocabulary.text_tokens)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, no marks parsed or added. Raises UserError for text that is no Unicode."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the text holds half of a character ({text[error.start]!a} at {error.start})"
                ) from error
        return self.words.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids of text pieces -> text; marks and codes among them are an error of the caller."""
        return self.plain.decode(ids, skip_special_tokens=False)
